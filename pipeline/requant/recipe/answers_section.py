"""Recipe section evaluate.answers: prompts of held-out rows that variants answer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from requant.recipe import section_examples
from requant.recipe.fields import Section


class Answers(Section):
    """Answers side by side: prompts of the in-domain set's rows, asked of adapter, merged model and what ships."""

    model_config = section_examples.ANSWERS

    prompts: Annotated[int, Field(ge=0, le=200)] = Field(
        default=20,
        description="Prompts, spread over the set's rows of chat or of prompt and completion; 0: none. Plain text has "
        "none without begin.",
    )
    begin: Annotated[int, Field(ge=4, le=8192)] | None = Field(
        default=None,
        description="Plain text: a row's first so many tokens are a prompt, and what follows its own answer. Whether "
        "an answer ends is then not judged.",
    )
    new_tokens: Literal["auto"] | Annotated[int, Field(gt=0, le=8192)] = Field(
        default="auto",
        description="Tokens of an answer, at most; auto: 256 on a GPU, 64 on a CPU, half a window at most. An answer "
        "that is cut off there counts as one that does not end.",
    )
