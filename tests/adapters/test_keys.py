"""`requant.adapters.keys`: how each trainer spells keys; ambiguous spellings are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from helpers import pico
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from requant.adapters import peft_directory
from requant.adapters.keys import PREFIX, Key, clean, locate, normalise, normalise_all, spell, stem, stems
from requant.adapters.kinds import tensor_keys
from requant.errors import InputError

STEPS = st.sampled_from(
    ["model", "layers", "0", "11", "self_attn", "q_proj", "experts", "mlp", "embed_tokens", "h", "wte"]
)
MODULES = st.lists(STEPS, min_size=1, max_size=6).map(".".join)
NAMES = tensor_keys()
OWN = [name for name, spelling in NAMES.items() if not spelling.shared]


@st.composite
def keys(draw: Any) -> Key:
    """Any key: an adapter's own tensor, or one that replaces the base's."""
    module = draw(MODULES)
    if draw(st.booleans()):
        return Key(module, None, draw(st.sampled_from(["weight", "bias"])))
    tensor = draw(st.sampled_from([*OWN, "lora_B.bias"]))
    return Key(module, tensor, wrapped=draw(st.integers(0, 2)) if tensor.startswith(("lora_A", "lora_B")) else 0)


@st.composite
def noisy(draw: Any) -> tuple[str, Key, str]:
    """(a key as some trainer spells it, what it means, the adapter's name in it)."""
    key = draw(keys())
    name = draw(st.sampled_from(["default", "tuned", "v2"]))
    steps = spell(key).removeprefix(PREFIX).split(".")
    at = next((i for i, s in enumerate(steps) if s in NAMES), None)
    if at is not None and draw(st.booleans()):
        steps[at + 1 : at + 1] = [name]
        if key.tensor == "lora_magnitude_vector":
            steps += draw(st.sampled_from([[], ["weight"]]))
    if at is None:
        infix = draw(
            st.sampled_from(
                [[], ["base_layer"], ["modules_to_save"], ["modules_to_save", name], ["token_adapter", "base_layer"]]
            )
        )
        steps[-1:] = [*infix, steps[-1]]
    for wrapper in draw(
        st.lists(st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]), max_size=3)
    ):
        steps.insert(draw(st.integers(0, len(steps) - 1)), wrapper)
    prefix = draw(
        st.sampled_from(["", PREFIX, PREFIX * 2, "module." + PREFIX, PREFIX + "_orig_mod.", "_orig_mod." + PREFIX])
    )
    return prefix + ".".join(steps), key, name


@pytest.mark.slow
@given(keys())
def test_peft_own_spelling_is_read_back(key: Key) -> None:
    assert normalise(spell(key)) == key
    assert clean(spell(key)) == spell(key)


@given(noisy())
def test_noise_changes_nothing(case: tuple[str, Key, str]) -> None:
    spelled, key, name = case
    assert normalise(spelled, ("default", name)) == key


@given(noisy())
def test_cleaning_keeps_the_meaning(case: tuple[str, Key, str]) -> None:
    """What is written for PEFT to load means the same, and cleaning it again changes nothing."""
    spelled, key, name = case
    once = clean(spelled, ("default", name))
    assert once is not None
    assert once.startswith(PREFIX)
    assert normalise(once) == key
    assert clean(once) == once


@given(keys(), keys())
def test_two_keys_never_share_a_spelling(one: Key, other: Key) -> None:
    assert (spell(one) == spell(other)) == (one == other)


@given(st.lists(noisy(), min_size=1, max_size=8))
def test_a_file_is_read_whole_or_refused(cases: list[tuple[str, Key, str]]) -> None:
    """Every key gets its meaning; refused if two keys mean the same or two adapters mix.

    No key is lost silently.
    """
    spelled = {s: key for s, key, _ in cases}
    try:
        found = normalise_all(spelled)
    except InputError as error:
        message = str(error)
        assert any(words in message for words in ("several adapters", "which one counts", "adapter's name or a module"))
        return
    assert found == spelled


# What real trainers write ------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"
SPELLINGS = {
    "PEFT": f"base_model.model.{Q}.lora_A.weight",
    "a state dict with the adapter's name": f"base_model.model.{Q}.lora_A.default.weight",
    "another name": f"base_model.model.{Q}.lora_A.sft.weight",
    "wrapped twice": f"base_model.model.base_model.model.{Q}.lora_A.weight",
    "torch.compile": f"_orig_mod.base_model.model.{Q}.lora_A.default.weight",
    "compiled inside": f"base_model.model._orig_mod.{Q}.lora_A.weight",
    "compiled blocks": "base_model.model.model.layers.0._orig_mod.self_attn.q_proj.lora_A.weight",
    "FSDP": "_fsdp_wrapped_module.base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.default.weight",
    "FSDP with checkpointing": "base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
    "DDP": f"module.base_model.model.{Q}.lora_A.default.weight",
    "bare": f"{Q}.lora_A.weight",
}


