"""The class of transformers that a checkpoint's tensors belong to, and loading it.

A model type can have several: a causal LM of the text part alone, and a wrapper with towers for images and sound. The
config's `architectures` names the one that wrote the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from requant.errors import InputError
from requant.modeling import rotary_functions


def model_class(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The class whose `from_pretrained` and `_from_config` give the model that a transformers config describes.

    The class that the config names where it generates text, else the first registered for configs of this kind: causal
    LMs come before models that also read images, these before models that also read sound. With remote code the Auto
    class. Raises InputError where transformers has none, and for a draft model.
    """
    import transformers

    if trust_remote_code and getattr(config, "auto_map", None):
        return transformers.AutoModelForCausalLM
    classes = list(_registered(config.model_type))
    named = getattr(config, "architectures", None) or ()
    own = [made for made in classes if made.config_class is type(config)]
    if not own and not _writes_no_text(named):
        own = classes  # a config of its own for another type's class, as InternLM 3 has for Llama's
    found = next((made for made in classes if made.__name__ in named), None) or next(iter(own), None)
    file = Path(getattr(config, "_name_or_path", None) or "") / "config.json"
    if _drafts(config, found):
        raise InputError(
            f"{file}: model_type {config.model_type!r:.80} drafts tokens for another model, whose states it reads, and "
            "generates no text from text alone: fine-tune and requantize the other model, and serve this one as it is"
        )
    if found is None:
        raise InputError(
            f"{file}: model_type {config.model_type!r:.80} has no class that generates text in transformers "
            f"{transformers.__version__}, neither from text alone nor from images or sound and text"
        )
    return found


def _drafts(config: Any, made: Any) -> bool:
    """Whether a model drafts tokens from another's keys and values, or is called its assistant by transformers."""
    reads = made is not None and "shared_kv_states" in inspect.signature(made.forward).parameters
    return reads or str(config.model_type).endswith("_assistant")


def pretrained(config: Any, path: Path | None, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The model of a checkpoint as its class loads it, with rotary tables of the class's own.

    config: decides the class, and what it is told of the model. path: None where the options hold the tensors.
    options: of `from_pretrained`. Raises as `model_class` does, and what transformers raises.
    """
    with rotary_functions.of_model_classes():
        return model_class(config, trust_remote_code=trust_remote_code).from_pretrained(
            None if path is None else str(path), config=config, trust_remote_code=trust_remote_code, **options
        )


def _writes_no_text(named: Iterable[str]) -> bool:
    """Whether transformers has one of the classes that a config names, and it generates nothing."""
    import transformers
    from transformers import GenerationMixin

    found = [made for name in named if isinstance(name, str) and (made := getattr(transformers, name, None))]
    return any(isinstance(made, type) and not issubclass(made, GenerationMixin) for made in found)


def _registered(model_type: str) -> Iterator[Any]:
    """transformers' classes of a model type that generate text, in the order of preference.

    Its lists also hold models of a robot's actions (PI0) and of whole canvases (DiffusionGemma), which do not.
    """
    import transformers
    from transformers import GenerationMixin
    from transformers.models.auto import modeling_auto

    for mapping in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        names = dict(getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})).get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            made = getattr(transformers, name, None)
            if made is not None and issubclass(made, GenerationMixin):
                yield made
