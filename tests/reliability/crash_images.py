"""What a crash would leave on the disk: copies of a folder, one before each thing done to it.

Python reports every file that it opens, makes, renames or removes to audit hooks, before it happens. Copying the
folder at each such moment gives every state in which SIGKILL could leave it, but for those inside one write of
tensorstore's, which lie between two of ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR


@dataclasses.dataclass(frozen=True)
class Image:
    """One moment."""

    folder: Path
    """The copy."""
    moment: str
    """What was about to happen: the event and the name, seen from the copied folder."""


class Camera:
    """Copies a folder before each event in it, while it is on."""

    def __init__(self) -> None:
        self.source: Path | None = None
        self.images: list[Image] = []
        self._target = Path()
        self._lock = threading.RLock()
        self._copying: int | None = None  # the thread that does

    @contextlib.contextmanager
    def watching(self, source: Path, target: Path) -> Iterator[list[Image]]:
        """Copy ``source`` into numbered folders below ``target``; gives the list that grows."""
        self.images, self._target, self.source = [], target, source
        target.mkdir(parents=True)
        try:
            yield self.images
        finally:
            self.source = None

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Takes every audit event of the process."""
        if self.source is None or event not in _EVENTS or self._copying == threading.get_ident():
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
        if not path.startswith(str(self.source)):
            return
        with self._lock:  # the other threads stand still at their next event
            self._copying = threading.get_ident()
            try:
                self._take(event, Path(path).relative_to(self.source).as_posix())
            finally:
                self._copying = None

    def _take(self, event: str, name: str) -> None:
        folder = self._target / f"{len(self.images):04d}"
        assert self.source is not None
        for _ in range(5):
            # the other thread may be in the midst of something
            with contextlib.suppress(OSError, shutil.Error):
                shutil.copytree(self.source, folder)
                self.images.append(Image(folder, f"{event} {name}"))
                return
            shutil.rmtree(folder, ignore_errors=True)


CAMERA = Camera()
sys.addaudithook(CAMERA.hook)  # a hook cannot be removed; it does nothing while nobody watches
