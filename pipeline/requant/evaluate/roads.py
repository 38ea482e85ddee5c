"""Roads: what people ship in place of our checkpoint, by the libraries that they use.

nf4-merge: PEFT's `merge_and_unload` on the base in bitsandbytes' 4 bits, which rounds the sum to 4 bits again.
nf4-again: the merged checkpoint, which transformers loads through bitsandbytes in 4 bits.
gptqmodel: GPTQ by that library's defaults; its checkpoint is made before (`quantize.gptqmodel_engine`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch

from requant.checkpoint.atomic_write import write_text
from requant.checkpoint.reader import Checkpoint, read_json
from requant.checkpoint.run_directory import sealed, unsealed
from requant.errors import StageError, library_call
from requant.evaluate import peft_runtime, variants
from requant.evaluate.trained_base import compute_in, loaded, skipped
from requant.evaluate.variant_sources import VariantSources
from requant.merge.base_checkpoint import DecodedCheckpoint, open_base_checkpoint
from requant.merge.base_weights import Nf4Settings
from requant.merge.stored_dtype import own_dtype
from requant.modeling import skeleton
from requant.modeling.model_classes import pretrained
from requant.numerics.dtypes import DTYPES

NF4_ROADS = ("nf4-merge", "nf4-again")
ROADS = (*NF4_ROADS, "gptqmodel")
"""Those that are scored as variants of these names; rounding to nearest is the variant rtn."""
LIBRARIES = {
    "nf4-merge": ("peft", "bitsandbytes", "transformers"),
    "nf4-again": ("bitsandbytes", "transformers"),
    "gptqmodel": ("gptqmodel",),
}


class RoadFacts(TypedDict):
    """What a library made. by: libraries and their versions. settings: in words.

    bytes: of the tensors as it saves them. unquantized: of these, in tensors that are not in few bits.
    """

    by: str
    settings: str
    bytes: int
    unquantized: int


@dataclass(frozen=True)
class RoadLoader:
    """Loads variants, roads among them; tells in a file what a road's library made. facts: road -> file."""

    facts: Mapping[str, Path]

    def __call__(self, name: str, sources: VariantSources, *, device: torch.device, dtype: torch.dtype) -> Any:
        """The model of a variant or a road on `device`, computing in `dtype`, in eval mode."""
        if name not in NF4_ROADS:
            return variants.load(name, sources, device=device, dtype=dtype)
        model, settings = four_bit_model(name, sources, device)
        whole, unquantized = saved_bytes(model)
        facts = RoadFacts(by=libraries(name), settings=settings, bytes=whole, unquantized=unquantized)
        write_text(self.facts[name], json.dumps(sealed(facts)) + "\n")
        compute_in(model, dtype, None)
        return model.eval()


def libraries(name: str) -> str:
    """The libraries of a road with their versions, in words."""
    return ", ".join(f"{library} {version(library)}" for library in LIBRARIES[name])


def read_facts(file: Path) -> RoadFacts:
    """The facts in a file; ValueError where it holds something else."""
    found: Any = unsealed(read_json(file))
    try:
        by, settings, size, plain = (found[key] for key in ("by", "settings", "bytes", "unquantized"))
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from error
    return {"by": by, "settings": settings, "bytes": size, "unquantized": plain}


def unmeasurable(name: str, sources: VariantSources) -> str | None:
    """Why a road cannot be gone with this base, from headers; None: nothing is known against it."""
    if name != "nf4-merge":
        return None
    base = open_base_checkpoint(sources.base)
    if isinstance(base, DecodedCheckpoint):
        return f"the base is in {base.format_name}: bitsandbytes does not hold it in 4 bits"
    return None if sources.live else "transformers 5 cannot hold the base in 4 bits as training did"


def four_bit_model(name: str, sources: VariantSources, device: torch.device) -> tuple[Any, str]:
    """(the model as bitsandbytes computes it, its settings in words) of a road in 4 bits."""
    settings, words = nf4_settings(sources)
    if name == "nf4-merge":
        return _merged_in_4_bit(sources, settings, device), words
    return _merged_again_in_4_bit(sources, settings, device), words


def nf4_settings(sources: VariantSources) -> tuple[Nf4Settings, str]:
    """Settings of bitsandbytes as training had them, and in words; where training was in 16 bit, its defaults."""
    checkpoint = open_base_checkpoint(sources.base)
    held = checkpoint.quantization if sources.simulate is None and not sources.sixteen_bit else None
    load_dtype: Any = own_dtype(checkpoint)
    if sources.simulate is not None:
        settings, whose = sources.simulate, "as training had it"
    elif held is not None:
        settings, whose = _stored(held, load_dtype), "as the base is stored"
    else:
        settings, whose = (
            Nf4Settings(quant_type="nf4", double_quant=False, load_dtype=load_dtype),
            ("transformers' defaults beside nf4: training did not quantize the base"),
        )
    double = "double quantization" if settings.double_quant else "no double quantization"
    return settings, f"{settings.quant_type}, {double}; {whose}"


def _stored(quantization: Mapping[str, Any], load_dtype: Any) -> Nf4Settings:
    """The settings in the config of a 4-bit base, where missing transformers' defaults."""
    return Nf4Settings(
        quant_type=quantization.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(quantization.get("bnb_4bit_use_double_quant", False)),
        load_dtype=load_dtype,
        skip=tuple(quantization.get("llm_int8_skip_modules") or ()),
    )


def _merged_in_4_bit(sources: VariantSources, settings: Nf4Settings, device: torch.device) -> Any:
    """Base in 4 bits, adapter through PEFT, `merge_and_unload`."""
    if sources.sixteen_bit:
        sources = replace(sources, simulate=settings, sixteen_bit=False)
    model = peft_runtime.attach(loaded(sources, device, DTYPES[settings.load_dtype]), sources.plan or sources.adapter)
    what = f"{sources.adapter}: PEFT cannot merge it into 4 bits"
    with library_call(what, kind=StageError, passing=(torch.OutOfMemoryError,)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the very loss that is measured here
        return model.merge_and_unload()


def _merged_again_in_4_bit(sources: VariantSources, settings: Nf4Settings, device: torch.device) -> Any:
    """The merged checkpoint loaded in 4 bits, in the dtype that it is stored in."""
    from transformers import BitsAndBytesConfig

    trust, dtype = sources.trust_remote_code, DTYPES[own_dtype(Checkpoint(sources.merged))]
    config = skeleton.load_config(sources.merged, trust_remote_code=trust)
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped(sources.merged, settings, trust_remote_code=trust),
    )
    what = f"{sources.merged}: bitsandbytes cannot load it in 4 bits"
    with library_call(what, kind=StageError, passing=(torch.OutOfMemoryError,)):
        return pretrained(
            config,
            sources.merged,
            dtype=dtype,
            quantization_config=asked,
            device_map={"": device},
            trust_remote_code=trust,
        )


def saved_bytes(model: Any) -> tuple[int, int]:
    """(bytes of all tensors as the library saves the model, of these those that are not in 4 bits).

    Tied tensors count once. Of a quantized weight its codes, absmax, code books and state count.
    """
    from bitsandbytes.nn import Linear4bit

    packed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items() if name not in tied}
    plain = sum(size for name, size in sizes.items() if f"{name.rpartition('.weight')[0]}.weight" not in packed)
    return sum(sizes.values()), plain
