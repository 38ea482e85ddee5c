"""`requant.deploy.conversion`: every weight is exactly the same, or nothing is written."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import edit_json, edit_tensors, make_model
from safetensors.torch import load_file
from torch import Tensor

from requant import deploy
from requant.checkpoint.artifact import Artifact
from requant.checkpoint.reader import Checkpoint, read_json
from requant.deploy import conversion
from requant.deploy.conversion import convert
from requant.deploy.conversion_plan import AS_THEY_ARE
from requant.deploy.gguf_export import export
from requant.errors import InputError, StageError
from requant.evaluate import variants
from requant.formats import bit_stream
from requant.formats.registry import FORMATS, open_quantized
from requant.modeling.token_ends import EndBits
from requant.numerics.grid import Grid

CT = "compressed-tensors"
UP = "model.layers.0.mlp.up_proj"
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    make_model(out, hidden=64)
    return out


@pytest.fixture
def gptq(source: Path, tmp_path: Path) -> Path:
    """A GPTQ checkpoint with a card, of 4 bits in groups of 32."""
    pico.packed(source, tmp_path / "gptq", Grid(4, 32))
    (tmp_path / "gptq" / "README.md").write_text("# a card")
    return tmp_path / "gptq"


def test_a_copied_tensor_is_compared_with_no_other_in_memory(
    gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two largest of an 8B model, embedding and head, are neighbours: both with their copies were 4.2 GB."""
    alive, most, read = list[weakref.ref[Tensor]](), dict[str, int](), Checkpoint.read

    def watched(self: Checkpoint, name: str) -> Tensor:
        held = sum(one() is not None for one in alive)
        most[name] = max(most.get(name, 0), held)
        value = read(self, name)
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Checkpoint, "read", watched)
    convert(gptq, tmp_path / "out", CT)
    copied = {name: count for name, count in most.items() if "norm" in name or "embed" in name or "lm_head" in name}
    assert len(copied) > 4
    assert max(copied.values()) <= 1, "its own other copy"


def assert_same(one: Path, other: Path) -> None:
    """Both hold the same tensors by the names of a 16-bit checkpoint: weights exactly, others byte for byte."""
    a, b = open_quantized(one), open_quantized(other)
    assert set(a) == set(b)
    assert a.quantized == b.quantized
    assert a.quantized
    for name in a:
        x, y = a.read(name), b.read(name)
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


