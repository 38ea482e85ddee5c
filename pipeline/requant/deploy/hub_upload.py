"""Upload of a checkpoint to a Hugging Face hub: a list of files, then one atomic commit.

The token is read from the environment (HF_TOKEN) only, and never printed. The hub knows weights by their sha256, so a
repeated upload does not send again what an interrupted one has sent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.checkpoint.artifact import MANIFEST, UNDO, changed_files
from requant.checkpoint.model_files import files_of
from requant.checkpoint.run_directory import MARKER
from requant.deploy import check_headers
from requant.deploy.gguf_export import FORMAT
from requant.deploy.gguf_verification import gguf_file, verify_gguf
from requant.errors import InputError, StageError
from requant.formats.quantized_format import Finding
from requant.outgoing import MASK, masked

TOKEN = "HF_TOKEN"
ENDPOINT = "HF_ENDPOINT"
REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
CARD = "README.md"
_NOT_UPLOADED = frozenset({MANIFEST, "blocks.json"})


@dataclass(frozen=True)
class Upload:
    """Files of one upload, (name, bytes), their repository, and the format of the checkpoint."""

    repo: str
    folder: Path
    files: tuple[tuple[str, int], ...]
    format: str

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def plan_upload(run: str | Path, repo: str, *, trust_remote_code: bool = False) -> Upload:
    """The upload of `run`, a run directory or a checkpoint; nothing is sent.

    Raises InputError when there is no whole checkpoint or model card, or `repo` is no id; StageError when headers and
    configs of the checkpoint are wrong.
    """
    run = Path(run)
    if not REPO.fullmatch(repo):
        raise InputError(f"{repo!r} is not a hub id: expected OWNER/NAME of letters, digits, '.', '_' and '-'")
    folder = run / "gptq" if (run / "gptq").is_dir() else run
    gguf = gguf_file(folder)
    if gguf is None and not (folder / "config.json").exists():
        raise InputError(f"{run}: holds no finished checkpoint (gptq/config.json): finish `requant run` first")
    if not (folder / CARD).exists():
        raise InputError(f"{folder / CARD}: there is no model card: `requant report RECIPE` writes it")
    findings, layout = _checked(folder, gguf, trust_remote_code=trust_remote_code)
    if findings:
        shown = "\n".join(f"  {f}" for f in findings[:5])
        raise StageError(f"{folder}: not pushed, {len(findings)} things are wrong with it:\n{shown}")
    files = [f for f in files_of(folder) if f.name not in _NOT_UPLOADED and not f.name.startswith(".")]
    _refuse_links_outside(folder, files)
    changed = changed_files(folder)
    if changed:
        shown = "\n".join(f"  {name}: {why}" for name, why in list(changed.items())[:5])
        raise StageError(f"{folder}: not pushed, {len(changed)} files are not as they were written; {UNDO}:\n{shown}")
    listed = tuple((f.relative_to(folder).as_posix(), f.stat().st_size) for f in files)
    return Upload(repo, folder, listed, layout)


def _checked(folder: Path, gguf: Path | None, *, trust_remote_code: bool) -> tuple[list[Finding], str]:
    """(what is wrong with headers and configs of a checkpoint, or with its GGUF file, the name of its format)."""
    if gguf is not None:
        return verify_gguf(gguf).findings, FORMAT
    found = check_headers.check(folder, trust_remote_code=trust_remote_code)
    return found.findings, found.layout.name if found.layout else ""


def _refuse_links_outside(folder: Path, files: Sequence[Path]) -> None:
    """Raise InputError for a file whose content lies elsewhere: what is sent is what the run made.

    A link inside of the run directory, or of a checkpoint without one, is followed.
    """
    inside = folder.parent if (folder.parent / MARKER).exists() else folder
    for path in (folder, *files):
        real = path.resolve()
        if not real.is_relative_to(inside.resolve()):
            raise InputError(f"{path}: is a link to {real}, outside of {inside}: not sent; put the file itself there")


def push(upload: Upload, *, private: bool = True, update: bool = False, message: str = "Upload with requant") -> str:
    """Create the repository and send the upload in one commit; returns its address.

    update: add a commit to a repository that already holds files. Raises InputError without a token, for a refused one
    and for a repository that exists; StageError when the connection breaks: the same call goes on from there.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise InputError(f"{TOKEN} is not set: put a write token in the environment (it is never read from a file)")
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=os.environ.get(ENDPOINT), token=token)
    existing = _try(lambda: _create(api, upload.repo, private=private), upload, token)
    if existing and not update:
        raise InputError(
            f"{upload.repo}: exists and holds {len(existing)} files, e.g. {existing[0]}: pass --update to add a commit "
            "to it"
        )
    operations = [CommitOperationAdd(name, str(upload.folder / name)) for name, _ in upload.files]
    done = _try(
        lambda: api.create_commit(upload.repo, operations, commit_message=message, repo_type="model"), upload, token
    )
    return str(done.repo_url)


def _create(api: Any, repo: str, *, private: bool) -> list[str]:
    """Create the repository unless it exists; names of its files, without git's own."""
    api.create_repo(repo, private=private, exist_ok=True)
    info = api.model_info(repo)
    return [s.rfilename for s in info.siblings or () if s.rfilename != ".gitattributes"]


def _try(work: Callable[[], Any], upload: Upload, token: str) -> Any:
    """Run one request; the client's errors become ours, without the token."""
    # Its HTTP client is httpx or httpx2, by version; both call the root of their errors so.
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        return work()
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        text = _clean(str(error), token)
        if status in (401, 403):
            raise InputError(
                f"{upload.repo}: the hub refuses the token in {TOKEN} (HTTP {status}): it needs write access: {text}"
            ) from None
        raise StageError(f"{upload.repo}: the hub answered HTTP {status}: {text}") from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _broken(upload, error, token) from None


def _broken(upload: Upload, error: Exception, token: str) -> StageError:
    cause = error.__cause__ or error
    return StageError(
        f"{upload.repo}: the connection broke ({type(cause).__name__}: {_clean(str(cause), token)}): run the same "
        "command again, weights that arrived are not sent again (with --update should the commit have arrived too)"
    )


def _clean(text: str, token: str) -> str:
    first = next((line.strip() for line in text.splitlines() if line.strip()), "no details")
    return masked(first.replace(token, MASK))[:300]
