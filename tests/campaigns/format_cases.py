"""Mutated formats: checkpoints in other formats than GPTQ, conversions, bases in FP8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from helpers import encoded

from campaigns import judges
from campaigns.cases import Bench, Case, linked, merge_with, perhaps_strange
from campaigns.model_cases import WEIGHTS, foreign_checkpoint, judge_merged, stated
from campaigns.mutations import to_json
from campaigns.tensor_mutations import changed_tensors, changed_values
from campaigns.workshop import Workshop

_WEIGHTS: list[Any] = [
    None, 3, [], {}, {"num_bits": 4}, {"num_bits": "4", "type": "int", "symmetric": True, "strategy": "group"},
    {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 10**12},
    {"num_bits": 10**400, "type": "float", "symmetric": "x", "strategy": "channel", "group_size": 0},
    {"num_bits": 2, "type": "int", "symmetric": False, "strategy": "channel", "dynamic": "local", "actorder": "group"},
]  # fmt: skip
PACKED: dict[str, list[Any]] = {  # keys of quantization_config
    "quant_method": [None, [], "gptq", "fp8", 3], "format": [None, "dense", 3, [], "float-quantized"],
    "ignore": [None, 3, "x", [3], ["re:["], ["re:(a+)+$"], ["re:.*"], ["Linear"], ["\x1b[2J"], ["lm_head"] * 10**4],
    "config_groups": [
        None, {}, [], 3, {"a": 3}, *({"group_0": {"targets": ["Linear"], "weights": w}} for w in _WEIGHTS),
        {"group_0": {"targets": 3, "weights": {}}}, {"group_0": {"targets": ["re:["]}}, {"": {"targets": [None]}},
    ],
    "kv_cache_scheme": [3, {}, "x"], "quantization_status": ["frozen", 3, None], "meta": [3, []],
}  # fmt: skip
ROUNDED: dict[str, list[Any]] = {
    "quant_method": [None, [], "gptq", "awq"], "bits": [None, 5, "4", 10**400], "group_size": [0, -2, 10**12, "x"],
    "sym": [None, 3, "x", False], "data_type": ["fp", 3, None], "act_bits": [8, "x", -1, 10**400], "desc_act": [True],
    "packing_format": [None, 3, "auto_round", "auto_round:gptq", "auto_round:auto_awq", "x" * 10**4],
    "block_name_to_quantize": [None, 3, "x", "model", [["model.layers.0"], 3], "model.layers,lm_head"],
    "extra_config": [None, 3, [], {"": {}}, {"a": 3}, {"(a+)+$": {"bits": 16}}, {"[": {}}, {".*": {"bits": 8}},
                     {"model.layers.0.mlp.up_proj": {"bits": 16, "sym": "x"}}, {".*mlp.*": {"group_size": 64}}],
}  # fmt: skip
AFFINE: dict[str, list[Any]] = {
    "quant_method": ["gptq", None, 3], "bits": [None, 5, "4", True, 2, 10**400], "group_size": [64, 0, -1, "x", 10**12],
    "mode": [None, 3, "mxfp4", []], "sym": [True], "lm_head": [False, True, 3, {"bits": 4}],
    "model.layers.0.mlp.up_proj": [False, True, 3, [], {"bits": 8}, {"group_size": 10**12}, {"mode": "x"}],
}  # fmt: skip
FORMATS = {"compressed-tensors": PACKED, "auto-round": ROUNDED, "mlx": AFFINE}  # keys of each's quantization_config
ENCODED: dict[str, list[Any]] = {
    "quant_method": [None, [], "fbgemm_fp8", "compressed-tensors", "mxfp4", "bitsandbytes", 3],
    "weight_block_size": [None, [], [0, 0], [32], [64, 32], [10**400, 1], "x", [1.5, 2], [-32, 32], [True, 32], {}],
    "modules_to_not_convert": [None, 3, ["x"], "x"], "activation_scheme": [3, "static"],
    "transform_config": [{}, {"a": 1}, 3], "config_groups": [3, {}, {"a": 3}, {"a": {"weights": {"block_structure": "x"}}}],
}  # fmt: skip


def _converted(shop: Workshop, to: str) -> Path:
    """The finished run's checkpoint in another format; made once."""
    folder = shop.folder / f"converted-{to}"
    if not folder.exists():
        end = shop.requant.run(["convert", shop.finished / "gptq", "--to", to, "--out", folder])
        if end.code != 0:
            raise RuntimeError(end.text[-1000:])
    return folder


def _in_fp8(shop: Workshop) -> Path:
    """The 16-bit base with its projections in FP8; made once."""
    folder = shop.folder / "fp8"
    if not folder.exists():
        shutil.copytree(shop.project / "original", folder)
        encoded.fp8(folder)
    return folder


def _changed(bench: Bench, source: Path, table: dict[str, list[Any]], name: str) -> tuple[Path, str]:
    """A directory like `source` with other weights, or another quantization_config."""
    if bench.rng.random() < 0.6:
        data = (source / WEIGHTS).read_bytes()
        made, label = changed_tensors(data, bench.rng) if bench.rng.random() < 0.7 else changed_values(data, bench.rng)
        folder = linked(source, bench.folder / name, {WEIGHTS: made})
        return folder, perhaps_strange(bench, folder / WEIGHTS, label)
    config = json.loads((source / "config.json").read_text())
    inner, label = stated(config["quantization_config"], table, bench.rng)
    keys = {key for key in ("quantization", "quantization_config") if key in config}
    text = to_json(config | dict.fromkeys(keys, "HERE")).replace(b'"HERE"', inner)
    if bench.rng.random() < 0.15:
        nested = config | {"text_config": {"quantization_config": "HERE"}}
        del nested["quantization_config"]
        text, label = to_json(nested).replace(b'"HERE"', inner), f"text_config.{label}"
    folder = linked(source, bench.folder / name, {"config.json": text})
    return folder, perhaps_strange(bench, folder / "config.json", label)


def convert(bench: Bench) -> Case:
    """`requant convert` of a changed checkpoint, there or back."""
    out, back, to = bench.folder / "out", bench.rng.random() < 0.5, bench.rng.choice(list(FORMATS))
    if back:
        folder, label = _changed(bench, _converted(bench.shop, to), FORMATS[to], "packed")
    else:
        folder, label = foreign_checkpoint(bench)
    return Case(
        argv=["convert", folder, "--to", "gptq" if back else to, "--out", out], label=label,
        judge=lambda: judges.library_refusal(folder)
        or judges.library_refusal(out) or judges.outside(bench.shop, "load_configs", out),
    )  # fmt: skip


def verify_converted(bench: Bench) -> Case:
    """`requant verify` of a changed checkpoint in another format."""
    to = bench.rng.choice(list(FORMATS))
    folder, label = _changed(bench, _converted(bench.shop, to), FORMATS[to], "packed")
    return Case(
        argv=["verify", folder], label=label,
        judge=lambda: judges.library_refusal(folder) or judges.outside(bench.shop, "load_configs", folder),
    )  # fmt: skip


def encoded_base(bench: Bench) -> Case:
    """A merge onto a changed base in FP8."""
    folder, label = _changed(bench, _in_fp8(bench.shop), ENCODED, "base")
    argv = merge_with(bench, base__model=folder, base__nf4="none", base__original="null")
    return Case(argv=argv, label=label, judge=lambda: judge_merged(bench, folder))


MAKERS = ((convert, 5), (verify_converted, 5), (encoded_base, 6))