GRIDS = [
    Grid(bits, group, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for group in (-1, 32, 64)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("to", [CT, "auto-round", "mlx"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}g{g.group_size}{'' if g.symmetric else 'a'}")
def test_every_setting_there_and_back(source: Path, tmp_path: Path, grid: Grid, to: str) -> None:
    if to == "mlx" and (grid.group_size == -1 or not grid.symmetric):
        pytest.skip("a group that MLX has not, or rounded: tests/formats/test_mlx.py")
    pico.packed(source, tmp_path / "gptq", grid)
    done = convert(tmp_path / "gptq", tmp_path / "ct", to)
    assert (done.linears, done.dropped) == (14, {})
    assert_same(tmp_path / "gptq", tmp_path / "ct")
    assert not (tmp_path / "ct" / "quantize_config.json").exists()
    convert(tmp_path / "ct", tmp_path / "back", "gptq")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("gptq", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "ct", "gptq"]


def test_settings_of_modules_tokenizer_and_card_come_along(source: Path, tmp_path: Path) -> None:
    overrides = (("*.down_proj", {"bits": 8, "symmetric": False}), ("*.layers.1.self_attn.*", None))
    pico.packed(source, tmp_path / "gptq", Grid(3, 64), overrides=overrides, dtype=torch.bfloat16, max_bytes=2 * 10**4)
    (tmp_path / "gptq" / "README.md").write_text("---\ntags: [gptq]\n---\n# a card")
    convert(tmp_path / "gptq", tmp_path / "ct", CT)
    assert_same(tmp_path / "gptq", tmp_path / "ct")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "ct" / name).read_bytes() == (tmp_path / "gptq" / name).read_bytes()
    card = (tmp_path / "ct" / "README.md").read_text()
    assert card.startswith("---\ntags: [gptq]\n---\n> The files here are in the format compressed-tensors. ")
    assert card.endswith("\n\n# a card")
    done = deploy.verify(tmp_path / "ct", source=source)
    assert done.ok, done.message()
    assert done.linears == 10
    scores = [deploy.verify(tmp_path / n).perplexity for n in ("gptq", "ct")]
    assert scores[0] == scores[1]


def test_evaluation_reads_what_was_converted(gptq: Path, source: Path, tmp_path: Path) -> None:
    convert(gptq, tmp_path / "ct", CT)
    models = [variants.quantized(p, device=torch.device("cpu"), dtype=torch.float32) for p in (gptq, tmp_path / "ct")]
    with torch.no_grad():
        a, b = (pico.logits(m) for m in models)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("gemma3_text", {}),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    ],
)
def test_families(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """Conv1D weights, experts under their original names, experts that stay in one tensor, norms of their own."""
    pico.save(pico.model(kind, **changes), tmp_path / "model", torch.bfloat16)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32), dtype=torch.bfloat16)
    convert(tmp_path / "gptq", tmp_path / "ct", CT)
    assert_same(tmp_path / "gptq", tmp_path / "ct")
    done = deploy.verify(tmp_path / "ct", source=tmp_path / "model")
    assert [f for f in done.findings if f.where != "tokenizer"] == []
    ignore = read_json(tmp_path / "ct" / "config.json")["quantization_config"]["ignore"]
    assert any("experts" in name for name in ignore) == (kind == "gpt_oss")


