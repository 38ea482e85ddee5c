"""Trained weights beside an adapter: files of its directory that PEFT does not read.

Some trainers save embeddings, norms, projectors or heads that were trained along with LoRA to files of their own. What
belongs to the text model is refused, since merging without it gives another model; the rest is named. Pickles are never
loaded: the names in them are read from their opcodes.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from requant.adapters.keys import stem
from requant.adapters.kinds import tensor_keys
from requant.adapters.weight_files import INDEX, SHARDS, WEIGHTS
from requant.checkpoint.reader import read_header
from requant.errors import InputError
from requant_eval.regular_files import open_regular

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz")
_STATE = re.compile(
    r"optim|sched|scaler|rng|random_state|training_args|train_args|trainer|sampler|dataloader|profile|loss|metrics|"
    r"zero_pp|mp_rank|bf16_zero|fp16_zero|tokenizer",
    re.IGNORECASE,
)
"""Files with the state of a training run, which has no weights in it."""
_FULL_MODEL = re.compile(r"(model|pytorch_model|consolidated|merged)([-.]\d+)*(-of-\d+)?\.(safetensors|bin|pt|pth)")
_NOT_TEXT = re.compile(
    r"(^|[._/-])(v_?head|value_?head|reward_?head|critic\w*|vision\w*|visual\w*|vit|image\w*|img\w*|mm_\w*|"
    r"multi_modal\w*|\w*projector|mlp1|connector|resampler|perceiver\w*|audio\w*|speech\w*|whisper\w*|merger|aligner|"
    r"q_?former\w*|patch_embed\w*)($|[._-])",
    re.IGNORECASE,
)
"""Names of what is no part of a text model: value heads, encoders of images and sound, their projectors."""
_TEXT = re.compile(r"trainable|non_lora|embed|lm_head|norm|modules_to_save|full_weights", re.IGNORECASE)
"""Names of files whose tensors are taken for the text model's where their own names cannot be read."""
_NOT_A_NAME = re.compile(r"storage|cpu|(cuda|meta|mps|xpu|npu)(:\d+)?|version|_metadata|assign_to_params_buffers|\d*")
_LARGEST_PICKLE = 2**22  # bytes; the names of 25,000 tensors. A small archive may unpack to any size


def check(path: Path, held: Collection[str]) -> list[str]:
    """A note on every further file of an adapter directory that holds trained weights.

    Raises InputError when such a file holds tensors of the text model that the adapter does not.
    held: tensors of the base that the adapter replaces.
    """
    notes, refused = [], []
    own = {WEIGHTS, *(f.name for f in path.glob(SHARDS) if (path / INDEX).exists())}
    for file in sorted(path.iterdir()):
        if file.suffix not in _SUFFIXES or file.name in own or _STATE.search(file.stem) or not file.is_file():
            continue
        try:
            note = _note(file, {_leaf_stem(name) for name in held})
        except InputError as error:
            refused.append(f"{file}: {error}")
        else:
            notes += [f"{path.name}/{file.name}: {note}"] if note else []
    if refused:
        raise InputError("\n".join(refused))
    return notes


def _note(file: Path, held: Collection[str]) -> str | None:
    """What to say of one file; None where it holds no weights, or only those that the adapter has too.

    Raises InputError, without the file's name, where the text model would lack what is in there.
    """
    names = _names(file)
    if names is None:
        if _TEXT.search(file.stem) and not _NOT_TEXT.search(file.stem):
            raise InputError(
                "seems to hold weights that were trained beside LoRA, and its names cannot be read: convert it "
                "to safetensors, or move it out of the directory if nothing in it was trained"
            )
        return "weights beside the adapter that are not read, as in PEFT: what was trained in there is left out"
    adapter = [n for n in names if any(step in tensor_keys() for step in n.split("."))]
    others = [n for n in names if n not in set(adapter) and _leaf_stem(_bare(n)) not in held]
    text = [n for n in others if not _NOT_TEXT.search(n) and not _NOT_TEXT.search(file.stem)]
    named = [n for n in text if "." in n or _TEXT.search(n) or _TEXT.search(file.stem)]
    if named and not _is_full_model(file, named):
        raise InputError(
            f"holds {len(named)} trained tensors of the text model that {WEIGHTS} does not, e.g. {named[0]!r}: "
            "merging without them gives another model. Save the adapter with these modules in modules_to_save, or move "
            "the file out of the directory if nothing in it was trained"
        )
    if text and not named:
        return (
            f"{len(text)} tensors that are not read, as in PEFT, e.g. {text[0]}: what was trained in there is left out"
        )
    if text:
        return (
            f"a full model of {len(names)} tensors beside the adapter, not read: the merge is base and adapter. If the "
            "base's own weights were trained too, this is not that model"
        )
    if others:
        return f"{len(others)} tensors outside the text model, e.g. {others[0]}: left out, the result is text only"
    return f"a second copy of the adapter, not read: {WEIGHTS} counts, as in PEFT" if adapter else None


def _is_full_model(file: Path, names: Collection[str]) -> bool:
    """Whether a file with a full model's name holds whole blocks, not only what was trained beside LoRA."""
    inner = ("q_proj", "qkv", "c_attn", "query", "down_proj", "fc2", "c_proj", "dense_4h", "w2.", "o_proj")
    return bool(_FULL_MODEL.fullmatch(file.name)) and any(step in n for n in names for step in inner)


def _bare(name: str) -> str:
    """A name without the prefixes of PEFT, DeepSpeed and DDP."""
    return re.sub(r"^(base_model\.model\.|module\.)+", "", name)


def _leaf_stem(name: str) -> str:
    """`embed_tokens.weight`, whatever the outer names of the model's class are."""
    return stem(name).replace(".modules_to_save.default", "").replace(".modules_to_save", "")


def _names(file: Path) -> list[str] | None:
    """The names of a file's tensors; None where they cannot be read without loading a pickle."""
    try:
        if file.suffix == ".safetensors":
            return list(read_header(file))
        with open_regular(file) as stream:
            if file.suffix != ".npz" and not zipfile.is_zipfile(stream):
                stream.seek(0)
                return _pickled_names(stream, 4)  # torch before 1.6: magic number, protocol, system, then the object
            with zipfile.ZipFile(stream) as archive:
                if file.suffix == ".npz":
                    return [n.removesuffix(".npy") for n in archive.namelist()]
                inner = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
                if inner is None:
                    return None
                with archive.open(inner) as pickled:
                    return _pickled_names(pickled, 1)
    except (OSError, ValueError, InputError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return None


def _pickled_names(file: IO[bytes], pickles: int) -> list[str]:
    """Texts in the last of several pickles that may be names of tensors; none where it holds no tensor.

    Raises ValueError for what is no pickle, or a larger one than names explain.
    """
    stream = io.BytesIO(file.read(_LARGEST_PICKLE))  # a text in it says its own length: that much would be allocated
    found: list[str] = []
    tensors = False
    for left in range(pickles - 1, -1, -1):
        for text in _texts(stream):
            tensors |= "_rebuild_" in text
            if left == 0 and not _NOT_A_NAME.fullmatch(text) and " " not in text:
                found.append(text)
    return list(dict.fromkeys(n for n in found if not n.startswith(("torch", "collections")))) if tensors else []


def _texts(stream: IO[bytes]) -> Iterator[str]:
    """The text arguments of one pickle's opcodes; nothing is executed."""
    for opcode, value, _ in pickletools.genops(stream):
        if isinstance(value, str) and opcode.name != "PERSID":
            yield value if opcode.name != "GLOBAL" else value.replace(" ", ".")
