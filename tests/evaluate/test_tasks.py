"""Tasks: files read as data, what is refused early, scores by variant, resuming."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tasks as local
from transformers import AutoTokenizer

from requant.data import tokenizer as tokenizers
from requant.errors import InputError
from requant.evaluate import generation_settings, task_files
from requant.evaluate.task_definitions import TaskRequest, require_library
from requant.evaluate.variant_sources import VariantSources
from requant_eval.scoring import answers
from requant_eval.scoring.batches import BatchSize

GOOD: dict[str, Any] = {
    "task": "words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "words.jsonl"}},
    "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "label",
    "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
ANSWERED: dict[str, Any] = {
    "task": "written", "output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{choices[label]}}",
    "metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 6},
}  # fmt: skip
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
ROW = {"q": "one and one", "choices": [" is two", " is six"], "label": 0}


def written(folder: Path, text: str | None = None, **changes: Any) -> Path:
    """A task file; of JSON, which is YAML."""
    file = folder / "words.yaml"
    kept = {key: value for key, value in (GOOD | changes).items() if value is not None}
    file.write_text(json.dumps(kept) if text is None else text)
    if not (folder / "words.jsonl").exists():
        (folder / "words.jsonl").write_text("".join(json.dumps(ROW | {"label": i % 2}) + "\n" for i in range(12)))
    return file


def request(path: Path | None = None, **more: Any) -> TaskRequest:
    given: dict[str, Any] = {
        "title": "words", "name": None if path else "words", "path": path, "limit": None, "few_shot": None,
        "chat": False, "metric": None, "place": "recipe.yaml:7: evaluate.tasks.0",
    }  # fmt: skip
    return TaskRequest(**given | more)


def test_paths_of_data_are_as_seen_from_the_file(tmp_path: Path) -> None:
    assert task_files.read(written(tmp_path))["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "words.jsonl")}


def test_a_file_is_laid_over_what_it_includes(tmp_path: Path) -> None:
    written(tmp_path).rename(tmp_path / "base.yaml")
    made = task_files.read(written(tmp_path, "include: base.yaml\ntask: other\n"))
    assert (made["task"], made["doc_to_text"]) == ("other", "{{q}}")


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("process_docs: !function utils.run\n", {}, "words.yaml:1: !function utils.run: runs Python code"),
        ("a: !!python/object/apply:os.system [true]\n", {}, "is no YAML that is read here"),
        ("include: words.yaml\n", {}, "includes itself"),
        ("include: 5\n", {}, "include: 5, expected the name of a file"),
        ("a: &a {b: *a}\n", {}, "its aliases (*name) stand for more than"),
        (BOMB, {}, "its aliases (*name) stand for more than"),
        ("include: other.yaml\n", {}, "other.yaml: cannot be read (No such file"),
        ("- a\n", {}, "expected the keys of a task, got list"),
        ("a: [\n", {}, "is no YAML that is read here"),
        ("group: all\ntask: [a, b]\n", {}, "is a group of tasks"),
        (None, {"output_type": None}, "output_type missing"),
        (None, {"test_split": None}, "test_split or validation_split is missing"),
        (None, {"dataset_path": "pandas"}, "dataset_path: 'pandas', expected one of json"),
        (None, {"use_prompt": "own.yaml:all"}, "use_prompt: loads another file"),
        (None, {"dataset_kwargs": None}, "data_files names no file of data"),
        (None, {"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "none.jsonl: no such file"),
    ],
)
def test_a_file_that_is_no_task_is_named(
    tmp_path: Path, text: str | None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        task_files.read(written(tmp_path, text, **changes))
    assert message in str(refused.value)


def test_without_the_library_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requant.evaluate.task_definitions.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"evaluate\.tasks\.0: needs lm-evaluation-harness: pip install"):
        require_library(request().place)


@pytest.mark.parametrize("found", ["0.4.11", "0.5.0", "1.0"])
def test_a_version_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr("requant.evaluate.task_definitions.find_spec", lambda name: name)
    monkeypatch.setattr("requant.evaluate.task_definitions.library_version", lambda: found)
    with pytest.raises(InputError, match=rf"lm-evaluation-harness {found} is installed, which is not run here: pip"):
        require_library(request().place)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"custom_generate": "owner/name", "trust_remote_code": True}, "'custom_generate' is not run here"),
        ({"assistant_model": "owner/name"}, "'assistant_model' is not run here"),
        ({"do_sample": True}, "answers are sampled"),
        ({"temperature": 0.7}, "answers are sampled"),
        ({"num_beams": 4}, "answers are sampled or searched with beams"),
        ({"max_gen_toks": "many"}, "max_gen_toks: 'many', expected a number of tokens"),
        ({"until": [5]}, "until: [5], expected texts"),
    ],
)
def test_only_greedy_answers_are_run(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        generation_settings.check({"until": ["\n"]} | settings, "recipe.yaml:7: task words")
    assert message in str(refused.value)
    assert "recipe.yaml:7: task words: generation_kwargs" in str(refused.value)


def test_settings_that_mean_nothing_without_sampling_are_left_alone() -> None:
    generation_settings.check({"until": "\n", "do_sample": False, "temperature": 0.7, "top_p": 0.9}, "here")
    generation_settings.check({"temperature": 0.0, "max_gen_toks": 8, "num_beams": 1}, "here")


# --- with the library ---


@local.needs_library
@pytest.mark.slow
def test_a_task_that_loads_code_to_answer_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    changes = {
        "output_type": "generate_until", "doc_to_choice": None, "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n"], "custom_generate": "owner/name", "trust_remote_code": True},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"evaluate\.tasks\.0: task words: generation_kwargs: 'custom_generate'"):
        loaded(request(written(tmp_path, **changes)), tokenizer=tokenizer, trust=True)


@local.needs_library
@pytest.mark.slow
def test_a_metric_that_does_not_say_which_way_is_better_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "own.py").write_text("def judge(row, answers):\n    return {'points': 1.0}\n")
    file = written(tmp_path, metric_list=[{"metric": "points", "aggregation": "mean"}])
    file.write_text(file.read_text()[:-1] + ', "process_results": !function own.judge}')
    with pytest.raises(InputError, match="does not say whether more points is better: give its metric higher_is"):
        loaded(request(file), tokenizer=tokenizer, trust=True)


@local.needs_library
@pytest.mark.slow
def test_the_code_of_an_included_file_is_in_the_digest(tmp_path: Path, tokenizer: Any) -> None:
    common = tmp_path / "common"
    common.mkdir()
    file = written(common, process_results="JUDGE")
    file.write_text(file.read_text().replace('"JUDGE"', "!function own.judge"))
    (tmp_path / "mine.yaml").write_text("include: common/words.yaml\n")
    (tmp_path / "common" / "words.jsonl").rename(tmp_path / "words.jsonl")
    digests = []
    for right in ("1.0", "0.0"):
        (common / "own.py").write_text(f"def judge(row, answers):\n    return {{'acc': {right}}}\n")
        made = loaded(request(tmp_path / "mine.yaml"), tokenizer=tokenizer, trust=True)
        digests.append(made.items[0].digest)
    assert digests[0] != digests[1]


def loaded(*asked: TaskRequest, tokenizer: Any, window: int = 256, trust: bool = False) -> Any:
    from requant.evaluate import tasks

    return tasks.load(asked, tokenizer, window=window, stops=(1,), trust_remote_code=trust)


@pytest.fixture
def tokenizer(source: Path) -> Any:
    return tokenizers.load(source, None)


@local.needs_library
@pytest.mark.slow
def test_a_misspelt_name_is_told_with_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"'gsm8kk' is no task of lm-evaluation-harness: did you mean .*gsm8k"):
        loaded(request(name="gsm8kk"), tokenizer=tokenizer)


@local.needs_library
@pytest.mark.slow
def test_data_that_is_not_here_is_told_as_that(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"task words: its data is not on this machine and cannot be downloaded"):
        loaded(request(name="gsm8k"), tokenizer=tokenizer)


@local.needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({}, {"chat": True}, "the tokenizer has no chat template"),
        ({}, {"metric": "acc_norm"}, "has no metric 'acc_norm': acc"),
        ({"metric_list": [{"metric": "mauve"}]}, {}, "its metric mauve is Python code of a hub"),
        ({"metric_list": [{"metric": "mcc", "higher_is_better": True}]}, {}, "no document has a value of its own"),
        ({"unsafe_code": True}, {}, "runs code that the model writes"),
        ({"repeats": 3}, {}, "asks each question 3 times"),
        ({"doc_to_text": "{{nothing}}"}, {}, "'nothing' is undefined"),
        ({"doc_to_text": "{{q.__class__.__mro__}}"}, {}, "SecurityError"),
        ({"output_type": "guess"}, {}, "Got invalid output_type"),
        ({"doc_to_text": "{{q * 200}}"}, {}, "document 0 takes"),
    ],
)
def test_what_would_fail_later_is_refused_before(
    tmp_path: Path, tokenizer: Any, changes: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        loaded(request(written(tmp_path, **changes), **asked), tokenizer=tokenizer)
    assert message in str(refused.value)
    assert "recipe.yaml:7: evaluate.tasks.0" in str(refused.value)


@local.needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "refused"),
    [
        (1, ""),
        (" is six", ""),
        ("six", "'six'"),
        (2, "2"),
        (-1, "-1"),
        ([0, 9], ""),
        ([9], "[9]"),
        ("", "''"),
    ],
)
def test_a_label_that_is_none_of_the_choices_is_told(tmp_path: Path, tokenizer: Any, label: Any, refused: str) -> None:
    """The library counts every answer to such a document as wrong."""
    file = written(tmp_path)
    first = ROW | {"label": [0] if isinstance(label, list) else " is two" if isinstance(label, str) else 0}
    rows = [first, ROW | {"label": label}]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not refused:
        assert loaded(request(file), tokenizer=tokenizer).items[0].documents == 2
        return
    with pytest.raises(InputError, match=r"1 of 2 documents have a label that is none of their choices") as told:
        loaded(request(file), tokenizer=tokenizer)
    assert f"document 1: {refused} of 2 choices" in str(told.value)


NULLS = [
    ({}, {"q": None}, "doc_to_text: the field q is null"),
    ({"doc_to_text": "Q: {{q|trim}}?"}, {"q": None}, "doc_to_text: the field q is null"),
    ({"doc_to_text": "{{q.strip()}}"}, {"q": None}, "doc_to_text: the field q is null"),
    ({"doc_to_text": "q"}, {"q": None}, "doc_to_text: the field q is null"),
    ({}, {"label": None}, "doc_to_target: the field label is null"),
    ({"doc_to_target": "{{label}}"}, {"label": None}, "doc_to_target: the field label is null"),
    ({}, {"choices": [" is two", None]}, "doc_to_choice: the field choices.1 is null"),
    ({"doc_to_choice": "choices"}, {"choices": [None, " is six"]}, "doc_to_choice: the field choices.0 is null"),
    ({"doc_to_text": "{{more.of.it}}"}, {"more": {"of": {"it": None}}}, "doc_to_text: the field more.of.it is null"),
    (ANSWERED | {"doc_to_target": "{{q}}", "doc_to_text": "x"}, {"q": None}, "doc_to_target: the field q is null"),
]


@local.needs_library
@pytest.mark.slow
@pytest.mark.parametrize(("changes", "row", "message"), NULLS)
def test_a_null_is_not_asked_as_the_word_none(
    tmp_path: Path, tokenizer: Any, changes: dict[str, Any], row: dict[str, Any], message: str
) -> None:
    file, whole = written(tmp_path, **changes), ROW | {"more": {"of": {"it": "more"}}}
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(whole | {"q": f"{n}"} | (row if n == 3 else {})) + "\n" for n in range(6)))
    with pytest.raises(InputError) as refused:
        loaded(request(file), tokenizer=tokenizer)
    assert f"task words: {file}: document 3 of test, {message} and would be written as the word None" in str(
        refused.value
    )
    assert "None" not in str(refused.value).replace("word None", "")


@local.needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "{{q}}{% if hint %} ({{hint}}){% endif %}",
        "{{q}}{{hint or ''}}",
        "{{q}}{{hint|default('', true)}}",
        "{{q}}{% if hint is not none %}{{hint}}{% endif %}",
        "{{q}}{% if hint != none %}{{hint}}{% endif %}",
    ],
)
def test_a_template_that_leaves_a_null_out_is_asked(tmp_path: Path, tokenizer: Any, text: str) -> None:
    file = written(tmp_path, doc_to_text=text)
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(ROW | {"hint": hint}) + "\n" for hint in ("", None)))
    (part,) = loaded(request(file), tokenizer=tokenizer).items[0].parts
    assert {instance.args[0] for instance in part.instances} == {"one and one"}
    written(tmp_path, doc_to_text="{{hint|tojson}}")
    (part,) = loaded(request(file), tokenizer=tokenizer).items[0].parts
    assert {instance.args[0] for instance in part.instances} == {'""', "null"}


BAD, SHOTS = ROW | {"label": 5}, {"fewshot_split": "test"}


@local.needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "changes", "shots", "message"),
    [
        ([], {}, None, "its data holds no documents (StopIteration"),
        ([BAD, ROW], {}, None, "cannot ask document 0 of test, doc_to_choice (IndexError: list index out of range)"),
        ([ROW, ROW, BAD], SHOTS, 1, "cannot ask document 2 of test, doc_to_target (IndexError: list index out of"),
        ([ROW, ROW, ROW | {"choices": None}], {"doc_to_choice": "choices"}, None, "document 2 of test, doc_to_choice"),
        ([ROW] * 3, SHOTS, 9, "fewer documents for examples than are asked for (ValueError: Sample larger than"),
    ],
)
def test_an_error_of_the_library_names_the_document_and_what_to_do(
    tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]], changes: dict[str, Any], shots: int | None, message: str
) -> None:
    file = written(tmp_path, **changes)
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as refused:
        loaded(request(file, few_shot=shots), tokenizer=tokenizer)
    assert f"task words: {file}: " in str(refused.value)
    assert message in str(refused.value)


@local.needs_library
@pytest.mark.slow
def test_some_unlabelled_documents_of_the_librarys_own_tasks_count_as_wrong(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the scores that others publish: SNLI has such."""
    from requant.evaluate import tasks

    file, judge = written(tmp_path), tasks._require_judgement
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(ROW | {"label": n}) + "\n" for n in (0, -1)))
    monkeypatch.setattr(tasks, "_require_judgement", lambda *_: None)
    (part,) = loaded(request(file), tokenizer=tokenizer).items[0].parts
    judge(request(name="snli"), part, "here")
    with pytest.raises(InputError, match="here: 1 of 2 documents have a label that is none of their choices"):
        judge(request(file), part, "here")
    part._instances = [i for i in part.instances if i.doc_id == 1]
    with pytest.raises(InputError, match="here: 1 of 1 documents"):
        judge(request(name="snli"), part, "here")