def test_version_2_stores_zero_points_as_they_are(source: Path, tmp_path: Path) -> None:
    pico.packed(source, tmp_path / "gptq", Grid(4, 32, symmetric=False))
    convert(tmp_path / "gptq", tmp_path / "one", CT)

    def unshifted(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith("qzeros"):
            return tensor
        zero = bit_stream.unpack_rows(tensor.T.contiguous(), 4) + 1
        return bit_stream.pack_rows(zero, 4).T.contiguous()

    edit_tensors(tmp_path / "gptq" / "model.safetensors", lambda t: {n: unshifted(n, v) for n, v in t.items()})
    for file in ("config.json", "quantize_config.json"):
        whole = read_json(tmp_path / "gptq" / file)
        declared = whole.get("quantization_config", whole) | {"checkpoint_format": "gptq_v2"}
        edit_json(
            tmp_path / "gptq" / file, **({"quantization_config": declared} if file == "config.json" else declared)
        )
    convert(tmp_path / "gptq", tmp_path / "two", CT)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_file_of_autogptq(gptq: Path, tmp_path: Path) -> None:
    """As its first releases wrote it: biases of zeros, rotary tables, its own file name, a path of its machine."""
    convert(gptq, tmp_path / "one", CT)
    extra = {f"{UP}.bias": torch.zeros(128), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(gptq / "model.safetensors", lambda t: t | extra)
    (gptq / "model.safetensors").rename(gptq / "gptq_model-4bit-32g.safetensors")
    keys = ("quant_method", "bits", "group_size", "desc_act", "sym", "damp_percent")
    declared = {k: read_json(gptq / "config.json")["quantization_config"][k] for k in keys}
    edit_json(gptq / "config.json", quantization_config=declared, _name_or_path="/home/ann/llama", dtype=None)
    (gptq / "quantize_config.json").unlink()
    done = convert(gptq, tmp_path / "two", CT)
    assert done.dropped.keys() == extra.keys()
    assert_same(tmp_path / "one", tmp_path / "two")
    assert read_json(tmp_path / "two" / "config.json")["dtype"] == "float16"
    assert deploy.verify(tmp_path / "two").ok


@pytest.mark.parametrize("later", [{}, {"sym": True, "true_sequential": True, "model_name_or_path": None}])
def test_a_file_of_autogptq_without_quantization_config(gptq: Path, tmp_path: Path, later: dict[str, Any]) -> None:
    """The settings stand in quantize_config.json alone, in its first releases without method and symmetry."""
    convert(gptq, tmp_path / "one", CT)
    config = read_json(gptq / "config.json")
    del config["quantization_config"]
    (gptq / "config.json").write_text(json.dumps(config))
    settings = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False} | later
    (gptq / "quantize_config.json").write_text(json.dumps(settings))
    assert deploy.verify(gptq).ok
    convert(gptq, tmp_path / "two", CT)
    assert_same(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "two" / "quantize_config.json").exists()
    edit_json(gptq / "quantize_config.json", bits=5)
    with pytest.raises(InputError, match=r"quantize_config\.json: bits is 5, expected one of 2, 3, 4, 8"):
        convert(gptq, tmp_path / "three", CT)


def test_settings_beside_16_bit_weights_say_nothing_of_them(source: Path, gptq: Path, tmp_path: Path) -> None:
    """A folder that once held both: there is no packed tensor."""
    model = shutil.copytree(source, tmp_path / "model")
    (model / "quantize_config.json").write_text((gptq / "quantize_config.json").read_text())
    assert Checkpoint(model).quantization == {}


def shuffled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    return tensors | {f"{Q}.g_idx": (order // 32).int()}


def declare_act_order(gptq: Path) -> None:
    for file in ("config.json", "quantize_config.json"):
        whole = read_json(gptq / file)
        declared = whole.get("quantization_config", whole) | {"desc_act": True}
        edit_json(gptq / file, **({"quantization_config": declared} if file == "config.json" else declared))


@pytest.mark.parametrize("to", [*FORMATS, "gguf"])
def test_act_order_is_refused_by_its_groups_alone(
    gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """Before any other tensor is read: an 8B checkpoint would be read up to its first linear of that kind."""
    edit_tensors(gptq / "model.safetensors", shuffled)
    declare_act_order(gptq)
    read = list[str]()
    whole = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (read.append(name), whole(self, name))[1])
    ends = EndBits(embeddings=8) if to == "gptq" else AS_THEY_ARE  # else it is one already
    write = export if to == "gguf" else partial(convert, to=to)
    with pytest.raises(InputError, match=rf"{Q} has its groups in an order of their own .*, which {to} cannot say"):
        write(gptq, tmp_path / "out", ends=ends)
    assert read
    assert all(name.endswith(".g_idx") for name in read)
    assert [p.name for p in tmp_path.iterdir()] == ["gptq"]


def test_act_order_in_name_alone_is_converted(gptq: Path, tmp_path: Path) -> None:
    """Inputs in order under desc_act: true, as tools write where sorting changed nothing."""
    declare_act_order(gptq)
    convert(gptq, tmp_path / "ct", CT)
    assert_same(gptq, tmp_path / "ct")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (shuffled, rf"{Q} has its groups in an order of their own \(desc_act\), which compressed-tensors cannot say"),
        (lambda t: t | {f"{UP}.bias": torch.ones(128)}, rf"{UP}.bias: extra: LlamaForCausalLM with this config"),
        (
            lambda t: t | {f"{UP}.scales": torch.full_like(t[f"{UP}.scales"], torch.nan)},
            rf"{UP}.scales: 256 of 256 scales are not finite",
        ),
        (
            lambda t: t | {f"{UP}.scales": torch.full((2, 128), 1e-12, dtype=torch.bfloat16)},
            rf"{UP} cannot be stored as compressed-tensors: a scale is not exact in float16",
        ),
        (lambda t: t | {f"{UP}.qzeros": torch.zeros_like(t[f"{UP}.qzeros"])}, rf"{UP}.qzeros: stores zero point 0, a"),
        (lambda t: {n: v for n, v in t.items() if n != f"{UP}.g_idx"}, rf"{UP}.g_idx: missing"),
    ],
    ids=["act order", "bias", "NaN", "scale", "zero point", "missing"],
)
def test_what_cannot_be_said_leaves_nothing(
    gptq: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str
) -> None:
    edit_tensors(gptq / "model.safetensors", damage)
    if damage is shuffled:
        declare_act_order(gptq)
    with pytest.raises(InputError, match=told):
        convert(gptq, tmp_path / "ct", CT)
    assert [p.name for p in tmp_path.iterdir()] == ["gptq"]


@pytest.mark.parametrize("way", ["it", "below", "linked"])
def test_nothing_is_written_into_an_artifact_of_a_run(gptq: Path, tmp_path: Path, way: str) -> None:
    artifact = Artifact(tmp_path / "run", "gptq")
    part = artifact.begin("key")
    (part / "deeper").mkdir()
    artifact.finish("key", {})
    (tmp_path / "link").symlink_to(artifact.path)
    out = {"it": artifact.path, "below": artifact.path / "deeper", "linked": tmp_path / "link"}[way] / "ct"
    for written in (partial(convert, to=CT), export):
        with pytest.raises(InputError, match=r"ct: lies inside .*run/gptq, an artifact that a run has finished"):
            written(gptq, out)
    assert {f.name for f in artifact.path.rglob("*")} == {"deeper", "manifest.json"}


def test_wrong_inputs(gptq: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gptq: exists: nothing is overwritten; choose another --out"):
        convert(gptq, gptq, CT)
    with pytest.raises(InputError, match=r"no such directory: make it, or choose another --out"):
        convert(gptq, tmp_path / "a" / "b", CT)
    with pytest.raises(InputError, match=r"gptq: is a gptq checkpoint already: name another format"):
        convert(gptq, tmp_path / "ct", "gptq")
    with pytest.raises(
        InputError, match=r"cannot be converted to 'awq': expected one of gptq, compressed-tensors, .*gguf"
    ):
        convert(gptq, tmp_path / "ct", "awq")
    with pytest.raises(
        InputError, match=r"cannot be converted:\n.*quant_method is None, expected one of gptq, compressed"
    ):
        convert(source, tmp_path / "ct", CT)
    edit_json(gptq / "config.json", quantization_config={"quant_method": "gptq", "bits": 5})
    with pytest.raises(InputError, match=r"cannot be converted:\n.*bits is 5, expected one of 2, 3, 4, 8"):
        convert(gptq, tmp_path / "ct", CT)
    assert [p.name for p in tmp_path.iterdir()] == ["gptq"]


def cut_short(gptq: Path) -> None:
    """The first of several shards, as a download that broke off leaves it."""
    shard = gptq / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])


