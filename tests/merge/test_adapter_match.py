"""`merge.adapter_match`, `evaluate.adapter_probe`: does an adapter belong to a base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import copied, edit_json, make_model, make_nf4, recipe

from requant.adapters import peft_directory
from requant.data.documents import TokenDocument
from requant.evaluate import adapter_probe
from requant.merge.adapter_match import Match, match
from requant.run import observer, prepare, runner
from requant_eval.scoring.batches import BatchSize

pytestmark = pytest.mark.filterwarnings("ignore")


def matched(project: Path, name: str = "./base", revision: str | None = None) -> Match:
    plan, _ = prepare.plan_merge(
        project / "base", peft_directory.load(project / "adapter"), None, trust_remote_code=False
    )
    return match(plan.adapter, plan, [(name, revision)])


def sign(found: Match, what: str) -> Any:
    return next(s for s in found.signs if s.what == what)


def test_names_shapes_and_base_name(project: Path) -> None:
    found = matched(project)
    assert found.score == (3, 3)
    assert not found.warnings
    assert str(found) == (
        "3 of 3 signs agree (names, shapes, base name); not known: revision, vocabulary, chat template"
    )
    assert sign(found, "names").note == "14 adapted tensors, all found"


@pytest.mark.parametrize(
    ("trained", "given", "agrees"),
    [
        ("unsloth/Qwen3-8B-bnb-4bit", "Qwen/Qwen3-8B", True),
        ("unsloth/llama-3-8b-unsloth-bnb-4bit", "/models/Llama-3-8B", True),
        ("org/model", "./copies/model-nf4", True),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", False),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", False),
        ("HuggingFaceTB/SmolLM-135M", "./models/base", False),
    ],
)
def test_base_names_are_compared_without_owner_and_4_bit_suffix(
    project: Path, tmp_path: Path, trained: str, given: str, agrees: bool
) -> None:
    mine = copied(project, tmp_path / "p", "adapter")
    edit_json(mine / "adapter" / "adapter_config.json", base_model_name_or_path=trained)
    found = matched(mine, given)
    assert sign(found, "base name").agrees is agrees
    if not agrees:
        assert found.score == (2, 3)
        (warning,) = found.warnings
        shown = given if given.startswith("./") else Path(given).name
        assert f"trained on {Path(trained).name}, the recipe's base is {shown}:" in warning
        assert "different: base name" in str(found)


def test_revisions(project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p", "adapter")
    assert sign(matched(mine, revision="abc"), "revision").agrees is None
    edit_json(mine / "adapter" / "adapter_config.json", revision="abc")
    assert sign(matched(mine, revision="abc"), "revision").agrees is True
    assert sign(matched(mine), "revision").agrees is None
    assert matched(mine, revision="def").warnings == ["revision: trained on abc, the recipe's is def"]


def with_tokenizer(project: Path, to: Path, **config: Any) -> Path:
    """A copy whose adapter brings the base's tokenizer, its config changed."""
    mine = copied(project, to, "adapter", "base")
    for file in (project / "base").glob("tokenizer*"):
        (mine / "adapter" / file.name).write_bytes(file.read_bytes())
    edit_json(mine / "adapter" / "tokenizer_config.json", **config)
    return mine


def test_the_vocabulary(project: Path, tmp_path: Path) -> None:
    mine = with_tokenizer(project, tmp_path / "p")
    assert sign(matched(mine), "vocabulary").note == "the same file"
    file = mine / "adapter" / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 300, "content": "<tool>"})
    file.write_text(json.dumps(raw))
    assert (sign(matched(mine), "vocabulary").agrees, sign(matched(mine), "vocabulary").note) == (
        True, "the base's, and 1 added tokens",
    )  # fmt: skip
    one, other = list(raw["model"]["vocab"])[-2:]
    raw["model"]["vocab"] |= {one: raw["model"]["vocab"][other], other: raw["model"]["vocab"][one]}
    file.write_text(json.dumps(raw))
    (warning,) = matched(mine).warnings
    assert "vocabulary: 2 of the base's 300 tokens are others in the adapter's tokenizer" in warning


