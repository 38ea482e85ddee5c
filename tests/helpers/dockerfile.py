"""The Dockerfile as stages, and one stage executed in an empty directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSIDE = ("/opt/requant", "/src", "/work")
"""Directories of the image that the commands name."""


@dataclass
class Stage:
    """One FROM and what follows it: (instruction, its text), continued lines joined."""

    name: str
    image: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]


def stages(text: str) -> dict[str, Stage]:
    """Every stage by its name, in order; what stands before the first FROM is in ''."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = {"": Stage("", "")}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            image, _, name = rest.partition(" AS ")
            found[name] = Stage(name, image)
        elif instruction:
            list(found.values())[-1].steps.append((instruction, rest.strip()))
    return found


def arguments(stage: Stage) -> dict[str, str]:
    """Name -> default of each ARG of a stage."""
    pairs = (text.partition("=") for text in stage.all("ARG"))
    return {name: value.strip('"') for name, _, value in pairs}


def environment(stage: Stage, before: dict[str, str]) -> dict[str, str]:
    """What the ENV lines of a stage make of an environment."""
    result = dict(before)
    for text in stage.all("ENV"):
        for name, value in re.findall(r"(\w+)=(\S+)", text):
            result[name] = re.sub(r"\$(\w+)", lambda found: result.get(found[1], ""), value)
    return result


def execute(stage: Stage, place: Path, base: dict[str, str]) -> None:
    """COPY, WORKDIR and RUN of a stage in order, below `place`; raises CalledProcessError for a command that fails."""
    here = place
    variables = environment(stage, base | arguments(stage))
    variables = {name: moved(value, place) if name != "HOME" else value for name, value in variables.items()}
    for instruction, text in stage.steps:
        if instruction == "WORKDIR":
            here = Path(moved(text, place))
            here.mkdir(parents=True)
        elif instruction == "COPY":
            *sources, target = text.split()
            for source in sources:
                copy(ROOT / source, here / target)
        elif instruction == "RUN":
            subprocess.run(["/bin/sh", "-ec", moved(text, place)], cwd=here, env=variables, check=True)


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copy(source, target / source.name if target.is_dir() else target)


def moved(text: str, place: Path) -> str:
    """The text with the image's directories below `place`."""
    return re.sub(rf"(?<![\w/])({'|'.join(INSIDE)})(?![\w-])", lambda found: f"{place}{found[1]}", text)


def outside() -> dict[str, str]:
    """The environment of a fresh container, with what pip needs to know of here."""
    kept = ("HOME", "LANG", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE", "SSL_CERT_FILE", "HTTPS_PROXY")
    return {name: os.environ[name] for name in (*kept, "PATH") if name in os.environ}