def in_groups_of(group: Tensor) -> Callable[[Path], None]:
    """A checkpoint under act order, one linear of which has these groups."""

    def damage(gptq: Path) -> None:
        edit_tensors(gptq / "model.safetensors", lambda t: t | {f"{Q}.g_idx": group.int()})
        declare_act_order(gptq)

    return damage


def in_shape(change: Callable[[Tensor], Tensor], suffix: str) -> Callable[[Path], None]:
    """A checkpoint with one tensor changed."""

    def damage(gptq: Path) -> None:
        name = f"{UP}.{suffix}"
        edit_tensors(gptq / "model.safetensors", lambda t: t | {name: change(t[name]).contiguous()})

    return damage


@pytest.mark.parametrize("to", [CT, "gguf"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_short, r"model\.safetensors: truncated: \d+ bytes, its header describes \d+ .* is cut\): download it again"),
        (lambda p: (p / "config.json").unlink(), r"config\.json: missing: copy it there, or name the directory"),
        (lambda p: (p / "model.safetensors").unlink(), r"no safetensors weights found: download the whole repository"),
        (in_groups_of(torch.arange(64)), rf"{Q}\.g_idx: spans 0 to 63, there are 2 groups"),
        (in_groups_of(torch.zeros(64, 1)), r"write it again\):\n  .*g_idx: shape \[64, 1\], expected \[64\]"),
        (in_groups_of(torch.arange(64).flip(0) // 32), rf"{Q} has its groups in an order of their own"),
        (in_shape(lambda t: t[:-1], "qweight"), r"in 1 places \(`requant verify` .*\):\n.*shape \[7, 128\], expected \[8"),
        (in_shape(lambda t: t.T, "scales"), r"scales: shape \[128, 2\], expected \[2, 128\]"),
        (in_shape(lambda t: t * 0, "scales"), r"scales: 256 of 256 scales are zero, the first of group 0, output 0"),
        (lambda p: edit_json(p / "config.json", num_hidden_layers=3), r"layers\.2\.\S+: missing: expected int32 \[8, 64\]"),
        (lambda p: edit_json(p / "quantize_config.json", bits=3), r"quantize_config\.json: bits: 3, config\.json says 4"),
    ],
    ids=[
        "cut short", "no config", "no weights", "too many groups", "a table of groups", "backwards", "a row less", "turned",
        "zero", "a layer more", "two configs",
    ],
)  # fmt: skip
def test_damaged_checkpoints_are_named_before_anything_is_written(
    gptq: Path, tmp_path: Path, damage: Callable[[Path], None], told: str, to: str
) -> None:
    damage(gptq)
    write = partial(convert, to=to) if to == CT else export
    with pytest.raises(InputError, match=told):
        write(gptq, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["gptq"]


@pytest.mark.parametrize(
    ("grid", "overrides", "to", "told"),
    [
        (Grid(2, 8), (), "mlx", r"MLX has groups of 32, 64, 128 inputs, not of 8"),
        (Grid(4, 16), (), "gguf", r"groups of 16 inputs are no multiple of a block of 32: choose another format"),
        (Grid(4, 32), (("*.down_proj", {"group_size": 16}),), "gguf", r"layers\.0\.mlp\.down_proj cannot be .* of 16"),
        (Grid(4, 32), (("*.k_proj", {"bits": 8, "symmetric": False}),), "gguf", r"k_proj cannot .* Q8_0 has none"),
        (Grid(3, -1, symmetric=False), (), "mlx", r"inputs, not of a whole row"),
    ],
)
def test_settings_that_a_format_lacks_are_named(
    source: Path, tmp_path: Path, grid: Grid, overrides: Any, to: str, told: str
) -> None:
    pico.packed(source, tmp_path / "gptq", grid, overrides=overrides)
    write = partial(convert, to=to) if to == "mlx" else export
    with pytest.raises(InputError, match=told):
        write(tmp_path / "gptq", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["gptq"]


@pytest.mark.parametrize("suffix", ["weight_packed", "norm.weight"])
def test_what_does_not_decode_to_its_source_gets_no_name(
    gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    class Careless(conversion.CheckpointWriter):
        def write(self, name: str, tensor: Tensor) -> None:
            super().write(name, tensor + 1 if name.endswith(suffix) else tensor)

    monkeypatch.setattr(conversion, "CheckpointWriter", Careless)
    with pytest.raises(
        StageError, match=r"what was converted (does not decode to its source|is no copy of its source)"
    ):
        convert(gptq, tmp_path / "ct", CT)
    assert [p.name for p in tmp_path.iterdir()] == ["gptq"]


def test_healing_writes_gptq_alone(gptq: Path, source: Path, tmp_path: Path) -> None:
    from requant.heal.stage import check_same

    convert(gptq, tmp_path / "ct", CT)
    with pytest.raises(
        InputError, match=r"is no GPTQ checkpoint, and healing writes no other: `requant convert --to g"
    ):
        check_same(tmp_path / "ct", source)
    shutil.rmtree(tmp_path / "ct")


@pytest.mark.parametrize(
    ("form", "name", "dtype"),
    [
        ("gptq", "qweight", torch.float32), ("gptq", "qzeros", torch.int64), ("gptq", "g_idx", torch.float32),
        ("gptq", "scales", torch.int16), (CT, "weight_packed", torch.float32), (CT, "weight_scale", torch.int16),
        (CT, "weight_shape", torch.float64),
    ],
)  # fmt: skip
def test_tensors_of_another_dtype_are_refused(
    gptq: Path, tmp_path: Path, form: str, name: str, dtype: torch.dtype
) -> None:
    """Their bytes would be read as other numbers; NaN is no size."""
    if form == CT:
        convert(gptq, tmp_path / "ct", CT)
    file = tmp_path / ("gptq" if form == "gptq" else "ct") / "model.safetensors"
    edit_tensors(file, lambda t: t | {f"{Q}.{name}": torch.full(t[f"{Q}.{name}"].shape, -1).to(dtype)})
    reader = open_quantized(file.parent)
    for use in (reader.read, reader.bits_and_group_size):
        with pytest.raises(InputError, match=rf"{Q}\.{name} is {dtype}, expected torch\.\w+: the .* is damaged"):
            use(f"{Q}.weight")


def test_meta_and_damp_of_other_tools(gptq: Path, tmp_path: Path) -> None:
    """Engines read neither; other tools write what they like there."""
    config = read_json(gptq / "config.json")
    config["quantization_config"] |= {"meta": ["gptqmodel"], "damp_percent": "auto"}
    edit_json(gptq / "config.json", **config)
    convert(gptq, tmp_path / "ct", CT)
    assert_same(gptq, tmp_path / "ct")


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("generation_config.json", "[1]")]
)
def test_small_files_that_no_engine_loads_are_refused(gptq: Path, tmp_path: Path, name: str, text: str) -> None:
    """They are copied: the result would be no checkpoint."""
    (gptq / name).write_text(text)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        convert(gptq, tmp_path / "ct", CT)
    assert not (tmp_path / "ct").exists()


def test_a_checkpoint_without_a_tokenizer_is_converted(gptq: Path, tmp_path: Path) -> None:
    for file in gptq.glob("tokenizer*"):
        file.unlink()
    convert(gptq, tmp_path / "ct", CT)
    assert_same(gptq, tmp_path / "ct")


def test_a_tied_head_that_is_stored_again_is_left_out_where_it_is_the_same(tmp_path: Path) -> None:
    make_model(tmp_path / "model", hidden=64, tied=True)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32))
    weights = tmp_path / "gptq" / "model.safetensors"
    edit_tensors(weights, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    done = convert(tmp_path / "gptq", tmp_path / "ct", CT)
    assert done.dropped == {"lm_head.weight": "the embedding's values again, which loaders tie"}
    assert "lm_head.weight" not in Checkpoint(tmp_path / "ct")
    edit_tensors(weights, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 2})
    with pytest.raises(InputError, match=r"lm_head\.weight: stored although tie_word_embeddings is true"):
        convert(tmp_path / "gptq", tmp_path / "other", CT)


def test_quantized_linears_past_the_last_layer_are_not_lost(gptq: Path, tmp_path: Path) -> None:
    edit_json(gptq / "config.json", num_hidden_layers=1)
    with pytest.raises(
        InputError, match=r"model\.layers\.1\.\S+ is quantized, and LlamaForCausalLM has no place for it"
    ):
        convert(gptq, tmp_path / "ct", CT)


def test_a_linear_in_both_ways_is_refused(gptq: Path, tmp_path: Path) -> None:
    edit_tensors(gptq / "model.safetensors", lambda t: t | {f"{UP}.weight": torch.ones(128, 64).half()})
    with pytest.raises(InputError, match=f"{UP}.weight: in 16 bit beside its packed tensors"):
        convert(gptq, tmp_path / "ct", CT)


@pytest.mark.parametrize("to", [CT, "gguf"])
def test_values_that_are_not_finite_are_not_copied(gptq: Path, tmp_path: Path, to: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][1, 1] = float("inf")

    edit_tensors(gptq / "model.safetensors", spoil)
    write = partial(convert, to=to) if to == CT else export
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight has values that are not finite"):
        write(gptq, tmp_path / "out")
    assert not (tmp_path / "out").exists()
