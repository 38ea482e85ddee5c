"""Recipe section evaluate.tasks: tasks of lm-evaluation-harness, by name or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from requant.recipe import section_examples
from requant.recipe.fields import Positive, Section, Text, absolute, fail

FILES = (".yaml", ".yml")


class Task(Section):
    """One task. A plain string is its name, or the path of its file where it ends in .yaml."""

    model_config = section_examples.TASK

    name: Annotated[Text, Field(max_length=100)] | None = Field(
        default=None,
        description="Task or group of lm-evaluation-harness; with path: what the report and gates call it, default the "
        "file's name.",
    )
    path: Text | None = Field(
        default=None, description="File with a task of lm-evaluation-harness (YAML), relative to the recipe."
    )
    limit: Positive | None = Field(default=None, description="Only the first so many documents of each task.")
    few_shot: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        default=None, description="Worked examples before each question; default: as many as the task says."
    )
    chat: bool = Field(default=False, description="Ask through the tokenizer's chat template.")
    metric: Text | None = Field(
        default=None, description="The metric that is compared and gated; default: the first of the task's own."
    )

    @property
    def title(self) -> str:
        """What the report and gates call it."""
        return self.name or Path(str(self.path)).stem

    def resolve(self, directory: Path) -> Path | None:
        """Absolute `path`; None of a task of the library."""
        return None if self.path is None else absolute(self.path, directory)

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.name is None and self.path is None:
            fail(((), "expected name or path, got neither"))
        if self.path is not None and not self.path.endswith(FILES):
            fail((("path",), f"{self.path!r} does not end in one of {', '.join(FILES)}"))
        return self


def _from_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return {"path" if value.endswith(FILES) else "name": value}


AnyTask = Annotated[Task, BeforeValidator(_from_text, json_schema_input_type=str | Task)]
