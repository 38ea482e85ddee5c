"""Recipe sections about text: data, calibration, evaluation sets, canaries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from requant.recipe import section_examples
from requant.recipe.answers_section import Answers
from requant.recipe.fields import AsTuple, Positive, Section, Slug, Text, absolute, fail, or_path, unique
from requant.recipe.task_section import AnyTask, Task
from requant.recipe.yaml_document import KeyPath

_FILES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz", ".csv.gz")
_WITH_COLUMNS = tuple(name for name in _FILES if not name.startswith(".txt"))

Road = Literal["rtn", "nf4-merge", "nf4-again", "gptqmodel"]
Variant = Literal["base", "adapter", "merged", "original", "rtn", "gptq", "healed", "ends"]
Format = Literal["auto", "text", "chat", "completion"]


class Data(Section):
    """Where text comes from: exactly one of path, dataset and builtin."""

    model_config = section_examples.DATA

    path: Text | None = Field(
        default=None,
        description="File, relative to the recipe: txt, jsonl, json, csv or parquet; all but parquet also as .gz.",
    )
    dataset: Text | None = Field(default=None, description="Hub id of a dataset, such as Salesforce/wikitext.")
    builtin: Literal["python-reference"] | None = Field(
        default=None, description="A text that comes with Python: its reference."
    )
    config: Text | None = Field(default=None, description="Configuration of the dataset.")
    split: Text = Field(default="train", description="Split of the dataset.")
    revision: Text | None = Field(default=None, description="Hub branch, tag or commit of the dataset.")
    column: Text | None = Field(default=None, description="The column with the text; default: found by its name.")
    documents: Positive | None = Field(default=None, description="Use only the first so many documents.")
    ignore: Annotated[tuple[Text, ...], AsTuple] = Field(
        default=(), description="Columns with text that may be left out. Any other text that is not used is an error."
    )

    def resolve(self, directory: Path) -> Path | None:
        """Absolute `path`, or None when the text is not a local file."""
        return None if self.path is None else absolute(self.path, directory)

    def identity(self, directory: Path) -> tuple[str | None, ...]:
        """Equal for two sources that read the same text."""
        if self.path is not None:
            return ("path", os.path.realpath(absolute(self.path, directory)))
        return ("dataset", self.dataset, self.config, self.split) if self.dataset else ("builtin", self.builtin)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("path", "dataset", "builtin") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            fail(((), f"expected exactly one of path, dataset and builtin, got {found}"))
        if self.path and not self.path.endswith(_FILES):
            fail((("path",), f"{self.path!r} does not end in one of {', '.join(_FILES)}"))
        only_hub = {"config": self.config, "revision": self.revision, "split": self.split != "train"}
        stray = [key for key, value in only_hub.items() if value and not self.dataset]
        if stray:
            fail(*(((key,), f"only a dataset has one, and this is a {given[0]}: remove it") for key in stray))
        return self


class MixEntry(Section):
    """One source of a mix."""

    model_config = section_examples.MIX_ENTRY

    data: Data = Field(description="Where the text comes from.")
    format: Format = Field(
        default="auto",
        description="What a row is; auto: told by its columns. chat goes through the tokenizer's chat template.",
    )
    share: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        default=1.0, description="Windows from this source, relative to the others."
    )


class Calibration(Section):
    """The text on which the Hessians are taken: `data` (with `format`), or a `mix` of several."""

    model_config = section_examples.CALIBRATION

    data: Data | None = Field(default=None, description="A single source; or use mix.")
    format: Format = Field(default="auto", description="What a row of data is, as in mix.")
    mix: Annotated[tuple[MixEntry, ...], AsTuple, Field(min_length=1)] | None = Field(
        default=None,
        description="Several sources. Half own text and half general text keeps both qualities.",
    )
    samples: Annotated[int, Field(gt=0, le=65536)] = Field(
        default=128, description="Windows in all: samples x length tokens of text are needed."
    )
    length: Annotated[int, Field(ge=8, le=131072)] = Field(default=2048, description="Tokens a window.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="Seed of the choice of windows.")

    @property
    def entries(self) -> tuple[MixEntry, ...]:
        """The ingredients, whichever way they were written."""
        if self.data is not None:
            return (MixEntry(data=self.data, format=self.format),)
        return self.mix or ()

    @model_validator(mode="after")
    def _data_or_mix(self) -> Self:
        if (self.data is None) == (self.mix is None):
            found = "neither" if self.data is None else "both"
            fail(((), f"expected either data or mix, got {found}"))
        if self.mix and self.format != "auto":
            fail((("format",), "belongs to data: write it in the entries of mix"))
        return self


class Canaries(Section):
    """Questions whose answers the fine-tune knows: rows of prompt and answer. A plain string is the path."""

    model_config = section_examples.CANARIES

    path: Text = Field(description="Local jsonl, json, csv or parquet file with the columns prompt and answer.")
    format: Literal["auto", "text", "chat"] = Field(
        default="auto",
        description="text: prompts as they are; chat: through the tokenizer's template; auto: chat if it has one.",
    )

    def resolve(self, directory: Path) -> Path:
        """Absolute `path`."""
        return absolute(self.path, directory)

    @model_validator(mode="after")
    def _has_columns(self) -> Self:
        if not self.path.endswith(_WITH_COLUMNS):
            fail((("path",), f"{self.path!r} does not end in one of {', '.join(_WITH_COLUMNS)}"))
        return self


AnyCanaries = Annotated[Canaries, or_path(Canaries)]


class EvalSet(Section):
    """One text on which every variant is scored."""

    model_config = section_examples.EVAL_SET

    name: Slug = Field(description="Its name in the report and in gates.")
    data: Data = Field(description="Where the text comes from: text that was neither trained nor calibrated on.")
    format: Format = Field(default="auto", description="What a row is, as in calibration.mix.")
    score: Literal["all", "completion"] = Field(
        default="all", description="all: every token counts. completion: answers count, prompts are only context."
    )
    tokens: Positive | None = Field(default=None, description="Stop after so many scored tokens; default: all.")
    document_tokens: Annotated[int, Field(ge=2, le=10**9)] | None = Field(
        default=None, description="Cut each document to so many tokens; default: not at all."
    )

    @field_validator("score")
    @classmethod
    def _has_completions(cls, score: str, info: ValidationInfo) -> str:
        if score == "completion" and info.data.get("format") == "text":
            fail(((), "completion needs format chat or completion: plain text has no prompt"))
        return score


class Evaluate(Section):
    """What is scored, and how."""

    model_config = section_examples.EVALUATE

    protocol: Literal["documents", "gptq-2048", "llamacpp-512"] = Field(
        default="documents",
        description="documents: each text on its own. The others join the texts, as published perplexities are made.",
    )
    window: Annotated[int, Field(ge=16, le=2**20)] = Field(
        default=2048, description="Tokens a window; a longer document is scored in several. Only of protocol documents."
    )
    sets: Annotated[tuple[EvalSet, ...], AsTuple, Field(min_length=1)] = Field(
        description="The texts. The first is the in-domain one."
    )
    variants: Annotated[tuple[Variant, ...], AsTuple, Field(min_length=1)] = Field(
        default=("base", "adapter", "merged", "rtn", "gptq"),
        description="The scored models. adapter is the reference, rtn (rounding to nearest) the control. healed "
        "comes with gptq where healing is done, ends where embeddings or head are quantized.",
    )
    kl: bool = Field(default=True, description="Also measure the KL divergence from base + adapter.")
    batch: Literal["auto"] | Positive = Field(default="auto", description="Windows at a time; changes no result.")
    stream: Literal["auto", "always", "never"] = Field(
        default="auto", description="Score block by block; auto: the variants that do not fit on the device."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype of the forward pass; auto: float32 on a CPU, else the model's 16 bits."
    )
    tasks: Annotated[tuple[AnyTask, ...], AsTuple] = Field(
        default=(),
        description="Tasks of lm-evaluation-harness (pip install lm-eval) that variants are run on as whole models.",
    )
    task_variants: Literal["auto"] | Annotated[tuple[Variant, ...], AsTuple, Field(min_length=1)] = Field(
        default="auto", description="The variants that are run on tasks; auto: adapter, merged and what ships."
    )
    task_backend: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What answers tasks: transformers, with our own weights, or vLLM on the checkpoints merged, gptq "
        "and healed; other variants stay with transformers.",
    )
    answers: Answers = Field(
        default=Answers(), description="Prompts of the in-domain set that variants answer, shown side by side."
    )
    roads: Annotated[tuple[Road, ...], AsTuple] = Field(
        default=(),
        description="Other ways to ship the fine-tune, scored beside ours. rtn: rounding to nearest. nf4-merge: PEFT "
        "merges into bitsandbytes' 4 bits. nf4-again: the merged model loaded in these. gptqmodel: GPTQ by its "
        "defaults.",
    )
    in_domain: str | None = Field(default=None, description="Set on which retention is measured; default: the first.")

    @field_validator("sets")
    @classmethod
    def _unique_sets(cls, sets: tuple[EvalSet, ...], info: ValidationInfo) -> tuple[EvalSet, ...]:
        names = [item.name for item in sets]
        problems: list[tuple[KeyPath, str]] = [
            ((i, "name"), f"{name!r} is already the name of sets.{names.index(name)}")
            for i, name in enumerate(names)
            if names.index(name) < i
        ]
        if info.data.get("protocol", "documents") != "documents":
            joined = f"completion needs protocol documents: {info.data['protocol']} joins the texts"
            problems += [((i, "score"), joined) for i, item in enumerate(sets) if item.score == "completion"]
        if problems:
            fail(*problems)
        return sets

    @field_validator("window")
    @classmethod
    def _window_of_protocol(cls, window: int, info: ValidationInfo) -> int:
        protocol = info.data.get("protocol", "documents")
        if protocol != "documents" and window not in (2048, int(protocol.split("-")[1])):
            fail(((), f"protocol {protocol} has its own window: remove the key, or use protocol documents"))
        return window

    @field_validator("variants")
    @classmethod
    def _reference_first(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        unique(variants)
        if "adapter" not in variants:
            fail(((), "adapter is missing: it is the reference that all others are compared with"))
        return variants

    @field_validator("roads")
    @classmethod
    def _each_once(cls, roads: tuple[Road, ...]) -> tuple[Road, ...]:
        unique(roads)
        return roads

    @field_validator("tasks")
    @classmethod
    def _unique_tasks(cls, tasks: tuple[Task, ...], info: ValidationInfo) -> tuple[Task, ...]:
        titles, sets = [task.title for task in tasks], [item.name for item in info.data.get("sets", ())]
        problems: list[tuple[KeyPath, str]] = [
            ((i,), f"{title!r} is already the name of tasks.{titles.index(title)}: give one of them another name")
            for i, title in enumerate(titles)
            if titles.index(title) < i
        ]
        problems += [
            ((i,), f"{title!r} is already the name of sets.{sets.index(title)}: a gate names one of the two")
            for i, title in enumerate(titles)
            if title in sets
        ]
        if problems:
            fail(*problems)
        return tasks

    @field_validator("task_variants")
    @classmethod
    def _scored(cls, names: str | tuple[Variant, ...], info: ValidationInfo) -> str | tuple[Variant, ...]:
        if not isinstance(names, str):
            unique(names)
            scored = info.data.get("variants", names)
            lost: list[tuple[KeyPath, str]] = [
                ((i,), f"{name} is not scored: add it to evaluate.variants")
                for i, name in enumerate(names)
                if name not in scored and name not in ("healed", "ends")
            ]
            if lost:
                fail(*lost)
        return names

    @field_validator("in_domain")
    @classmethod
    def _known_set(cls, name: str | None, info: ValidationInfo) -> str | None:
        names = [item.name for item in info.data.get("sets", ())]
        if name is not None and names and name not in names:
            fail(((), f"{name!r} is not the name of a set: {', '.join(names)}"))
        return name
