"""A headless Chromium for the tests of the HTML report, driven by the DevTools protocol.

It is reached through two pipes: no port, no driver, no package. Every request of the page and every message of its console
is recorded.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "no Chromium here (apt-get install chromium): the page was not opened in a browser"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--hide-scrollbars", "--font-render-hinting=none", "--remote-debugging-pipe",
)  # fmt: skip
# The browser reads commands from descriptor 3 and writes answers to 4.
LAUNCH = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
KEYS = {"Enter": (13, "\r"), " ": (32, " "), "Tab": (9, "")}


def executable() -> str | None:
    """The browser to use: `REQUANT_CHROMIUM`, else the first of the usual names on the path."""
    named = os.environ.get("REQUANT_CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page: its `requests`, its `console` (all that is logged, thrown or blocked), actions."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self.process, self._commands, self._answers = process, commands, answers
        self._buffer, self._count, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.console: list[str] = []
        self._loaded = False
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self._send(f"{domain}.enable")

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load `url`; raises AssertionError when it can't be."""
        self.view(width, height, dark=dark)
        self.requests.clear()
        self.console.clear()
        self._loaded = False
        failed = self._send("Page.navigate", url=url).get("errorText")
        assert not failed, f"{url}: {failed}"
        while not self._loaded:
            self._read()

    def view(self, width: int, height: int = 900, *, dark: bool = False, media: str = "") -> None:
        """Size of the window, colour scheme, and medium (`print`)."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """One real key press, down and up."""
        code, text = KEYS.get(key, (0, ""))
        said = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        self._send("Input.dispatchKeyEvent", type="keyDown", **said, **({"text": text} if text else {}))
        self._send("Input.dispatchKeyEvent", type="keyUp", **said)

    def move(self, x: float, y: float) -> None:
        """The pointer to a place of the window."""
        self._send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """A real click in the middle of the first element of `selector`."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def middle(self, selector: str) -> tuple[float, float]:
        """Scrolls an element into view and says where its middle is."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect(); "
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return box[0], box[1]

    def tree(self) -> list[dict[str, Any]]:
        """The accessibility tree's nodes, those that a screen reader skips left out."""
        nodes: list[dict[str, Any]] = self._send("Accessibility.getFullAXTree")["nodes"]
        return [node for node in nodes if not node["ignored"]]

    def screenshot(self, path: Path, *, full: bool = True) -> None:
        """A PNG of the whole page, or of the window."""
        data = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        """The page as printed."""
        return base64.b64decode(self._send("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"])

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        number = self._count
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self, patience: float = 60) -> dict[str, Any]:
        end = time.monotonic() + patience
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._answers, 1 << 16) if ready else b""
            assert data, f"the browser is {'silent' if not ready else 'gone'} (exit code {self.process.poll()})"
            self._buffer += data
        first, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(first)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.consoleAPICalled":
                self.console.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
            case "Runtime.exceptionThrown":
                self.console.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.console.append(params["entry"]["text"])
            case "Page.loadEventFired":
                self._loaded = True


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile in `profile`, and its one page; gone at the end."""
    command_out, command_in = os.pipe()
    answer_out, answer_in = os.pipe()
    browser = executable()
    assert browser, MISSING
    flags = (*FLAGS, f"--user-data-dir={profile}")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(command_out), str(answer_in), browser, *flags],
        pass_fds=(command_out, answer_in), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(command_out)
    os.close(answer_in)
    try:
        yield Page(process, command_in, answer_out)
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(command_in)
        os.close(answer_out)
