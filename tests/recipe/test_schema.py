"""`requant.recipe.schema` and `yaml_document`: what is accepted; messages word for word."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.errors import RecipeError
from requant.recipe import Recipe, dump, json_schema, load, parse, yaml_document
from requant.recipe.fields import Source
from requant.recipe.model_sections import AdapterSource, Nf4
from requant_eval import escaping

GOOD = """\
name: tiny
base:
  model: ./base
adapter: ./adapter
calibration:
  data: {path: ./train.jsonl}
evaluate:
  sets:
    - name: in-domain
      data: {path: ./heldout.jsonl}
"""
HERE = Path("/somewhere")


def recipe(extra: str = "", *overrides: str) -> Recipe:
    return parse(GOOD + extra, overrides=overrides, directory=HERE)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, overrides=overrides, directory=HERE)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def said(extra: str, *overrides: str) -> list[str]:
    """Problems of the good recipe with lines added at its end, from line 11 on."""
    return problems(GOOD + extra, *overrides)


def test_defaults() -> None:
    r = recipe()
    assert (r.version, r.device, r.trust_remote_code) == (1, "auto", False)
    assert r.adapter == AdapterSource(path="./adapter")
    assert r.base.nf4 == "auto"
    assert r.base.sixteen_bit is None
    assert (r.quantize.bits, r.quantize.group_size, r.quantize.symmetric) == (4, 128, True)
    assert (r.quantize.scale_search, r.quantize.order, r.quantize.damp) == ("hessian", "auto", "auto")
    assert r.quantize.signed_scales is False
    assert r.quantize.overrides == {}
    assert (r.calibration.samples, r.calibration.length, r.calibration.seed) == (128, 2048, 0)
    assert r.evaluate.variants == ("base", "adapter", "merged", "rtn", "gptq")
    assert (r.evaluate.protocol, r.evaluate.window, r.evaluate.kl, r.evaluate.batch) == (
        "documents",
        2048,
        True,
        "auto",
    )
    assert r.output.dir == "runs"
    assert r.output.keep == ("merged", "gptq")
    assert r.merge.onto == "dequantized"
    assert r.merge.max_shard_bytes == 5 * 10**9


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe().name = "other"  # type: ignore[misc]


def test_all_problems_at_once_in_file_order() -> None:
    text = GOOD.replace("name: tiny", "name: ti ny").replace("model:", "modl:")
    extra = "quantize:\n  group_sze: 64\n  bits: 5\n  symmetric: yes\ndevice: gpu\ngate: []\ndistil: {steps: 1}\n"
    top = ", ".join(Recipe.model_fields)
    assert problems(text + extra) == [
        "recipe.yaml:1: name: 'ti ny' is not a name of letters, digits, '.', '_' and '-' that begins with a "
        "letter or digit",
        "recipe.yaml:2: base.model: required key is missing",
        "recipe.yaml:3: base.modl: unknown key, did you mean 'model'?",
        "recipe.yaml:12: quantize.group_sze: unknown key, did you mean 'group_size'?",
        "recipe.yaml:13: quantize.bits: 5 is not one of 2, 3, 4, 8",
        "recipe.yaml:14: quantize.symmetric: 'yes' is not true or false",
        "recipe.yaml:15: device: 'gpu' is not one of auto, cpu, cuda, cuda:N",
        "recipe.yaml:16: gate: unknown key, did you mean 'gates'?",
        f"recipe.yaml:17: distil: unknown key, known here: {top}",
    ]


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ("version: 2", "11: version: 2 is of a newer requant, this one reads 1: upgrade requant"),
        ("version: true", "11: version: true is not a whole number"),
        ("quantize: {bits: 4.0}", "11: quantize.bits: 4.0 is not a whole number"),
        ('quantize: {bits: "4"}', "11: quantize.bits: '4' is not one of 2, 3, 4, 8"),
        ("quantize: {group_size: 100}", "11: quantize.group_size: 100 is not one of 32, 64, 128, -1"),
        ("quantize: {damp: 1}", "11: quantize.damp: 1 is not auto or a number below 1.0"),
        ("quantize: {damp: low}", "11: quantize.damp: 'low' is not auto or a number"),
        ("quantize: {damp: .nan}", "11: quantize.damp: nan is not auto or a number below 1.0"),
        ("quantize:", "11: quantize: empty, expected a section (key: value lines)"),
        ("quantize: []", "11: quantize: an empty list is not a section (key: value lines)"),
        ("merge: {max_shard: 0GB}", "11: merge.max_shard: '0GB' is not a size such as 5GB or 500MB"),
        ("merge: {max_shard: 5}", "11: merge.max_shard: 5 is not text"),
        ("heal: {steps: 0}", "11: heal.steps: 0 is not a number above 0"),
        ("heal: {lr: 2}", "11: heal.lr: 2 is not a number of at most 1.0"),
        ("heal: {tune: []}", "11: heal.tune: an empty list is not a list of at least one item"),
        ("output: {formats: 'gptq,gguf'}", "11: output.formats: 'gptq,gguf' is not a list: write [gptq,gguf]"),
        ("heal: {tune: [code]}", "11: heal.tune.0: 'code' is not one of scales, codes, norms: did you mean codes?"),
        (
            "heal: {tune: [codes], mode: blocks+whole}",
            "11: heal.mode: the second pass trains all but the codes: use blocks, or add scales to tune",
        ),
        ("heal: {tune: [scales], code_lr: 0.01}", "11: heal.code_lr: belongs to codes: add them to tune, or remove it"),
        ("heal: {tune: [scales, scales]}", "11: heal.tune.1: scales is already in the list"),
        ("heal: {format: chat}", "11: heal.format: belongs to data: write it in the entries of mix, or remove it"),
        (
            "heal: {mode: blocks+whole, target: adapter}",
            "11: heal.target: adapter needs mode whole: block by block a student follows the merged model's blocks",
        ),
        ("merge: {dtype: fp16}", "11: merge.dtype: 'fp16' is not one of auto, float16, bfloat16, float32"),
        ("trust_remote_code: 1", "11: trust_remote_code: 1 is not true or false"),
        ("output: {keep: [merged]}", "11: output.keep: gptq is missing: it is what the run is for"),
        (
            "output: {formats: [compressed-tensors]}",
            "11: output.formats: gptq is missing: it is what the run scores, and what the others are made of",
        ),
        ("output: {keep: [gptq, gptq]}", "11: output.keep.1: gptq is already in the list"),
        (
            "quantize: {symmetric: false, signed_scales: true}",
            "11: quantize.signed_scales: true needs symmetric: true: with a zero point the sign of a scale "
            "means nothing",
        ),
        (
            'quantize: {overrides: {"*.o_proj": {}}}',
            '11: quantize.overrides."*.o_proj": sets nothing: give it bits, group_size, symmetric or skip: true',
        ),
        (
            'quantize: {overrides: {"*.o_proj": {skip: true, bits: 8}}}',
            '11: quantize.overrides."*.o_proj".skip: a skipped module has no bits: keep one of the two',
        ),
        (
            'quantize: {signed_scales: true, overrides: {"*.o_proj": {symmetric: false}}}',
            '11: quantize.overrides."*.o_proj".symmetric: false contradicts quantize.signed_scales: true',
        ),
        (
            "merge: {onto: original}",
            "11: merge.onto: original needs the 16-bit base: set base.original, or base.nf4 if "
            "base.model itself is 16-bit",
        ),
    ],
)
def test_one_problem(extra: str, line: str) -> None:
    assert said(extra) == [f"recipe.yaml:{line}"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("calibration.samples", "0", "0 is not a number above 0"),
        ("calibration.samples", "3.5", "3.5 is not a whole number"),
        ("calibration.length", "4", "4 is not a number of at least 8"),
        ("calibration.length", "1000000", "1000000 is not a number of at most 131072"),
        ("calibration.mix", "[]", "an empty list is not a list of at least one item"),
        ("evaluate.window", "8", "8 is not a number of at least 16"),
        ("evaluate.batch", "many", "'many' is not auto or a whole number"),
        ("evaluate.batch", "0", "0 is not auto or a number above 0"),
        ("evaluate.sets", "[]", "an empty list is not a list of at least one item"),
        ("evaluate.variants", "adapter", "'adapter' is not a list"),
        (
            "evaluate.variants",
            "[base]",
            "adapter is missing: it is the reference that all others are compared with",
        ),
        ("evaluate.in_domain", "other", "'other' is not the name of a set: in-domain"),
        ("base.nf4", "yes", "'yes' is not one of auto, none or a section (key: value lines)"),
        ("base.model", "null", "empty, expected text"),
        (
            "base.model",
            "a/b/c",
            "'a/b/c' is neither an existing path nor a hub id (owner/name): begin a path with ./",
        ),
        ("base.revision", "main", "only a hub id has one, and model './base' is a local path: remove it"),
        (
            "adapter.revision",
            "main",
            "only a hub id has one, and path './adapter' is a local path: remove it",
        ),
        ("calibration.data.split", "test", "only a dataset has one, and this is a path: remove it"),
        ("calibration.data", "{}", "expected exactly one of path, dataset and builtin, got none of them"),
        (
            "calibration.data",
            "{path: ./a.txt, dataset: b}",
            "expected exactly one of path, dataset and builtin, got path and dataset",
        ),
        (
            "calibration.data.path",
            "./a.pdf",
            "'./a.pdf' does not end in one of .txt, .jsonl, .json, .csv, .parquet, "
            ".txt.gz, .jsonl.gz, .json.gz, .csv.gz",
        ),
        ("calibration.data.builtin", "foo", "'foo' is not python-reference"),
    ],
)
def test_override_gets_the_same_checks(key: str, value: str, message: str) -> None:
    assert said("", f"{key}={value}") == [f"--set {key}: {message}"]


def test_calibration_needs_data_or_mix_and_not_both() -> None:
    neither = GOOD.replace("  data: {path: ./train.jsonl}", "  samples: 3")
    assert problems(neither) == ["recipe.yaml:5: calibration: expected either data or mix, got neither"]
    mix = "calibration.mix=[{data: {path: ./x.txt}}]"
    assert said("", mix) == ["recipe.yaml:5: calibration: expected either data or mix, got both"]
    stray = GOOD.replace("  data: {path: ./train.jsonl}", "  format: text\n  mix: [{data: {path: ./x.txt}}]")
    assert problems(stray) == ["recipe.yaml:6: calibration.format: belongs to data: write it in the entries of mix"]


def test_entries_are_the_same_for_shorthand_and_mix() -> None:
    short = recipe("", "calibration.format=chat").calibration.entries
    text = GOOD.replace(
        "  data: {path: ./train.jsonl}", "  mix: [{data: {path: ./train.jsonl}, format: chat, share: 1}]"
    )
    assert parse(text, directory=HERE).calibration.entries == short
    assert [(e.data.path, e.format, e.share) for e in short] == [("./train.jsonl", "chat", 1.0)]


def test_missing_sections_are_reported_where_they_belong() -> None:
    assert problems("# a comment\nname: x\n") == [
        f"recipe.yaml:1: {key}: required key is missing" for key in ("base", "adapter", "calibration", "evaluate")
    ]


def test_nf4_has_no_default_type() -> None:
    assert said("", "base.nf4={blocksize: 48, doublequant: true}") == [
        "--set base.nf4: base.nf4.quant_type: required key is missing",
        "--set base.nf4: base.nf4.double_quant: required key is missing",
        "--set base.nf4: base.nf4.doublequant: unknown key, did you mean 'double_quant'?",
        "--set base.nf4: base.nf4.blocksize: 48 is not one of 32, 64, 128, 256, 512, 1024, 2048, 4096",
    ]


def test_nf4_section_makes_the_model_the_16_bit_base() -> None:
    nf4 = "base.nf4={quant_type: nf4, double_quant: true}"
    r = recipe("merge: {onto: original}\n", nf4, "evaluate.variants=[adapter, original]")
    assert r.base.nf4 == Nf4(quant_type="nf4", double_quant=True)
    assert r.base.sixteen_bit == Source(path="./base")
    pre = recipe("merge: {onto: original}\n", "base.original=meta/model")
    assert pre.base.sixteen_bit == Source(path="meta/model")
    assert said("", "evaluate.variants=[adapter, original]") == [
        "--set evaluate.variants: evaluate.variants.1: original needs the 16-bit base: set base.original, or "
        "base.nf4 if base.model itself is 16-bit"
    ]


@pytest.mark.parametrize(
    ("calibration", "evaluation", "same"),
    [
        ("{path: ./train.jsonl}", "{path: ./x/../train.jsonl}", True),
        ("{path: train.jsonl}", "{path: /somewhere/train.jsonl, documents: 3}", True),
        ("{path: ./train.jsonl}", "{path: ./train2.jsonl}", False),
        ("{builtin: python-reference}", "{builtin: python-reference}", True),
        ("{dataset: a/b, config: c}", "{dataset: a/b, config: c, split: train}", True),
        ("{dataset: a/b, config: c}", "{dataset: a/b, config: c, split: test}", False),
        ("{dataset: a/b, config: c}", "{dataset: a/b, config: d}", False),
        ("{dataset: a/b.txt}", "{path: a/b.txt}", False),
    ],
)
def test_evaluation_on_calibration_text_is_refused(calibration: str, evaluation: str, same: bool) -> None:
    settings = (f"calibration.data={calibration}", f"evaluate.sets.0.data={evaluation}")
    if not same:
        assert recipe("", *settings).calibration.data is not None
        return
    assert said("", *settings) == [
        "--set evaluate.sets.0.data: is the same text as calibration.data: judge on text that the quantizer "
        "has not seen"
    ]


def test_leak_names_the_entry_of_the_mix() -> None:
    text = GOOD.replace(
        "  data: {path: ./train.jsonl}", "  mix: [{data: {path: ./a.txt}}, {data: {path: ./heldout.jsonl}}]"
    )
    assert problems(text) == [
        "recipe.yaml:10: evaluate.sets.0.data: is the same text as calibration.mix.1.data: judge on text "
        "that the quantizer has not seen"
    ]


def test_set_names_are_unique() -> None:
    extra = "    - {name: in-domain, data: {path: ./b.txt}}\n"
    assert said(extra) == ["recipe.yaml:11: evaluate.sets.1.name: 'in-domain' is already the name of sets.0"]


def test_completion_needs_prompts() -> None:
    assert said("", "evaluate.sets.0.format=text", "evaluate.sets.0.score=completion") == [
        "--set evaluate.sets.0.score: completion needs format chat or completion: plain text has no prompt"
    ]
    assert said("", "evaluate.protocol=gptq-2048", "evaluate.sets.0.score=completion") == [
        "--set evaluate.sets.0.score: completion needs protocol documents: gptq-2048 joins the texts"
    ]


def test_published_protocols_have_their_own_window() -> None:
    assert said("", "evaluate.protocol=llamacpp-512", "evaluate.window=1024") == [
        "--set evaluate.window: protocol llamacpp-512 has its own window: remove the key, or use protocol documents"
    ]
    for window in ("512", "2048"):  # 2048: the default, which dump writes out
        recipe("", "evaluate.protocol=llamacpp-512", f"evaluate.window={window}")


FUSED_QKV = "engines fuse q_proj, k_proj, v_proj, so they share one setting: use a pattern covering all, such as "


@pytest.mark.parametrize(
    ("patterns", "suggested"),
    [
        (["*.q_proj"], ["'*.[qkv]_proj'"]),
        (["*q_proj", "*.k_proj"], ["'*.[qkv]_proj'", "'*.[qkv]_proj'"]),
        (["v_proj"], ["'[qkv]_proj'"]),
        (["*.q_proj", "*.k_proj", "*.v_proj"], []),
        (["*.[qkv]_proj", "*.qkv_proj", "*.gate_up_proj", "*.o_proj", "*.down_proj", "*"], []),
    ],
)
def test_parts_that_engines_fuse_share_one_setting(patterns: list[str], suggested: list[str]) -> None:
    extra = "quantize:\n  overrides:\n" + "".join(f'    "{p}": {{bits: 8}}\n' for p in patterns)
    if not suggested:
        assert list(recipe(extra).quantize.overrides) == patterns
        return
    assert said(extra) == [
        f"recipe.yaml:{13 + i}: quantize.overrides.{yaml_document.show_path((p,))}: {FUSED_QKV}{s}"
        for i, (p, s) in enumerate(zip(patterns, suggested, strict=True))
    ]


def test_fused_parts_with_different_settings_are_refused() -> None:
    extra = 'quantize: {overrides: {"*.up_proj": {bits: 8}, "*.gate_proj": {bits: 4}}}'
    found = said(extra)
    assert len(found) == 2
    assert all("engines fuse gate_proj, up_proj" in line and "'*.[gu]*_proj'" in line for line in found)


# --- YAML ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+2", 100.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("012", 12),
        ("0x1F", 31),
        ("0o17", 15),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"),
        ("12:30:45", "12:30:45"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("5GB", "5GB"),
    ],
)
def test_yaml_1_2_scalars(text: str, value: Any) -> None:
    read = yaml_document.read(f"a: {text}\n", "x").data["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: empty file: `requant init ADAPTER` writes a recipe to start from"),
        ("# nothing\n", "recipe.yaml: empty file: `requant init ADAPTER` writes a recipe to start from"),
        ("- a\n", "recipe.yaml:1: not a mapping: expected `key: value` lines, got a list"),
        ("hello\n", "recipe.yaml:1: not a mapping: expected `key: value` lines, got 'hello'"),
        ("a: [1\nb: 2\n", "recipe.yaml:2: not valid YAML: expected ',' or ']', but got ':'"),
        ("a: 1\nb: c: d\n", "recipe.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a:\n\t- b\n", "recipe.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: 1\nb: \x00\n", "recipe.yaml:2: not valid YAML: special characters are not allowed"),
        (
            "a:\n  *.q: 1\n",
            "recipe.yaml:2: not valid YAML: found undefined alias '.q:': put quotes around text that begins with *",
        ),
    ],
)
def test_not_a_recipe_at_all(text: str, message: str) -> None:
    assert problems(text) == [message]


def test_duplicate_key_names_both_lines() -> None:
    assert said("quantize:\n  bits: 4\n  symmetric: true\n  bits: 3\n") == [
        "recipe.yaml:14: quantize.bits: duplicate key, first given on line 12: keep one of them"
    ]


def test_keys_must_be_text_and_tags_are_refused() -> None:
    found = said("quantize: !fast {bits: 4}\n7: 8\n")
    assert found == [
        "recipe.yaml:11: quantize: unknown tag !fast: leave it out",
        "recipe.yaml:12: 7: this key is not text: put it in quotes",
    ]


def test_an_alias_inside_its_own_anchor_ends() -> None:
    assert "recipe.yaml:11: merge.onto: an alias may not be inside the value that it names" in said(
        "merge: &m {onto: *m}\n"
    )


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    writes = f"`requant init ADAPTER -o {path}` writes one"
    with pytest.raises(RecipeError, match=re.escape(f"{path}: no such file: {writes}") + "$"):
        load(path)
    (tmp_path / "r2.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=re.escape(f"did you mean {tmp_path / 'r2.yaml'}? Else {writes}") + "$"):
        load(path)
    with pytest.raises(RecipeError, match=r": cannot be read: a directory, expected a file$"):
        load(tmp_path)
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: not UTF-8 text: a recipe is a YAML file$"):
        load(path)
    path.write_text(GOOD + "bits: 4\n")
    with pytest.raises(RecipeError, match=rf"^{re.escape(str(path))}:11: bits: unknown key"):
        load(path)
    path.write_text("\ufeff" + GOOD)
    assert load(path, ["quantize.bits=3"]).quantize.bits == 3
    assert load(path).directory == tmp_path


# --- --set ---


def test_overrides_apply_in_order_and_reach_everything() -> None:
    r = recipe(
        "",
        "quantize={bits: 8, group_size: 64}",
        "quantize.bits=3",
        'quantize.overrides."*.down_proj".bits=8',
        "evaluate.sets.0.tokens=100",
        "adapter=owner/adapter",
        "device=cuda:1",
    )
    assert (r.quantize.bits, r.quantize.group_size) == (3, 64)
    assert r.quantize.overrides["*.down_proj"].bits == 8
    assert r.evaluate.sets[0].tokens == 100
    assert r.adapter == AdapterSource(path="owner/adapter")
    assert r.device == "cuda:1"
    hub = parse(GOOD.replace("./adapter", "owner/adapter"), overrides=["adapter.revision=v1"], directory=HERE)
    assert hub.adapter == AdapterSource(path="owner/adapter", revision="v1")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("quantize.bits=5", "--set quantize.bits: 5 is not one of 2, 3, 4, 8"),
        ("quantize.bitz=4", "--set quantize.bitz: unknown key, did you mean 'bits'?"),
        ("quantise.bits=4", "--set quantise.bits: quantise: unknown key, did you mean 'quantize'?"),
        ("quantize={bits: 5}", "--set quantize: quantize.bits: 5 is not one of 2, 3, 4, 8"),
        ("quantize", "--set quantize: expected key.path=value, such as --set quantize.bits=3"),
        ("=3", "--set =3: expected key.path=value, such as --set quantize.bits=3"),
        ("quantize.damp=", "--set quantize.damp: empty, expected auto or a number"),
        ("name.x=1", "--set name.x: name is 'tiny', not a section: it has no key 'x'"),
        (
            "evaluate.sets.1.tokens=5",
            "--set evaluate.sets.1.tokens: evaluate.sets has 1 item, numbered from 0: there is no item '1'",
        ),
        (
            "evaluate.sets.in-domain.tokens=5",
            "--set evaluate.sets.in-domain.tokens: evaluate.sets has 1 item, numbered from 0: there is no "
            "item 'in-domain'",
        ),
        (
            "quantize.order=[a",
            "--set quantize.order: '[a' is not valid YAML: expected ',' or ']', but got '<stream end>'",
        ),
        (
            "quantize={bits: 4, bits: 3}",
            "--set quantize: bits: duplicate key, first given on line 1: keep one of them",
        ),
    ],
)
def test_wrong_override(override: str, line: str) -> None:
    assert said("", override) == [line]


def test_override_repairs_what_the_file_has_wrong() -> None:
    assert recipe("quantize: {bits: 5}\n", "quantize.bits=4").quantize.bits == 4


# --- ${env:...} ---


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUANT_TEST", "mo${del}")
    monkeypatch.setenv("REQUANT_PLAIN", "model")
    monkeypatch.delenv("REQUANT_NONE", raising=False)
    text = GOOD.replace("./base", '"./${env:REQUANT_PLAIN}/${env:REQUANT_NONE:-7}${env:REQUANT_NONE:-}"')
    assert parse(text, directory=HERE).base.model == "./model/7"
    for value, message in {
        "${env:REQUANT_NONE}": "environment variable REQUANT_NONE is not set: set it or write "
        "${env:REQUANT_NONE:-default}",
        "${REQUANT_PLAIN}": "'./${REQUANT_PLAIN}': only ${env:VAR} and ${env:VAR:-default} are replaced",
        "${env:REQUANT_TEST}": "'./${env:REQUANT_TEST}': the variable's value holds ${ itself, which is not replaced",
    }.items():
        assert problems(GOOD.replace("./base", f"./{value}")) == [f"recipe.yaml:3: base.model: {message}"]
    assert recipe("", "base.model=./${env:REQUANT_PLAIN}").base.model == "./model"


# --- dump, paths, schema ---

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: "${" not in text)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    text=NAMES,
    bits=st.sampled_from([2, 3, 4, 8]),
    damp=st.just("auto") | st.floats(0, 1, exclude_min=True, exclude_max=True),
    pattern=NAMES,
    share=st.floats(1e-6, 1e6),
    kl=st.booleans(),
)
def test_dump_reads_back_as_the_same_recipe(
    text: str, bits: int, damp: str | float, pattern: str, share: float, kl: bool
) -> None:
    data: dict[str, Any] = {
        "name": "x",
        "base": {"model": f"./{text}", "nf4": {"quant_type": "fp4", "double_quant": kl, "skip": [text]}},
        "adapter": {"path": "owner/name", "revision": text},
        "quantize": {"bits": bits, "damp": damp, "overrides": {f"*.{pattern}.x": {"bits": bits}}},
        "calibration": {"mix": [{"data": {"dataset": text, "config": text}, "share": share}]},
        "evaluate": {"sets": [{"name": "a", "data": {"path": f"{text}.txt", "column": text}}], "kl": kl},
    }
    first = parse(escaping.yaml(data), directory=HERE)
    written = dump(first)
    again = parse(written, directory=HERE)
    assert again == first
    assert again.base.model == f"./{text}"
    assert again.quantize.damp == damp
    assert dump(again) == written


def test_dump_writes_every_default() -> None:
    def keys(value: Any) -> set[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return (set(value) if isinstance(value, dict) else set()).union(*map(keys, inner))

    written = keys(yaml_document.read(dump(recipe()), "x").data)
    assert {
        "version",
        "max_shard",
        "scale_search",
        "damp",
        "samples",
        "document_tokens",
        "in_domain",
    } <= written
    assert "directory" not in written


def test_dump_for_another_directory_means_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "plain").mkdir()
    text = GOOD.replace("./base", "plain").replace("./adapter", "owner/adapter")
    first = parse(text, directory=tmp_path / "old")
    moved = parse(dump(first, tmp_path / "runs" / "x"), directory=tmp_path / "runs" / "x")
    assert moved.base.model == "./../../old/plain"
    assert moved.adapter == first.adapter
    assert moved.base.source.resolve(moved.directory) == first.base.source.resolve(first.directory)
    assert moved.evaluate.sets[0].data.resolve(moved.directory) == tmp_path / "old" / "heldout.jsonl"


def test_a_source_is_local_by_spelling_or_by_existing(tmp_path: Path) -> None:
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert Source(path="owner/here").resolve(tmp_path) == str(tmp_path / "owner" / "here")
    assert Source(path="owner/name").resolve(tmp_path) == "owner/name"
    assert Source(path="./x/../y").resolve(tmp_path) == str(tmp_path / "y")
    assert Source(path="../y").resolve(tmp_path) == str(tmp_path.parent / "y")
    assert Source(path="/y").resolve(tmp_path) == "/y"
    assert Source(path="~/y").resolve(tmp_path) == str(Path.home() / "y")
    assert Source(path="~nobody-here/y").resolve(tmp_path) == str(tmp_path / "~nobody-here" / "y")
    assert Source(path="x" * 999).resolve(tmp_path) == "x" * 999
    text = GOOD.replace("./base", "owner/here/deep")
    (tmp_path / "owner" / "here" / "deep").mkdir()
    assert parse(text, directory=tmp_path).base.source.is_local(tmp_path)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("64KB", 64000), ("2MiB", 2**21)],
)
def test_shard_sizes(size: str, expected: int) -> None:
    assert recipe("", f"merge.max_shard={size}").merge.max_shard_bytes == expected


def test_json_schema_knows_every_key_and_describes_it() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        undescribed = [
            key for key, value in section["properties"].items() if not {"description", "$ref"} & value.keys()
        ]
        assert undescribed == []
    assert {"type": "string"} in schema["properties"]["adapter"]["anyOf"]
    assert schema["$defs"]["Quantize"]["properties"]["bits"]["enum"] == [2, 3, 4, 8]


def test_import_is_light() -> None:
    code = "import requant.recipe, sys; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ROOTS}
    )
    assert done.stdout == "set()\n"


ROOTS = os.pathsep.join(str(Path(__file__).parents[2] / root) for root in ("pipeline", "eval"))


# --- gates ---

GATE = "gates:\n  - {metric: ppl_increase, set: in-domain, max: 5%}\n"


def test_gates_are_read_and_kept() -> None:
    r = recipe(
        GATE + "  - {metric: kl, set: in-domain, max: 0.1}\n  - {metric: retention, set: in-domain, min: 90 %}\n"
    )
    assert [gate.parsed().text for gate in r.gates] == [
        "perplexity increase on in-domain at most 5 %",
        "KL divergence on in-domain at most 0.1 nats",
        "retention on in-domain at least 90 %",
    ]
    assert parse(dump(r), directory=HERE) == r
    assert recipe().gates == ()


@pytest.mark.parametrize(
    ("gate", "line"),
    [
        (
            "{metric: ppl, set: in-domain, max: 5%}",
            "recipe.yaml:12: gates.0.metric: 'ppl' is not one of ppl_increase, ",
        ),
        ("{metric: ppl_increase, set: code, max: 5%}", "gates.0.set: 'code' is not the name of a set: in-domain"),
        ("{metric: ppl_increase, set: in-domain, max: 5}", "gates.0.max: 5.0 is not a percentage: write 5%"),
        (
            "{metric: ppl_increase, set: in-domain, min: 5%}",
            "gates.0.min: ppl_increase is good when it is small: use max",
        ),
        ("{metric: ppl_increase, set: in-domain}", "gates.0.max: required key is missing"),
        (
            "{metric: ppl_increase, set: in-domain, max: 5%, relative_to: merged}",
            "gates.0.relative_to: 'merged' is not rtn",
        ),
        ("{metric: ppl_increase, set: in-domain, maxx: 5%}", "gates.0.maxx: unknown key, did you mean 'max'?"),
        (
            "{metric: retention, set: in-domain, min: 50%, relative_to: rtn}",
            "gates.0.relative_to: only ppl_increase, kl",
        ),
    ],
)
def test_a_gate_that_means_nothing(gate: str, line: str) -> None:
    found = said(f"gates:\n  - {gate}\n")
    assert len(found) == 1
    assert line in found[0]
    assert found[0].startswith("recipe.yaml:12: ")


@pytest.mark.parametrize(
    ("gate", "evaluate", "line"),
    [
        ("{metric: kl, set: in-domain, max: 0.1}", "kl: false", "gates.0.metric: kl needs evaluate.kl: true"),
        ("{metric: agreement, set: in-domain, min: 90%}", "kl: false", "agreement needs evaluate.kl: true"),
        (
            "{metric: retention, set: in-domain, min: 90%}",
            "variants: [adapter, gptq]",
            "gates.0.metric: retention compares with base: add it to evaluate.variants",
        ),
        (
            "{metric: ppl_increase, set: in-domain, max: 50%, relative_to: rtn}",
            "variants: [adapter, gptq]",
            "gates.0.relative_to: rtn is not scored: add it to evaluate.variants",
        ),
        (
            "{metric: ppl_increase, set: in-domain, max: 5%}",
            "variants: [adapter, merged]",
            "gates.0: gptq is what ships and is judged: add it to evaluate.variants",
        ),
    ],
)
def test_a_gate_that_nothing_will_decide(gate: str, evaluate: str, line: str) -> None:
    text = GOOD.replace("evaluate:\n", f"evaluate:\n  {evaluate}\n") + f"gates:\n  - {gate}\n"
    found = problems(text)
    assert len(found) == 1
    assert line in found[0]


def test_retention_belongs_to_the_in_domain_set() -> None:
    other = "    - name: general\n      data: {path: ./general.jsonl}\n"
    found = said(other + "gates:\n  - {metric: retention, set: general, min: 90%}\n")
    assert found == [
        "recipe.yaml:14: gates.0.set: retention is measured on the in-domain set, 'in-domain': evaluate.in_domain"
    ]
    text = GOOD + other + "  in_domain: general\ngates:\n  - {metric: retention, set: general, min: 90%}\n"
    assert parse(text, directory=HERE).gates


# several adapters ---------------------------------------------------------------------------------------------


SEVERAL = GOOD.replace("adapter: ./adapter", "adapters: [{path: ./a}, {path: owner/b, weight: -0.5, revision: v2}]")


def test_several_adapters_with_weights() -> None:
    r = parse(SEVERAL, directory=HERE)
    assert [(s.path, s.revision, w) for s, w in r.weighted_adapters] == [("./a", None, 1.0), ("owner/b", "v2", -0.5)]
    assert parse(dump(r), directory=HERE) == r
    assert recipe().weighted_adapters == ((AdapterSource(path="./adapter"), 1.0),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SEVERAL + "adapter: ./c\n", "adapter: adapters is set too: keep one of the two keys"),
        (SEVERAL.replace("weight: -0.5", "weight: 0"), "adapters.1.weight: 0 leaves this adapter out: remove it"),
        (SEVERAL.replace("weight: -0.5", "weight: .inf"), "adapters.1.weight: "),
        (SEVERAL.replace("weight: -0.5", "wieght: 1.0"), "unknown key, did you mean 'weight'?"),
        (GOOD.replace("adapter: ./adapter", "adapters: []"), "adapter: required key is missing"),
    ],
)
def test_wrong_lists_of_adapters(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, directory=HERE)
    assert says in str(caught.value)
