"""`requant.run.sweep`: whole runs, as `run` makes them, that share what they have in common."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.e2e import copied, digests, killed_sweep, one_thread, run, times, visible, write_recipe

from requant import merge
from requant.deploy import verify
from requant.errors import InputError
from requant.modeling import skeleton
from requant.run import observer, shared_inputs
from requant.run.sweep import SweepResult, sweep

pytestmark = pytest.mark.slow
BITS: dict[str, list[Any]] = {"quantize.bits": [3, 4]}
VARIANTS = {
    "evaluate.variants": ["base", "adapter", "merged", "gptq"], "evaluate.sets.0.tokens": 100,
    "evaluate.sets.1.tokens": 100,
}  # fmt: skip
MEASURED = ("seconds", "peak_rss", "created", "recipe")


class Recorder(observer.Watcher):
    """What the runs of a sweep did: stages that were not up to date, variants that were scored."""

    def __init__(self) -> None:
        self.worked: list[str] = []
        self.notes: list[str] = []

    def stage(self, name: str, *, done: bool) -> None:
        self.worked += [] if done else [name]

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.notes += [note] if note.startswith("loading") else []


def swept(project: Path, out: Path, settings: dict[str, list[Any]], **changes: Any) -> list[SweepResult]:
    watcher = changes.pop("watcher", None)
    with one_thread():
        return sweep(written(project, out, changes), settings, watcher=watcher)


def ran(result: SweepResult) -> list[str]:
    """The stages of a run that did not fail."""
    assert result.error is None
    assert result.outcome is not None
    return result.outcome.ran


def written(project: Path, out: Path, changes: dict[str, Any]) -> Path:
    """A recipe beside the project's files, its runs in `out`."""
    mine = out / "project"
    if not mine.exists():
        copied(project, mine)
    return write_recipe(mine, {"output.dir": str(out / "runs"), **VARIANTS, **changes})


