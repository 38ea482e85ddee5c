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


def test_a_model_type_without_text_is_refused_by_its_name() -> None:
    with pytest.raises(InputError, match="model_type 'vit' has no class that generates text"):
        skeleton.build(pico.transformers.AutoConfig.for_model("vit"))
