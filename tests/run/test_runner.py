"""`requant.run.runner`: files of a run, what is not done again, resuming after any kill."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.e2e import ALL, copied, digests, edit_json, killed_run, recipe, run, times, visible

from requant import __version__
from requant import recipe as recipes
from requant.checkpoint import atomic_write
from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.run_directory import RunDirectory, key_of, sealed
from requant.errors import InputError, RequantError, StageError
from requant.evaluate import variants
from requant.run import observer, prepare, probe, report_stage, runner
from requant.run.context import RunContext

WEIGHTS = "*.safetensors"
STAGES = ["merge", "quantize", "evaluate", "report"]  # of a run on a CPU, where nothing is healed
HELD = {"recipe.yaml", "merged", "gptq", "report.json", "report.md", "report.html", "log.txt", "events.jsonl"}


class Recorder(observer.Watcher):
    """Remembers what a run reported."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, bool]] = []
        self.steps: list[tuple[str, int, int, str]] = []
        self.done: list[str] = []

    def stage(self, name: str, *, done: bool) -> None:
        self.stages.append((name, done))

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.steps.append((self.stages[-1][0], done, total, note))

    def doing(self, text: str) -> None:
        self.done.append(text)

    def scored(self) -> set[tuple[str, str]]:
        """(variant, set) pairs that were scored."""
        notes = {note for stage, _, _, note in self.steps if " on " in note}
        return {(variant, name) for variant, name in (note.split(" on ") for note in notes)}