def timeless(value: Any) -> Any:
    """A report without what differs between two runs of the same recipe."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in MEASURED}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def report(run: Path) -> Any:
    return timeless(json.loads((run / "report.json").read_text()))


@pytest.fixture(scope="module")
def done(project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder, dict[str, int]]:
    """(directory of the runs of a sweep, what its runs did, calls of what is to be shared); tests only read it."""
    out, watcher, counts = tmp_path_factory.mktemp("sweep"), Recorder(), dict.fromkeys(("tokenize", "merge", "open"), 0)

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_inputs, "tokenize", counted("tokenize", shared_inputs.tokenize))
        patch.setattr(merge, "merge", counted("merge", merge.merge))
        patch.setattr("requant.run.prepare.skeleton.open_model", counted("open", skeleton.open_model))
        results = swept(project, out, {"quantize.bits": [3, 4], "quantize.group_size": [32, 64]}, watcher=watcher)
    assert [result.error for result in results] == [None] * 4
    return out / "runs", watcher, counts


def test_what_runs_have_in_common_is_made_once(done: tuple[Path, Recorder, dict[str, int]]) -> None:
    _, watcher, counts = done
    assert counts["tokenize"] == 3, "each source once"
    assert counts["merge"] == 1
    assert watcher.worked == ["merge", "probe", *4 * ["quantize", "evaluate", "report"]]
    scored = ["loading adapter", "loading base", "loading merged", "loading gptq"]
    assert watcher.notes == [*scored, *3 * ["loading gptq"]]


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (4, 64)])
def test_each_is_the_run_of_its_recipe(
    project: Path, tmp_path: Path, done: tuple[Path, Recorder, dict[str, int]], bits: int, group_size: int
) -> None:
    """The same bytes and the same digits as of a run alone, and nothing left to do for it."""
    name = f"pico-bits{bits}-group_size{group_size}"
    changes = {"quantize.bits": bits, "quantize.group_size": group_size, "name": name, **VARIANTS}
    run(project, tmp_path, changes)
    alone, mine = tmp_path / name, done[0] / name
    assert visible(mine) == visible(alone)
    for artifact in ("merged", "gptq"):
        assert {**digests(mine / artifact), "README.md": ""} == {**digests(alone / artifact), "README.md": ""}
    assert report(mine) == report(alone)
    assert {f.name for f in (mine / ".cache").iterdir()} == {f.name for f in (alone / ".cache").iterdir()}
    before = times(mine)
    assert run(project, done[0], changes).ran == []
    assert times(mine) == before
    assert verify(mine / "gptq", source=mine / "merged").ok


def test_a_later_run_or_sweep_finds_the_tokens(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(project, tmp_path, BITS)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a text is tokenized again")

    monkeypatch.setattr(shared_inputs, "tokenize", never)
    again = swept(project, tmp_path, BITS)
    assert [*map(ran, again)] == [[], []]
    assert run(tmp_path / "project", tmp_path / "runs", {"name": "pico-bits4", **VARIANTS}).ran == []


def test_weights_are_on_the_disk_once(done: tuple[Path, Recorder, dict[str, int]]) -> None:
    files = list(done[0].glob("*/merged/model.safetensors"))
    assert len(files) == 4
    assert len({file.stat().st_ino for file in files}) == 1
    configs = list(done[0].glob("*/merged/config.json"))
    assert len({file.stat().st_ino for file in configs}) == 4, "what may be edited is each run's own"


def test_a_run_lives_on_without_the_others(project: Path, tmp_path: Path) -> None:
    first, second = swept(project, tmp_path, BITS)
    assert ran(first)
    assert ran(second)
    before = digests(second.combination.path / "merged")
    shutil.rmtree(first.combination.path)
    assert digests(second.combination.path / "merged") == before
    assert run(project, tmp_path / "runs", {"name": "pico-bits4", **VARIANTS}).ran == []


def test_scores_of_the_base_are_shared_where_the_merge_is_not(project: Path, tmp_path: Path) -> None:
    watcher = Recorder()
    swept(project, tmp_path, {"merge.dtype": ["float32", "bfloat16"]}, watcher=watcher)
    assert watcher.worked == ["merge", "probe", "quantize", "evaluate", "report",
                              "merge", "quantize", "evaluate", "report"]  # fmt: skip
    assert watcher.notes[4:] == ["loading merged", "loading gptq"]
    files = {f.stat().st_ino for f in (tmp_path / "runs").glob("*/merged/model.safetensors")}
    assert len(files) == 2


def test_the_quantized_weights_are_shared_where_only_healing_differs(project: Path, tmp_path: Path) -> None:
    watcher = Recorder()
    healing = [{"steps": steps, "batch": 2, "length": 64} for steps in (2, 3)]
    first, second = swept(project, tmp_path, {"heal": healing}, watcher=watcher)
    assert ran(first) == ["merge", "quantize", "heal", "evaluate", "report"]
    assert ran(second) == ["heal", "evaluate", "report"]
    assert watcher.notes[-2:] == ["loading healed", "loading healed"], "scores of gptq are taken over"
    one, other = (result.combination.path for result in (first, second))
    assert (one / "gptq" / "model.safetensors").samefile(other / "gptq" / "model.safetensors")
    assert not (one / "healed" / "model.safetensors").samefile(other / "healed" / "model.safetensors")


def test_what_is_not_kept_is_removed_at_the_end(project: Path, tmp_path: Path) -> None:
    watcher = Recorder()
    changes = {"output.keep": ["gptq"]}
    swept(project, tmp_path, BITS, watcher=watcher, **changes)
    assert watcher.worked.count("merge") == 1
    assert not list((tmp_path / "runs").glob("*/merged"))
    again = swept(project, tmp_path, BITS, **changes)
    assert [*map(ran, again)] == [[], []]


def test_a_killed_sweep_goes_on(project: Path, tmp_path: Path) -> None:
    file = written(project, tmp_path, {})
    assert killed_sweep(file, BITS, "quantize:1", 2) == -signal.SIGKILL
    assert (tmp_path / "runs" / "pico-bits3" / "report.json").exists()
    assert not (tmp_path / "runs" / "pico-bits4" / "report.json").exists()
    watcher = Recorder()
    first, second = swept(project, tmp_path, BITS, watcher=watcher)
    assert ran(first) == []
    assert ran(second) == ["quantize", "evaluate", "report"]
    assert watcher.notes == ["loading gptq"]
    alone = run(project, tmp_path / "alone", {"quantize.bits": 4, "name": "pico-bits4", **VARIANTS})
    assert digests(second.combination.path / "gptq", "*.safetensors") == digests(alone.path / "gptq", "*.safetensors")
    assert report(second.combination.path) == report(alone.path)


def test_one_that_fails_does_not_end_the_others(project: Path, tmp_path: Path) -> None:
    """Another process works in the first directory: that one fails, the second is a whole run."""
    taken = tmp_path / "runs" / "pico-bits3"
    taken.mkdir(parents=True)
    (taken / ".requant.json").write_text('{"made_by": "requant", "layout": 1}\n')
    with (taken / ".requant.json").open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        first, second = swept(project, tmp_path, BITS)
    assert isinstance(first.error, InputError)
    assert "another requant is running here" in str(first.error)
    assert ran(second) == ["merge", "quantize", "evaluate", "report"]
    watcher = Recorder()
    first, second = swept(project, tmp_path, BITS, watcher=watcher)
    assert ran(first) == ["quantize", "evaluate", "report"], "merged by the second"
    assert watcher.notes == ["loading gptq"]


def test_a_run_that_another_process_works_in_at_the_end_is_left_as_it_is(project: Path, tmp_path: Path) -> None:
    """Another process takes the first run while the second is made: both results are told, and why merged/ stays."""
    taken = tmp_path / "runs" / "pico-bits3" / ".requant.json"

    class Taking(Recorder):
        handle: Any = None
        warnings: tuple[str, ...] = ()

        def stage(self, name: str, *, done: bool) -> None:
            super().stage(name, done=done)
            if self.worked.count("quantize") == 2 and self.handle is None:
                self.handle = taken.open()
                fcntl.flock(self.handle, fcntl.LOCK_EX)

        def warn(self, text: str) -> None:
            self.warnings += (text,)

    watcher = Taking()
    first, second = swept(project, tmp_path, BITS, watcher=watcher, **{"output.keep": ["gptq"]})
    watcher.handle.close()
    assert ran(first) == ["merge", "quantize", "evaluate", "report"]
    assert ran(second) == ["quantize", "evaluate", "report"]
    (told,) = (text for text in watcher.warnings if "output.keep" in text)
    assert "pico-bits3: another requant is running here" in told
    assert [run.parent.name for run in (tmp_path / "runs").glob("*/merged")] == ["pico-bits3"]


def test_a_combination_that_check_refuses_ends_it_before_any_work(project: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        swept(project, tmp_path, {"quantize.group_size": [32, 128], **BITS})
    said = str(error.value).splitlines()
    both = [f"pico-group_size128-bits{bits} (quantize.group_size=128, quantize.bits={bits})" for bits in (3, 4)]
    assert said[0].startswith(" and ".join(both) + ": ")
    assert "nothing was run" in said[-1]
    assert not (tmp_path / "runs").exists()


def test_what_all_combinations_lack_is_said_once(project: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        swept(project, tmp_path, BITS, **{"calibration.samples": 65536})
    said = str(error.value)
    assert said.count("train.jsonl has") == 1
    assert "pico-bits" not in said


def test_a_directory_of_somebody_else_is_refused_before_any_work(project: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "runs" / "pico-bits4"
    theirs.mkdir(parents=True)
    (theirs / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"pico-bits4 \(quantize.bits=4\): .* was not made by requant"):
        swept(project, tmp_path, BITS)
    assert visible(tmp_path / "runs") == {"pico-bits4"}


def test_merged_weights_that_changed_are_not_taken(project: Path, tmp_path: Path) -> None:
    """One bit of the first run's weights at the same size and time: both runs hold what was merged, not that."""
    first, second = swept(project, tmp_path, BITS)
    assert ran(first)
    assert ran(second)
    whole = digests(first.combination.path / "gptq", "*.safetensors")
    shutil.rmtree(second.combination.path)
    file = first.combination.path / "merged" / "model.safetensors"
    before, content = file.stat(), bytearray(file.read_bytes())
    merged = digests(file.parent, "*.safetensors")
    content[-100] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    first, second = swept(project, tmp_path, BITS)
    assert ran(first) == ["merge", "report"]
    assert ran(second) == ["quantize", "evaluate", "report"]
    for result in (first, second):
        assert digests(result.combination.path / "merged", "*.safetensors") == merged
    assert digests(first.combination.path / "gptq", "*.safetensors") == whole