@local.needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"filter_list": [{"name": "n", "filter": [{"function": "regex", "regex_pattern": "([0-9]+"}]}]},
            "unterminated",
        ),
        ({"filter_list": [{"name": "n", "filter": [{"function": "regex", "regex_pattern": 5}]}]}, "must be string"),
        ({"doc_to_choice": "{{choices}}", "doc_to_target": "{{q}}"}, "list indices must be integers"),
    ],
)
def test_answers_that_cannot_be_judged_are_told_before_there_are_any(
    tmp_path: Path, tokenizer: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=r"task words: its answers cannot be judged \(.*correct filter_list") as told:
        loaded(request(written(tmp_path, **ANSWERED | changes)), tokenizer=tokenizer)
    assert message in str(told.value)


@local.needs_library
@pytest.mark.slow
def test_an_answer_longer_than_the_window_is_told(tmp_path: Path, tokenizer: Any) -> None:
    changes = {
        "output_type": "generate_until", "doc_to_choice": None, "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 300},
    }  # fmt: skip
    with pytest.raises(InputError, match="300 of them for the answer, and the model has 256: fewer examples"):
        loaded(request(written(tmp_path, **changes)), tokenizer=tokenizer)


@local.needs_library
@pytest.mark.slow
def test_a_template_that_opens_no_answer_is_told(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="the chat template cannot open an answer"):
        loaded(request(written(tmp_path), chat=True), tokenizer=tokenizer)