def pairs(*variants: str, sets: tuple[str, ...] = ("in-domain", "general")) -> set[tuple[str, str]]:
    return {(v, s) for v in variants for s in sets}


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def edge(report: dict[str, Any], start: str, end: str, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = next(e for e in report["sets"][number]["edges"] if (e["from"], e["to"]) == (start, end))
    return found


def numbers(report: dict[str, Any]) -> list[Any]:
    """What must not depend on when or how often a run was started."""
    return [{k: v for k, v in s.items() if k != "variants"} for s in report["sets"]]


# --- what a run leaves ---


def test_a_run_directory_holds_what_the_manual_says(finished: Path, project: Path) -> None:
    assert visible(finished) == HELD
    assert {"README.md", "config.json", "quantize_config.json", "manifest.json"} <= visible(finished / "gptq")
    assert not [f for f in finished.rglob("*") if "partial" in f.name or ".tmp" in f.name or ".old" in f.name]
    for artifact in ("merged", "gptq"):
        assert digests(finished / artifact, "tokenizer*") == digests(project / "base", "tokenizer*")
        manifest = read(finished / artifact / "manifest.json")
        assert set(manifest["files"]) == visible(finished / artifact) - {"manifest.json", "README.md"}
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    expected = [(kind, stage) for stage in STAGES for kind in ("start", "done")]
    assert [(e["event"], e["stage"]) for e in events] == expected
    assert all(f"{stage}: done" in (finished / "log.txt").read_text() for stage in STAGES)
    assert "a few rows, recomputed in fp64" in (finished / "log.txt").read_text()


def test_the_merged_model_is_the_adapter(finished: Path) -> None:
    report = read(finished / "report.json")
    for number in range(2):
        merged = edge(report, "adapter", "merged", number)
        assert abs(merged["delta"]["value"]) < 1e-4
        undecided = 2 / report["sets"][number]["n_scored"]  # tokens whose two best logits are the same but for rounding
        assert merged["agreement"]["value"] >= 1 - undecided
    assert edge(report, "base", "adapter")["delta"]["value"] < -0.3, "the pico adapter learned something"
    assert report["facts"]["merge"]["dtype"] == "float32"
    assert report["facts"]["merge"]["ledger"]["adapter"] == {"consumed": 28, "folds": 14, "replaced": 0}


def test_the_report_agrees_with_itself(finished: Path) -> None:
    report = read(finished / "report.json")
    for number, s in enumerate(report["sets"]):
        variants = {v["name"]: v for v in s["variants"]}
        assert set(variants) == set(ALL)
        for name, v in variants.items():
            sums = s["documents"][name]
            assert v["mean_nll"]["value"] == pytest.approx(math.fsum(sums["nll"]) / sum(sums["n"]), rel=1e-12)
            assert v["ppl"]["value"] == pytest.approx(math.exp(v["mean_nll"]["value"]), rel=1e-12)
            assert v["n"] == sum(sums["n"]) == s["n_scored"]
        for e in s["edges"]:
            difference = variants[e["to"]]["mean_nll"]["value"] - variants[e["from"]]["mean_nll"]["value"]
            assert e["delta"]["value"] == pytest.approx(difference, abs=1e-9)
        whole = edge(report, "adapter", "merged", number), edge(report, "merged", "gptq", number)
        total = edge(report, "adapter", "gptq", number)["delta"]["value"]
        assert sum(e["delta"]["value"] for e in whole) == pytest.approx(total, abs=1e-9)
    gain, loss = (edge(report, *ends)["delta"]["value"] for ends in (("base", "adapter"), ("adapter", "gptq")))
    assert report["sets"][0]["retention"]["gptq"]["value"] == pytest.approx(1 + loss / gain, rel=1e-9)


def test_the_report_agrees_with_the_files(finished: Path) -> None:
    facts = read(finished / "report.json")["facts"]
    for name in ("merged", "gptq"):
        assert facts["cost"]["bytes"][name] == sum(f.stat().st_size for f in (finished / name).glob(WEIGHTS))
    gptq = Checkpoint(finished / "gptq")
    packed = [n for n in gptq if n.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    weights = sum(8 * gptq[n].shape[0] * gptq[n].shape[1] for n in packed if n.endswith(".qweight"))
    assert facts["quantize"]["bits_per_weight"] == pytest.approx(8 * sum(gptq[n].nbytes for n in packed) / weights)
    modules = facts["quantize"]["modules"]
    assert {m["name"] for m in modules} == {n.removesuffix(".qweight") for n in packed if n.endswith(".qweight")}
    assert sum(m["relative_error"] for m in modules) < sum(m["rtn_error"] for m in modules)
    runtimes = facts["evaluation"]["runtimes"]
    assert runtimes["adapter"] == "bitsandbytes and PEFT, unmerged, computed in float32"
    assert runtimes["merged"] == "torch, computed in float32", "stored in float32"
    assert runtimes["gptq"] == "torch, computed in float32, ships in bfloat16"
    assert set(facts["evaluation"]["runtimes"]) == set(ALL)
    assert facts["cost"]["seconds"].keys() == facts["cost"]["peak_rss"].keys() == {"merge", "quantize", "evaluate"}


def test_every_rendering_shows_the_same_perplexity_and_no_local_path(finished: Path, project: Path) -> None:
    report = read(finished / "report.json")
    shown = f"{next(v for v in report['sets'][0]['variants'] if v['name'] == 'gptq')['ppl']['value']:.1f}"
    for file in ("report.md", "report.html", "gptq/README.md"):
        text = (finished / file).read_text()
        assert shown in text
        assert str(project) not in text
    assert str(project) not in (finished / "report.json").read_text()


@pytest.mark.slow
def test_a_small_model_of_the_probe_is_scored_too(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded once, where it may stay; the numbers are those of a model loaded again."""
    loaded: list[str] = []

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        loaded.append(name)
        return load_variant(name, *arguments, **options)

    load_variant = variants.load
    monkeypatch.setattr(variants, "load", load)
    changes = {"evaluate.variants": ["base", "adapter", "merged"]}
    found, loads = [], list[int]()
    for share in (probe.KEPT, 0.0):
        monkeypatch.setattr(probe, "KEPT", share)
        found.append(run(project, tmp_path / str(share), changes).report)
        loads.append(loaded.count("adapter") - sum(loads))
    assert loads == [1, 2]
    assert [s["documents"] for s in found[0]["sets"]] == [s["documents"] for s in found[1]["sets"]]


@pytest.mark.slow
def test_progress_counts_up_to_its_total(project: Path, tmp_path: Path) -> None:
    watcher = Recorder()
    run(project, tmp_path, {"evaluate.variants": ["adapter", "merged"]}, watcher=watcher)
    worked = [stage for stage, done in watcher.stages if not done]
    assert worked == ["merge", "probe", *STAGES[1:]]
    for stage in ("merge", "quantize", "evaluate"):
        steps = [(done, total) for name, done, total, _ in watcher.steps if name == stage]
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert {total for _, total in steps} == {steps[-1][0]}
    assert watcher.scored() == pairs("adapter", "merged")
    for said in ("headers of", "tokens of the evaluation set general", "digests of", "rows of its own text", "first block",
                 "values of 14 linears, each against its source", "perplexity and a few tokens"):  # fmt: skip
        assert any(said in text for text in watcher.done), said
    assert {note for *_, note in watcher.steps if note.startswith("loading")} == {"loading adapter", "loading merged"}


@pytest.mark.slow
def test_stages_alone(project: Path, tmp_path: Path, finished: Path) -> None:
    assert run(project, tmp_path, until="merge").ran == ["merge"]
    assert visible(tmp_path / "pico") == {"merged", "recipe.yaml", "log.txt", "events.jsonl"}
    assert digests(tmp_path / "pico" / "merged", WEIGHTS) == digests(finished / "merged", WEIGHTS)
    assert run(project, tmp_path, until="quantize").ran == ["quantize"]
    assert visible(tmp_path / "pico") == {"merged", "gptq", "recipe.yaml", "log.txt", "events.jsonl"}
    assert digests(tmp_path / "pico" / "gptq", WEIGHTS) == digests(finished / "gptq", WEIGHTS)


# --- what is not done again ---


def test_a_second_run_does_nothing(project: Path, ran: Path) -> None:
    before, watcher = times(ran / "pico"), Recorder()
    outcome = run(project, ran, watcher=watcher)
    assert outcome.ran == []
    assert times(ran / "pico") == before
    assert outcome.report == read(ran / "pico" / "report.json")
    assert watcher.stages == [(stage, True) for stage in STAGES], "each stage is announced once"


def test_the_resolved_recipe_is_the_recipe(project: Path, ran: Path) -> None:
    saved = ran / "pico" / "recipe.yaml"
    run(project, ran, until="merge")  # written anew, as seen from this directory
    loaded, before = recipes.load(saved), times(ran / "pico")
    original = recipes.load(project / "recipe.yaml")
    assert loaded.base.source.resolve(loaded.directory) == original.base.source.resolve(original.directory)
    assert loaded.adapter.resolve(loaded.directory) == original.adapter.resolve(original.directory)
    for section in ("merge", "quantize"):
        assert getattr(loaded, section) == getattr(original, section)
    assert recipes.dump(loaded, ran / "pico") == saved.read_text()
    assert "damp: auto" in saved.read_text(), "every default is written out"
    assert runner.run(loaded).ran == []
    assert times(ran / "pico") == before


@pytest.mark.slow
def test_other_bits_redo_quantize_and_what_depends_on_it(project: Path, ran: Path) -> None:
    out, watcher = ran / "pico", Recorder()
    before, merged = times(out / ".cache"), times(out / "merged")
    weights = digests(out / "gptq", WEIGHTS)
    assert run(project, ran, {"quantize.bits": 3}, watcher=watcher).ran == ["quantize", "evaluate", "report"]
    assert watcher.scored() == pairs("rtn", "gptq")
    assert times(out / "merged") == merged
    assert before.items() <= times(out / ".cache").items()
    assert digests(out / "gptq", WEIGHTS) != weights
    assert read(out / "gptq" / "config.json")["quantization_config"]["bits"] == 3
    watcher = Recorder()
    assert run(project, ran, watcher=watcher).ran == ["quantize", "report"], "its scores are still there"
    assert digests(out / "gptq", WEIGHTS) == weights


@pytest.mark.slow
def test_other_tokens_redo_the_scores_of_that_set(project: Path, ran: Path) -> None:
    out, watcher = ran / "pico", Recorder()
    artifacts = times(out / "merged") | times(out / "gptq", but=("README.md",))
    outcome = run(project, ran, {"evaluate.sets.0.tokens": 300}, watcher=watcher)
    assert outcome.ran == ["evaluate", "report"]
    assert watcher.scored() == pairs(*ALL, sets=("in-domain",))
    assert times(out / "merged") | times(out / "gptq", but=("README.md",)) == artifacts
    assert 300 <= outcome.report["sets"][0]["n_scored"] < 332
    assert outcome.report == read(out / "report.json")


@pytest.mark.slow
def test_another_merge_redoes_everything_after_it(project: Path, ran: Path) -> None:
    watcher = Recorder()
    outcome = run(project, ran, {"merge.dtype": "bfloat16"}, watcher=watcher)
    assert outcome.ran == STAGES
    assert watcher.scored() == pairs("merged", "rtn", "gptq")
    assert abs(edge(outcome.report, "adapter", "merged")["delta"]["value"]) > 1e-5, "bfloat16 rounds"


@pytest.mark.slow
def test_another_adapter_redoes_all_but_the_base(project: Path, ran: Path, tmp_path: Path) -> None:
    other, watcher = copied(project, tmp_path / "other", "adapter"), Recorder()
    edit_json(other / "adapter" / "adapter_config.json", lora_alpha=16)
    outcome = run(
        other, ran, {"evaluate.variants": ["base", "adapter", "merged"], "evaluate.kl": False}, watcher=watcher
    )
    assert outcome.ran == STAGES
    assert watcher.scored() == pairs("base", "adapter", "merged")
    assert abs(edge(outcome.report, "adapter", "merged")["delta"]["value"]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["report.md", "report.html", "report.json", "gptq/README.md"])
def test_a_lost_report_is_written_again(project: Path, ran: Path, lost: str) -> None:
    (ran / "pico" / lost).unlink()
    assert run(project, ran).ran == ["report"]
    assert (ran / "pico" / lost).exists()


@pytest.mark.slow
def test_a_cut_checkpoint_is_made_again(project: Path, ran: Path, finished: Path) -> None:
    weights = ran / "pico" / "gptq" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run(project, ran).ran == ["quantize", "report"]
    assert digests(weights.parent, WEIGHTS) == digests(finished / "gptq", WEIGHTS)


def test_in_domain_is_the_set_that_the_recipe_names(project: Path, ran: Path) -> None:
    report = run(project, ran, {"evaluate.in_domain": "general"}).report
    assert [s["in_domain"] for s in report["sets"]] == [False, True]
    assert set(report["sets"][1]["retention"]) == {"merged", "original", "rtn", "gptq"}


@pytest.mark.slow
def test_in_domain_is_the_first_set_by_default(project: Path, ran: Path) -> None:
    changes = {"evaluate.sets.0.name": "general", "evaluate.sets.1.name": "in-domain"}
    report = run(project, ran, changes | {"evaluate.variants": ["adapter"]}).report
    assert [s["in_domain"] for s in report["sets"]] == [True, False], "as the recipe's schema and `init` say"


def test_other_gates_redo_only_the_report(project: Path, ran: Path) -> None:
    out = ran / "pico"
    before = {k: v for k, v in times(out).items() if "report" not in k and k not in ("gptq/README.md", ".stages.json")}
    strict = {"gates": [{"metric": "ppl_increase", "set": "in-domain", "max": "-90%"}]}
    outcome = run(project, ran, strict)
    assert outcome.ran == ["report"]
    assert outcome.report == read(out / "report.json")
    assert (outcome.report["verdict"]["status"], outcome.report["gates"][0]["limit"]) == ("fail", -90)
    assert (
        (out / "report.md")
        .read_text()
        .startswith("FAIL: GPTQ 4-bit g32 breaks its gate: perplexity increase on in-domain")
    )
    assert before.items() <= times(out).items(), "no checkpoint and no score was touched"
    assert run(project, ran, strict).ran == []
    assert run(project, ran).ran == ["report"]
    assert read(out / "report.json")["verdict"]["status"] == "none"


def test_the_key_of_a_report_is_that_of_older_versions(project: Path, finished: Path) -> None:
    """Gates are in the key as in the report: an older version's run stays up to date."""
    gates = {"gates": [{"metric": "ppl_increase", "set": "general", "max": "5%"}]}
    prepared = prepare.prepare(recipe(project, finished.parent, gates))
    context = RunContext.of(prepared, RunDirectory(finished), observer.Watcher())
    keys = (context.keys.merge, context.keys.quantize, context.keys.heal, context.scores.key)
    gate = {
        "metric": "ppl_increase", "set": "general", "limit": 5.0, "relative_to": None, "side": "max", "unit": "%",
    }  # fmt: skip
    assert report_stage.report_key(context) == key_of(*keys, "in-domain", [gate], [], False, 2, __version__, {})


def test_a_run_that_was_renamed_gets_a_report_with_its_name(project: Path, ran: Path) -> None:
    """Its directory too, as `name` asks: nothing else is done again, and no file but the report's tells the old name."""
    (ran / "pico").rename(ran / "other")
    assert run(project, ran, {"name": "other"}).ran == ["report"]
    assert read(ran / "other" / "report.json")["name"] == "other"
    assert run(project, ran, {"name": "other"}).ran == []


@pytest.mark.parametrize("name", ["gptq/model.safetensors", ".cache/gptq-*.safetensors", "report.json"])
def test_what_changed_on_the_disk_is_made_again(project: Path, ran: Path, name: str) -> None:
    """One bit of a checkpoint or of scores at the same size and time; a cut report."""
    mine = numbers(read(ran / "pico" / "report.json"))
    file = next((ran / "pico").glob(name))
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content if file.suffix == ".safetensors" else content[:-100])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = run(project, ran)
    expected = {"gptq": ["quantize", "report"], ".cache": ["evaluate", "report"], "report.json": ["report"]}
    assert again.ran == expected[name.split("/")[0]]
    assert numbers(read(ran / "pico" / "report.json")) == mine


def test_the_ways_to_deploy_have_the_sizes_of_the_files(finished: Path, project: Path) -> None:
    report = read(finished / "report.json")
    sizes = {o["name"]: o["bytes"] for o in report["recommendation"]["options"]}
    files = {p: sum(f.stat().st_size for f in p.glob(WEIGHTS)) for p in (finished / "gptq", finished / "merged")}
    apart = sum(f.stat().st_size for part in ("base", "adapter") for f in (project / part).glob(WEIGHTS))
    assert [sizes["requantized"], sizes["merged"], sizes["separate"]] == [*files.values(), apart]


# --- keeping only the product ---


def test_the_merged_model_is_not_kept_and_not_missed(project: Path, ran: Path) -> None:
    keep = {"output.keep": ["gptq"]}
    assert run(project, ran, keep).ran == []
    assert not (ran / "pico" / "merged").exists()
    before = times(ran / "pico")
    assert run(project, ran, keep).ran == []
    assert times(ran / "pico") == before


@pytest.mark.slow
@pytest.mark.parametrize("variants", [["adapter", "gptq"], ["adapter", "base"], ["adapter", "rtn"]])
def test_more_scores_without_the_merged_model(project: Path, ran: Path, variants: list[str]) -> None:
    keep = {"output.keep": ["gptq"], "evaluate.variants": variants}
    run(project, ran, keep)
    outcome = run(project, ran, keep | {"evaluate.sets.0.tokens": 200})
    assert [v["name"] for v in outcome.report["sets"][0]["variants"]] == variants
    assert not (ran / "pico" / "merged").exists()
    assert ("merge" in outcome.ran) == ("rtn" in variants), "the 16-bit model is made only when it is needed"


# --- killed ---

SMALL = {"evaluate.variants": ["adapter", "gptq"], "evaluate.sets.0.tokens": 100, "evaluate.sets.1.tokens": 100}


def whole_or_absent(out: Path, finished: Path) -> None:
    """Whatever has its final name is complete."""
    for name in ("merged", "gptq"):
        if (out / name).exists():
            assert (out / name / "manifest.json").exists()
            assert digests(out / name, WEIGHTS) == digests(finished / name, WEIGHTS)
    named = {name for name in visible(out) if not name.endswith(".tmp")}
    assert named <= HELD


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "left"),
    [
        ("merge:0", ["merge", "quantize", "evaluate", "report"]),
        ("merge:11", ["merge", "quantize", "evaluate", "report"]),
        ("quantize:1", ["quantize", "evaluate", "report"]),
        ("quantize:2", ["quantize", "evaluate", "report"]),
        ("evaluate:4", ["evaluate", "report"]),
        ("report:0", ["report"]),
    ],
)
def test_a_killed_run_goes_on(project: Path, tmp_path: Path, finished: Path, when: str, left: list[str]) -> None:
    assert killed_run(project, tmp_path, when, SMALL) == -signal.SIGKILL
    out = tmp_path / "pico"
    whole_or_absent(out, finished)
    assert "report.json" not in visible(out)
    watcher = Recorder()
    assert run(project, tmp_path, SMALL, watcher=watcher).ran == left
    whole_or_absent(out, finished)
    assert {"merged", "gptq", "report.json", "report.md", "report.html"} <= visible(out)
    assert not [f for f in out.iterdir() if "partial" in f.name]
    assert run(project, tmp_path, SMALL).ran == []


