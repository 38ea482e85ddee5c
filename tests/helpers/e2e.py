"""A small project for the tests of run, command line and bad input.

Real file formats, real libraries.

A random two-layer Llama (hidden 64, intermediate 128, 300 tokens) saved in 4 bits by bitsandbytes through
transformers, a LoRA adapter trained and saved by PEFT (alpha != r), a byte-level BPE tokenizer, and texts from
Python's own help topics.
A test module takes the fixtures with `pytest_plugins = ("e2e",)`. PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from requant import recipe as recipes
from requant.recipe import Recipe

VOCABULARY = 300
LENGTH = 64
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = ("base", "adapter", "merged", "original", "rtn", "gptq")
RECIPE: dict[str, Any] = {
    "name": "pico",
    "base": {"model": "./base", "original": "./original"},
    "adapter": "./adapter",
    "merge": {"dtype": "float32"},
    "quantize": {"bits": 4, "group_size": 32},
    "calibration": {"data": {"path": "./train.jsonl"}, "samples": 8, "length": LENGTH},
    "evaluate": {
        "window": LENGTH,
        "sets": [
            {"name": "in-domain", "data": {"path": "./heldout.jsonl"}, "document_tokens": 32},
            {"name": "general", "data": {"path": "./general.jsonl"}, "document_tokens": 24},
        ],
        "variants": list(ALL),
    },
    "device": "cpu",
}


# --- building ---


def texts() -> dict[str, list[str]]:
    """Three disjoint sets of documents: two out of Python's help topics, one of numbers."""
    from pydoc_data.topics import topics

    documents = [topics[name][:800] for name in sorted(topics) if len(topics[name]) > 800]
    general = [" ".join(str((7 * i + j) ** 3 % 9973) for j in range(40)) for i in range(20)]
    return {"train": documents[:20], "heldout": documents[20:44], "general": general}


