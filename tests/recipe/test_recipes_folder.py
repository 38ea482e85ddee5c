"""The recipes folder: the schema accepts each one, and it marks what is to be edited."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.recipe import load

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*/recipe.yaml"))


def test_the_models_people_fine_tune_are_there() -> None:
    names = {path.parent.name for path in RECIPES}
    assert {"llama-3.1-8b", "qwen2.5-7b", "qwen3-8b", "mistral-7b", "gemma-2-9b"} <= names
    assert {"qwen3.5-9b", "gemma-3-12b", "gemma-4-31b", "llama-3.3-70b", "mistral-small-24b", "gpt-oss-20b"} <= names
    assert {"qwen3-30b-a3b", "qwen3-vl-8b"} <= names, "a mixture, and one that sees"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_recipe_loads(path: Path) -> None:
    recipe = load(path)
    assert recipe.directory == path.parent
    assert "gptq" in recipe.evaluate.variants
    assert (path.parent / "README.md").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_recipe_is_servable(path: Path) -> None:
    """vLLM and SGLang load symmetric 4- and 8-bit GPTQ and nothing else."""
    quantize = load(path).quantize
    settings = [quantize, *quantize.overrides.values()]
    assert all(setting.symmetric in (True, None) and setting.bits in (4, 8, None) for setting in settings)
