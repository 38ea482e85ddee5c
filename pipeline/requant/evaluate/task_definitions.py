"""Tasks of lm-evaluation-harness, found, built and checked before a model is loaded.

The library is imported here and in the files beside that say so, only where a recipe asks for tasks.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from requant.data.template_losses import TemplateFailure
from requant.errors import InputError, RequantError, one_line
from requant.evaluate import task_documents, task_files
from requant_eval.regular_files import read_bytes

INSTALL = "pip install 'lm-eval>=0.4.12,<0.5'"
OLDEST, TOO_NEW = (0, 4, 12), (0, 5)
_NAME = re.compile(rb"^(task|group|tag):[ \t]*[\"']?([^\s\"'#\[{]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
_TAGS = re.compile(rb"^tag:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n)+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """A task as the recipe asks for it. place: `file:line: key`, for messages."""

    title: str
    name: str | None
    path: Path | None
    limit: int | None
    few_shot: int | None
    chat: bool
    metric: str | None
    place: str


def require_library(place: str) -> None:
    """Raise InputError where lm-evaluation-harness is not installed, or a version that is not known here."""
    if find_spec("lm_eval") is None:
        raise InputError(f"{place}: needs lm-evaluation-harness: {INSTALL}")
    found = library_version()
    numbers = tuple(map(int, re.findall(r"[0-9]+", found)[:3]))
    if not OLDEST <= numbers < TOO_NEW:
        raise InputError(f"{place}: lm-evaluation-harness {found} is installed, which is not run here: {INSTALL}")


def build(request: TaskRequest, *, trust_remote_code: bool) -> list[Any]:
    """The library's tasks of a request: one, or those of a group. Its data is read here.

    Raises InputError for a name that is unknown, data that is not there, and what is not run.
    """
    with _guarded(request, trust_remote_code=trust_remote_code):
        made = _of_file(request, trust_remote_code=trust_remote_code) if request.path else _of_name(request)
    for task in made:
        _refuse(request, task)
        if request.few_shot is not None:
            task.set_config(key="num_fewshot", value=request.few_shot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return made


@contextmanager
def _guarded(request: TaskRequest, *, trust_remote_code: bool) -> Iterator[None]:
    """What the library raises while it builds a task becomes an error of ours; code of a hub is not run."""
    from lm_eval.api import task as library
    from lm_eval.api.registry import get_metric, metric_registry

    def own_metric(name: str, of_hub: bool = False) -> Any:
        if of_hub or name not in metric_registry:
            raise InputError(
                f"{request.place}: task {request.title}: its metric {name} is Python code of a hub "
                "(the library evaluate): take a task with the library's own metrics, or set trust_remote_code: true"
            )
        return get_metric(name)

    _sandbox_templates()
    before = library.get_metric
    library.get_metric = before if trust_remote_code else own_metric
    try:
        with telling(request):
            yield
    finally:
        library.get_metric = before


@contextmanager
def telling(request: TaskRequest) -> Iterator[None]:
    """What the library raises about a task becomes an InputError that names the document; nulls of a file's too."""
    with task_documents.watched(refuse_nulls=request.path is not None) as seen:
        try:
            yield
        except (RequantError, TemplateFailure):
            raise
        except Exception as error:  # of the library, its data sets' library, and the network
            file = f"{request.path}: " if request.path else ""
            raise InputError(f"{request.place}: task {request.title}: {file}{_why(error, seen)}") from error


def _why(error: Exception, seen: task_documents.Watched) -> str:
    """What a failure to build a task means, and what to do."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {
        "DatasetNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectionError",
        "HfHubHTTPError",
        "LocalEntryNotFoundError",
    }:
        return (
            f"its data is not on this machine and cannot be downloaded ({one_line(error)}): run it once where there is "
            "a network, or give a file with local data (docs/tasks.md)"
        )
    return task_documents.failure(error, seen)


def _sandbox_templates() -> None:
    """Let the templates of tasks be rendered in Jinja's sandbox: a template is a program too."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if isinstance(utils.env, SandboxedEnvironment):
        return
    sandbox = SandboxedEnvironment(
        loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=utils.env.keep_trailing_newline
    )
    sandbox.filters |= utils.env.filters
    utils.env = sandbox


def _of_file(request: TaskRequest, *, trust_remote_code: bool) -> list[Any]:
    """The task of a local file; its data is read into memory and leaves nothing in a cache."""
    from lm_eval.tasks import TaskManager

    assert request.path is not None
    config = task_files.read(request.path.resolve(), function=_function if trust_remote_code else None)
    manager = TaskManager(include_defaults=False)
    with tempfile.TemporaryDirectory() as folder:
        if config["dataset_path"] in task_files.LOADERS:
            kept = {"cache_dir": folder, "keep_in_memory": True}
            config = {**config, "dataset_kwargs": {**config["dataset_kwargs"], **kept}}
        found = manager.load(config)
    return list(found["tasks"].values())


def _function(name: str, directory: Path) -> Any:
    """What `!function NAME` of a trusted file stands for."""
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    return _import_func_in_yml(name, directory)


def _of_name(request: TaskRequest) -> list[Any]:
    """The task or group of the library with this name."""
    from lm_eval.tasks import TaskManager

    name = str(request.name)
    tasks, others = _index()
    if name in tasks:  # alone: the library's own index of 14,000 files takes most of a minute
        found = TaskManager(include_defaults=False).load(str(tasks[name]))
    elif name in others:
        found = TaskManager().load(name)
    else:
        near = difflib.get_close_matches(name, [*tasks, *others], n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "its list: lm_eval ls tasks; a local task needs path"
        raise InputError(f"{request.place}: {name!r:.80} is no task of lm-evaluation-harness: {hint}")
    return list(found["tasks"].values())


def _index() -> tuple[dict[str, Path], set[str]]:
    """(task -> its file, names of groups and tags) of the installed library, from the text of its files."""
    import lm_eval

    tasks: dict[str, Path] = {}
    others: set[str] = set()
    for file in sorted((Path(lm_eval.__file__).parent / "tasks").rglob("*.yaml")):
        text = read_bytes(file)
        for kind, found in _NAME.findall(text):
            if kind == b"task" and b"\nclass:" not in b"\n" + text:
                tasks.setdefault(found.decode("utf-8", "replace"), file)
            else:
                others.add(found.decode("utf-8", "replace"))
        for block in _TAGS.findall(text):
            others |= {line.strip(b"- \t\"'").decode("utf-8", "replace") for line in block.splitlines()}
    return tasks, others


def _refuse(request: TaskRequest, task: Any) -> None:
    """Raise InputError for a task that is not run here."""
    where = f"{request.place}: task {request.title}"
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"{where}: runs code that the model writes, which requant never does: use lm_eval itself")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"{where}: asks about images or sound, which are not run here")
    if task.get_config("repeats") not in (None, 1):
        raise InputError(
            f"{where}: asks each question {task.get_config('repeats')} times: only single answers are paired"
        )


@cache
def library_version() -> str:
    """The installed version of lm-evaluation-harness."""
    from importlib.metadata import version

    return version("lm_eval")
