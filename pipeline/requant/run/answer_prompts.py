"""The prompts that variants answer, of the in-domain set's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from requant.data import prompts
from requant.data.prompts import Answer, Prompt, Prompts
from requant.errors import InputError
from requant.modeling import skeleton
from requant.outgoing import shared
from requant.recipe import Recipe
from requant.recipe.answers_section import Answers
from requant.run.prepared import MergeInputs
from requant.run.recipe_texts import placed, source_of
from requant.run.task_recipe import stop_ids
from requant.runtime.device import pick_device
from requant_eval.metrics import answer_checks
from requant_eval.metrics.answers import AskedPrompt, GivenAnswers

NEW_TOKENS, ON_CPU = 256, 64  # of an answer, where the recipe does not say


def load(recipe: Recipe, tokenizer: Any, model: Any, of: MergeInputs) -> Prompts | None:
    """The prompts, or why there are none; None where the recipe asks for none.

    Raises InputError where the recipe asks otherwise than by default, or has a gate on answers, and there are none.
    """
    asked, e = recipe.evaluate.answers, recipe.evaluate
    if not asked.prompts:
        return None
    index, item = next((i, s) for i, s in enumerate(e.sets) if e.in_domain in (None, s.name))
    positions = skeleton.positions(model.config)
    window = min(e.window, positions) if positions else e.window
    tokens = _new_tokens(recipe, window)
    items: list[Prompt] = []
    why = f"protocol {e.protocol} joins the texts"
    if e.protocol == "documents":
        begin = _begin(recipe, window - tokens)
        with placed(recipe, ("evaluate", "sets", index, "data"), item.data):
            items, why = prompts.held_out(
                source_of(item.data, recipe.directory), tokenizer, item.format, count=asked.prompts,
                longest=window - tokens, reads_calls=answer_checks.reads_calls, begin=begin,
            )  # fmt: skip
    if not items and (asked != Answers() or any(gate.on_answers for gate in recipe.gates)):
        raise InputError(
            f"{recipe.place('evaluate', 'answers')}: set {item.name}: {why}: name a set that has prompts in "
            "evaluate.in_domain, or set prompts: 0"
        )
    return Prompts(
        set_name=item.name, items=tuple(items), why=why, stream=e.stream, new_tokens=tokens,
        stops=stop_ids(of.plan, of.stops, tokenizer), decode=_decoder(tokenizer),
    )  # fmt: skip


def _new_tokens(recipe: Recipe, window: int) -> int:
    asked = recipe.evaluate.answers.new_tokens
    if asked == "auto":
        on_cpu = pick_device(recipe.device).type == "cpu"
        return min(ON_CPU if on_cpu else NEW_TOKENS, window // 2)
    if asked >= window:
        raise InputError(
            f"{recipe.place('evaluate', 'answers', 'new_tokens')}: {asked} tokens of an answer leave no room for a "
            f"prompt in {window} positions of evaluate.window and the model: lower it"
        )
    return asked


def _begin(recipe: Recipe, longest: int) -> int | None:
    """The tokens of a plain text that are its prompt. Raises InputError where these leave no room for an answer."""
    begin = recipe.evaluate.answers.begin
    if begin is not None and begin > longest:
        raise InputError(
            f"{recipe.place('evaluate', 'answers', 'begin')}: a prompt of {begin} tokens leaves no room for an answer: "
            f"it may have {longest}, which is evaluate.window less evaluate.answers.new_tokens"
        )
    return begin


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def given(asked: Prompts, answers: Mapping[str, Sequence[Answer]]) -> GivenAnswers:
    """The answers with their prompts, as the report's section is made of them."""
    return GivenAnswers(
        set_name=shared(asked.set_name), new_tokens=asked.new_tokens, why=asked.why,
        prompts=[
            AskedPrompt(row=p.row, shown=shared(p.shown), text=p.text, own=p.own, tools=p.tools, calls=p.calls,
                plain=p.plain)
            for p in asked.items
        ],
        given={name: [(shared(text), ended) for text, ended in many] for name, many in answers.items()},
    )  # fmt: skip
