"""A service in a process of its own, and what is sent to it."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pcam_jax.data.sample import sample_patches


class Service:
    """A service in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers, body."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()

    def predict(self, files: Sequence[tuple[str, bytes]], query: str = "") -> Any:
        body, kind = form(files)
        return self.ask("POST", f"/predict{query}", body, {"Content-Type": kind})

    def json(self, method: str, path: str) -> Any:
        return json.loads(self.ask(method, path)[2])

    def resident_bytes(self) -> int:
        """Memory in use."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def running_service(run: Path) -> Iterator[Service]:
    """``serve RUN`` on a free port, warm."""
    command = [sys.executable, "-m", "pcam_jax.serve", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = 0
        for line in process.stdout:
            if line.startswith("Serving "):
                port = int(line.split("http://")[1].split("/")[0].rpartition(":")[2])
            if line.startswith("Ready "):
                break
        else:
            sys.exit(f"error: the service of {run} ended before it was ready")
        yield Service(process, port)
        if process.poll() is not None:
            sys.exit(f"error: the service of {run} ended on its own with code {process.returncode}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def patch_files(image_shape: Sequence[int], count: int) -> list[bytes]:
    """Synthetic patches as uncompressed tif files, as PatchCamelyon's are."""
    side = image_shape[0]
    drawn = (
        sample_patches(count, image_size=side, seed=5).images if side >= 24 else _noise(count, image_shape)
    )
    return [encoded(Image.fromarray(image), "tiff") for image in drawn]


def _noise(count: int, image_shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *image_shape), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def zipped(members: Sequence[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, content) in enumerate(members):
            archive.writestr(f"{number}-{name}", content)
    return file.getvalue()


def form(files: Sequence[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A multipart/form-data body of files, and its content type."""
    boundary = uuid.uuid4().hex
    parts = []
    for name, content in files:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        parts += [head.encode(), content, b"\r\n"]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"
