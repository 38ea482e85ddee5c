"""Which class of transformers a checkpoint belongs to."""

from __future__ import annotations

import pytest
from helpers import pico, tiny

from requant.errors import InputError
from requant.modeling import skeleton
from requant.modeling.model_classes import model_class


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", "LlamaForCausalLM"),
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
        ("qwen3_5_text", "Qwen3_5ForCausalLM"),
    ],
)
def test_the_first_class_registered_for_the_config(kind: str, expected: str) -> None:
    """Of qwen3_5 transformers also registers the text part alone: its config is another one."""
    assert model_class(tiny.config(kind)).__name__ == expected


def test_the_class_that_the_config_names_comes_first() -> None:
    config = tiny.config("mllama")
    config.architectures = ["MllamaForConditionalGeneration"]
    assert model_class(config).__name__ == "MllamaForConditionalGeneration"
    config.architectures = ["LlamaForSequenceClassification"]  # generates no text: as if nothing was said
    assert model_class(config).__name__.startswith("Mllama")


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("vit", None),
        ("pi0", "PI0ForConditionalGeneration"),  # a robot's actions; transformers lists it among those that write
        ("diffusion_gemma", "DiffusionGemmaForBlockDiffusion"),  # a whole canvas at once
        ("shieldgemma2", "ShieldGemma2ForImageClassification"),
    ],
)
def test_a_model_type_without_text_is_refused_by_its_name(kind: str, named: str | None) -> None:
    config = pico.transformers.AutoConfig.for_model(kind)
    config.architectures = named and [named]
    with pytest.raises(InputError, match=f"model_type '{kind}' has no class that generates text"):
        skeleton.build(config)


@pytest.mark.parametrize("kind", ["gemma4_assistant", "gemma4_unified_assistant", "muse_glimmer_assistant"])
def test_a_draft_model_is_refused_as_that(kind: str) -> None:
    """Two of them count as causal LMs, whose forward needs the keys and values of the model that they draft for."""
    config = tiny.default_config(kind)
    with pytest.raises(InputError, match=f"model_type '{kind}' drafts tokens for another model"):
        model_class(config)


@pytest.mark.parametrize(
    ("kind", "named", "expected"),
    [
        ("internlm3", "InternLM3ForCausalLM", "LlamaForCausalLM"),  # as the hub's file names it, of remote code
        ("iquestcoder", "IQuestCoderForCausalLM", "LlamaForCausalLM"),
        ("glmga", None, "Glm46VForConditionalGeneration"),
        ("pp_chart2table", None, "GotOcr2ForConditionalGeneration"),
    ],
)
def test_a_config_of_its_own_for_another_types_class(kind: str, named: str | None, expected: str) -> None:
    config = pico.transformers.AutoConfig.for_model(kind)
    config.architectures = named and [named]
    assert model_class(config).__name__ == expected
