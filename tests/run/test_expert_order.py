"""`requant.run.expert_order`: unsloth's adapters whose order of experts only text tells.

A mixture of experts is really trained on a few rows; the same adapter is then written in the other order.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers import e2e, pico
from helpers.merging import FP32
from safetensors.torch import load_file

from requant import recipe as recipes
from requant.adapters.peft_directory import WEIGHTS
from requant.checkpoint.artifact import MANIFEST
from requant.errors import InputError
from requant.evaluate import expert_order_probe, variants
from requant.evaluate.expert_order_probe import OrderFacts
from requant.run import prepare, runner
from requant.run.stage_keys import Keys

pytestmark = pytest.mark.filterwarnings("ignore")
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS, RANK = 4, 6


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (16 bit), peft/ and unsloth/ (the same adapter in both orders, no order recorded), texts."""
    out = tmp_path_factory.mktemp("experts")
    with e2e.one_thread():
        made = pico.model("qwen3_moe", vocab_size=e2e.VOCABULARY, max_position_embeddings=256)
        pico.save(made, out / "base")
        e2e.make_tokenizer(out / "base")
        _train(made, out)
    for name, documents in e2e.texts().items():
        e2e.write_rows(out / f"{name}.jsonl", [{"text": text} for text in documents])
    shutil.copytree(out / "peft", out / "unsloth")
    b = [name for name in load_file(out / "peft" / WEIGHTS) if "experts" in name and "lora_B" in name]
    pico.edit_tensors(out / "unsloth" / WEIGHTS, change=dict.fromkeys(b, _expert_after_expert))
    return out


