"""A real headless Chromium, driven through its debugging pipe (no driver, no websocket package).

``with Browser() as browser: page = browser.open(path)``; a page can be looked at, measured and printed.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
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

# gives the pipes the numbers 3 and 4 in a process between, since forking this one after jax has started is unsafe
_LAUNCH = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


@functools.cache
def executable() -> str | None:
    """Path of the browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser process with a profile of its own; a context manager.

    Its two pipes carry JSON messages that end with a zero byte (Chrome DevTools Protocol).
    """

    def __init__(self, timeout: float = 60) -> None:
        self._timeout = timeout
        self._last = 0
        self._unread = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        self._profile = tempfile.mkdtemp(prefix="pcam_jax-browser-")
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()

        program = executable()
        assert program is not None, "no chromium; apt-get install chromium"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _LAUNCH, str(to_browser), str(from_browser)),
                *(program, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"),
            ],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, TimeoutError, AssertionError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come meanwhile are kept in ``events``."""
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)
        raise TimeoutError(method)

    def wait_for(self, event: str, session: str) -> dict[str, Any]:
        """The next event of a kind."""
        for known in self.events:
            if known["method"] == event and known.get("sessionId") == session:
                self.events.remove(known)
                return known["params"]
        for answer in self._messages():
            if answer.get("method") == event and answer.get("sessionId") == session:
                return answer["params"]
            self.events.append(answer)
        raise TimeoutError(event)

    def open(self, place: str | Path, width: int = 1200, height: int = 900, **metrics: Any) -> Page:
        """Open a file or an address in a window of that size and wait until it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height, **metrics)
        address = place if isinstance(place, str) else place.resolve().as_uri()
        page.call("Page.navigate", url=address)
        self.wait_for("Page.loadEventFired", session)
        return page

    def _messages(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + self._timeout
        while True:
            while b"\0" in self._unread:
                whole, _, self._unread = self._unread.partition(b"\0")
                yield json.loads(whole)
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                return
            part = os.read(self._from, 2**20)
            assert part, "the browser has ended"
            self._unread += part


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this tab."""
        return self._browser.call(method, self._session, **params)

    def resize(self, width: int, height: int = 900, scale: float = 1, mobile: bool = False) -> None:
        """Give the window another size, as a phone's where ``mobile``."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=mobile,
        )

    def emulate(self, media: str) -> None:
        """Show the page as on ``screen`` or in ``print``."""
        self.call("Emulation.setEmulatedMedia", media=media)

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression (a promise is waited for)."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path | None = None, whole: bool = True) -> bytes:
        """PNG of the page, to its end where ``whole``."""
        content = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        if path is not None:
            path.write_bytes(content)
        return content

    def pdf(self, path: Path | None = None) -> bytes:
        """The page as printed on A4."""
        answer = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        content = base64.b64decode(answer["data"])
        if path is not None:
            path.write_bytes(content)
        return content

    def events(self, method: str) -> list[dict[str, Any]]:
        """Parameters of the events of a kind so far."""
        self.evaluate("1")  # what came before this answer has been read by now
        found = self._browser.events
        return [e["params"] for e in found if e["method"] == method and e.get("sessionId") == self._session]

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """What the browser logged as an error or a warning, and uncaught exceptions."""
        logged = [event["entry"] for event in self.events("Log.entryAdded")]
        texts = [entry["text"] for entry in logged if entry["level"] in ("error", "warning")]
        return texts + [str(event) for event in self.events("Runtime.exceptionThrown")]
