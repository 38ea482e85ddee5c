"""`requant.checkpoint.run_directory`: whole or absent, one run at a time, no foreign files."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from requant.checkpoint import digests as digest_module
from requant.checkpoint import run_directory
from requant.checkpoint.artifact import MANIFEST, Artifact, changed_files, read_manifest
from requant.checkpoint.atomic_write import DAMAGED
from requant.checkpoint.reader import file_digest
from requant.checkpoint.run_directory import MARKER, LogFile, RunDirectory, key_of, sealed, unsealed
from requant.errors import InputError


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "runs" / "demo")
    with directory.open():
        pass
    return directory


def build(artifact: Artifact, key: str, content: str = "weights") -> Path:
    partial = artifact.begin(key)
    (partial / "model.safetensors").write_text(content)
    artifact.finish(key, {"tool": "requant"})
    return artifact.path


def test_what_cannot_be_a_run_directory_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("rows")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file" / "demo", tmp_path / "link" / "deeper" / "demo", tmp_path / "link"):
        with pytest.raises(InputError, match=r"(file|link) is no directory: choose another output\.dir"):
            RunDirectory(path).check()
    RunDirectory(tmp_path / "new" / "deeper" / "demo").check()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=rf"{tmp_path}: cannot be written \(no permission\): choose another output"):
        RunDirectory(tmp_path / "new" / "demo").check()


def test_keys_are_digests_of_values_not_of_order() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert len({key_of(x) for x in ({"a": 1}, {"a": 2}, {"a": "1"}, [1], None)}) == 5
    assert key_of("a", "b") != key_of("ab")
    assert len(key_of("x")) == 64


def test_an_artifact_is_absent_until_it_is_finished(run: RunDirectory) -> None:
    artifact = run.artifact("merged")
    partial = artifact.begin("k" * 64)
    (partial / "model.safetensors").write_text("half")
    assert not artifact.path.exists()
    assert not artifact.whole("k" * 64)
    artifact.finish("k" * 64, {})
    assert artifact.whole("k" * 64)
    assert not partial.exists()
    assert not artifact.whole("other" * 12)


def test_the_journal_stays_until_the_manifest_is_written(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed while its files are synced and their digests are taken resumes from all that was solved."""
    artifact = run.artifact("gptq")
    partial = artifact.begin("key")
    for name in ("model.safetensors", "blocks.json"):
        (partial / name).write_text(name)

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("requant.checkpoint.artifact.sync_all", killed)
        with pytest.raises(KeyboardInterrupt):
            artifact.finish("key", {}, journal="blocks.json")
    assert artifact.begin("key") == partial
    assert (partial / "blocks.json").exists()
    artifact.finish("key", {}, journal="blocks.json")
    assert {f.name for f in artifact.path.iterdir()} == {"model.safetensors", "manifest.json"}
    assert artifact.whole("key")


def test_a_changed_file_makes_it_incomplete(run: RunDirectory) -> None:
    artifact = run.artifact("merged")
    file = build(artifact, "k") / "model.safetensors"
    file.write_text("cut")
    assert not artifact.whole("k")
    file.unlink()
    assert not artifact.whole("k")


def test_files_written_late_do_not_count(run: RunDirectory) -> None:
    artifact = run.artifact("gptq")
    path = build(artifact, "k")
    (path / "README.md").write_text("model card, written after the evaluation")
    assert artifact.whole("k")
    assert json.loads((path / MANIFEST).read_text())["files"] == {"model.safetensors": 7}


def test_an_interrupted_run_goes_on_only_with_the_same_key(run: RunDirectory) -> None:
    artifact = run.artifact("gptq")
    first = artifact.begin("a" * 64)
    (first / "blocks.json").write_text("[1]")
    assert (artifact.begin("a" * 64) / "blocks.json").read_text() == "[1]"
    second = artifact.begin("b" * 64)
    assert not first.exists(), "what belongs to other inputs is removed"
    assert list(second.iterdir()) == []


