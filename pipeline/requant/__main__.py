"""The program `requant`, also `python -m requant`: launchers such as torchrun use that name."""

from __future__ import annotations

from requant.runtime import signals


def main() -> None:
    """Run the command line; a signal ends it with one line also before and after the command."""
    signals.end_at_once()
    from requant.cli import main as command

    try:
        command()
    finally:
        signals.end_at_once()


if __name__ == "__main__":
    main()
