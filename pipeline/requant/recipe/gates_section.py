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
    set: Text = Field(description="Name of an evaluation set: evaluate.sets.N.name.")
    max: Limit | None = Field(
        default=None, description="Largest good value: a share such as 5%, for kl nats, for perplexity a number."
    )
    min: Limit | None = Field(default=None, description="Smallest good value, for retention and agreement.")
    relative_to: Literal["rtn"] | None = Field(
        default=None, description="rtn: the limit is a share of what rounding to nearest costs."
    )

    def parsed(self) -> gate.Gate:
        """The gate as `requant_eval` evaluates it."""
        return gate.make(self.metric, self.set, most=self.max, least=self.min, relative_to=self.relative_to)

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        try:
            self.parsed()
        except gate.GateError as error:
            fail(((error.key,), str(error)))
        return self


Gates = Annotated[tuple[Gate, ...], AsTuple]


def undecidable(gates: Sequence[Gate], evaluate: Evaluate) -> list[tuple[KeyPath, str]]:
    """Gates that the evaluation cannot decide, as (key path, message)."""
    found: list[tuple[KeyPath, str]] = []
    names = [item.name for item in evaluate.sets]
    in_domain = evaluate.in_domain or names[0]
    for i, item in enumerate(gates):
        if item.set not in names:
            found.append(((i, "set"), f"{item.set!r} is not the name of a set: {', '.join(names)}"))
        elif gate.METRICS[item.metric].in_domain and item.set != in_domain:
            found.append(
                ((i, "set"), f"{item.metric} is measured on the in-domain set, {in_domain!r}: evaluate.in_domain")
            )
        if not {"gptq", "healed"} & {str(name) for name in evaluate.variants}:
            found.append(((i,), "gptq is what ships and is judged: add it to evaluate.variants"))
        if item.relative_to is not None and item.relative_to not in evaluate.variants:
            found.append(((i, "relative_to"), f"{item.relative_to} is not scored: add it to evaluate.variants"))
        for needed in gate.METRICS[item.metric].needs:
            if needed not in evaluate.variants:
                found.append(((i, "metric"), f"{item.metric} compares with {needed}: add it to evaluate.variants"))
        if gate.METRICS[item.metric].needs_kl and not evaluate.kl:
            found.append(((i, "metric"), f"{item.metric} needs evaluate.kl: true"))
    return found
