"""Words that a report explains: on hover where they stand, and in a table at the end."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from requant_eval.render.tables import Table

WORDS = {
    "adapter": "the small matrices that the fine-tune trained; as a variant: the base with them beside it, unmerged",
    "base": "the model that the adapter was trained on",
    "calibration": "text that runs through the model while it is quantized; it decides which errors matter",
    "embeddings": "the table that turns tokens into vectors; with the head the two ends of a model",
    "gate": "a limit that you set, which decides whether the checkpoint ships",
    "GPTQ": "a method that rounds weights column by column and corrects the remaining ones",
    "greedily": "always with the most likely next token, so that the same prompt has the same answer",
    "healed": "trained after quantizing to imitate the 16-bit model",
    "held-out": "text that neither training nor calibration has seen",
    "in-domain": "text of the kind that the fine-tune is for",
    "interval": "where the true value lies with 95 % confidence, over texts of this kind",
    "KL": "KL divergence: how far the probabilities of two models' next tokens are apart, in nats; 0 is the same",
    "merged": "the adapter added into the base's weights: one ordinary 16-bit model",
    "perplexity": "of how many equally likely tokens a model chooses the next one, on average; lower is better",
    "quantized": "stored with few bits a weight, 4 instead of 16, and so smaller and a little wrong",
    "retention": "the share of what the adapter gained over the base that is kept",
    "rtn": "rounding to nearest, without calibration; the control that a method has to beat",
    "script": "a writing system, such as Latin or Cyrillic",
    "stop token": "the token with which a model says that its answer is over",
    "token": "a word or a part of one; models read and write tokens",
    "top-1": "the token that a model finds most likely",
    "variant": "one of the models that are compared: base, adapter, merged, rtn, gptq and others",
}
_WORD = re.compile(
    rf"(?<![\w`/.\-])({'|'.join(sorted(map(re.escape, WORDS), key=len, reverse=True))})(?![\w`/\-])", re.IGNORECASE
)
_BY_NAME = {word.lower(): meaning for word, meaning in WORDS.items()}


def explained(text: str) -> Markup:
    """A text as HTML, in which words of the glossary are explained on hover, each where it first stands."""
    seen: set[str] = set()

    def abbreviation(found: re.Match[str]) -> str:
        word = found[0].lower()
        if word in seen:
            return found[0]
        seen.add(word)
        return f'<abbr title="{escape(_BY_NAME[word])}">{found[0]}</abbr>'

    return Markup(_WORD.sub(abbreviation, str(escape(text))))


def glossary_table() -> Table:
    """Every word with its meaning."""
    return Table(title="Glossary", columns=("word", "meaning"), rows=tuple(WORDS.items()), text=2)
