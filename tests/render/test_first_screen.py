"""The first screen and answers side by side: plain words, marks, cuts, harmless text."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers.reports import answered, built, full, hostile

from requant_eval.metrics.answers import AskedPrompt, GivenAnswers, section
from requant_eval.render import html, markdown
from requant_eval.render.answer_cards import LONGEST, SHORT, answers_said, cards, checks_table
from requant_eval.render.document import document
from requant_eval.render.first_screen import first_screen
from requant_eval.render.glossary import WORDS, explained


def said(text: str) -> tuple[str, bool]:
    return text.removesuffix("</s>"), text.endswith("</s>")


def two(adapter: str, gptq: str, **more: Any) -> Any:
    prompts = [AskedPrompt(row=5, shown="Why?", text="Why?", own="")]
    given = {"adapter": [said(adapter)], "gptq": [said(gptq)]}
    return section(GivenAnswers(set_name="s", new_tokens=8, prompts=prompts, given=given, **more))


def test_a_person_reads_what_changed_in_plain_words() -> None:
    first = first_screen(answered())
    assert re.fullmatch(r"On text like yours the most likely next word.* in [\d.]+ of 100 places\.", first.plain[0])
    assert first.plain[1] == (
        "6 of 20 answers to your own prompts have other words than the fine-tune's; 1 fails a check that the "
        "fine-tune's does not."
    )
    assert re.fullmatch(r"Of what the fine-tune learned, \d+ % is kept\.", first.plain[2])
    assert len(first.answers.cards) == 3
    assert dict(first.sizes)["Size"] == "100 MB, 3.0 times smaller than the merged model's 300 MB"
    assert "not measured" in dict(first.sizes)["Speed"]
    assert first.then[0].startswith("Measure on more held-out rows")


@pytest.mark.parametrize(
    ("kept", "shown"), [(0.4, "40"), (0.9849, "98"), (0.9969, "99.7"), (0.99949, "99.9"), (0.9996, "100"), (1.2, "100")]
)
def test_all_of_the_fine_tune_is_kept_only_where_it_is(kept: float, shown: str) -> None:
    report = answered()
    home = next(s for s in report["sets"] if s["in_domain"])
    home["retention"]["gptq"]["value"] = kept
    assert f"Of what the fine-tune learned, {shown} % is kept." in first_screen(report).plain


def test_the_row_s_own_answer_stands_beside_what_models_say() -> None:
    """Cut like the others, and harmless; without one, as in older reports, nothing stands there."""
    prompts = [AskedPrompt(row=5, shown="Why?", text="Why?", own=f"<b>So.</b> {'x' * 2 * LONGEST}")]
    given = {"adapter": [said("a</s>")], "gptq": [said("b</s>")]}
    report = answered()
    report["answers"] = section(GivenAnswers(set_name="in-domain", new_tokens=8, prompts=prompts, given=given))
    page, text = html.render(report), markdown.render(report)
    assert "&lt;b&gt;So.&lt;/b&gt; xx" in page
    assert "Its own answer:" in text
    assert "x" * (LONGEST + 1) not in page + text
    report["answers"]["items"][0].pop("own")
    assert "own answer" not in html.render(report) + markdown.render(report)


def test_the_share_of_changed_words_is_that_of_the_report() -> None:
    report = answered()
    home = next(s for s in report["sets"] if s["in_domain"])
    step = next(e for e in home["edges"] if (e["from"], e["to"]) == ("adapter", "gptq"))
    said = float(re.search(r"in ([\d.]+) of 100", first_screen(report).plain[0])[1])  # type: ignore[index]
    assert said == pytest.approx(100 * (1 - step["agreement"]["value"]), abs=0.06)


def test_an_older_report_has_no_answers_and_says_nothing_of_them() -> None:
    first = first_screen(built())
    assert first.answers.cards == ()
    assert not any("answers" in sentence for sentence in first.plain)
    assert "Answers" not in [s.title for s in document(built()).sections]


def test_plain_text_says_why_there_are_none() -> None:
    report = full() | {"answers": section(GivenAnswers(set_name="s", new_tokens=8, why="its rows are plain text"))}
    assert "No answers were compared: its rows are plain text." in first_screen(report).plain
    assert "No answers were compared on s: its rows are plain text." in markdown.render(report)


def test_no_code_name_of_a_metric_is_on_the_page() -> None:
    text = markdown.render(answered()).partition("## Reproduce")[0]
    assert "ppl_increase" not in text
    assert "right_to_wrong" not in text
    assert "perplexity increase" in text


@pytest.mark.parametrize(
    ("text", "parts", "note"),
    [
        ("a b c</s>", ("a b c", "", ""), ""),
        ("a x c</s>", ("a ", "x", " c"), ""),
        ("a\n  x c</s>", ("a\n  ", "x", " c"), ""),
        ("a b</s>", ("a b", "", ""), "ends where the other goes on"),
        ("</s>", ("", "", ""), "says nothing; ends where the other goes on"),
        ("a x c", ("a ", "x", " c"), "cut off after 8 tokens"),
    ],
)
def test_the_first_word_that_differs_is_marked(text: str, parts: tuple[str, str, str], note: str) -> None:
    (card,) = cards(two("a b c</s>", text))
    reference, other = card.answers
    assert (reference.word, reference.is_same) == ("", False)
    assert (other.before, other.word, other.after) == parts
    assert other.note == note
    assert other.is_same == (text == "a b c</s>")


@pytest.mark.parametrize("longest", [LONGEST, SHORT])
@pytest.mark.parametrize("at", [0, 5, 300])
def test_a_long_answer_is_cut_around_the_word(at: int, longest: int) -> None:
    words = ["word"] * 900
    other = [*words[:at], "OTHER", *words[at + 1 :]]
    said = cards(two(" ".join(words), " ".join(other)), longest=longest)[0].answers[1]
    assert said.word == "OTHER"
    assert len(said.before + said.word + said.after) <= longest + 12
    assert said.after.endswith(" …")
    assert said.before.startswith("… ") == (at == 300)


def test_tables_and_sentences_count_as_the_section() -> None:
    found = answered()["answers"]
    table = checks_table(found)
    assert table.columns == ("check", "adapter", "merged", "gptq")
    assert ("the answer ends by itself", "20 of 20", "20 of 20", "19 of 20") in table.rows
    lines = answers_said(found)
    assert "gptq: 6 of 20 from adapter's and 6 of 20 from merged's differ." in lines
    assert lines[-1].startswith(
        "Checks that an answer of gptq fails and adapter's does not: the answer ends by itself (row 58)"
    )


def test_a_variant_that_was_not_asked_is_named() -> None:
    prompts = [AskedPrompt(row=1, shown="a", text="a", own="")]
    given: dict[str, list[tuple[str, bool]]] = {"adapter": [], "merged": [("x", True)], "gptq": [("x", True)]}
    found = section(GivenAnswers(set_name="s", new_tokens=8, prompts=prompts, given=given))
    assert any(line.startswith("adapter was not asked: it ran block by block") for line in answers_said(found))
    assert "1 of 1" not in " ".join(first_screen(full() | {"answers": found}).plain)


def test_answers_of_strangers_are_shown_and_not_obeyed() -> None:
    page, text = html.render(hostile()), markdown.render(hostile())
    body = page.partition("<script>")[0]
    assert "<script>hacked" not in page
    assert "&lt;script&gt;hacked=1&lt;/script&gt;" in body
    assert "\x1b" not in page
    assert "\x1b" not in text
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" in text
    assert "<script>" not in outside, "only in fences, where it is text"


def test_names_of_strangers_obey_no_terminal() -> None:
    bell = "\x1b[31m\x07"
    prompts = [AskedPrompt(row=1, shown=bell, text="a", own="")]
    given = {"adapter": [("x", False)], f"gptq{bell}": [(f"y{bell}", False)]}
    found = section(GivenAnswers(set_name=f"s{bell}", new_tokens=8, why=bell, prompts=prompts, given=given))
    found["rules"] = {name: rule + bell for name, rule in found["rules"].items()}
    for made in (found, found | {"items": []}):
        report: Any = full() | {"answers": made}
        assert not {"\x1b", "\x07"} & set(html.render(report) + markdown.render(report))


def test_many_answers_leave_the_page_before_it_is_too_long() -> None:
    report = answered(200)
    for item in report["answers"]["items"]:
        item["given"] = {name: text + " word" * 200 for name, text in item["given"].items()}
    page = html.render(report)
    assert len(page.encode()) < html.LIMIT
    assert "all but the first answers" in page
    assert page.count('class="card"') == 3


def test_words_are_explained_once_where_they_stand() -> None:
    said = str(explained("Perplexity of <merged> and merged: held-out `merged`"))
    assert said.count("<abbr") == 3
    assert f'<abbr title="{WORDS["perplexity"]}">Perplexity</abbr>' in said
    assert "&lt;<abbr" in said
    assert "<abbr" not in str(explained("unmerged, merged_model, base/merged"))
