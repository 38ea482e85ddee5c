"""`requant.adapters.other_files`: trained weights beside an adapter are refused or named."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pico
from safetensors.torch import save_file

from requant.adapters import peft_directory
from requant.errors import InputError

ROWS = torch.ones(2, 4)
NORM = {"model.norm.weight": torch.ones(4)}
LAYER = {"model.layers.0.self_attn.q_proj.weight": ROWS}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    pico.train(pico.model(), tmp_path / "adapter")
    return tmp_path / "adapter"


def write(file: Path, tensors: dict[str, torch.Tensor], *, old: bool = False) -> None:
    if file.suffix == ".safetensors":
        save_file({n: t.clone() for n, t in tensors.items()}, file)
    elif file.suffix == ".npz":
        np.savez(file, **{n: t.numpy() for n, t in tensors.items()})
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=not old)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    ("name", "tensors", "first"),
    [
        ("trainable_params.bin", {"base_model.model.model.norm.weight": torch.ones(4)}, "norm.weight"),
        ("non_lora_trainables.bin", {"model.mm_projector.0.weight": ROWS, **NORM}, "model.norm.weight"),
        ("new_embeddings.safetensors", {"input_embeddings": ROWS, "output_embeddings": ROWS}, "input_embeddings"),
        ("embeddings.safetensors", {"weight": ROWS}, "weight"),
        ("extra.pt", {"lm_head.weight": ROWS}, "lm_head.weight"),
        ("embeddings.npz", {"tokens": ROWS}, "tokens"),
        ("pytorch_model.bin", {"model.embed_tokens.weight": ROWS}, "model.embed_tokens.weight"),
    ],
)
def test_what_changes_the_text_model_is_refused(
    adapter: Path, name: str, tensors: dict[str, torch.Tensor], first: str, old: bool
) -> None:
    write(adapter / name, tensors, old=old)
    with pytest.raises(InputError) as caught:
        peft_directory.load(adapter)
    message = str(caught.value)
    assert message.startswith(str(adapter / name))
    assert f"{first}'" in message
    assert "modules_to_save" in message


@pytest.mark.parametrize(
    ("name", "tensors", "says"),
    [
        ("mm_projector.bin", {"model.mm_projector.0.weight": ROWS}, "1 tensors outside the text model, e.g. model.mm"),
        ("value_head.safetensors", {"summary.weight": ROWS}, "1 tensors outside the text model, e.g. summary.weight"),
        ("value_head.bin", {"v_head.summary.weight": ROWS}, "outside the text model, e.g. v_head.summary.weight"),
        ("pytorch_model.bin", {"v_head.summary.weight": ROWS}, "outside the text model"),
        ("non_lora_trainables.bin", {"base_model.model.model.vision_tower.x.weight": ROWS}, "outside the text model"),
        ("delta.safetensors", {"down": ROWS}, "1 tensors that are not read, as in PEFT, e.g. down: what was trained"),
        ("model.safetensors", LAYER | NORM, "a full model of 2 tensors beside the adapter, not read"),
        ("pytorch_model-00001-of-00002.bin", LAYER | NORM, "a full model of 2 tensors"),
        (
            "adapter_model.bin",
            {"base_model.model.model.layers.0.a.lora_A.weight": ROWS},
            "a second copy of the adapter",
        ),
    ],
)
def test_what_is_no_part_of_the_text_model_is_named(
    adapter: Path, name: str, tensors: dict[str, torch.Tensor], says: str
) -> None:
    write(adapter / name, tensors)
    (note,) = peft_directory.load(adapter).notes
    assert note.startswith(f"adapter/{name}: ")
    assert says in note


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", {"state": {0: {"exp_avg": ROWS}}}),
        ("scheduler.pt", {"last_epoch": 3}),
        ("rng_state_0.pth", {"cpu": torch.ones(3)}),
        ("training_args.bin", {"lr": 0.1}),
        ("non_lora_trainables.bin", {}),
    ],
)
def test_the_state_of_training_is_left_alone(adapter: Path, name: str, content: Any) -> None:
    torch.save(content, adapter / name)
    assert peft_directory.load(adapter).notes == ()


def test_names_that_cannot_be_read(adapter: Path) -> None:
    (adapter / "something.pt").write_bytes(b"no pickle at all")
    (note,) = peft_directory.load(adapter).notes
    assert note.startswith("adapter/something.pt: weights beside the adapter that are not read")
    (adapter / "trainable_params.bin").write_bytes(b"no pickle at all")
    with pytest.raises(InputError, match=r"trainable_params.bin: seems to hold weights that were trained beside LoRA"):
        peft_directory.load(adapter)


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_that_says_it_is_long_is_not_waited_for(adapter: Path, packed: bool) -> None:
    """A pickle says how long its texts are, and a small archive unpacks to gigabytes: neither is believed."""
    said = b"\x80\x04\x8d" + struct.pack("<Q", 2**62)
    if packed:
        with zipfile.ZipFile(adapter / "something.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", b"\x80\x04" + b"N0" * 2**21 + b"K\x00.")  # a little more than is read
    else:
        (adapter / "something.pt").write_bytes(said)
    (note,) = peft_directory.load(adapter).notes
    assert note.startswith("adapter/something.pt: weights beside the adapter that are not read")


def test_a_pickle_is_never_executed(adapter: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"a": Trap(), "model.norm.weight": torch.ones(2)}, adapter / "trainable_params.bin")
    with pytest.raises(InputError, match=r"trainable_params.bin: holds .* trained tensors of the text model"):
        peft_directory.load(adapter)
    assert not (tmp_path / "executed").exists()


def test_what_the_adapter_holds_too_is_no_loss(tmp_path: Path) -> None:
    pico.train(pico.model(), tmp_path / "adapter", modules_to_save=["lm_head"])
    torch.save({"base_model.model.lm_head.weight": ROWS}, tmp_path / "adapter" / "trainable_params.bin")
    assert peft_directory.load(tmp_path / "adapter").notes == ()


def test_every_refused_file_is_named_at_once(adapter: Path) -> None:
    for name in ("trainable_params.bin", "embeddings.safetensors"):
        write(adapter / name, NORM)
    with pytest.raises(InputError) as caught:
        peft_directory.load(adapter)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        str(adapter / "embeddings.safetensors"),
        str(adapter / "trainable_params.bin"),
    ]