def test_the_chat_template(project: Path, tmp_path: Path) -> None:
    mine = with_tokenizer(project, tmp_path / "p")
    assert sign(matched(mine), "chat template").agrees is None
    (mine / "adapter" / "chat_template.jinja").write_text("{{ messages }}\n")
    (warning,) = matched(mine).warnings
    assert "the adapter's tokenizer has one, the base's has none: was it trained on the instruct model?" in warning
    edit_json(mine / "base" / "tokenizer_config.json", chat_template="{{ messages }}")
    assert sign(matched(mine), "chat template").agrees is True
    edit_json(mine / "base" / "tokenizer_config.json", chat_template="{{ other }}")
    assert "the adapter's differs from the base's; the adapter's is shipped" in matched(mine).warnings[0]
    (mine / "adapter" / "chat_template.jinja").unlink()
    assert "trained on the base model without instructions?" in matched(mine).warnings[0]


# A few rows ----------------------------------------------------------------------------------------------------------


def test_rows_are_spread_cut_and_long_enough() -> None:
    documents = [TokenDocument(tuple(range(n)), (True,) * n, n) for n in [4, *range(100, 400, 10)]]
    rows = adapter_probe.sample_rows(["a", "b"], [documents, documents[:1]])["a"]
    assert len(rows) == adapter_probe.MAX_ROWS
    assert all(adapter_probe.MIN_LENGTH <= len(r.ids) <= adapter_probe.MAX_LENGTH for r in rows)
    assert all(r.counted.all() for r in rows)
    assert [len(r.ids) for r in rows][:2] == [100, 150]
    assert "b" not in adapter_probe.sample_rows(["a", "b"], [documents, documents[:1]]), "nothing long enough"


def test_rows_of_chats_count_their_answers() -> None:
    """A late answer is in the row too, with BOS before what leads to it; a row cut before its answer counts whole."""

    def document(length: int, first: int) -> TokenDocument:
        return TokenDocument(tuple(range(1, length + 1)), (False,) * first + (True,) * (length - first), 1)

    early, late = adapter_probe.sample_rows(["a"], [[document(40, 30), document(900, 700)]], bos=0)["a"]
    assert early.ids.tolist() == list(range(41))
    assert early.counted.tolist() == [False] * 31 + [True] * 10
    assert len(late.ids) == adapter_probe.MAX_LENGTH
    assert late.ids[0] == 0
    assert late.ids[late.counted][0] == 701
    assert int(late.counted.sum()) == (adapter_probe.MAX_LENGTH - 1) // 2
    assert early.cut(20).counted.all()


def test_only_tokens_that_count_are_measured(tmp_path: Path) -> None:
    live = pico.train(pico.model(), tmp_path / "adapter")
    ids = pico.ids(1, 16)[0]
    labels = ids.masked_fill(torch.arange(16) < 10, -100)
    row = adapter_probe.ProbeRow(ids, torch.arange(16) >= 10)
    (found,) = adapter_probe.measure(live, {"a": [row]}, torch.device("cpu"))
    assert found.with_adapter == pytest.approx(float(live(input_ids=ids[None], labels=labels[None]).loss), rel=1e-5)