@pytest.mark.parametrize("key", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings_of_one_tensor(key: str) -> None:
    assert normalise_all([key]) == {key: Key(Q, "lora_A")}


def test_saved_modules_and_their_originals() -> None:
    """A copy of the base's weight beside a trained module (unsloth, state dicts) is no change."""
    head = "base_model.model.lm_head"
    assert normalise(f"{head}.modules_to_save.default.weight") == Key("lm_head", None, "weight")
    assert normalise(f"{head}.modules_to_save.weight") == Key("lm_head", None, "weight")
    assert normalise(f"{head}.original_module.weight") is None
    assert normalise("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_original.default") is None
    inner = "base_model.model.model.layers.0.mlp.modules_to_save.default.up_proj.weight"
    assert normalise(inner) == Key("model.layers.0.mlp.up_proj", None, "weight")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (["a.mlp.modules_to_save.up_proj.weight"], "is 'up_proj' the adapter's name or a module"),
        ([f"{Q}.lora_A.weight", f"base_model.model.{Q}.lora_A.default.weight"], "which one counts? Remove one of them"),
        ([f"{Q}.lora_A.one.weight", f"{Q}.lora_B.two.weight"], "holds several adapters (default, one, two)"),
        ([f"{Q}.lora_A.default.scale.weight"], "what is 'scale.weight' after lora_A? Expected weight or bias"),
        (["lora_A.weight"], "names no module"),
        (["base_model.model.weight"], "is not a key of an adapter file"),
    ],
)
def test_ambiguous_keys_are_refused(found: list[str], says: str) -> None:
    with pytest.raises(InputError) as caught:
        normalise_all(found)
    assert says in str(caught.value)


def test_equal_copies_are_no_contradiction() -> None:
    """PEFT saves a resized, saved head under two keys."""
    one, two = "base_model.model.lm_head.weight", "base_model.model.lm_head.modules_to_save.weight"
    assert normalise_all([one, two], lambda a, b: True) == {one: Key("lm_head", None, "weight"), two: None}


# Where a module is in the base --------------------------------------------------------------------------------------

BASE = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"]


@pytest.mark.parametrize(
    "written",
    ["model.language_model.layers.1.mlp.up_proj", "language_model.model.layers.1.mlp.up_proj", "layers.1.mlp.up_proj"],
)
def test_outer_names_may_differ(written: str) -> None:
    assert locate(written, BASE, stems(BASE)) == BASE[1]


@given(st.lists(MODULES, min_size=1, max_size=6, unique=True), st.data())
def test_a_module_of_the_base_is_itself(modules: list[str], data: Any) -> None:
    module = data.draw(st.sampled_from(modules))
    assert locate(module, modules, stems(modules)) == module
    assert stem(stem(module)) == stem(module)


def test_unknown_and_ambiguous_modules() -> None:
    assert locate("model.layers.2.mlp.up_proj", BASE, stems(BASE)) == "model.layers.2.mlp.up_proj"
    towers = ["model.text_model.layers.0.fc1", "model.layers.0.fc1"]
    with pytest.raises(InputError, match=r"layers\.0\.fc1 may be model\.layers\.0\.fc1 or model\.text_model"):
        locate("language_model.layers.0.fc1", towers, stems(towers))


# Whole files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["unsloth", "compiled", "fsdp", "doubled", "vision"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_in_another_style_merges_alike(tmp_path: Path, style: str) -> None:
    """The merged files are bit for bit those of the adapter as PEFT wrote it."""
    made = pico.model()
    base = pico.save(made, tmp_path / "base")
    pico.train(made, tmp_path / "adapter", modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
    pico.merged(base, tmp_path / "adapter", tmp_path / "plain")
    file = tmp_path / "adapter" / peft_directory.WEIGHTS
    tensors = load_file(file)
    head = "base_model.model.lm_head"
    changed = {restyled(k, style): v for k, v in tensors.items()}
    if style == "unsloth":
        changed[f"{head}.original_module.weight"] = changed[f"{head}.modules_to_save.default.weight"] * 0
    save_file(changed, file)
    plan, _, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert plan.adapter.copies == (style == "unsloth")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "out"))
    assert one.keys() == two.keys()
    assert all(bool((one[n] == two[n]).all()) for n in one)


def restyled(key: str, style: str) -> str:
    """A key of PEFT's file as `style` would have written it."""
    if style == "unsloth" and "lora" not in key:
        return key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")
    return {
        "unsloth": key.replace(".weight", ".default.weight"),
        "compiled": f"_orig_mod.{key}",
        "fsdp": key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        "doubled": PREFIX + key,
        "vision": key.replace("model.model.", "model.model.language_model."),
    }[style]


@pytest.mark.parametrize("style", ["compiled", "doubled", "vision", "unsloth"])
@pytest.mark.filterwarnings("ignore")
def test_peft_gets_what_it_can_load(tmp_path: Path, style: str) -> None:
    """The live reference applies the whole adapter; PEFT alone would skip these tensors."""
    from requant.evaluate import peft_runtime
    from requant.run import prepare

    made = pico.model()
    base = pico.save(made, tmp_path / "base")
    expected = pico.logits(pico.train(made, tmp_path / "adapter", modules_to_save=["lm_head"]))
    file = tmp_path / "adapter" / peft_directory.WEIGHTS
    save_file({restyled(k, style): v for k, v in load_file(file).items()}, file)
    plan, _ = prepare.plan_merge(base, peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False)
    live = peft_runtime.attach(pico.model(), plan).eval()
    assert pico.relative(pico.logits(live), expected) < 1e-6
    assert isinstance(live, peft.PeftModel)
