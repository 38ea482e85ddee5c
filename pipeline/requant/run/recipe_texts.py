"""Texts of a recipe: tokenizer, windows of calibration and healing, evaluation sets."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from torch import Tensor

from requant.data import healing_text, overlap, packing
from requant.data import tokenizer as tokenizer_files
from requant.data.documents import TextSource, TokenDocument, read_texts, sample_answers, tokenize
from requant.data.duplicates import same_text
from requant.data.healing_text import HealingText
from requant.data.tokenizer import adds_bos
from requant.errors import InputError
from requant.evaluate import adapter_probe
from requant.recipe import Recipe
from requant.recipe.heal_section import Heal
from requant.recipe.text_sections import Calibration, Data
from requant.recipe.yaml_document import KeyPath

if TYPE_CHECKING:
    from requant_eval.scoring.windows import EvalSet

IDENTICAL, OVERLAPS = 0.5, 0.01
Tokenize = Callable[..., list[TokenDocument]]


class CalibrationFacts(TypedDict):
    """The calibration text, for the report.

    overlap: evaluation set -> share of its 13-grams in the text.
    """

    data: list[str]
    documents: int
    windows: int
    length: int
    tokens: int
    seed: int
    digest: str
    overlap: NotRequired[dict[str, float]]


class HealingFacts(TypedDict):
    """The healing text, for the report. overlap: as in `CalibrationFacts`."""

    data: list[str]
    digest: str
    overlap: NotRequired[dict[str, float]]


def load_tokenizer(recipe: Recipe, base: Path, adapter: Path) -> Any:
    """The tokenizer that the merged model will have."""
    date = datetime.date.fromisoformat(recipe.chat_date)
    return tokenizer_files.load(base, adapter, date=date, trust_remote_code=recipe.trust_remote_code)


def source_of(item: Data, directory: Path) -> TextSource:
    return TextSource(
        path=item.resolve(directory),
        dataset=item.dataset,
        builtin=item.builtin,
        config=item.config,
        split=item.split,
        revision=item.revision,
        column=item.column,
        documents=item.documents,
        ignore=item.ignore,
    )


def calibration(
    recipe: Recipe, tokenizer: Any, notes: list[str] | None = None, read: Tokenize = tokenize
) -> tuple[list[Sequence[TokenDocument]], Tensor, CalibrationFacts]:
    """(documents of each source, windows int64 [samples, length], facts for the report).

    notes: what was left out or changed is added. read: `tokenize`, or what remembers what that gave.
    """
    c = recipe.calibration
    entries = _mixed(recipe, ("calibration",), c, tokenizer, notes, read)
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    windows = packing.calibration_windows(
        entries, samples=c.samples, length=c.length, seed=c.seed, bos=bos, eos=tokenizer.eos_token_id
    )
    facts: CalibrationFacts = {
        "data": [name for name, _, _ in entries],
        "documents": sum(len(d) for _, d, _ in entries),
        "windows": c.samples,
        "length": c.length,
        "tokens": windows.numel(),
        "seed": c.seed,
        "digest": packing.digest(windows),
    }
    return [documents for _, documents, _ in entries], windows, facts


def probed(
    recipe: Recipe, tokenizer: Any, documents: Sequence[Sequence[TokenDocument]]
) -> list[Sequence[TokenDocument]]:
    """Documents of each calibration source for the adapter probe: of chats and completions a few with answers flagged.

    documents: of each source, whole; the source's own where it is plain text, or where its answers cannot be told.
    """
    entries = zip(recipe.calibration.entries, documents, strict=True)
    return [
        sample_answers(source_of(e.data, recipe.directory), tokenizer, e.format, count=2 * adapter_probe.MAX_ROWS)
        or own
        for e, own in entries
    ]


def _mixed(
    recipe: Recipe, key: KeyPath, section: Calibration | Heal, tokenizer: Any, notes: list[str] | None, read: Tokenize
) -> list[tuple[str, list[TokenDocument], float]]:
    """(name, documents, share) of each text of a section."""
    entries = []
    for i, e in enumerate(section.entries):
        source = source_of(e.data, recipe.directory)
        with placed(recipe, (*key, *(("mix", i) if section.mix else ()), "data"), e.data):
            documents = read(source, tokenizer, e.format, completions=False, notes=notes)
        entries.append((str(source), documents, e.share))
    return entries


@contextmanager
def placed(recipe: Recipe, key: KeyPath, data: Data) -> Iterator[None]:
    """What is wrong with a text begins with file, line and key of the recipe that names it."""
    try:
        yield
    except InputError as error:
        named = next(name for name in ("path", "dataset", "builtin") if getattr(data, name) is not None)
        raise InputError(f"{recipe.place(*key, named)}: {error}") from error


def healing(
    recipe: Recipe,
    section: Heal,
    tokenizer: Any,
    calibrated: Sequence[Sequence[TokenDocument]],
    notes: list[str] | None = None,
    read: Tokenize = tokenize,
) -> tuple[list[Sequence[TokenDocument]], HealingText, HealingFacts]:
    """(documents of its own sources, packed windows, facts for the report).

    calibrated: the documents of the calibration sources, which are the text when the section names none.
    """
    own = bool(section.entries)
    if own:
        entries = _mixed(recipe, ("heal",), section, tokenizer, notes, read)
    else:
        named = [str(source_of(e.data, recipe.directory)) for e in recipe.calibration.entries]
        entries = list(zip(named, map(list, calibrated), (e.share for e in recipe.calibration.entries), strict=True))
    text = healing_text.healing_windows(
        entries,
        tokenizer,
        steps=section.steps,
        batch=section.batch,
        length=section.length,
        seed=section.seed,
        notes=notes,
    )
    facts: HealingFacts = {"data": [name for name, _, _ in entries], "digest": text.digest}
    return [documents for _, documents, _ in entries] if own else [], text, facts


def evaluation_set(
    recipe: Recipe,
    name: str,
    tokenizer: Any,
    calibrated: Sequence[Sequence[TokenDocument]] = (),
    notes: list[str] | None = None,
    read: Tokenize = tokenize,
) -> EvalSet:
    """One evaluation set, cut into windows by the recipe's protocol.

    calibrated: the documents of the calibration sources. Raises InputError when most of the set's documents are
    among them, drawn into a window or not, or when nothing is left to score.
    """
    from requant_eval.errors import EvaluationError
    from requant_eval.metrics.set_metrics import MIN_DOCUMENTS
    from requant_eval.scoring import windows as ev

    e = recipe.evaluate
    index, item = next((i, s) for i, s in enumerate(e.sets) if s.name == name)
    source = source_of(item.data, recipe.directory)
    where = placed(recipe, ("evaluate", "sets", index, "data"), item.data)
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    if e.protocol != "documents":
        with where:
            texts = read_texts(source)
        ids = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
        documents = [ev.Document(tuple(ids if bos is None or ids[:1] == [bos] else [bos, *ids]))]
    else:
        completion = item.score == "completion"
        with where:
            rows = read(source, tokenizer, item.format, completions=completion, notes=notes)
        _refuse_identical(name, overlap.shared_documents(calibrated, rows), "documents")
        documents = [_document(row, item.document_tokens, completion=completion) for row in rows]
        cut = _without_answer(recipe.place("evaluate", "sets", index, "document_tokens"), item, documents)
        if notes is not None:
            notes += [*_copies(name, [document.ids for document in documents]), *cut]
    try:
        made = ev.make_set(name, documents, window=e.window, protocol=e.protocol, bos_id=bos, tokens=item.tokens)
    except EvaluationError as error:
        raise InputError(f"evaluate.sets: {error}") from error
    if made.n_documents < MIN_DOCUMENTS:
        one = '; a .txt file is one document: write JSON lines, {"text": ...} each' if _is_txt(source) else ""
        raise InputError(
            f"evaluate.sets: set '{name}' has {made.n_documents} documents with something to score: an interval needs "
            f"at least {MIN_DOCUMENTS}, and 20 or more to be worth much; give it more or shorter texts{one}"
        )
    return made


def _is_txt(source: TextSource) -> bool:
    return source.path is not None and source.path.name.endswith((".txt", ".txt.gz"))


def _document(row: TokenDocument, cut: int | None, *, completion: bool) -> Any:
    from requant_eval.scoring.windows import Document

    return Document(row.ids[:cut], row.scored[:cut] if completion else None, row.n_bytes if cut is None else 0)


def _without_answer(place: str, item: Any, documents: Sequence[Any]) -> list[str]:
    """A warning about documents that `document_tokens`, at `place`, cuts off before their answers.

    item: the set of the recipe. Raises InputError where it cuts off every answer.
    """
    lost = sum(document.unscored for document in documents)
    if not lost or not item.document_tokens:
        return []
    if lost == len(documents):
        raise InputError(
            f"{place}: the prompts of set '{item.name}' fill its {item.document_tokens} tokens, so that no answer is "
            "left to score: raise it, or leave it out: an answer beyond evaluate.window is scored all the same"
        )
    return [f"{place}: {lost} of {len(documents)} documents are cut off before their answer and left out: raise it"]


def _copies(name: str, documents: Sequence[tuple[int, ...]]) -> list[str]:
    """A warning about documents of a set that are the same text: intervals take each for a text of its own."""
    texts = same_text(documents)
    copies = len(texts) - len(set(texts))
    if not copies:
        return []
    return [
        f"evaluate.sets: of the {len(texts)} documents of set '{name}' {copies} repeat others, the same or nearly: "
        "intervals count each as a further document and are too narrow; leave copies out"
    ]


def _refuse_identical(name: str, share: float, what: str, where: str = "calibration") -> None:
    if share >= IDENTICAL:
        raise InputError(
            f"evaluation set {name}: {share:.0%} of its {what} are in the {where} text: "
            "the quantizer would be judged on what it has seen; use other text"
        )


def overlaps(
    windows: Tensor, sets: tuple[EvalSet, ...], warnings: list[str], where: str = "calibration"
) -> dict[str, float]:
    """Share of each set's 13-grams that the calibration text holds.

    Raises InputError when it is mostly the same text.
    """
    shares = {}
    for s in sets:
        share = overlap.overlap(windows, [w.ids.tolist() for w in s.windows], [w.document for w in s.windows])
        _refuse_identical(s.name, share, "13-token runs", where)
        if share > OVERLAPS:
            runs = f"{share:.1%} of the 13-token runs of set {s.name}"
            warnings.append(f"{runs} are in the {where} text: its loss is understated")
        shares[s.name] = share
    return shares
