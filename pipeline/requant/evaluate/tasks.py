"""The tasks of a run, built and checked against chat template and window, with digests.

What would fail in the long work fails here: an unknown name, data that is not there, a chat template that cannot open
an answer, a question that is longer than the model's window.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from requant.checkpoint.reader import file_digest
from requant.checkpoint.run_directory import key_of
from requant.data.template_losses import TemplateFailure
from requant.errors import InputError, one_line
from requant.evaluate import generation_settings, task_definitions, task_files, task_model, task_values
from requant.evaluate.task_definitions import TaskRequest
from requant.runtime.guarded_process import LimitError, call_guarded

SAMPLED = 100  # requests whose tokens are counted for what check says of time
_QUESTION = [{"role": "user", "content": "How many?"}]


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """One task or group of the recipe. parts: the library's tasks.

    digests: of each part, of all that it asks. code: of Python files beside a trusted task. longest: tokens of the
    longest request with its answer. tokens, written: of all requests, and of the answers that are generated, as long as
    they may be, about.
    """

    request: TaskRequest
    parts: tuple[Any, ...]
    digests: tuple[str, ...]
    metric: str
    higher_is_better: bool
    documents: int
    requests: int
    longest: int
    tokens: int
    written: int
    code: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of everything that is asked and how it is judged."""
        return key_of(self.digests, *self.code)

    def __str__(self) -> str:
        shots = self.parts[0].get_config("num_fewshot") or 0
        of = f", {len(self.parts)} tasks" if len(self.parts) > 1 else ""
        return (
            f"{self.request.title}{of}: {self.documents} documents, {shots}-shot, {self.metric}, "
            f"at most {self.longest} tokens"
        )


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """All tasks of a recipe. window: tokens that the model takes. stops: token ids that end an answer."""

    items: tuple[LoadedTask, ...]
    tokenizer: Any
    window: int
    stops: tuple[int, ...]


def load(
    requests: Sequence[TaskRequest],
    tokenizer: Any,
    *,
    window: int,
    stops: Sequence[int],
    trust_remote_code: bool,
    doing: Callable[[str], None] = lambda _: None,
) -> Tasks:
    """Build and check the tasks. Raises InputError naming the task's place in the recipe."""
    task_definitions.require_library(requests[0].place)
    tokenizer = copy.deepcopy(tokenizer)  # the library gives it a padding token
    items = []
    for request in requests:
        doing(f"requests of the task {request.title}")
        if request.chat:
            _require_turn(request, tokenizer)
        parts = task_definitions.build(request, trust_remote_code=trust_remote_code)
        metric, better = task_values.main_metric(request, parts)
        code = _code(request) if trust_remote_code else ()
        for part in parts:
            _build_requests(request, part, tokenizer)
        tokens, written = _sizes(parts, tokenizer)
        items.append(
            LoadedTask(
                request=request, parts=tuple(parts), digests=tuple(map(task_values.digest_of, parts)), code=code,
                metric=metric, higher_is_better=better,
                documents=sum(len({i.doc_id for i in p.instances}) for p in parts),
                requests=sum(len(p.instances) for p in parts),
                longest=max(_longest(request, part, tokenizer, window) for part in parts),
                tokens=tokens, written=written,
            )
        )  # fmt: skip
    return Tasks(items=tuple(items), tokenizer=tokenizer, window=window, stops=tuple(stops))


def _code(request: TaskRequest) -> tuple[str, ...]:
    """Digests of the Python files beside a trusted task and beside what it includes."""
    own = task_files.with_included(request.path.resolve()) if request.path else []
    folders = dict.fromkeys(file.parent for file in own)
    return tuple(file_digest(file) for folder in folders for file in sorted(folder.glob("*.py")))


def _build_requests(request: TaskRequest, task: Any, tokenizer: Any) -> None:
    """All requests of one task, as they will be asked."""
    task.set_fewshot_seed(task_values.SEED)
    where = f"{request.place}: task {request.title}"
    try:
        with task_definitions.telling(request):
            task.build_all_requests(
                limit=request.limit,
                apply_chat_template=request.chat,
                fewshot_as_multiturn=request.chat,
                chat_template=partial(_ask, tokenizer) if request.chat else None,
            )
    except TemplateFailure as error:
        raise InputError(f"{where}: the chat template refuses its messages ({error}): set chat: false") from error
    for instance in task.instances:
        if instance.request_type == "generate_until":
            generation_settings.check(instance.args[1], where)
    _require_judgement(request, task, where)


