"""The campaigns' own parts: they repeat themselves and find what they are made to find."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from campaigns import crash_states, fuzzing, mutations, same_run, syscall_layer, tensor_mutations
from campaigns.crash_states import Event
from campaigns.syscall_layer import Call
from campaigns.verdicts import SECRET, End, Tally, fault_of
from campaigns.workshop import Workshop

TRACEBACK = """Traceback (most recent call last):
  File "/x/pipeline/requant/cli/main.py", line 3, in main
    f()
  File "/x/eval/requant_eval/report/compare.py", line 9, in _run
    g()
  File "/x/lib/other.py", line 1, in h
ValueError: no"""


def end(code: int, text: str = "error: told") -> End:
    return End(code=code, text=text, seconds=0.1, peak=1)


# --- verdicts ---


@pytest.mark.parametrize(
    ("ended", "cause"),
    [
        (end(0, ""), ""),
        (end(2), ""),
        (end(1, TRACEBACK), "traceback requant_eval/report/compare.py:_run <- ValueError"),
        (end(2, ""), "speechless 2"),
        (end(70), "died 70"),
        (end(-11), "died -11"),
        (end(2, f"token {SECRET}"), "secret in the output"),
        (end(2, "error: \x1b[2J"), "control characters in the output"),
        (end(0, "\x1b[31mred\x1b[0m"), ""),
        (End(code=-9, text="", seconds=9, peak=1, stopped="hang"), "hang"),
    ],
)
def test_what_ended_well(ended: End, cause: str) -> None:
    assert fault_of(ended) == cause


def test_failures_of_one_cause_are_one_fault() -> None:
    tally = Tally("x")
    assert tally.add("kind", end(1, TRACEBACK), "a", repeat="first", label="")
    assert not tally.add("kind", end(1, TRACEBACK), "a", repeat="second", label="")
    assert not tally.add("kind", end(0), "", repeat="third", label="")
    assert [(f.count, f.first) for f in tally.faults.values()] == [(2, "first")]
    assert "3 trials, 2 failed, 1 root causes" in tally.summary()


# --- mutations ---


def test_mutations_are_drawn_from_their_seed_alone() -> None:
    document = {"a": [1, {"b": "c"}], "d": 0.5}
    tensors = tensor_mutations.join({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8)
    for seed in range(60):
        assert mutations.changed_json(document, Random(seed)) == mutations.changed_json(document, Random(seed))
        once, again = (tensor_mutations.changed_tensors(tensors, Random(seed)) for _ in range(2))
        assert once == again
    assert len({mutations.changed_json(document, Random(seed))[0] for seed in range(60)}) > 40
    assert document == {"a": [1, {"b": "c"}], "d": 0.5}


def test_every_kind_is_drawn_at_every_size() -> None:
    for size in (1, 100, 10_000):
        inputs = fuzzing.drawn(3, size)
        assert {kind for kind, _ in inputs} == fuzzing.MAKERS.keys()
        assert len(set(inputs)) == len(inputs)
    assert len(fuzzing.drawn(3, 10_000)) == pytest.approx(10_000, rel=0.01)
    assert fuzzing.drawn(3, 100) == fuzzing.drawn(3, 100) != fuzzing.drawn(4, 100)


# --- power losses ---


def event(kind: crash_states.Kind, node: int, **values: object) -> Event:
    return Event(kind=kind, node=node, **values)  # type: ignore[arg-type]


def states(*events: Event) -> set[tuple[tuple[str, bytes | None], ...]]:
    """Everything that 400 power losses after these events leave."""
    return {tuple(crash_states.state_after(events, Random(seed))[0].files()) for seed in range(400)}


WRITTEN = (event("make", 1, place=(0, "new")), event("write", 1, data=b"ab"))
SYNCED, NAMED = event("sync", 1), event("sync", 0)
MOVED = event("move", 1, place=(0, "old"), source=(0, "new"))


def test_unsynced_data_is_lost_cut_or_zeroed() -> None:
    assert states(*WRITTEN) == {(), (("new", b""),), (("new", b"ab"),), (("new", b"\0\0"),)}


def test_synced_data_stays_with_its_name() -> None:
    assert states(*WRITTEN, SYNCED) == {(("new", b"ab"),)}


def test_a_rename_is_certain_after_a_sync_of_the_directory() -> None:
    assert states(*WRITTEN, SYNCED, MOVED) == {(("new", b"ab"),), (("old", b"ab"),)}
    assert states(*WRITTEN, SYNCED, MOVED, NAMED) == {(("old", b"ab"),)}


def test_a_rename_may_come_before_the_data() -> None:
    assert (("old", b""),) in states(*WRITTEN, MOVED)


def test_calls_become_events(tmp_path: Path) -> None:
    record = crash_states.Record(tmp_path)

    def call(name: str, path: str, **values: object) -> None:
        record.see(Call(number=0, name=name, path=str(tmp_path / path), **values))  # type: ignore[arg-type]

    call("mkdir", "d")
    call("mkdir", "d")  # fails, and changes nothing
    call("openat", "d/a", offset=0o100)
    call("pwrite64", "d/a", data=b"xyz", offset=1)
    call("ftruncate", "d/a", size=2)
    call("rename", "e", other=str(tmp_path / "d"))
    call("unlink", "e/none")
    assert list(record.now.files()) == [("e", None), ("e/a", b"\0x")]
    record.now.write(tmp_path / "real")
    assert (tmp_path / "real" / "e" / "a").read_bytes() == b"\0x"


# --- the fork server and the layer: functions that its children run ---


def spin() -> None:
    while True:
        pass


def wait() -> None:
    """Nothing is done, but for a look at the clock as progress is told: no end of a command either."""
    while True:
        time.sleep(0.2)


def swallow() -> None:
    held = [bytearray(b"x") * 10**8 for _ in range(20)]
    spin()
    del held


def write(folder: str) -> None:
    for name in "abc":
        (Path(folder) / name).write_bytes(b"x" * 1000)


# One limit is what each function goes past; the other is out of its reach on any machine.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "cpu", "memory", "reason"),
    [(spin, 1.5, 10**12, "hang"), (wait, 600.0, 10**12, "hang"), (swallow, 600.0, 10**9, "memory")],
)
def test_limits_end_a_command(
    shop: Workshop, function: Callable[[], None], cpu: float, memory: int, reason: str
) -> None:
    running = shop.requant.start([f"{__name__}:{function.__name__}"])
    assert running.wait(cpu=cpu, memory=memory).stopped == reason


@pytest.mark.slow
@pytest.mark.skipif(not syscall_layer.usable(), reason="needs seccomp notifications (Linux 5.5, x86-64)")
def test_the_layer_refuses_and_kills(shop: Workshop) -> None:
    def run(name: str, decide: syscall_layer.Decide) -> End:
        runs = shop.fresh(name)
        layer = syscall_layer.Layer(runs, shop.folder / "layer", decide)
        ended = shop.requant.run([f"{__name__}:write", runs], layer=layer.address)
        layer.close()
        return ended

    full = run("full", syscall_layer.full_after(1500))
    assert full.code == 1
    assert "No space left on device" in full.text
    assert [f.stat().st_size for f in sorted((shop.cases / "full").iterdir())] == [1000, 0]
    assert run("killed", syscall_layer.kill_at(3)).code == -9
    assert [f.name for f in (shop.cases / "killed").iterdir()] == ["a"]


@pytest.mark.slow
def test_a_changed_run_is_another(shop: Workshop) -> None:
    run = shop.fresh("same") / "pico"
    run.symlink_to(shop.finished)
    assert same_run.difference(run, shop.finished) == ""
    changed = shutil.copytree(shop.finished, shop.fresh("changed") / "pico")
    report = json.loads((shop.finished / "report.json").read_text())
    report["sets"][0]["variants"][0]["tokens"] = 1
    (changed / "report.json").write_text(json.dumps(report))
    assert same_run.difference(changed, shop.finished).startswith("report differs: /sets/0/variants/0/tokens")


def test_sums_in_another_order_may_round_otherwise_and_not_worse(shop: Workshop) -> None:
    changed = shutil.copytree(shop.finished, shop.fresh("near") / "pico")
    file = next((changed / "gptq").glob("*.safetensors"))
    tensors = load_file(file)
    codes = next(t for n, t in sorted(tensors.items()) if n.endswith("qweight"))
    codes.view(torch.uint8).view(-1)[3] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert same_run.difference(changed, shop.finished).startswith("other bytes: gptq/")
    assert same_run.difference(changed, shop.finished, digits=1e-5) == ""
    report = json.loads((shop.finished / "report.json").read_text())
    means = report["sets"][0]["variants"]
    report["sets"][0]["edges"][0]["delta"]["low"] += 1.0
    (changed / "report.json").write_text(json.dumps(report))
    assert same_run.difference(changed, shop.finished, digits=1e-5) == ""
    means[0]["mean_nll"]["value"] *= 1.02
    (changed / "report.json").write_text(json.dumps(report))
    assert same_run.difference(changed, shop.finished, digits=1e-5).startswith("report differs: /sets/0/variants/0/")
    codes.add_(1)
    save_file(tensors, file, metadata={"format": "pt"})
    assert same_run.difference(changed, shop.finished, digits=1e-5).startswith("other bytes: gptq/")
