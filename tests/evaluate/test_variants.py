"""`requant.evaluate.variants`: each name gives exactly its model, checked by other code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico, tiny
from helpers.e2e import LENGTH, LINEARS, VOCABULARY, one_thread, recipe
from safetensors.torch import load_file
from torch import Tensor

from requant import merge
from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.errors import StageError
from requant.evaluate import trained_base, variants
from requant.merge import stage as merge_stage
from requant.merge.base_weights import BaseWeights, Nf4Settings
from requant.numerics.grid import Grid
from requant.run import prepare

CPU = torch.device("cpu")
MODULES = [
    f"model.layers.{i}.{'mlp' if '_proj' in n and n[0] in 'gud' else 'self_attn'}.{n}" for i in (0, 1) for n in LINEARS
]
GROUP = 32


@pytest.fixture(scope="module")
def sources(project: Path, finished: Path) -> variants.VariantSources:
    prepared = prepare.prepare(recipe(project, finished.parent))
    return variants.VariantSources(
        base=prepared.sources.base,
        adapter=prepared.sources.adapter,
        merged=finished / "merged",
        gptq=finished / "gptq",
        grids=prepared.quantize.plan.grids,
        original=prepared.merge.onto_original,
    )


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


def load(name: str, sources: variants.VariantSources, dtype: torch.dtype = torch.float32) -> Any:
    return variants.load(name, sources, device=CPU, dtype=dtype)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    value: Tensor = model(input_ids=ids).logits.float()
    return value


def codes_of(words: Tensor) -> Tensor:
    """int32 [k, m] -> [8 k, m]: eight 4-bit codes a word, lowest first, one shift at a time."""
    return torch.stack([(words.long() >> (4 * i)) & 15 for i in range(8)], dim=1).reshape(-1, words.shape[1])


def by_hand(gptq: Path) -> dict[str, Tensor]:
    """The GPTQ checkpoint as plain weights: (code - (stored zero + 1)) * scale, in fp64."""
    stored = load_file(gptq / "model.safetensors")
    plain = {n: t.float() for n, t in stored.items() if n.rpartition(".")[2] in ("weight", "bias")}
    for module in MODULES:
        group = stored[f"{module}.g_idx"].long()
        zero = codes_of(stored[f"{module}.qzeros"].T.contiguous()).T + 1
        scale = stored[f"{module}.scales"].double()
        codes = codes_of(stored[f"{module}.qweight"])
        plain[f"{module}.weight"] = ((codes - zero[group]) * scale[group]).T.float()
    return plain


def llama(project: Path, weights: dict[str, Tensor]) -> Any:
    """transformers' own model with these weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(project / "original"))
    model.load_state_dict(weights, strict=True)
    return model.float().eval()


