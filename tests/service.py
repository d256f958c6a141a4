"""A real service in a process of its own, and a client that knows nothing of the package."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
Files = Sequence[tuple[str, bytes]]


class Reply(NamedTuple):
    """An answer; ``json`` is its parsed body, or None."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body) if "json" in self.headers.get("content-type", "") else None

    @property
    def error(self) -> str:
        """The sentence of an answer that is no prediction."""
        assert set(self.json) == {"error"}, self.body
        return self.json["error"]


class Service:
    """``serve`` on a free port, warnings as errors; a context manager that ends it and keeps what it said."""

    def __init__(self, *arguments: Any, wait: bool = True, **options: Any) -> None:
        self._command = [*(sys.executable, "-W", "error", str(ROOT / "tests/tiny.py"), "serve")]
        self._command += [*map(str, arguments), *([] if "--port" in arguments else ["--port", "0"])]
        self._options, self._wait = options, wait
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.port = 0

    def __enter__(self) -> Service:
        self.process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **{"cwd": ROOT, **self._options},
        )
        for stream, lines in ((self.process.stdout, self.lines), (self.process.stderr, self.errors)):
            threading.Thread(target=lambda s=stream, kept=lines: kept.extend(s), daemon=True).start()
        self.said("Serving ")
        line = next(line for line in self.lines if line.startswith("Serving "))
        self.port = int(line.split("http://")[1].split("/")[0].rpartition(":")[2])
        if self._wait:
            self.said("Ready after ")
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def said(self, start: str, timeout: float = 120) -> None:
        """Wait for a line of output."""
        deadline = time.monotonic() + timeout
        while not any(line.startswith(start) for line in self.lines):
            assert time.monotonic() < deadline, (self.lines, self.errors)
            ended = self.process.poll() is not None
            time.sleep(0.02)
            assert not ended or any(line.startswith(start) for line in self.lines), (self.lines, self.errors)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request on a connection of its own; underscores in names of headers stand for hyphens."""
        with contextlib.closing(self.connect()) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            return read_reply(connection)

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, **headers)

    def predict(self, files: Files, query: str = "", **headers: str) -> Reply:
        body, kind = form(files)
        return self.ask("POST", f"/predict{query}", body, content_type=kind, **headers)


def read_reply(connection: http.client.HTTPConnection) -> Reply:
    answer = connection.getresponse()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return Reply(answer.status, headers, answer.read())


def form(files: Files, field: str = "files") -> tuple[bytes, str]:
    """A multipart/form-data body of files, and its content type."""
    boundary = uuid.uuid4().hex
    parts = []
    for name, content in files:
        quoted = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{quoted}"\r\n\r\n'
        parts += [head.encode(), content, b"\r\n"]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def resident_bytes(process: int) -> int:
    """Memory of a process that is in use."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
