"""Makes docs/report.png: two windows of a report.html in headless Chromium, side by side.

The left one shows the verdict, the right one what each step costs.

python docs/screenshot.py runs/smollm2-pydocs-w4g64/report.html
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from helpers import browser  # noqa: E402

WIDTH, HEIGHT, GAP, COLOURS = 860, 1000, 24, 160


def window(page: browser.Page, top: str) -> Image.Image:
    """Screenshot with the heading `top` at the upper edge ("": the start of the page)."""
    heading = f"[...document.querySelectorAll('h2')].find(h => h.textContent === {json.dumps(top)})"
    page.run(f"scrollTo(0, {heading}.getBoundingClientRect().top - 30)" if top else "scrollTo(0, 0)")
    file = Path(tempfile.mkdtemp()) / "window.png"
    page.screenshot(file, full=False)
    return Image.open(io.BytesIO(file.read_bytes())).convert("RGB")


def main() -> None:
    report = Path(sys.argv[1]).resolve()
    with browser.chromium(Path(tempfile.mkdtemp())) as page:
        page.open(report.as_uri(), width=WIDTH, height=HEIGHT)
        page.run("document.documentElement.style.scrollBehavior = 'auto'")
        shots = [window(page, ""), window(page, "in-domain")]
    sheet = Image.new("RGB", (2 * WIDTH + GAP, HEIGHT), "#d8d3c8")
    for number, shot in enumerate(shots):
        sheet.paste(shot, (number * (WIDTH + GAP), 0))
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(HERE / "report.png", optimize=True)


if __name__ == "__main__":
    main()