@local.needs_library
@pytest.mark.slow
def test_code_beside_a_file_runs_where_it_is_trusted_alone(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "own.py").write_text("def text(row):\n    return 'So ' + row['q']\n")
    file = written(tmp_path)
    file.write_text(file.read_text().replace('"{{q}}"', "!function own.text"))
    with pytest.raises(InputError, match=r"!function own\.text: runs Python code"):
        loaded(request(file), tokenizer=tokenizer)
    made = loaded(request(file), tokenizer=tokenizer, trust=True)
    assert made.items[0].parts[0].instances[0].args[0] == "So one and one"


@local.needs_library
@pytest.mark.slow
def test_the_digest_is_of_what_is_asked(tmp_path: Path, tokenizer: Any) -> None:
    def digest(**asked: Any) -> str:
        return str(loaded(request(written(tmp_path), **asked), tokenizer=tokenizer).items[0].digest)

    assert digest() == digest()
    assert len({digest(), digest(limit=3), digest(few_shot=1)}) == 3


@local.needs_library
@pytest.mark.slow
def test_scores_are_the_model_s_own_and_kept(source: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Each choice's log-likelihood by hand; then nothing is asked again, and a lost file alone is."""
    from requant.evaluate import task_stage, variants

    made = loaded(request(written(tmp_path)), request(written(tmp_path), title="few", few_shot=1), tokenizer=tokenizer)
    cpu = torch.device("cpu")
    (tmp_path / "cache").mkdir()
    scores = task_stage.TaskScores(
        cache=tmp_path / "cache", tasks=made, keys={"merged": "k"}, device=cpu, dtype=torch.float32
    )
    sources = VariantSources.of_checkpoint(source)
    seen: list[int] = []
    result = task_stage.run_tasks(scores, sources, batch=2, progress=lambda done, of, note: seen.append(done))
    assert result == {"variants": ["merged"], "missing": {}, "notes": [], "again_from": {}}
    assert seen[-1] == 48, "two tasks of 12 rows with two choices"
    model, plain = (
        variants.load("merged", sources, device=cpu, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
    )
    likelihoods = []
    for choice in ROW["choices"]:
        context = plain(ROW["q"])["input_ids"]
        ids = plain(f"{ROW['q']} {choice}")["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        likelihoods.append(sum(float(log_p[i - 1, ids[i]]) for i in range(len(context), len(ids))))
    best = int(likelihoods[1] > likelihoods[0])
    part = scores.read("merged", made.items[0], 0)
    assert part is not None
    assert part["values"]["acc"] == [float(i % 2 == best) for i in range(12)]
    before = scores.file("merged", made.items[0], 0).stat().st_mtime_ns
    scores.file("merged", made.items[1], 0).write_text("{}")
    assert [task.request.title for task, _ in scores.missing("merged")] == ["few"]
    task_stage.run_tasks(scores, sources, batch=2)
    assert scores.file("merged", made.items[0], 0).stat().st_mtime_ns == before
    assert scores.missing("merged") == []
    assert replace(scores, keys={"merged": "other"}).missing("merged"), "another model has no results"


class OwnModel:
    """A server that computes with our own model, one request after the other."""

    described = "our own model"

    def __init__(self, path: Path) -> None:
        from requant.evaluate import variants

        sources = VariantSources.of_checkpoint(path)
        self.model = variants.load("merged", sources, device=torch.device("cpu"), dtype=torch.float32)

    def scores(self, rows: Any) -> list[tuple[float, bool]]:
        found = []
        for ids, first in rows:
            with torch.no_grad():
                log_p = self.model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)
            own = torch.tensor(ids[first:])
            chosen = log_p.gather(-1, own[:, None]).sum()
            found.append((float(chosen), bool((log_p.argmax(-1) == own).all())))
        return found

    def continuations(self, prompts: Any, *, new_tokens: int, until: Any, stops: Any) -> list[list[int]]:
        from requant_eval.scoring.answers import answer

        return answer(self.model, prompts, new_tokens, stops=stops, device="cpu")


@local.needs_library
@pytest.mark.slow
def test_a_server_answers_what_our_own_model_is_asked(source: Path, tmp_path: Path, tokenizer: Any) -> None:
    """The same prompts, tokens and cuts: through a server with the same model every document has the same value."""
    from contextlib import nullcontext

    from requant.evaluate import task_stage

    (tmp_path / "w").mkdir()
    asked = [request(written(tmp_path), few_shot=1), request(written(tmp_path / "w", **ANSWERED), title="written")]
    made = loaded(*asked, tokenizer=tokenizer)
    values = []
    for served in ({}, {"merged": source}):
        scores = task_stage.TaskScores(
            cache=tmp_path, tasks=made, keys={"merged": "k"}, device=torch.device("cpu"), dtype=torch.float32,
            served=served,
        )  # fmt: skip
        assert len(scores.missing("merged")) == 2, "kept apart"
        result = task_stage.run_tasks(
            scores, VariantSources.of_checkpoint(source), batch=2, serve=lambda path: nullcontext(OwnModel(path))
        )
        assert result["notes"] == []
        assert {scores.read("merged", task, 0).get("by") for task in made.items} == {  # type: ignore[union-attr]
            "our own model" if served else None
        }
        values.append([scores.read("merged", task, 0)["values"] for task in made.items])  # type: ignore[index]
    assert values[0] == values[1]


@local.needs_library
@pytest.mark.slow
def test_answers_share_a_batch_where_the_logits_of_choices_would_not(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary of 262,144: logits of all positions of four choices, but of the last of hundreds of answers."""
    from requant.evaluate import task_stage

    (tmp_path / "w").mkdir()
    asked = [request(written(tmp_path)), request(written(tmp_path / "w", **ANSWERED), title="written")]
    made = loaded(*asked, tokenizer=tokenizer)
    scores = task_stage.TaskScores(
        cache=tmp_path, tasks=made, keys={}, device=torch.device("cpu"), dtype=torch.float32
    )  # fmt: skip
    choice, answer = made.items
    room = 8 * len(tokenizer) * choice.longest
    monkeypatch.setattr(task_stage, "logit_bytes", lambda _: 2 * room)
    work = task_stage._Work(scores=scores, sources=None, batch=BatchSize(windows=12), progress=None)  # type: ignore[arg-type]
    assert work._rows(choice, 0) == 2
    assert work._rows(answer, 0) == 12


@local.needs_library
@pytest.mark.slow
def test_captured_steps_write_what_the_library_does(source: Path, tmp_path: Path, tokenizer: Any) -> None:
    """On the CPU a step is launched kernel by kernel, and otherwise as on a GPU: the same texts, cut at `until`."""
    from requant.evaluate import task_model, variants

    questions = [" ".join(["one and two", "three", "a dog", "the end of"][i % 4 :]) for i in range(12)]
    (tmp_path / "words.jsonl").write_text(
        "".join(json.dumps(ROW | {"q": f"{q} {i}"}) + "\n" for i, q in enumerate(questions))
    )
    long = {"until": ["&", "\n"], "max_gen_toks": 40}
    made = loaded(request(written(tmp_path, **ANSWERED | {"generation_kwargs": long})), tokenizer=tokenizer)
    (task,) = made.items
    model = variants.load(
        "merged", VariantSources.of_checkpoint(source), device=torch.device("cpu"), dtype=torch.float32
    )
    launches: list[int] = []

    def capture(step: Any) -> Any:
        return lambda: (launches.append(1), step())

    def texts(batch: int, how: Any, stops: tuple[int, ...] = made.stops) -> list[str]:
        asked = task_model.wrapped(
            model, made.tokenizer, window=made.window, batch=batch, stops=stops, capture=how
        )  # fmt: skip
        return list(asked.generate_until(task.parts[0].instances))

    said = [texts(1, None), texts(4, None), texts(4, capture)]
    assert said[0] == said[1] == said[2]
    assert len(set(said[0])) > 4
    assert not any("&" in text for text in said[0])
    prompts = [tokenizer(i.args[0])["input_ids"] for i in task.parts[0].instances]
    written_ids = answers.answer(model, prompts, 12, stops=made.stops, device="cpu")
    often = Counter(i for ids in written_ids for i in ids).most_common(1)[0][0]
    words = (tokenizer.convert_tokens_to_ids("!"), often)  # stop tokens that are text: what follows an end is not
    assert texts(4, None, words) == texts(4, capture, words) != said[0]
    assert launches
