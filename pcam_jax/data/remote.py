"""Files from a web server: resumed where they stopped, checked before they get their name."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import sync_folder
from pcam_jax.runtime.progress import progress

_BLOCK = 2**20
_PATIENCE_SECONDS = 60
_TRIES = 6  # in a row without a single new byte
_SPARE_BYTES = 64 * 2**20
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_CUT = (http.client.HTTPException, ConnectionError, TimeoutError, urllib.error.URLError)

Check = Callable[[], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch.

    Attributes:
        name: of the file, below the address and in the folder.
        size: bytes, where known beforehand.
        md5: hex digests of which it must have one; empty checks its length alone.
    """

    name: str
    size: int | None = None
    md5: tuple[str, ...] = ()


def fetch_all(
    address: str, files: Sequence[RemoteFile], folder: Path, check: Check, say: Say, wait_seconds: float = 1.0
) -> None:
    """Fetch files into a folder; those that are there and right are left alone.

    What is fetched of a file lies in ``<name>.part`` until it is complete and checked.

    Args:
        address: of the files' folder, without a slash at the end.
        files: what to fetch.
        folder: where to, made if needed.
        check: called several times a second; may raise to stop, and the next call goes on.
        say: takes sentences for the user.
        wait_seconds: before the second try; doubled each time.

    Raises:
        UserError: no room, no such file, a web page in its place, wrong bytes, or a server that stays away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for file in files:
        if (folder / file.name).exists():
            _check_content(folder / file.name, file, check, "exists already with other content: delete it")
            say(f"{file.name} is there already.")
        else:
            missing.append(file)
    sizes = {file.name: file.size or _size(f"{address}/{file.name}") for file in missing}
    _check_space(folder, sizes)
    for file in missing:
        _Fetch(f"{address}/{file.name}", folder / file.name, file, check, wait_seconds).run(sizes[file.name])
        say(f"{file.name}: {(folder / file.name).stat().st_size / 1e6:,.1f} MB, "
            f"{'its MD5 is right' if file.md5 else 'complete'}.")  # fmt: skip


def _check_space(folder: Path, sizes: dict[str, int | None]) -> None:
    needed = 0
    for name, size in sizes.items():
        part = folder / f"{name}.part"
        needed += max(0, (size or 0) - (part.stat().st_size if part.exists() else 0))
    free = shutil.disk_usage(folder).free
    if needed and free < needed + _SPARE_BYTES:
        raise UserError(
            f"The files need {needed / 1e6:,.0f} MB but {folder} has {free / 1e6:,.0f} MB free: "
            f"free some space, or choose a folder on another disk."
        )


def _size(url: str) -> int | None:
    """Bytes of a file as its server says without sending it; None where it does not."""
    try:
        with urllib.request.urlopen(_request(url, method="HEAD"), timeout=_PATIENCE_SECONDS) as answer:
            length = answer.headers.get("Content-Length")
            return int(length) if length and length.isdigit() else None
    except (*_CUT, OSError):
        return None  # the download itself will say what is wrong


def _request(url: str, method: str = "GET", **headers: str) -> urllib.request.Request:
    # identity: a compressed answer could be neither resumed nor measured
    return urllib.request.Request(
        url, headers={"User-Agent": "pcam-jax", "Accept-Encoding": "identity", **headers}, method=method
    )


class _Fetch:
    """One file on its way."""

    def __init__(self, url: str, target: Path, file: RemoteFile, check: Check, wait_seconds: float) -> None:
        self.url, self.target, self.file, self.check = url, target, file, check
        self.part = target.with_name(f"{target.name}.part")
        self.wait_seconds = wait_seconds

    def run(self, size: int | None) -> None:
        """Fetch until complete, check, and give the file its name."""
        tries = 0
        with progress(size, self.file.name[-40:], "B", initial=self._have()) as bar:
            while True:
                before = self._have()
                try:
                    if self._receive(bar):
                        break
                    cause = "the connection was cut"
                except urllib.error.HTTPError as error:
                    self._explain(error)
                    cause = f"HTTP {error.code}"
                except _CUT as error:
                    cause = str(getattr(error, "reason", None) or error) or type(error).__name__
                tries = 0 if self._have() > before else tries + 1
                if tries >= _TRIES:
                    raise UserError(
                        f"{self.url} cannot be fetched ({cause}, {_TRIES} times): check the network and give the "
                        f"same command again, it goes on where it stopped."
                    )
                self._wait(self.wait_seconds * 2 ** max(0, tries - 1))
        _check_content(self.part, self.file, self.check, "was received wrong: try again later", delete=True)
        self.part.rename(self.target)
        sync_folder(self.target.parent)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _receive(self, bar: Any) -> bool:
        """Add what the server sends to the part; returns whether the file is complete."""
        have = self._have()
        headers = {"Range": f"bytes={have}-"} if have else {}
        try:
            answer = urllib.request.urlopen(_request(self.url, **headers), timeout=_PATIENCE_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            # nothing lies beyond what we have: complete, or a part of another file
            whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]
            error.close()
            if whole == str(have):
                return True
            self.part.unlink()
            return False
        with answer:
            resumed = answer.status == 206 and _range_start(answer) == have
            if answer.status == 206 and not resumed:
                self.part.unlink(missing_ok=True)
                return False
            start = have if resumed else 0  # a server without ranges sends everything again
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length and length.isdigit() else None
            if not resumed:
                bar.reset(total)
            self._refuse_page(answer)
            with open(self.part, "ab" if resumed else "wb") as file:
                while block := answer.read(_BLOCK):
                    if file.tell() == 0:
                        _refuse_html(self.url, block)
                    file.write(block)
                    bar.update(len(block))
                    self.check()
                return total is None or file.tell() == total

    def _refuse_page(self, answer: Any) -> None:
        if answer.headers.get_content_type() == "text/html":
            raise UserError(f"{self.url} is a web page (HTML), not the file: check the address in a browser.")

    def _explain(self, error: urllib.error.HTTPError) -> None:
        """Raise for an answer that will not get better by asking again."""
        error.close()
        if error.code in _PASSING:
            return
        advice = {
            401: "it needs a login",
            403: "it refuses access",
            404: "there is no such file",
            410: "it is gone",
        }
        raise UserError(
            f"{self.url} cannot be fetched: {advice.get(error.code, 'it answers')} (HTTP {error.code})."
        )

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(0.2, left))


def _range_start(answer: Any) -> int:
    start = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else -1


def _refuse_html(url: str, block: bytes) -> None:
    if block.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower().startswith((b"<!doctype html", b"<html", b"<head")):
        raise UserError(f"{url} is a web page (HTML), not the file: check the address in a browser.")


def _check_content(path: Path, file: RemoteFile, check: Check, trouble: str, delete: bool = False) -> None:
    size = path.stat().st_size
    found = ""
    if file.size is not None and size != file.size:
        found = f"{size:,} bytes instead of {file.size:,}"
    elif file.md5:
        digest = hashlib.md5(usedforsecurity=False)
        with open(path, "rb") as content, progress(size, f"check {file.name[-34:]}", "B") as bar:
            while block := content.read(4 * _BLOCK):
                digest.update(block)
                bar.update(len(block))
                check()
        if digest.hexdigest() not in file.md5:
            found = f"its MD5 is {digest.hexdigest()}, not {' or '.join(file.md5)}"
    if found:
        if delete:
            path.unlink()
        raise UserError(f"{path.with_name(file.name)} {trouble} ({found}).")