def rows_of(rows: Iterable[torch.Tensor]) -> list[adapter_probe.ProbeRow]:
    return [adapter_probe.ProbeRow.whole(ids) for ids in rows]


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_losses_are_those_of_the_model(tmp_path: Path, lora: dict[str, Any]) -> None:
    """Losses with and without the adapter against transformers' own; KL against fp64."""
    live = pico.train(pico.model(), tmp_path / "adapter", **lora)
    ids = pico.ids(3)
    on, off = (pico.logits(m, ids)[:, :-1].log_softmax(-1) for m in (live, pico.model()))
    (found,) = adapter_probe.measure(live, {"text": rows_of(ids)}, torch.device("cpu"))
    assert found.with_adapter == pytest.approx(float(live(input_ids=ids, labels=ids).loss), rel=1e-5)
    assert found.without == pytest.approx(float(pico.model()(input_ids=ids, labels=ids).loss), rel=1e-5)
    assert found.moved == pytest.approx(float((on.exp() * (on - off)).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize("size", [BatchSize(windows=8), BatchSize(tokens=64), BatchSize(windows=3, padding=10_000)])
def test_rows_run_together_have_the_losses_of_rows_alone(tmp_path: Path, size: BatchSize) -> None:
    """Padded to the longest of a batch, or with rows of their own length."""
    live = pico.train(pico.model(), tmp_path / "adapter")
    samples = {
        name: rows_of(pico.ids(1, n)[0] for n in many) for name, many in {"a": (16, 9, 16, 12), "b": (14, 10)}.items()
    }
    together, alone = (adapter_probe.measure(live, samples, torch.device("cpu"), batch) for batch in (size, 1))
    forwards = counted(live, lambda: adapter_probe.measure(live, samples, torch.device("cpu"), size))
    assert forwards < 2 * 6, "fewer than one by one"
    for one, other in zip(together, alone, strict=True):
        assert one.source == other.source
        for name in ("without", "with_adapter", "moved"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4)


def test_rows_run_apart_where_padding_changes_the_model(tmp_path: Path) -> None:
    live = pico.train(pico.model(), tmp_path / "adapter")
    rows = rows_of(pico.ids(1, n)[0] for n in (16, 9, 9))
    alone = adapter_probe.measure(live, {"a": rows}, torch.device("cpu"))
    head, forward = live.get_output_embeddings(), type(live.get_output_embeddings()).forward
    head.forward = lambda x: forward(head, x) * (1 + x.shape[1] / 8)  # the length that it is given shows in the logits
    changed = adapter_probe.measure(live, {"a": rows}, torch.device("cpu"))
    together = adapter_probe.measure(live, {"a": rows}, torch.device("cpu"), BatchSize(windows=8))
    assert changed[0].with_adapter != pytest.approx(alone[0].with_adapter, rel=1e-2)
    assert together[0].with_adapter == pytest.approx(changed[0].with_adapter, rel=1e-5)


def counted(model: Any, work: Callable[[], object]) -> int:
    """How many times `work` runs the model's head."""
    calls: list[None] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append(None))
    work()
    handle.remove()
    return len(calls)


@pytest.mark.slow
def test_gain_is_movement_on_the_adapters_own_text(tmp_path: Path) -> None:
    """Text drawn from the adapted model itself: the efficiency is 1, whatever the adapter."""
    live = pico.train(pico.model(), tmp_path / "adapter", scale=0.4)
    ids = pico.ids(64, 1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(47):
        drawn = torch.multinomial(pico.logits(live, ids)[:, -1].softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], dim=1)
    (found,) = adapter_probe.measure(live, {"text": rows_of(ids)}, torch.device("cpu"))
    assert found.efficiency == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("probes", "says"),
    [
        ([adapter_probe.Probe("a", 2.0, 1.7, 0.3)], None),
        ([adapter_probe.Probe("a", 2.0, 2.5, 0.6), adapter_probe.Probe("b", 3.0, 2.8, 0.5)], None),
        (
            [adapter_probe.Probe("a", 2.0, 2.1, 0.3)],
            "the adapter does not lower the loss on calibration text (loss on a: 2.000 without",
        ),
        ([adapter_probe.Probe("a", 2.0, 1.95, 0.5)], "moves predictions far and gains little"),
        ([adapter_probe.Probe("a", 2.0, 2.0, 0.0)], "changes next to nothing on calibration text (loss on a"),
        (
            [adapter_probe.Probe("a", 3.308, 3.3078, 2e-4), adapter_probe.Probe("b", 2.0, 2.0, 0.0)],
            "was it trained, on this base and on this kind of text?",
        ),
        ([adapter_probe.Probe("a", 3.308, 3.3078, 2e-4), adapter_probe.Probe("b", 2.0, 1.7, 0.3)], None),
    ],
)
def test_verdicts(probes: list[adapter_probe.Probe], says: str | None) -> None:
    said, warnings = adapter_probe.verdict(probes)
    assert said.startswith("loss on")
    assert bool(warnings) == (says is not None)
    assert says is None or says in warnings[0]


class Heard(observer.Watcher):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.slow
def test_the_right_base_is_not_warned_of(project: Path, tmp_path: Path) -> None:
    heard = Heard()
    runner.run(recipe(project, tmp_path), until="quantize", watcher=heard)
    assert not heard.warnings
    log = (tmp_path / "pico" / "log.txt").read_text()
    assert "probe: loss on train.jsonl" in log


@pytest.mark.slow
def test_right_shape_and_wrong_base_is_caught_and_said(project: Path, tmp_path: Path) -> None:
    """Another model of the same architecture: only the loss shows it, and the report says so."""
    mine = copied(project, tmp_path / "p")
    (mine / "base").unlink()
    make_model(tmp_path / "other", seed=5)
    make_nf4(tmp_path / "other", mine / "base")
    found = matched(mine)
    assert found.score == (3, 3)
    heard = Heard()
    outcome = runner.run(
        recipe(mine, tmp_path / "out", {"base.original": None, "evaluate.variants": ["base", "adapter", "gptq"]}),
        watcher=heard,
    )
    (warning,) = heard.warnings
    assert "is this the base it was trained on" in warning
    assert outcome.report is not None
    assert warning in outcome.report["facts"]["warnings"]