def _train(made: Any, out: Path) -> None:
    torch.manual_seed(1)
    options: Any = {"target_modules": ["q_proj"], "target_parameters": STACKS, "task_type": "CAUSAL_LM"}
    tuned = peft.get_peft_model(made, peft.LoraConfig(r=RANK, lora_alpha=9, **options))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "base")
    ids = tokenizer("\n".join(e2e.texts()["train"]))["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).reshape(-1, 64)[:48]
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        tuned(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
    tuned.save_pretrained(out / "peft")
    pico.edit_adapter(out / "peft", base_model_name_or_path="base", auto_mapping={"unsloth_fixed": True})


def _expert_after_expert(b: torch.Tensor) -> torch.Tensor:
    return b.reshape(len(b), RANK, EXPERTS).transpose(1, 2).reshape(b.shape)


def recipe(project: Path, out: Path, adapter: Any, **changes: Any) -> recipes.Recipe:
    document = e2e.changed(
        {
            "output.dir": str(out), "base.model": "./base", "base.original": None, "base.nf4": "none",
            "evaluate.variants": ["base", "adapter", "merged", "gptq"], "adapter": adapter, "heal": "off",
        }
        | changes
    )  # fmt: skip
    return recipes.parse(json.dumps(document), directory=project)


@pytest.mark.parametrize("order", ["peft", "unsloth"])
def test_the_text_decides(project: Path, tmp_path: Path, order: str) -> None:
    """A whole run: the order that training had, said with numbers, and merged as PEFT's own forward has it."""
    with e2e.one_thread():
        made = runner.run(recipe(project, tmp_path, f"./{order}"))
    report = made.report
    assert report is not None
    words = {"peft": "PEFT's order", "unsloth": "unsloth's order"}[order]
    said = f"{order}: lora_B of experts is read in {words}, measured: on 6 rows of train"
    assert [w for w in report["facts"]["warnings"] if w.startswith(said)]
    assert said in (made.path / "log.txt").read_text()
    manifest = json.loads((made.path / "merged" / MANIFEST).read_text())
    assert manifest["provenance"]["experts"][0].startswith(said)
    live = peft.PeftModel.from_pretrained(pico.reload(project / "base"), project / "peft").eval()
    assert pico.relative(pico.logits(pico.reload(made.path / "merged")), pico.logits(live)) < FP32
    prepared = prepare.prepare(recipe(project, tmp_path, {"path": f"./{order}", "expert_order": order}))
    model = variants.load(
        "adapter", _sources(prepared, made.path), device=torch.device("cpu"), dtype=torch.float32
    )  # what evaluation and healing compare with
    assert pico.relative(pico.logits(model), pico.logits(live)) < FP32


def _sources(prepared: Any, run: Path) -> variants.VariantSources:
    from requant.run import evaluation_inputs

    return evaluation_inputs.variant_sources(prepared, run)


def test_what_was_measured_is_not_measured_again(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with e2e.one_thread():
        runner.run(recipe(project, tmp_path, "./unsloth"), until="merge")
        monkeypatch.setattr(expert_order_probe, "measure", lambda *_: pytest.fail("measured again"))
        again = runner.run(recipe(project, tmp_path, "./unsloth"), until="merge")
    assert again.ran == []


def test_adapters_of_one_name_are_measured_apart(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a stored result and a name of its own: a second run measures neither again."""
    for order in ("peft", "unsloth"):
        shutil.copytree(project / order, tmp_path / order / "final")
    both = [{"path": str(tmp_path / order / "final"), "weight": 0.5} for order in ("peft", "unsloth")]
    wanted = recipe(project, tmp_path / "runs", None, adapters=both)
    with e2e.one_thread():
        runner.run(wanted, until="merge")
    monkeypatch.setattr(expert_order_probe, "measure", lambda *_: pytest.fail("measured again"))
    again = runner.run(wanted, until="merge")
    said = [
        line for line in (again.path / "log.txt").read_text().splitlines() if "lora_B of experts is read in" in line
    ]
    for order, words in (("peft", "PEFT's order"), ("unsloth", "unsloth's order")):
        assert [line for line in said if f"{order}/final: lora_B of experts is read in {words}" in line]


def test_another_order_is_another_merge(project: Path, tmp_path: Path) -> None:
    """The keys of every stage that reads the adapter."""
    keys = []
    for order in ("peft", "unsloth"):
        prepared = prepare.prepare(recipe(project, tmp_path, {"path": "./unsloth", "expert_order": order}))
        with runner.RunDirectory(tmp_path / "run").open() as directory:
            keys.append(Keys.of(prepared, directory, torch.device("cpu")))
    a, b = keys
    assert a.merge != b.merge
    assert a.quantize != b.quantize
    assert a.heal != b.heal
    assert a.variants["adapter"] != b.variants["adapter"]
    assert a.variants["base"] == b.variants["base"]


def test_text_that_does_not_tell(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a stage, with the numbers of all texts and the key that decides."""
    monkeypatch.setattr(expert_order_probe, "FEWEST_ROWS", 7)
    with e2e.one_thread(), pytest.raises(InputError) as caught:
        runner.run(recipe(project, tmp_path, "./unsloth"))
    message = str(caught.value)
    assert "the text of this recipe does not tell: on 6 rows of train.jsonl the loss is" in message
    assert "on 6 rows of evaluation set in-domain the loss is" in message
    assert "write expert_order: unsloth" in message
    assert not (tmp_path / "pico" / "merged").exists()
    with e2e.one_thread():
        runner.run(recipe(project, tmp_path, {"path": "./unsloth", "expert_order": "unsloth"}), until="merge")


def test_check_says_what_will_happen(project: Path, tmp_path: Path) -> None:
    prepared = prepare.prepare(recipe(project, tmp_path, "./unsloth"))
    told = [w for w in prepared.warnings if w.startswith("unsloth: auto_mapping.unsloth_fixed names unsloth")]
    assert len(told) == 1
    assert "measured before the merge" in told[0]


def facts(source: str = "train", **changes: Any) -> OrderFacts:
    right: OrderFacts = {
        "source": source, "rows": 6, "without": 3.0, "losses": {"peft": 2.0, "unsloth": 3.4},
        "efficiency": {"peft": 0.9, "unsloth": -0.8}, "difference": 1.4, "se": 0.1,
    }  # fmt: skip
    return right | changes  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("many", "order"),
    [
        ([facts()], "peft"),
        ([facts(difference=-1.4, efficiency={"peft": -0.8, "unsloth": 0.9})], "unsloth"),
        ([facts(se=0.5)], None),
        ([facts(rows=2)], None),
        ([facts(efficiency={"peft": 0.2, "unsloth": -0.8})], None),
        ([facts(), facts("general", se=0.9)], "peft"),
        ([facts(difference=0.0, se=0.0)], "peft"),
        ([facts(), facts("other", difference=-1.4, efficiency={"peft": -0.8, "unsloth": 0.9})], None),
    ],
    ids=[
        "peft",
        "unsloth",
        "unsure",
        "few rows",
        "another kind of text",
        "one text tells",
        "no difference",
        "two texts disagree",
    ],
)
def test_when_a_text_tells(many: list[OrderFacts], order: str | None) -> None:
    assert expert_order_probe.decide(many)[0] == order