def test_partials_of_other_artifacts_are_left_alone(run: RunDirectory) -> None:
    other = run.artifact("merged").begin("a" * 64)
    run.artifact("gptq").begin("b" * 64)
    assert other.exists()


def test_a_new_result_replaces_ours(run: RunDirectory) -> None:
    artifact = run.artifact("merged")
    build(artifact, "a" * 64, "old")
    build(artifact, "b" * 64, "new")
    assert (artifact.path / "model.safetensors").read_text() == "new"
    assert [p.name for p in run.path.iterdir() if "merged" in p.name] == ["merged"]


def test_a_foreign_directory_in_its_place_is_kept(run: RunDirectory) -> None:
    artifact = run.artifact("merged")
    artifact.path.mkdir()
    (artifact.path / "precious").write_text("x")
    with pytest.raises(InputError, match="exists without requant's manifest: not overwritten; move it away"):
        artifact.begin("k")
    artifact.remove()
    assert (artifact.path / "precious").exists()


def test_remove_deletes_ours(run: RunDirectory) -> None:
    artifact = run.artifact("merged")
    build(artifact, "k")
    artifact.remove()
    assert not artifact.path.exists()


def test_a_foreign_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists and was not made by requant"), RunDirectory(tmp_path).open():
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_directory_may_be_used(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).open():
        assert (tmp_path / MARKER).exists()
    with RunDirectory(tmp_path).open():
        assert json.loads((tmp_path / MARKER).read_text()) == {"made_by": "requant", "layout": 1}


def test_a_second_run_is_refused_while_the_first_holds_the_lock(tmp_path: Path) -> None:
    """flock belongs to the open file, so a second `open` here acts as another process."""
    with RunDirectory(tmp_path / "run").open(), pytest.raises(InputError, match="another requant is running here"):
        RunDirectory(tmp_path / "run").open().__enter__()
    with RunDirectory(tmp_path / "run").open() as again:
        assert again.path.exists()


def test_an_unwritable_place_is_an_input_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"), RunDirectory(tmp_path / "run").open():
        pass


def test_a_file_in_the_way_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError), RunDirectory(tmp_path / "run").open():
        pass


def test_results_are_remembered_by_key(run: RunDirectory) -> None:
    run.remember("merge", "k1", {"dtype": "float16"})
    run.remember("quantize", "k2", {"bits": 4})
    assert run.result("merge", "k1") == {"dtype": "float16"}
    assert run.result("merge", "k2") is None
    run.remember("merge", "k3", {"dtype": "bfloat16"})
    assert run.result("merge", "k1") is None
    assert run.result("quantize", "k2") == {"bits": 4}


