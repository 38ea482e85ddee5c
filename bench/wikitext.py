"""A recipe's texts with WikiText-2 as the general text: more of it than a package ships.

    python bench/wikitext.py --texts recipes/RECIPE/work/texts --wikitext DIR --out FOLDER

DIR holds wikitext2-valid.txt (becomes the calibration text) and wikitext2-test.txt (held out). One article, one document.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

PARTS = {"wikitext2-valid.txt": "general-calibration.jsonl", "wikitext2-test.txt": "general.jsonl"}
_TITLE = re.compile(r"^ = (?!=)", re.MULTILINE)  # sections have two signs and more


def articles(text: str) -> list[str]:
    """Each from its title to the next one."""
    starts = [m.start() for m in _TITLE.finditer(text)]
    return [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("texts", "wikitext", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(args.texts / name, args.out / name)
    for source, target in PARTS.items():
        found = articles((args.wikitext / source).read_text(encoding="utf-8"))
        (args.out / target).write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")
        print(f"{target}: {len(found)} articles")


if __name__ == "__main__":
    main()
