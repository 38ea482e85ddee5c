"""The Dockerfile: pinned, not root; its build stage, executed in an empty directory."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from helpers import dockerfile
from helpers.dockerfile import ROOT

STAGES = dockerfile.stages((ROOT / "Dockerfile").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = {
    line.partition("==")[0].lower().replace("_", "-")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
}


def test_the_stages() -> None:
    assert list(STAGES) == ["", "build", "base", "cuda", "cpu"]
    assert {STAGES[name].image for name in ("build", "base")} == {"python:${PYTHON}"}
    assert {STAGES[name].image for name in ("cuda", "cpu")} == {"base"}


def test_the_image_is_of_one_version_that_requant_runs_on() -> None:
    tag = dockerfile.arguments(STAGES[""])["PYTHON"]
    version = re.match(r"(\d+)\.(\d+)\.\d+-", tag)
    assert version
    assert f"Programming Language :: Python :: {version[1]}.{version[2]}" in PROJECT["classifiers"]


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_what_is_started_is_requant_and_not_as_root(name: str) -> None:
    assert STAGES[name].steps[-1] == ("USER", "requant")
    (entry,) = STAGES["base"].all("ENTRYPOINT")
    assert set(json.loads(entry)) <= set(PROJECT["scripts"])


def test_every_package_is_installed_in_the_version_that_was_tested() -> None:
    commands = [text for text in STAGES["build"].all("RUN") if " install " in text]
    assert len(commands) == 3
    for command in commands:
        assert "-c constraints.txt" in command
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gguf"], "hatchling"]
    names = {re.split(r"[^\w.-]", name)[0].lower().replace("_", "-") for name in wanted}
    assert names - PINNED == set()


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    copied = {source for text in STAGES["build"].all("COPY") for source in text.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)
    assert set(PROJECT["license-files"]) | {PROJECT["readme"]} <= copied


def test_a_stage_is_read_and_executed(tmp_path: Path) -> None:
    """By the helper that executes the real one: order, directories, environment, and a command that fails."""
    text = (
        "FROM x AS a\nARG WHO=you\nENV PATH=/opt/requant/bin:$PATH\nWORKDIR /src\nCOPY LICENSE ./\n"
        "# no step\nRUN echo $WHO \\\n && cp LICENSE /src/copy > log\nRUN echo $PATH > path\n"
    )
    stage = dockerfile.stages(text)["a"]
    dockerfile.execute(stage, tmp_path, {"PATH": "/usr/bin:/bin"})
    assert (tmp_path / "src" / "copy").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (tmp_path / "src" / "path").read_text() == f"{tmp_path}/opt/requant/bin:/usr/bin:/bin\n"
    stage.steps = [("RUN", "false")]
    with pytest.raises(subprocess.CalledProcessError):
        dockerfile.execute(stage, tmp_path, {"PATH": "/usr/bin:/bin"})


@pytest.mark.dockerfile
def test_the_build_stage_works_in_an_empty_directory(tmp_path: Path) -> None:
    """Installs torch and all else anew, then a starter recipe is written by what was installed."""
    dockerfile.execute(STAGES["build"], tmp_path, dockerfile.outside())
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    variables = dockerfile.environment(STAGES["base"], dockerfile.outside())
    variables = {name: dockerfile.moved(value, tmp_path) for name, value in variables.items()} | {"HF_HUB_OFFLINE": "1"}
    for arguments in (["--help"], ["schema"], ["init", "adapter"]):
        done = subprocess.run(
            [tmp_path / "opt" / "requant" / "bin" / "requant", *arguments],
            cwd=tmp_path, env=variables, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "name: adapter-w4g128" in done.stdout