def test_gptq_is_the_written_checkpoint(project: Path, sources: variants.VariantSources, ids: Tensor) -> None:
    expected = llama(project, by_hand(sources.gptq))
    ours = load("gptq", sources)
    torch.testing.assert_close(logits(ours, ids), logits(expected, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(dict(ours.named_parameters()), dict(expected.named_parameters()), rtol=1e-6, atol=0)


def test_merged_is_the_merged_checkpoint(project: Path, sources: variants.VariantSources, ids: Tensor) -> None:
    expected = llama(project, load_file(sources.merged / "model.safetensors"))
    torch.testing.assert_close(logits(load("merged", sources), ids), logits(expected, ids), rtol=0, atol=1e-5)


def test_rtn_is_nearest_on_its_own_grid_and_nothing_else_changes(sources: variants.VariantSources) -> None:
    merged, rtn = dict(load("merged", sources).named_parameters()), dict(load("rtn", sources).named_parameters())
    changed = {f"{m}.weight" for m in MODULES}
    assert merged.keys() == rtn.keys()
    for name in merged.keys() - changed:
        assert torch.equal(merged[name], rtn[name])
    for name in changed:
        before, after = (t[name].double().reshape(-1, GROUP) for t in (merged, rtn))
        step = before.abs().amax(dim=1, keepdim=True) / 7.5  # min-max: 16 levels span -max .. +max
        codes = after / step  # the stored step is rounded to 8 bits, so a code may be off by 7.5 / 256
        assert (codes - codes.round()).abs().max() < 8 * 2**-8
        assert codes.round().min() >= -8
        assert codes.round().max() <= 7
        assert ((before - after).abs() / step).max() < 0.5 + 8 * 2**-8, "to the nearest level"
        assert not torch.equal(before, after)


def test_rtn_follows_every_modules_own_grid(sources: variants.VariantSources) -> None:
    name = MODULES[-1]
    finer = replace(sources, grids={**sources.grids, name: Grid(8, GROUP)})
    merged, coarse, fine = (
        dict(load(v, p).named_parameters())[f"{name}.weight"]
        for v, p in (("merged", sources), ("rtn", sources), ("rtn", finer))
    )
    assert (fine - merged).norm() < (coarse - merged).norm() / 10


def test_base_and_adapter_differ_by_the_lora_delta(
    sources: variants.VariantSources, project: Path, ids: Tensor
) -> None:
    base, adapter = load("base", sources), load("adapter", sources)
    weights = load_file(project / "adapter" / "adapter_model.safetensors")
    name = MODULES[0]
    a, b = (weights[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = base.get_submodule(name)(x)
        tuned = adapter.get_submodule(f"base_model.model.{name}")(x)
    torch.testing.assert_close(tuned - plain, 12 / 8 * x @ a.T @ b.T, rtol=1e-4, atol=1e-5)
    assert (logits(adapter, ids) - logits(base, ids)).abs().max() > 0.1
    torch.testing.assert_close(logits(adapter, ids), logits(load("merged", sources), ids), rtol=0, atol=1e-3)


def test_base_runs_on_the_weights_that_training_saw(sources: variants.VariantSources) -> None:
    """The project's base was quantized from bfloat16: training multiplied by the decoded weights in bfloat16."""
    base = load("base", sources)
    exact = BaseWeights(Checkpoint(sources.base)).read(f"{MODULES[0]}.weight")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = base.get_submodule(MODULES[0])(x)
    torch.testing.assert_close(y, x @ exact.bfloat16().float().T, rtol=1e-5, atol=1e-6)
    assert (y - x @ exact.T).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["base", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_weights_are_kept_for_a_while_and_change_nothing(
    sources: variants.VariantSources, ids: Tensor, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes.functional as bnb

    model, decode, decoded = load(name, sources, dtype), bnb.dequantize_4bit, list[int]()
    with trained_base.decoded_once(model, CPU) as kept:
        assert not kept, "a CPU decodes them each time"
    monkeypatch.setattr(trained_base, "KEPT_ON", ("cpu",))
    monkeypatch.setattr(bnb, "dequantize_4bit", lambda *args: [decoded.append(1), decode(*args)][1])
    expected = pico.logits(model, ids)
    each, held = len(decoded), 0
    with trained_base.decoded_once(model, CPU) as kept:
        assert kept
        assert torch.equal(pico.logits(model, ids), expected)
        held = len(decoded)
        assert torch.equal(pico.logits(model, ids), expected)
    assert each == len(MODULES)
    assert (held, len(decoded)) == (2 * each, 2 * each), "once, not in each forward"
    assert torch.equal(pico.logits(model, ids), expected)
    assert len(decoded) == 3 * each


@pytest.mark.parametrize("lack", ["little is free", "it runs out"])
def test_weights_that_do_not_fit_are_decoded_each_time(
    sources: variants.VariantSources, ids: Tensor, lack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("adapter", sources)
    expected = pico.logits(model, ids)
    layers = [m.forward for m in model.modules() if isinstance(m.forward, trained_base._AsTrained)]
    need = sum(4 * layer.weight(torch.float32).numel() for layer in layers)
    weight = trained_base._AsTrained.weight
    monkeypatch.setattr(trained_base, "KEPT_ON", ("cpu",))
    monkeypatch.setattr(
        trained_base, "free_bytes", lambda device: 2 * need - 1 if lack == "little is free" else 2 * need
    )

    def runs_out(layer: Any, dtype: torch.dtype) -> Tensor:
        if layer is layers[-1]:
            raise torch.OutOfMemoryError
        return weight(layer, dtype)

    monkeypatch.setattr(trained_base._AsTrained, "weight", runs_out)
    with trained_base.decoded_once(model, CPU) as kept:
        assert not kept
        assert all(layer.kept is None for layer in layers)
        monkeypatch.setattr(trained_base._AsTrained, "weight", weight)
        assert torch.equal(pico.logits(model, ids), expected)


@pytest.mark.slow
def test_an_fp32_merge_is_the_adapter_as_trained(sources: variants.VariantSources, ids: Tensor, tmp_path: Path) -> None:
    """bf16(D) + BA in a file that can hold it; a bfloat16 file gets D + BA, rounded once."""
    plan, _ = prepare.plan_merge(sources.base, peft_directory.load(sources.adapter), None)
    results = {d: merge.merge(plan, tmp_path / d, dtype=d) for d in ("float32", "bfloat16")}  # type: ignore[arg-type]
    live = load("adapter", sources)
    merged = load("merged", replace(sources, merged=tmp_path / "float32"))
    torch.testing.assert_close(logits(merged, ids), logits(live, ids), rtol=0, atol=2e-5)
    assert results["float32"].onto == "4-bit weights decoded to bfloat16, as training multiplied by them"
    assert results["bfloat16"].onto == "4-bit weights decoded to float32"
    name = f"{MODULES[0]}.weight"
    exact = merge_stage.compute(replace(plan, stored=torch.bfloat16), next(op for op in plan.ops if op.name == name))[0]
    assert torch.equal(load_file(tmp_path / "bfloat16" / "model.safetensors")[name], exact.bfloat16())


def test_original_is_the_16_bit_base_with_the_delta(
    project: Path, sources: variants.VariantSources, ids: Tensor
) -> None:
    weights = {n: t.float() for n, t in load_file(project / "original" / "model.safetensors").items()}
    adapter = load_file(project / "adapter" / "adapter_model.safetensors")
    for module in MODULES:
        a, b = (adapter[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        weights[f"{module}.weight"] = (weights[f"{module}.weight"].double() + 12 / 8 * b @ a).float()
    ours = load("original", sources)
    torch.testing.assert_close(logits(ours, ids), logits(llama(project, weights), ids), rtol=0, atol=1e-4)
    assert (logits(ours, ids) - logits(load("merged", sources), ids)).abs().max() > 0.01, "NF4 cost something"


def test_a_16_bit_base_runs_through_bitsandbytes_as_the_recipe_says(
    project: Path, sources: variants.VariantSources, ids: Tensor
) -> None:
    simulated = replace(sources, base=project / "original", simulate=Nf4Settings(quant_type="nf4", double_quant=True))
    torch.testing.assert_close(
        logits(load("base", simulated), ids), logits(load("base", sources), ids), rtol=0, atol=1e-5
    )
    other = replace(simulated, simulate=Nf4Settings(quant_type="fp4", double_quant=True))
    assert (logits(load("base", other), ids) - logits(load("base", sources), ids)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["base", "adapter", "merged", "rtn", "gptq", "original"])
def test_the_forward_pass_computes_in_the_dtype_asked_for(
    sources: variants.VariantSources, ids: Tensor, name: str
) -> None:
    model = load(name, sources, torch.bfloat16)
    assert not model.training
    with torch.no_grad():
        out = model(input_ids=ids).logits
    assert out.dtype == torch.bfloat16
    exact = logits(load(name, sources), ids)
    error = (out.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.1


def test_rtn_rounds_the_merged_weights_and_not_their_cast(sources: variants.VariantSources) -> None:
    """What would ship is rounded from the stored weights; the forward pass's dtype comes after."""
    exact, cast = (dict(load("rtn", sources, dtype).named_parameters()) for dtype in (torch.float32, torch.bfloat16))
    for module in MODULES:
        assert torch.equal(cast[f"{module}.weight"], exact[f"{module}.weight"].bfloat16()), module


def test_a_checkpoint_without_one_of_its_tensors(sources: variants.VariantSources) -> None:
    model, stored = variants.plain("merged", sources, CPU)
    del stored._infos["model.norm.weight"]  # type: ignore[attr-defined]
    with pytest.raises(StageError, match=r"1 tensors of the model are missing, e.g. model.norm.weight"):
        variants.fill(model, stored, CPU, torch.float32)


def test_an_unknown_name(sources: variants.VariantSources) -> None:
    with pytest.raises(ValueError, match="no variant 'healed'"):
        load("healed", sources)
    with pytest.raises(ValueError, match="no variant 'original'"):
        load("original", replace(sources, original=None))


class Loading:
    """A stand-in for transformers' loader; `failing`: the error of loading to a device."""

    def __init__(self, failing: Exception | None = None) -> None:
        self.failing, self.asked, self.moved = failing, [], []

    def from_pretrained(self, path: str, **options: Any) -> Any:
        self.asked.append(options)
        if self.failing and "device_map" in options:
            raise self.failing
        model = torch.nn.Linear(1, 1)
        model.to = lambda device: self.moved.append(device) or model  # type: ignore[method-assign,assignment,func-returns-value]
        return model


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Loading:
    loader = Loading()
    monkeypatch.setattr("requant.modeling.model_classes.model_class", lambda *_, **__: loader)
    return loader


def test_a_gpu_gets_a_model_without_a_copy_on_the_host(sources: variants.VariantSources, loading: Loading) -> None:
    gpu = torch.device("cuda", 1)
    model = variants.load("merged", sources, device=gpu, dtype=torch.bfloat16)
    assert [options["device_map"] for options in loading.asked] == [{"": gpu}]
    assert not model.training
    variants.load("merged", sources, device=CPU, dtype=torch.float32)
    assert "device_map" not in loading.asked[1]


def test_memory_that_runs_out_while_loading_is_told_as_such(sources: variants.VariantSources, loading: Loading) -> None:
    """Out of memory while loading leads to streamed scoring.

    transformers hides the error while it fuses experts, so experts are fused on the host.
    """
    gpu = torch.device("cuda")
    loading.failing = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        variants.load("merged", sources, device=gpu, dtype=torch.bfloat16)
    assert len(loading.asked) == 1
    loading.failing = RuntimeError("We encountered some issues during automatic conversion of the weights")
    variants.load("merged", sources, device=gpu, dtype=torch.bfloat16)
    assert "device_map" not in loading.asked[2]
    assert loading.moved[-1] == gpu


def test_a_rotary_function_that_another_package_registered_is_not_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gptqmodel registers one for all models, without the order that ERNIE 4.5 VL gives its frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made, few = tiny.model("ernie4_5_vl_moe"), torch.arange(3, 23)[None]
    expected, path = pico.logits(made, few), pico.save(made, tmp_path / "base", torch.float32)

    def plain(config: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, float]:
        size = config.hidden_size // config.num_attention_heads
        return 10000.0 ** (-torch.arange(0, size, 2) / size), 1.0

    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "default", plain)
    sources = variants.VariantSources.of_checkpoint(path)
    for name in ("merged", "rtn"):
        loaded = variants.load(name, sources, device=torch.device("cpu"), dtype=torch.float32)
        assert pico.relative(pico.logits(loaded, few), expected) < 1e-5, name
    assert ROPE_INIT_FUNCTIONS["default"] is plain, "another package's own work is left to it"
