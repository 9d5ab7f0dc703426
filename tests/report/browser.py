"""Headless Chromium for tests of pages, by its debugging protocol over two pipes: no port, no driver."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL.Image
import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip

GONE = {
    "Inspected target navigated or closed",
    "Execution context was destroyed.",
    "Cannot find context with specified id",
}
"""errors of what was asked of a page while another took its place"""


class Reloaded(AssertionError):
    """The page was left before it answered."""


def find_chromium() -> str | None:
    """The program, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page in one Chromium. The test skips where there is none."""

    def __init__(self, profile: Path) -> None:
        program = find_chromium()
        if program is None:
            pytest.skip("no chromium on this machine")
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()

        def take_pipes() -> None:  # Chromium's are 3 and 4
            first, second = os.dup(reads), os.dup(writes)
            os.dup2(first, 3)
            os.dup2(second, 4)

        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=take_pipes, close_fds=False, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(reads)
        os.close(writes)
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result. AssertionError for an error, or where there is no answer in four minutes; Reloaded."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(240)
            if answer.get("id") == self._number:
                if answer.get("error", {}).get("message") in GONE:
                    raise Reloaded(answer["error"])
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, *_ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium does not answer"
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "Chromium has ended"
            self._rest += chunk
        first, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(first)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, url: str, width: int = 1200, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Load a page and wait until it has painted."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")
        self.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)))")

    def evaluate(self, expression: str) -> Any:
        """A JavaScript value, once it is there where it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 240.0) -> None:
        """Until the expression is true, also of another page that this one becomes."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Reloaded):
                if self.evaluate(expression):
                    return
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """What the page logged, threw or could not load."""
        wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
        return [json.dumps(event["params"])[:500] for event in self.events if event["method"] in wrong]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself and data: left out."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls[1:] if not url.startswith("data:")]

    def pixels(self, whole: bool = True) -> np.ndarray:
        """The page as [H, W, 3] uint8; whole: all of its height."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))

    def pdf(self) -> bytes:
        """The page as it is printed, on A4."""
        options = {"printBackground": True, "paperWidth": 8.27, "paperHeight": 11.69}
        return base64.b64decode(self.call("Page.printToPDF", **options)["data"])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._to)
        os.close(self._from)
