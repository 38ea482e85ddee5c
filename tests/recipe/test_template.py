"""`requant.recipe.template`: the starter is valid; bad adapters get useful messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from requant.errors import InputError
from requant.recipe import Recipe, dump, parse, yaml_document
from requant.recipe.model_sections import Nf4
from requant.recipe.template import starter

COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def adapter(name: str = "my-adapter", **config: Any) -> str:
    Path(name).mkdir(exist_ok=True)
    values = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["v_proj", "q_proj"],
        **config,
    }
    (Path(name) / "adapter_config.json").write_text(json.dumps(values))
    return name


def base(name: str, quantization: Any = None) -> str:
    Path(name).mkdir(exist_ok=True)
    extra = {} if quantization is None else {"quantization_config": quantization}
    (Path(name) / "config.json").write_text(json.dumps({"model_type": "llama", **extra}))
    return name


def recipe(name: str) -> Recipe:
    return parse(starter(name), directory=Path.cwd())


def refusal(name: str) -> str:
    with pytest.raises(InputError) as caught:
        starter(name)
    return str(caught.value)


def test_16_bit_hub_base_gets_an_explicit_nf4_section() -> None:
    text = starter(adapter(base_model_name_or_path="meta-llama/Llama-3.1-8B", revision=COMMIT))
    assert "adapter_config.json does not record how the base was quantized" in text
    assert "# The adapter: LORA, r 16, alpha 32 on q_proj, v_proj\n" in text
    r = parse(text, directory=Path.cwd())
    assert r.base.nf4 == Nf4(quant_type="nf4", double_quant=True)
    assert (r.base.model, r.base.revision) == ("meta-llama/Llama-3.1-8B", COMMIT)
    assert r.adapter.path == "./my-adapter"
    assert r.name == "my-adapter-w4g128"


@pytest.mark.parametrize(
    "name",
    [
        "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
        "unsloth/Qwen3-8B-unsloth-bnb-4bit",
        "someone/model-NF4",
        "a/b-4bit",
    ],
)
def test_a_4_bit_name_is_a_pre_quantized_base(name: str) -> None:
    text = starter(adapter(base_model_name_or_path=name))
    r = parse(text, directory=Path.cwd())
    assert r.base.nf4 == "auto"
    assert r.base.model == name
    assert "does not record" not in text


def test_the_16_bit_twin_of_an_unsloth_base_is_offered() -> None:
    text = starter(adapter(base_model_name_or_path="unsloth/Qwen3-8B-unsloth-bnb-4bit"))
    assert "# original: unsloth/Qwen3-8B " in text


def test_config_json_of_a_local_base_beats_its_name() -> None:
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert recipe(adapter(base_model_name_or_path=base("plain", four))).base.nf4 == "auto"
    full = recipe(adapter(base_model_name_or_path=base("was-bnb-4bit")))
    assert isinstance(full.base.nf4, Nf4)
    assert full.base.model == "./was-bnb-4bit"


def test_a_path_from_another_machine_is_marked() -> None:
    text = starter(adapter(base_model_name_or_path="/content/drive/base", revision="main"))
    assert "  model: /content/drive/base   # FIXME: not found here" in text
    assert parse(text, directory=Path.cwd()).base.revision is None


def test_every_key_of_the_schema_is_in_the_starter() -> None:
    text = starter(adapter(base_model_name_or_path="gpt2"))
    optional = {
        "config",
        "revision",
        "column",
        "documents",
        "builtin",
        "document_tokens",
        "path",
        "ignore",
        "in_domain",
    }

    def keys(value: Any) -> set[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return (set(value) if isinstance(value, dict) else set()).union(*map(keys, inner))

    schema = keys(yaml_document.read(dump(parse(text, directory=Path.cwd())), "x").data)
    assert {key for key in schema - optional if f"{key}:" not in text and key not in text} == set()


def test_every_default_in_the_starter_is_the_default() -> None:
    r = recipe(adapter(base_model_name_or_path="gpt2"))
    bare = parse(
        "name: a\nbase: {model: gpt2}\nadapter: ./a\ncalibration: {data: {path: a.txt}}\n"
        "evaluate: {sets: [{name: a, data: {path: b.txt}}]}\n",
        directory=Path.cwd(),
    )
    assert (r.merge, r.quantize, r.output, r.device) == (bare.merge, bare.quantize, bare.output, bare.device)
    assert (r.calibration.samples, r.calibration.length) == (
        bare.calibration.samples,
        bare.calibration.length,
    )
    assert r.evaluate.model_copy(update={"sets": bare.evaluate.sets}) == bare.evaluate


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: "${" not in text and text.strip("/. ")
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=WORDS, revision=st.none() | WORDS, target=WORDS)
def test_any_base_name_survives(model: str, revision: str | None, target: str) -> None:
    name = adapter(base_model_name_or_path=model, revision=revision, target_modules=[target])
    assert recipe(name).base.model in (model, f"./{model}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"r": 8}',
            "base_model_name_or_path is missing: expected the hub id or directory of the model that was "
            "fine-tuned: write it there",
        ),
        (
            '{"base_model_name_or_path": 3}',
            "base_model_name_or_path is 3: expected the hub id or directory of the model that was "
            "fine-tuned: write it there",
        ),
        ("[]", "expected a JSON object, got list: save the file again from PEFT"),
    ],
)
def test_bad_adapter_config(content: str, message: str) -> None:
    (Path(adapter()) / "adapter_config.json").write_text(content)
    assert refusal("my-adapter") == f"my-adapter/adapter_config.json: {message}"


def test_invalid_json_names_the_line() -> None:
    (Path(adapter()) / "adapter_config.json").write_text('{\n"r": }')
    assert refusal("my-adapter") == (
        "my-adapter/adapter_config.json:2: not valid JSON: Expecting value (column 6): save the file again from PEFT"
    )


def test_bad_places(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "file").touch()
    (here / "out").mkdir()
    adapter("out/checkpoint-120")
    adapter("out/checkpoint-240")
    assert refusal("empty") == (
        "empty: no adapter_config.json; expected a directory written by PEFT's save_pretrained; it is empty"
    )
    assert refusal("file") == "file: a file: expected the directory that holds adapter_config.json"
    assert refusal("./out") == (
        "./out: no adapter_config.json here, but in checkpoint-240 (the latest), checkpoint-120: give one of these "
        "directories, such as out/checkpoint-240"
    )
    for name in ("./nope", "nope", "a/b/c", "../x"):
        expected = f"{name}: no such directory: expected a PEFT directory or a hub id (owner/name)"
        assert refusal(name).startswith(expected)
    assert refusal("./emty").endswith(": did you mean ./empty?")


def test_hub_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    file = Path(adapter("cache", base_model_name_or_path="gpt2")) / "adapter_config.json"
    asked: list[tuple[str, str]] = []

    def download(repo: str, name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("the base is not in the cache")
        asked.append((repo, name))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    r = recipe("owner/adapter")
    assert asked == [("owner/adapter", "adapter_config.json")]
    assert r.adapter.path == "owner/adapter"
    assert r.name == "adapter-w4g128"


def test_unreachable_hub_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(repo: str, name: str) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert refusal("owner/adapter") == (
        "owner/adapter: neither a directory here nor an adapter that can be read from the hub (no network): "
        "check the name, the network and, for a private repository, HF_TOKEN"
    )


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quantization_config.quant_method is 'gptq': expected bitsandbytes 4-bit, MXFP4, FP8 or a 16-bit model: use "
            "the model that the adapter was trained on",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "quantization_config has no load_in_4bit: true: 8-bit (LLM.int8) bases are not supported: use a "
            "4-bit or a 16-bit model",
        ),
    ],
)
def test_bases_that_cannot_be_used(quantization: dict[str, Any], message: str) -> None:
    name = adapter(base_model_name_or_path=base("base", quantization))
    assert refusal(name) == f"base/config.json: {message}"


# --- revision, widths, tokenizer, another directory ---


def hub_with(monkeypatch: pytest.MonkeyPatch, revisions: tuple[str, ...]) -> list[str | None]:
    """A hub whose models have these revisions and config.json of no use; the revisions that were asked for."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    asked: list[str | None] = []

    def model_info(self: Any, repo: str, *, revision: str | None = None, timeout: float) -> SimpleNamespace:
        asked.append(revision)
        if revision not in (None, *revisions):
            raise RevisionNotFoundError("404", response=httpx_response())
        return SimpleNamespace(sha=COMMIT)

    def download(repo: str, name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def httpx_response() -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize("revision", ["unsloth", "0e9e39f", COMMIT])
def test_a_revision_that_the_base_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    hub_with(monkeypatch, ())
    text = starter(adapter(base_model_name_or_path="unsloth/tinyllama", revision=revision))
    assert parse(text, directory=Path.cwd()).base.revision is None
    assert f"# revision: the adapter records '{revision}'; left out, since the base has no such branch" in text


def test_a_revision_that_the_base_has_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub_with(monkeypatch, ("release-2",))
    assert recipe(adapter(base_model_name_or_path="ann/base", revision="release-2")).base.revision == "release-2"
    assert asked == ["release-2"]


@pytest.mark.parametrize(("revision", "kept"), [("unsloth", False), ("0e9e39f", False), ("main", True), (COMMIT, True)])
def test_without_a_hub_only_a_whole_commit_or_main_is_kept(revision: str, kept: bool) -> None:
    text = starter(adapter(base_model_name_or_path="unsloth/tinyllama-bnb-4bit", revision=revision))
    assert parse(text, directory=Path.cwd()).base.revision == (revision if kept else None)
    assert ("left out, since the hub could not be asked" in text) is not kept


def test_the_revision_of_a_local_base_is_left_out() -> None:
    base("plain")
    name = adapter(base_model_name_or_path="plain", revision=COMMIT)
    assert recipe(name).base.revision is None
    assert f"# revision: the adapter records '{COMMIT}'; left out, since only a hub id has one" in starter(name)


@pytest.mark.parametrize(
    ("widths", "size", "says"),
    [
        ({4096, 14336}, 128, "smaller is better and larger on disk\n"),
        ({576, 1536}, 64, "128 does not divide the base's 576 inputs"),
        ({128, 96}, 32, "128 does not divide the base's 96 inputs"),
        ({4096, 100}, -1, "128 does not divide the base's 100 inputs"),
        (set(), 128, "must divide the base's widths (not known here)"),
    ],
)
def test_the_group_divides_the_widths(widths: set[int], size: int, says: str) -> None:
    base("plain")
    text = starter(adapter(base_model_name_or_path="plain"), widths=lambda directory: widths)
    r = parse(text, directory=Path.cwd())
    assert r.quantize.group_size == size
    assert says in text
    assert r.name == ("my-adapter-w4" if size < 0 else f"my-adapter-w4g{size}")


def test_a_missing_tokenizer_is_marked(here: Path) -> None:
    base("plain")
    name = adapter(base_model_name_or_path="plain")
    assert "# FIXME: no tokenizer files beside this model or the adapter" in starter(name)
    (here / "plain" / "tokenizer.json").write_text("{}")
    assert "no tokenizer files" not in starter(name)


def test_local_paths_are_seen_from_where_the_recipe_is_saved(here: Path) -> None:
    base("plain")
    (here / "recipes" / "deep").mkdir(parents=True)
    name = adapter(base_model_name_or_path="plain")
    text = starter(name, directory="recipes/deep")
    r = parse(text, directory=here / "recipes" / "deep")
    assert (r.base.model, r.adapter.path) == ("../../plain", "../../my-adapter")
    assert r.adapter.resolve(r.directory) == str(here / "my-adapter")
    assert starter(Path(name)) == starter(name)


def test_a_config_with_quantization_config_null_is_16_bit(here: Path) -> None:
    base("plain")
    (here / "plain" / "config.json").write_text('{"model_type": "llama", "quantization_config": null}')
    assert isinstance(recipe(adapter(base_model_name_or_path="plain")).base.nf4, Nf4)


def test_a_base_that_is_no_model_is_marked(here: Path) -> None:
    name = adapter(base_model_name_or_path="./other")
    adapter("other", base_model_name_or_path="ann/base")
    text = starter(name)
    assert "# FIXME: an adapter's directory (adapter_config.json" in text
    assert parse(text, directory=here).base.model == "./other"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "base/config.json:1: not valid JSON: "),
        ('{"quantization_config": 3}', "base/config.json: quantization_config is 3, expected an object: download"),
        ('{"quantization_config": []}', "base/config.json: quantization_config is [], expected an object: download"),
        (
            '{"text_config": {"quantization_config": "x"}}',
            "base/config.json: quantization_config is 'x', expected an object",
        ),
    ],
)
def test_a_config_of_the_base_that_cannot_be_read(here: Path, content: str, says: str) -> None:
    base("base")
    (here / "base" / "config.json").write_text(content)
    said = refusal(adapter(base_model_name_or_path="base"))
    assert said.startswith(says)
    assert said.endswith("download the file again")


def lines_for_editors(text: str) -> list[str]:
    """Comments that a YAML language server obeys."""
    return [line for line in text.splitlines() if re.match(r"^#\s+yaml-language-server\s*:", line)]


def test_the_line_for_editors_is_written_where_a_schema_will_be(here: Path) -> None:
    name = adapter(base_model_name_or_path="gpt2")
    assert not lines_for_editors(starter(name)), "without the file an editor reports an error"
    text = starter(name, for_editors=True)
    assert lines_for_editors(text) == [text.splitlines()[0]] == ["# yaml-language-server: $schema=requant.schema.json"]
