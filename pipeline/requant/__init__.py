"""requant: a LoRA or QLoRA fine-tune in, a GPTQ checkpoint and its quality report out.

    from requant import load, run

    outcome = run(load("recipe.yaml", overrides={"quantize.bits": 4}))

Importing this package imports nothing heavy: torch and transformers come with the first use of `run`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from requant.recipe import Recipe, load
    from requant.run import Outcome, run
    from requant.run.sweep import sweep

__version__ = "0.1.0"
__all__ = ["Outcome", "Recipe", "__version__", "load", "run", "sweep"]


def __getattr__(name: str) -> Any:
    """The public names, imported on first use. `run` is the package of that name, which can be called."""
    if name in ("Recipe", "load"):
        from requant.recipe import Recipe, load

        return {"Recipe": Recipe, "load": load}[name]
    if name in ("Outcome", "run"):
        from requant.run import Outcome

        return {"Outcome": Outcome, "run": sys.modules[f"{__name__}.run"]}[name]
    if name == "sweep":
        from requant.run.sweep import sweep

        return sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