def _require_judgement(request: TaskRequest, task: Any, where: str) -> None:
    """Raise InputError for documents of which every answer would count as wrong, or none can be judged.

    Data sets of the library's own tasks have some unlabelled documents, which count as wrong in what others publish.
    """
    wrong, of = task_values.labels_of_no_choice(task), len({i.doc_id for i in task.instances})
    if wrong and (request.path or len(wrong) == of):
        number, label, count = wrong[0]
        raise InputError(
            f"{where}: {len(wrong)} of {of} documents have a label that is none of their choices, so that every answer "
            f"would be wrong, e.g. document {number}: {label!r:.80} of {count} choices: expected the number of a "
            "choice from 0 on, or its text, in every document: correct the data or doc_to_target"
        )
    try:
        task_values.rehearse(task)
    except Exception as error:  # of the library, or of code that is trusted
        raise InputError(
            f"{where}: its answers cannot be judged ({one_line(error)}): correct filter_list, metric_list or "
            "doc_to_target"
        ) from error


def _ask(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    return task_model.rendered(tokenizer, messages, ask=add_generation_prompt)


def _require_turn(request: TaskRequest, tokenizer: Any) -> None:
    """Raise InputError where the chat template is missing, fails, or does not begin an answer."""
    where = f"{request.place}: task {request.title}: chat: true"
    if not tokenizer.chat_template:
        raise InputError(f"{where}, and the tokenizer has no chat template: set chat: false")
    try:
        opened, closed = (call_guarded(partial(_turn, tokenizer, ask)) for ask in (True, False))
    except (LimitError, TemplateFailure) as error:
        raise InputError(f"{where}, and the chat template fails ({error}): set chat: false") from error
    if opened == closed:
        raise InputError(
            f"{where}, and the chat template cannot open an answer (add_generation_prompt changes nothing): give the "
            "tokenizer the template of inference, or set chat: false"
        )


def _turn(tokenizer: Any, ask: bool) -> str:
    from requant.data import template_call

    return template_call.apply(tokenizer, _QUESTION, None, ask=ask)


def _sizes(parts: Sequence[Any], tokenizer: Any) -> tuple[int, int]:
    """(tokens of all requests, tokens that are generated at most), about: by the letters of a few requests."""
    given = [instance for part in parts for instance in part.instances]
    texts = ["".join(i.args[: 1 if i.request_type == "generate_until" else 2]) for i in given]
    some = texts[:: -(-len(texts) // SAMPLED)]
    letters = max(1, sum(map(len, some)))
    tokens = sum(task_model.tokens(tokenizer, text) for text in some) * sum(map(len, texts)) // letters
    return tokens, sum(generation_settings.new_tokens(i.args[1]) for i in given if i.request_type == "generate_until")


def _longest(request: TaskRequest, task: Any, tokenizer: Any, window: int) -> int:
    """Tokens of a task's longest request with its answer; InputError for one that does not fit in the window."""
    longest = 0
    for instance in sorted(task.instances, key=lambda i: -len("".join(map(str, i.args)))):
        generates = instance.request_type == "generate_until"
        answer = generation_settings.new_tokens(instance.args[1]) if generates else 0
        text = instance.args[0] if generates else "".join(instance.args[:2])
        if len(text.encode()) + answer <= longest:  # no token is shorter than a byte
            continue
        length = task_model.tokens(tokenizer, text) + answer
        if length > window:
            cure = "fewer examples (few_shot), or fewer new tokens (generation_kwargs.max_gen_toks)"
            raise InputError(
                f"{request.place}: task {request.title}: document {instance.doc_id} takes {length} tokens"
                + (f", {answer} of them for the answer," if generates else "")
                + f" and the model has {window}: {cure if generates else 'fewer examples (few_shot)'}"
            )
        longest = max(longest, length)
    return longest
