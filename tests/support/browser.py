"""Chromium without a window, spoken to in its DevTools protocol over two pipes; nothing but the system's package is needed."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)

# The browser reads from 3 and writes to 4, whatever numbers the pipes have here.
_START = """import os, sys; from fcntl import F_DUPFD, fcntl
for number, pipe in enumerate([fcntl(int(text), F_DUPFD, 10) for text in sys.argv[1:3]], start=3): os.dup2(pipe, number)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """One tab."""

    def __init__(self, to: BinaryIO, back: BinaryIO) -> None:
        self.to, self.back = to, back
        self.number, self.session = 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{part}.enable")

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """What the browser answers to one call; what it tells meanwhile is kept in `events`."""
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        self.to.write(json.dumps({"id": self.number, "method": method, "params": values, **session}).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return message["result"]

    def _read(self) -> dict[str, Any]:
        found = bytearray()
        while (letter := self.back.read(1)) != b"\0":
            assert letter, "the browser is gone"
            found += letter
        message: dict[str, Any] = json.loads(found)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """Show a file in a window of `width` x `height` CSS pixels."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def value(self, expression: str) -> Any:
        """The value of some JavaScript; an exception in it fails the test."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def complaints(self) -> list[str]:
        """What was said to the console, thrown, or asked of the network, since the page was opened."""
        self.value("0")
        wanted = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        told = [json.dumps(event["params"]) for event in self.events if event["method"] in wanted]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return told + [url for url in asked if not url.startswith("file:")] + asked[1:]

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x: float, y: float) -> None:
        """Touch it shortly."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def picture(self, file: Path) -> None:
        """The whole page as a PNG."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(image))


def installed() -> str | None:
    """The system's browser."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


needs_chromium = pytest.mark.skipif(
    installed() is None, reason="needs chromium or google-chrome on the PATH (apt install chromium): pip has no browser"
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh browser, for tests that `needs_chromium` marks."""
    program = installed()
    assert program is not None
    read_theirs, write_ours = os.pipe()
    read_ours, write_theirs = os.pipe()
    with tempfile.TemporaryDirectory(prefix="surgeon-chromium-", ignore_cleanup_errors=True) as profile:
        started = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _START,
                f"{read_theirs}",
                f"{write_theirs}",
                program,
                *_FLAGS,
                f"--user-data-dir={profile}",
            ],
            pass_fds=(read_theirs, write_theirs),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_theirs)
        os.close(write_theirs)
        try:
            with os.fdopen(write_ours, "wb", buffering=0) as to, os.fdopen(read_ours, "rb") as back:
                browser = Browser(to, back)
                yield browser
                browser.session = ""
                browser.call("Browser.close")
        finally:  # it ends with its pipes, too
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