def test_digests_are_remembered_and_follow_the_content(run: RunDirectory, tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text("one")
    first = run.digests([file])
    assert first == run.digests([file]) == [file_digest(file)]
    before = file.stat()
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run.digests([file]) == [file_digest(file)] != first, "of the same size and time"


def test_only_the_hubs_cache_names_its_files_by_their_digests(run: RunDirectory, tmp_path: Path) -> None:
    """CACHE/models--A--B/snapshots/REVISION/FILE -> CACHE/models--A--B/blobs/SHA256; elsewhere a file is read."""
    for store, trusted in (("models--a--b", True), ("elsewhere", False)):
        blob = tmp_path / store / "blobs" / ("a" * 64)
        link = tmp_path / store / "snapshots" / ("0" * 40) / "model.safetensors"
        for path in (blob, link):
            path.parent.mkdir(parents=True)
        blob.write_text("x")
        link.symlink_to(blob)
        assert (run.digests([link]) == ["a" * 64]) is trusted
        assert run.digests([blob]) == [file_digest(blob)], "named directly it is a file like others"


def test_fingerprint_sees_what_a_run_reads(run: RunDirectory, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    before = run.fingerprint(model)
    (model / "notes.pdf").write_text("not read")
    assert run.fingerprint(model) == before
    (model / "tokenizer.json").write_text("{}")
    assert run.fingerprint(model) != before


def test_files_in_the_folders_of_a_model_belong_to_it(run: RunDirectory, tmp_path: Path) -> None:
    """A named chat template changes the fingerprint, and an artifact without it is not whole."""
    model = tmp_path / "model"
    (model / "additional_chat_templates").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    prints = [run.fingerprint(model)]
    template = model / "additional_chat_templates" / "tool_use.jinja"
    for text in ("A", "BB"):
        template.write_text(text)
        prints.append(run.fingerprint(model))
    assert len(set(prints)) == 3
    artifact = run.artifact("merged")
    partial = artifact.begin("key")
    (partial / "additional_chat_templates").mkdir()
    (partial / "additional_chat_templates" / "tool_use.jinja").write_text("A")
    artifact.finish("key", {})
    assert artifact.whole("key")
    (artifact.path / "additional_chat_templates" / "tool_use.jinja").unlink()
    assert not artifact.whole("key")


def flip(file: Path, at: int = -1) -> None:
    """Change one bit; size and modification time stay."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_bit_that_changed_makes_it_incomplete_and_is_said(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = run.artifact("gptq")
    file = build(artifact, "k") / "model.safetensors"
    assert artifact.whole("k")
    flip(file)
    assert not artifact.whole("k")
    (line,) = caplog.messages
    assert re.search(r"gptq/model\.safetensors: its content changed since it was written \(sha256 \w+, was \w+\)", line)
    assert changed_files(artifact.path).keys() == {"model.safetensors"}


def test_a_file_that_nobody_touched_is_not_read_again(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor after the run directory was renamed: names are no part of what a file is known by."""
    artifact = run.artifact("gptq")
    build(artifact, "k")
    time.sleep(2 * digest_module.FRESH / 1e9)
    assert artifact.whole("k")
    monkeypatch.setattr(digest_module, "DIGESTS", digest_module.Digests())
    monkeypatch.setattr(run_directory, "DIGESTS", digest_module.DIGESTS)
    monkeypatch.setattr(digest_module, "file_digest", lambda _: "0" * 64)
    run.path.rename(run.path.with_name("other"))
    with RunDirectory(run.path.with_name("other")).open() as moved:
        assert moved.artifact("gptq").whole("k")
        flip(moved.path / "gptq" / "model.safetensors")
        assert not moved.artifact("gptq").whole("k")


def test_a_manifest_of_an_older_version_holds_sizes_alone(run: RunDirectory) -> None:
    artifact = run.artifact("gptq")
    path = build(artifact, "k")
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert artifact.whole("k")
    (path / "model.safetensors").write_text("longer than it was")
    assert not artifact.whole("k")


@pytest.mark.parametrize("name", [".cache", "merged", "gptq", "healed", "log.txt", "events.jsonl", MARKER])
def test_what_a_run_writes_into_is_no_link(tmp_path: Path, name: str) -> None:
    """The run directory itself may be one: that is its owner's choice."""
    target, path = tmp_path / "elsewhere", tmp_path / "run"
    target.mkdir()
    path.mkdir()
    (path / MARKER).write_text("{}")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(target)
    with pytest.raises(
        InputError, match=rf"run/{re.escape(name)}: is a link to .*elsewhere: requant writes through no"
    ):
        RunDirectory(path).open().__enter__()
    assert list(target.iterdir()) == []
    (tmp_path / "linked").symlink_to(target)
    with RunDirectory(tmp_path / "linked").open():
        assert (target / MARKER).is_file()


def test_a_partial_directory_that_is_a_link_is_removed(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("x")
    for name in (".gptq.partial-kkkkkkkkkkkkkkkk", ".gptq.partial-other", ".gptq.old"):
        (run.path / name).symlink_to(tmp_path / "victim")
    artifact = run.artifact("gptq")
    for key in ("k" * 64, "l" * 64):
        build(artifact, key)
    assert [f.name for f in (tmp_path / "victim").iterdir()] == ["precious"]
    assert (tmp_path / "victim" / "precious").read_text() == "x"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"merge": 3}', '{"merge": {"key": 1, "result": {}}}', "\xff\xfe"])
def test_damaged_results_and_digests_are_none(run: RunDirectory, tmp_path: Path, content: str) -> None:
    file = tmp_path / "f.json"
    file.write_text("one")
    for name in (".stages.json", ".digests.json"):
        (run.path / name).write_bytes(content.encode("latin-1"))
    with run.open():
        assert run.result("merge", "k") is None
        run.remember("merge", "k", {"dtype": "float16"})
        assert run.result("merge", "k") == {"dtype": "float16"}
        assert run.digests([file]) == [file_digest(file)]


def test_what_killed_processes_left_goes_when_the_directory_is_opened(run: RunDirectory) -> None:
    left = [
        run.path / name
        for name in (".report.json.0f.tmp", ".cache/.gptq-a-1.safetensors.7.tmp", ".cache/ranks-2/0/.a.tmp")
    ]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    with run.open():
        assert not any(file.exists() for file in left)


def test_a_log_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """logging prints a traceback for each line that it cannot write."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    DAMAGED.addHandler(handler)
    try:
        log = LogFile(tmp_path / "log.txt")
        log.handler.setStream(open("/dev/full", "w"))  # noqa: SIM115
        with log:
            for _ in range(3):
                logging.getLogger("requant").info("a line")
    finally:
        DAMAGED.removeHandler(handler)
    assert len(said) == 1
    assert re.fullmatch(
        r".*log\.txt: cannot be written \(No space left on device: .*\): the run goes on without it", said[0]
    )
    assert capsys.readouterr() == ("", "")


def test_a_result_whose_bytes_have_changed_is_none(run: RunDirectory) -> None:
    """Still JSON, still of the right types: another number would have gone into the report."""
    run.remember("merge", "k", {"ledger": {"decoded": 14, 7: (1.5, None)}})
    kept = run.result("merge", "k")
    assert kept == {"ledger": {"decoded": 14, "7": [1.5, None]}}
    file = run.path / run_directory.STAGES
    whole = json.loads(file.read_text())
    file.write_text(file.read_text().replace("14", "15"))
    assert run.result("merge", "k") is None
    file.write_text(json.dumps(whole))
    assert run.result("merge", "k") == kept
    whole["merge"]["sha25"] = whole["merge"].pop("sha256")  # a flipped bit in the key itself
    file.write_text(json.dumps(whole))
    assert run.result("merge", "k") is None


def test_a_sealed_state_that_was_changed_is_seen() -> None:
    state = {"a": (1, 2.5), 3: None, "nan": float("inf")}
    kept = sealed(state)
    assert unsealed(json.loads(json.dumps(kept))) == {"a": [1, 2.5], "3": None, "nan": float("inf")}
    for changed in ({**kept, "a": [1, 2.6]}, {**kept, "b": 1}, {k: v for k, v in kept.items() if k != "a"}):
        with pytest.raises(ValueError, match="its bytes have changed"):
            unsealed(changed)
    with pytest.raises(ValueError, match="it has no checksum"):
        unsealed({"a": 1})


def test_a_memory_of_digests_that_was_changed_is_none(run: RunDirectory) -> None:
    known = run.path / run_directory.KNOWN
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(sealed({"path": ["stamp", "a" * 64]})))
    assert run._digests() == {"stamp": "a" * 64}
    known.write_text(known.read_text().replace("a" * 64, "b" * 64))
    assert run._digests() == {}
    assert not known.exists()


# --- taken over from another run ---


def finished_artifact(path: Path) -> RunDirectory:
    """A run directory with an artifact `merged` of key "k": weights and a config."""
    with RunDirectory(path).open() as run:
        out = run.artifact("merged").begin("k")
        (out / "model.safetensors").write_bytes(b"weights")
        (out / "additional_chat_templates").mkdir()
        (out / "additional_chat_templates" / "tools.jinja").write_text("{}")
        run.artifact("merged").finish("k", {})
    return run


def test_an_artifact_is_taken_over_where_its_key_is_the_same(tmp_path: Path) -> None:
    other = finished_artifact(tmp_path / "a")
    with RunDirectory(tmp_path / "b", [tmp_path / "none", other.path]).open() as run:
        assert not run.take_artifact("merged", "another")
        assert not run.take_artifact("gptq", "k")
        assert run.take_artifact("merged", "k")
        assert not run.take_artifact("merged", "k"), "what is there stays"
        artifact = run.artifact("merged")
        assert artifact.whole("k")
        names = {f.relative_to(artifact.path).as_posix() for f in artifact.path.rglob("*") if f.is_file()}
        assert names == {"model.safetensors", "additional_chat_templates/tools.jinja", "manifest.json"}
        theirs = other.path / "merged"
        assert (artifact.path / "model.safetensors").samefile(theirs / "model.safetensors")
        for name in names - {"model.safetensors"}:
            assert not (artifact.path / name).samefile(theirs / name), "people edit these"
        assert not list(run.path.glob(".merged.*"))
        artifact.remove()
    assert other.artifact("merged").whole("k"), "the other run's stays"


def test_an_artifact_is_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = finished_artifact(tmp_path / "a")

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    with RunDirectory(tmp_path / "b", [other.path]).open() as run:
        assert run.take_artifact("merged", "k")
        assert run.artifact("merged").whole("k")
        taken = run.path / "merged" / "model.safetensors"
        assert taken.read_bytes() == b"weights"
        assert not taken.samefile(other.path / "merged" / "model.safetensors")


def test_an_artifact_with_a_missing_file_is_not_taken_over(tmp_path: Path) -> None:
    other = finished_artifact(tmp_path / "a")
    (other.path / "merged" / "model.safetensors").unlink()
    with RunDirectory(tmp_path / "b", [other.path]).open() as run:
        assert not run.take_artifact("merged", "k")


def test_an_artifact_that_was_changed_is_taken_over_for_none(tmp_path: Path) -> None:
    other = finished_artifact(tmp_path / "a")
    (other.path / "merged" / "model.safetensors").write_bytes(b"Weights")
    with RunDirectory(tmp_path / "b", [other.path]).open() as run:
        assert run.take_artifact("merged", "k")
        assert not run.artifact("merged").whole("k"), "so the stage runs"


def test_results_and_cached_files_are_taken_over(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a").open() as other:
        other.remember("probe", "k", {"said": "yes"})
        (other.cache / "scores").write_text("1")
        (other.cache / "link").symlink_to("scores")
    with RunDirectory(tmp_path / "b", [other.path]).open() as run:
        assert run.result("probe", "another") is None
        assert run.result("probe", "k") == {"said": "yes"}
        assert run.take_cached("scores")
        assert not run.take_cached("scores"), "it is there"
        assert not run.take_cached("other")
        assert run.take_cached("link")
        assert not (run.cache / "link").is_symlink()
    shutil.rmtree(other.path)
    alone = RunDirectory(tmp_path / "b")
    assert alone.result("probe", "k") == {"said": "yes"}
    assert (alone.cache / "scores").read_text() == "1"


@pytest.mark.parametrize("field", ["key", "files", "sha256", "provenance"])
@pytest.mark.parametrize("value", [3, ["a"], None])
def test_a_manifest_of_another_shape_is_none_of_ours(tmp_path: Path, field: str, value: object) -> None:
    whole = {"key": "k", "files": {"a": 1}, "sha256": {"a": "0"}, "provenance": {"stage": "merge"}}
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    assert read_manifest(tmp_path) == whole
    (tmp_path / "manifest.json").write_text(json.dumps(whole | {field: value}))
    assert read_manifest(tmp_path) is None