def write_rows(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tokenizer(out: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts()["train"], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(out)


def make_pieces(out: Path, count: int = 512) -> None:
    """A tokenizer of sentencepiece's BPE as Gemma's tokenizer.json has it: pieces, and bytes for what is none."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=count - 263, show_progress=False)
    trained.train_from_iterator([text.replace(" ", "▁") for text in texts()["train"]], trainer)
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    specials = ["<pad>", "</s>", "<s>", "<unk>", "<start>", "<end>", "\n\n"]
    every = list(dict.fromkeys([*specials, *(f"<0x{i:02X}>" for i in range(256)), *pieces]))
    vocabulary = {piece: i for i, piece in enumerate(every)}
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        if piece not in specials
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(specials[:6])
    tokenizer.add_tokens(["\n\n"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(out)


def make_model(out: Path, *, hidden: int = 64, layers: int = 2, tied: bool = False, seed: int = 0) -> None:
    """A 16-bit Llama with weights large enough that its predictions differ from token to token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=1, initializer_range=0.08,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    make_tokenizer(out)


def make_nf4(original: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        original, dtype=torch.bfloat16, quantization_config=settings, device_map={"": "cpu"}
    )
    model.save_pretrained(out)
    for file in original.glob("tokenizer*"):
        shutil.copy(file, out)


def make_adapter(original: Path, out: Path, *, seed: int = 1) -> None:
    """LoRA on every linear, alpha 12 at rank 8, trained a little so that it gains.

    alpha != rank: a forgotten scaling shows.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules=list(LINEARS), task_type="CAUSAL_LM"))
    ids = AutoTokenizer.from_pretrained(original)("\n".join(texts()["train"]))["input_ids"]
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        tuned(input_ids=windows[:32], labels=windows[:32]).loss.backward()
        optimizer.step()
    tuned.save_pretrained(out)
    edit_json(out / "adapter_config.json", base_model_name_or_path=str(out.parent / "base"))


def make_project(out: Path, **model: Any) -> Path:
    """original/, base/ (NF4), adapter/, three texts and recipe.yaml in `out`."""
    make_model(out / "original", **model)
    make_nf4(out / "original", out / "base")
    make_adapter(out / "original", out / "adapter")
    for name, documents in texts().items():
        write_rows(out / f"{name}.jsonl", [{"text": text} for text in documents])
    write_recipe(out)
    return out


def copied(project: Path, to: Path, *parts: str) -> Path:
    """A copy of the project whose `parts` are real copies, to be damaged; the rest is linked."""
    to.mkdir(parents=True)
    for item in project.iterdir():
        if item.name == "runs":
            continue
        if item.name in parts and item.is_dir():
            shutil.copytree(item, to / item.name)
        elif item.name in parts or item.name == "recipe.yaml":
            shutil.copy(item, to / item.name)
        else:
            (to / item.name).symlink_to(item, target_is_directory=item.is_dir())
    return to


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=1))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> None:
    """Rewrite one safetensors file; `change` edits the dict in place or returns another."""
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


# --- recipes ---


def changed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """RECIPE with dotted keys replaced; None removes a key."""
    document = copy.deepcopy(RECIPE)
    for key, value in changes.items():
        *path, last = key.split(".")
        section: Any = document
        for step in path:
            section = section[int(step)] if isinstance(section, list) else section.setdefault(step, {})
        if value is None:
            section.pop(last)
        else:
            section[int(last) if isinstance(section, list) else last] = value
    return document


def write_recipe(project: Path, changes: Mapping[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
    with (project / name).open("w") as file:
        YAML(typ="safe").dump(changed(changes or {}), file)
    return project / name


def recipe(project: Path, out: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The project's recipe, running into `out`/pico."""
    document = changed({"output.dir": str(out)} | dict(changes or {}))
    return recipes.parse(json.dumps(document), directory=project)


# --- what is on disk ---


def digests(directory: Path, pattern: str = "*") -> dict[str, str]:
    """Name -> sha256 of every file directly in `directory` that matches."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.glob(pattern)) if f.is_file()}


def times(directory: Path, *, but: tuple[str, ...] = ("log.txt", "events.jsonl", "recipe.yaml")) -> dict[str, int]:
    """Relative path -> modification time of every file that not every run writes."""
    files = (f for f in directory.rglob("*") if f.is_file() and str(f.relative_to(directory)) not in but)
    return {str(f.relative_to(directory)): f.stat().st_mtime_ns for f in files if f.name != ".digests.json"}


def visible(directory: Path) -> set[str]:
    """What a user sees in a run directory (nothing when there is none)."""
    return {f.name for f in directory.iterdir() if not f.name.startswith(".")} if directory.exists() else set()


# --- killing ---


class _Killer:
    """A silent Watcher that ends the process without cleaning up, at step `at` of `stage`, the `count`-th time.

    0: as the stage begins.
    """

    def __init__(self, stage: str, at: int, count: int = 1) -> None:
        self.wanted, self.at, self.count, self.now = stage, at, count, ""

    def stage(self, name: str, *, done: bool) -> None:
        self.now = name
        self.progress(0, 0)

    def doing(self, text: str) -> None:
        """Of no interest here."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.count -= (self.now, done) == (self.wanted, self.at)
        if not self.count:
            os.kill(os.getpid(), signal.SIGKILL)

    def warn(self, text: str) -> None:
        """Of no interest here."""


def run_and_die(project: Path, out: Path, changes: dict[str, Any], when: str) -> None:
    """Run in this process until `when`: "stage:step", or "rename:n".

    rename:n is just before the n-th rename below `out`.
    """
    from requant.quantize import background_writer
    from requant.run.observer import Watcher

    background_writer.BEHIND = 0  # each block is told of before the next is on its way
    stage, step = when.split(":")
    watcher: Any = Watcher()
    if stage == "rename":
        _die_at_rename(out, int(step))
    else:
        watcher = _Killer(stage, int(step))
    run(project, out, changes, watcher=watcher)


def sweep_and_die(file: Path, settings: dict[str, list[Any]], when: str, count: int) -> None:
    """Sweep in this process until "stage:step" comes for the `count`-th time."""
    from requant.quantize import background_writer
    from requant.run.sweep import sweep

    background_writer.BEHIND = 0
    stage, step = when.split(":")
    with one_thread():
        sweep(file, settings, watcher=cast(Any, _Killer(stage, int(step), count)))


def killed_sweep(file: Path, settings: dict[str, list[Any]], when: str, count: int) -> int:
    """`sweep_and_die` in a process of its own; its exit code."""
    return _exit_code(sweep_and_die, (file, settings, when, count), when)


def _die_at_rename(out: Path, n: int) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "os.rename" and os.fspath(arguments[1]).startswith(str(out)):
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread, so that sums have one order: what is compared bit for bit needs it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(project: Path, out: Path, changes: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Run the project's recipe in this process, on one thread, into `out`/pico: the Outcome."""
    from requant.run import runner as runs

    with one_thread():
        return runs.run(recipe(project, out, changes), **options)


def killed_run(project: Path, out: Path, when: str, changes: dict[str, Any] | None = None) -> int:
    """`run_and_die` in a process of its own; its exit code, -SIGKILL if it died as asked."""
    return _exit_code(run_and_die, (project, out, changes or {}, when), when)


def _exit_code(target: Callable[..., None], arguments: tuple[Any, ...], when: str) -> int:
    process = forks().Process(target=target, args=arguments)
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"the run did not reach {when} in two minutes")
    return int(process.exitcode)


@functools.cache
def forks() -> Any:
    """Processes forked from one that has already imported everything, and has no threads."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["requant.run", "peft", "bitsandbytes", "transformers.models.llama.modeling_llama"])
    return context


# --- fixtures ---


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unharmed project; tests only read it."""
    with one_thread():
        return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit model with its tokenizer; tests only read it."""
    out = tmp_path_factory.mktemp("model")
    make_model(out)
    return out


@pytest.fixture(scope="session")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` in 4 bits, groups of 32, rounded to nearest; tests only read it."""
    from helpers import pico
    from requant.numerics.grid import Grid

    out = tmp_path_factory.mktemp("packed") / "gptq"
    pico.packed(source, out, Grid(4, 32), dtype=torch.bfloat16)
    return out


@pytest.fixture(scope="session")
def finished(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a completed run of the project's recipe; tests only read it."""
    return Path(run(project, tmp_path_factory.mktemp("finished")).path)


@pytest.fixture
def ran(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run directory's parent, for a test to go on with."""
    shutil.copytree(finished, tmp_path / "runs" / finished.name)
    return tmp_path / "runs"