@pytest.mark.slow
def test_a_run_killed_again_and_again_gets_there(project: Path, tmp_path: Path, finished: Path) -> None:
    """The run is killed before one rename after another, and resumed."""
    out, deaths = tmp_path / "pico", 0
    for n in range(2, 100, 3):
        code = killed_run(project, tmp_path, f"rename:{n}", SMALL)
        whole_or_absent(out, finished)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        deaths += 1
    assert deaths >= 4
    assert digests(out / "gptq", WEIGHTS) == digests(finished / "gptq", WEIGHTS)
    assert not [f for f in out.rglob("*") if "partial" in f.name or ".old" in f.name or f.name.endswith(".tmp")]
    assert run(project, tmp_path, SMALL).ran == []


@pytest.mark.slow
def test_a_block_finished_before_the_kill_is_not_solved_again(
    project: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from requant.quantize.block_quantizer import Quantizer

    solved: list[int] = []
    block = Quantizer.block

    def counted(self: Quantizer, index: int, items: Any) -> None:
        solved.append(index)
        block(self, index, items)

    monkeypatch.setattr(Quantizer, "block", counted)
    assert killed_run(project, tmp_path, "quantize:1", SMALL) == -signal.SIGKILL
    run(project, tmp_path, SMALL, until="quantize")
    assert solved == [1]
    assert digests(tmp_path / "pico" / "gptq", WEIGHTS) == digests(finished / "gptq", WEIGHTS)


@pytest.mark.slow
def test_a_half_written_report_of_other_settings_is_not_taken_for_ours(
    project: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = numbers(read(ran / "pico" / "report.json"))
    write = atomic_write.write_text

    def broken(file: Path, text: str) -> None:
        if file.name == "report.md":
            raise StageError("killed between report.json and report.md")
        write(file, text)

    monkeypatch.setattr(report_stage, "write_text", broken)
    with pytest.raises(StageError):
        run(project, ran, {"evaluate.sets.0.tokens": 300})
    monkeypatch.undo()
    assert numbers(run(project, ran).report) == mine
    assert numbers(read(ran / "pico" / "report.json")) == mine


def test_a_report_that_was_being_written_is_written_again(project: Path, ran: Path) -> None:
    """The key that a killed run leaves."""
    file = ran / "pico" / ".stages.json"
    edit_json(file, report=sealed({"key": "being written", "result": {}}))
    assert run(project, ran).ran == ["report"]
    assert run(project, ran).ran == []


@pytest.mark.slow
def test_a_failing_stage_keeps_what_is_finished(
    project: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise StageError("no luck")

    monkeypatch.setattr("requant.quantize.quantize", fails)
    with pytest.raises(StageError, match="no luck"):
        run(project, tmp_path, SMALL)
    assert visible(tmp_path / "pico") == {"merged", "recipe.yaml", "log.txt", "events.jsonl"}
    assert "stopped: no luck" in (tmp_path / "pico" / "log.txt").read_text()
    monkeypatch.undo()
    assert run(project, tmp_path, SMALL, until="quantize").ran == ["quantize"]
    assert digests(tmp_path / "pico" / "gptq", WEIGHTS) == digests(finished / "gptq", WEIGHTS)


# --- other people's directories ---


def test_a_foreign_directory_is_refused_and_untouched(project: Path, tmp_path: Path) -> None:
    (tmp_path / "pico").mkdir()
    (tmp_path / "pico" / "thesis.tex").write_text("mine")
    before = times(tmp_path, but=())
    with pytest.raises(InputError, match=r"pico: exists and was not made by requant"):
        run(project, tmp_path)
    assert times(tmp_path, but=()) == before
    assert [f.name for f in (tmp_path / "pico").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["merged", "gptq"])
def test_an_artifact_without_our_manifest_is_refused(project: Path, ran: Path, name: str) -> None:
    out = ran / "pico"
    shutil.rmtree(out / name)
    (out / name).mkdir()
    (out / name / "model.safetensors").write_text("somebody else's")
    before = digests(out / name)
    with pytest.raises(InputError, match=rf"{name}: exists without requant's manifest"):
        run(project, ran)
    assert digests(out / name) == before


def test_an_artifact_without_our_manifest_is_never_removed(project: Path, ran: Path) -> None:
    (ran / "pico" / "merged" / "manifest.json").unlink()
    run(project, ran, {"output.keep": ["gptq"]})
    assert (ran / "pico" / "merged" / "model.safetensors").exists()


def test_two_runs_at_once(project: Path, ran: Path) -> None:
    before = times(ran / "pico")
    with RunDirectory(ran / "pico").open(), pytest.raises(InputError, match="another requant is running here"):
        run(project, ran, {"quantize.bits": 3})
    assert times(ran / "pico") == before
    assert run(project, ran).ran == []


def test_somebody_elses_permission_error_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="shard"), RunDirectory(tmp_path / "pico").open():
        raise PermissionError(13, "Permission denied", "/models/base/shard.safetensors")


def test_an_impossible_output_directory(project: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(RequantError, match=r"file.*(cannot be written|[Nn]ot a directory)"):
        run(project, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a directory"


# --- what a run says before it changes or leaves out something ---


class Warned(observer.Watcher):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_checkpoint_that_will_be_replaced_is_named_first(project: Path, ran: Path) -> None:
    """The same directory and other settings: the old checkpoint is there until the new one is whole."""
    same, other = Warned(), Warned()
    run(project, ran, watcher=same, until="quantize")
    run(project, ran, {"quantize.bits": 8}, watcher=other, until="quantize")
    assert not [w for w in same.warnings if "replaced" in w]
    (told,) = [w for w in other.warnings if "replaced" in w]
    assert told.startswith(
        f"{ran / 'pico' / 'gptq'} was made from other inputs or settings and is replaced when quantize"
    )
    assert "--set name=" in told


def test_an_engine_that_a_finished_checkpoint_never_met_is_named(
    project: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "installed", lambda names: [n for n in ("transformers",) if n in names])
    watcher = Warned()
    outcome = run(project, ran, {"deploy": ["transformers"]}, watcher=watcher, until="quantize")
    assert outcome.ran == []
    (told,) = [w for w in watcher.warnings if w.startswith("deploy: ")]
    assert told.endswith(f"requant verify {ran / 'pico' / 'gptq'} --with transformers")
