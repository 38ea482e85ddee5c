"""Recipe section gates: how much loss is acceptable. Rules and units: `requant_eval.gate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from requant.recipe import section_examples
from requant.recipe.fields import AsTuple, Section, Text, fail
from requant.recipe.text_sections import Evaluate
from requant.recipe.yaml_document import KeyPath
from requant_eval import gate

Limit = Annotated[float, Field(allow_inf_nan=False)] | Text


class Gate(Section):
    """One condition for shipping, held against the 95 % interval."""

    model_config = section_examples.GATE

    metric: gate.MetricName = Field(description="What is limited; each is explained in docs/gates.md.")
    set: Text | None = Field(default=None, description="Name of an evaluation set: evaluate.sets.N.name.")
    task: Text | None = Field(default=None, description="With metric task: the name of one of evaluate.tasks.")
    max_drop: Limit | None = Field(
        default=None, description="With metric task: how many points the score may fall below the reference's."
    )
    max: Limit | None = Field(
        default=None, description="Largest good value: a share such as 5%, for kl nats, for perplexity a number."
    )
    min: Limit | None = Field(default=None, description="Smallest good value, for retention and agreement.")
    relative_to: Literal["rtn"] | None = Field(
        default=None, description="rtn: the limit is a share of what rounding to nearest costs."
    )

    def parsed(self) -> gate.Gate:
        """The gate as `requant_eval` evaluates it."""
        most = self.max_drop if self.on_task else self.max
        return gate.make(self.metric, self.on, most=most, least=self.min, relative_to=self.relative_to)

    @property
    def on_task(self) -> bool:
        """Whether it limits the loss on a task."""
        return gate.METRICS[self.metric].of == "task"

    @property
    def on_answers(self) -> bool:
        """Whether it limits how many answers may be lost."""
        return gate.METRICS[self.metric].of == "answers"

    @property
    def on(self) -> str:
        """The name of its set or task."""
        return str(self.task if self.on_task else self.set)

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        kind, needed = ("task", "task") if self.on_task else ("text", "set")
        if getattr(self, needed) is None:
            fail(((needed,), "required key is missing"))
        stray = {"task": ("set", "max", "min"), "text": ("task", "max_drop")}[kind]
        wrong = next((key for key in stray if getattr(self, key) is not None), None)
        if wrong is not None:
            use = "task and max_drop" if self.on_task else "set and max or min"
            fail(((wrong,), f"a gate of metric {self.metric} has no {wrong}: use {use}"))
        try:
            self.parsed()
        except gate.GateError as error:
            fail((("max_drop" if self.on_task and error.key == "max" else error.key,), str(error)))
        return self


Gates = Annotated[tuple[Gate, ...], AsTuple]


def undecidable(gates: Sequence[Gate], evaluate: Evaluate) -> list[tuple[KeyPath, str]]:
    """Gates that the evaluation cannot decide, as (key path, message)."""
    found: list[tuple[KeyPath, str]] = []
    names = [item.name for item in evaluate.sets]
    in_domain = evaluate.in_domain or names[0]
    for i, item in enumerate(gates):
        if item.on_task:
            found += _of_task(i, item, evaluate)
        elif item.set not in names:
            found.append(((i, "set"), f"{item.set!r} is not the name of a set: {', '.join(names)}"))
        elif gate.METRICS[item.metric].in_domain and item.set != in_domain:
            found.append(
                ((i, "set"), f"{item.metric} is measured on the in-domain set, {in_domain!r}: evaluate.in_domain")
            )
        if item.on_answers and not evaluate.answers.prompts:
            found.append(((i, "metric"), f"{item.metric} needs prompts: set evaluate.answers.prompts"))
        if not {"gptq", "healed", "ends"} & {str(name) for name in evaluate.variants}:
            found.append(((i,), "gptq is what ships and is judged: add it to evaluate.variants"))
        if item.relative_to is not None and item.relative_to not in evaluate.variants:
            found.append(((i, "relative_to"), f"{item.relative_to} is not scored: add it to evaluate.variants"))
        for needed in gate.METRICS[item.metric].needs:
            if needed not in evaluate.variants:
                found.append(((i, "metric"), f"{item.metric} compares with {needed}: add it to evaluate.variants"))
        if gate.METRICS[item.metric].needs_kl and not evaluate.kl:
            found.append(((i, "metric"), f"{item.metric} needs evaluate.kl: true"))
    return found


def _of_task(number: int, item: Gate, evaluate: Evaluate) -> list[tuple[KeyPath, str]]:
    """What keeps a gate on a task from being decided."""
    titles = [task.title for task in evaluate.tasks]
    if item.task not in titles:
        known = ", ".join(titles) or "there are none, add it to evaluate.tasks"
        return [((number, "task"), f"{item.task!r} is not the name of a task: {known}")]
    run = evaluate.variants if evaluate.task_variants == "auto" else evaluate.task_variants
    if not {"adapter", "merged"} & {str(name) for name in run}:
        return [((number, "metric"), "task compares with adapter or merged: add one to evaluate.task_variants")]
    if not {"gptq", "healed", "ends"} & {str(name) for name in run}:
        return [((number, "metric"), "gptq is what ships and is judged: add it to evaluate.task_variants")]
    return []
