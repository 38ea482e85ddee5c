"""The demo's texts: the split is disjoint and the same for any order or Python version."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

pydoc_topics = pytest.importorskip("pydoc_data.topics").topics

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "smollm2-pydocs"


def load(name: str) -> ModuleType:
    """Import a file of the recipe folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", RECIPE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


texts = load("texts")
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def split() -> dict[str, list[str]]:
    return texts.load_split(RECIPE / "topics.json")


@pytest.fixture(scope="module")
def rows(split: dict[str, list[str]]) -> tuple[Rows, Rows]:
    return texts.pydoc_rows(pydoc_topics, split["heldout"])


@pytest.fixture(scope="module")
def general() -> tuple[Rows, Rows]:
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None or package.origin is None:
        pytest.skip("chatterbot-corpus is not installed")
    return texts.general_rows(Path(package.origin).parent / "data" / "english")


def leak(documents: Rows, others: Rows) -> float:
    return float(texts.largest_overlap([row["text"] for row in documents], [row["text"] for row in others]))


def test_committed_list_follows_the_rule(split: dict[str, list[str]]) -> None:
    listed = split["heldout"] + split["train"]
    assert len(set(listed)) == len(listed)
    assert split["heldout"] == sorted(name for name in listed if texts.side(name) == "heldout")


def test_heldout_topics_are_never_trained_on(split: dict[str, list[str]], rows: tuple[Rows, Rows]) -> None:
    train, heldout = ({row["topic"] for row in side} for side in rows)
    assert not train & heldout
    assert heldout <= set(split["heldout"])
    assert not train & set(split["heldout"])


def test_no_13_gram_of_a_heldout_topic_is_trained_on(rows: tuple[Rows, Rows]) -> None:
    assert leak(rows[1], rows[0]) == 0.0


def test_without_scrubbing_the_same_split_would_leak(split: dict[str, list[str]]) -> None:
    heldout = set(split["heldout"]) & pydoc_topics.keys()
    seen = [text for topic, text in pydoc_topics.items() if topic not in heldout]
    assert texts.largest_overlap([pydoc_topics[topic] for topic in heldout], seen) > 0.9


def test_nothing_is_scored_or_trained_on_twice(rows: tuple[Rows, Rows]) -> None:
    grams = [texts.ngrams(row["text"]) for side in rows for row in side]
    assert len(set().union(*grams)) == sum(map(len, grams))


def test_sizes_are_enough_to_measure_on(rows: tuple[Rows, Rows]) -> None:
    train, heldout = (sum(len(row["text"]) for row in side) for side in rows)
    assert len(rows[1]) >= 20
    assert 0.2 < heldout / (train + heldout) < 0.3


def test_rows_are_well_formed(rows: tuple[Rows, Rows], general: tuple[Rows, Rows]) -> None:
    for side, key in [(rows, "topic"), (general, "source")]:
        for row in [*side[0], *side[1]]:
            assert row.keys() == {"text", key}
            assert row["text"] == row["text"].strip() != ""
            assert json.loads(json.dumps(row)) == row


def test_general_sets_share_no_file_and_no_13_gram(general: tuple[Rows, Rows]) -> None:
    files = [{name for row in side for name in row["source"].split("+")} for side in general]
    assert not files[0] & files[1]
    assert len(general[1]) >= 40
    assert leak(general[1], general[0]) == 0.0


def test_general_sets_repeat_no_conversation(general: tuple[Rows, Rows]) -> None:
    talks = [talk for side in general for row in side for talk in row["text"].split("\n\n") if "?" in talk]
    repeated = len(talks) - len(set(talks))
    assert repeated / len(talks) < 0.05  # short code comments inside `coding` answers repeat; talks don't


def test_split_does_not_depend_on_the_order_of_topics(split: dict[str, list[str]], rows: tuple[Rows, Rows]) -> None:
    backwards = dict(reversed(pydoc_topics.items()))
    again = texts.pydoc_rows(backwards, reversed(split["heldout"]))
    assert json.dumps(again) == json.dumps(rows)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["assignment", "class"])
def test_another_python_may_lack_a_topic_or_have_a_new_one(split: dict[str, list[str]], missing: str) -> None:
    other = {topic: text for topic, text in pydoc_topics.items() if topic != missing}
    other["brand-new"] = "A topic that no list names, of more than a hundred and fifty characters. " * 3
    train, heldout = texts.pydoc_rows(other, split["heldout"])
    assert missing not in {row["topic"] for row in [*train, *heldout]}
    assert "brand-new" in {row["topic"] for row in train}
    assert leak(heldout, train) == 0.0


def test_scrub_drops_just_the_shared_paragraph() -> None:
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    banned = texts.ngrams(shared)
    assert texts.scrub(f"first here\n\n{shared.upper()}\n\nlast here", banned) == "first here\n\nlast here"
    assert texts.scrub("first here\n\nlast here", banned) == "first here\n\nlast here"


def test_scrub_sees_a_run_that_spans_paragraphs() -> None:
    run = "a b c d e f g h i j k l m"
    assert texts.scrub("a b c d e f\n\ng h i j k l m\n\nrest", texts.ngrams(run)) == "rest"


def test_documents_keep_every_turn_once_and_close_at_the_size() -> None:
    files = {"x": [(f"question {i}", f"answer {i}") for i in range(20)], "y": [("hello", "there")]}
    made = texts.documents(files, size=100)
    turns = [line for row in made for line in re.split(r"\n+", row["text"])]
    assert turns == [turn for talks in files.values() for talk in talks for turn in talk]
    assert all(len(row["text"]) >= 100 for row in made[:-1])
    assert made[-1]["source"] in {"y", "x+y"}
