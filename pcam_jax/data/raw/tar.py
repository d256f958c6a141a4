"""Members of a tar: its headers are read once, each member with one `pread`.

A compressed tar can only be read from its beginning, so it is inflated into a temporary file first.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Hashable
from pathlib import Path
from typing import IO

from pcam_jax.data.raw.record import Fault, RecordFault
from pcam_jax.data.raw.unpacked import TemporaryCopy
from pcam_jax.runtime.errors import UserError

_JUNK = (".DS_Store", "Thumbs.db", "desktop.ini")
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError)


def is_tar(path: Path) -> bool:
    """Whether a file begins as a tar, compressed or not, that holds anything."""
    try:
        with tarfile.open(path) as archive:
            return archive.next() is not None
    except (*_DAMAGE, OSError):
        return False


class TarContainer:
    """Plain files in a tar, read in place; of a tar.gz, tar.bz2 or tar.xz from a temporary copy."""

    def __init__(self, path: Path, plain: Path | None = None) -> None:
        self.path = path
        self._plain = plain
        self._copy: TemporaryCopy | None = None
        self._descriptor = -1
        self._faults: list[Fault] = []
        self._listing: dict[str, Hashable] | None = None

    def members(self) -> dict[str, Hashable]:
        """Relative path -> (offset, size).

        Raises:
            UserError: a damaged or cut tar, or no room for the temporary copy.
        """
        if self._listing is not None:
            return self._listing
        listing: dict[str, Hashable] = {}
        self._faults = []
        try:
            with tarfile.open(self._uncompressed(), "r:") as archive:
                for entry in archive:
                    name = entry.name.removeprefix("./")
                    base = name.rpartition("/")[2]
                    if entry.isdir() or base in _JUNK or base.startswith("."):
                        continue
                    if not entry.isreg() or entry.issparse():
                        self._faults.append(
                            Fault(
                                "not a plain file",
                                Path(name).stem,
                                "",
                                name,
                                "a link or special file in the tar",
                            )
                        )
                        continue
                    if name in listing:
                        self._faults.append(
                            Fault(
                                "duplicate file",
                                Path(name).stem,
                                "",
                                name,
                                "the tar holds it twice; the last counts",
                            )
                        )
                    listing[name] = (entry.offset_data, entry.size)
        except _DAMAGE as error:
            raise UserError(
                f"{self.path} is a damaged or incomplete tar ({error}): download it again."
            ) from None
        self._listing = listing
        return listing

    def _uncompressed(self) -> Path:
        if self._plain is None:
            try:
                with tarfile.open(self.path, "r:"):
                    self._plain = self.path
            except tarfile.TarError:
                try:
                    with _inflated(self.path) as stream:
                        self._copy = TemporaryCopy(stream, str(self.path), 2 * self.path.stat().st_size)
                except _DAMAGE as error:
                    raise UserError(
                        f"{self.path} is a damaged or incomplete archive ({error}): download it again."
                    ) from None
                self._plain = self._copy.path
        return self._plain

    def forget(self) -> None:
        """Drop the listing."""
        self._listing = None

    def faults(self) -> list[Fault]:
        """Names that occur twice, and links."""
        return self._faults

    def read(self, locator: Hashable, limit: int) -> bytes:
        """The bytes of a member."""
        assert isinstance(locator, tuple)
        offset, size = locator
        if size > limit:
            raise RecordFault("unreadable", f"has {size} bytes, more than {limit}")
        if self._descriptor < 0:
            self._descriptor = os.open(self._uncompressed(), os.O_RDONLY | os.O_CLOEXEC)
        content = os.pread(self._descriptor, size, offset)
        if len(content) != size:
            raise RecordFault("unreadable", "lies beyond the end of the tar")
        return content

    def open(self, locator: Hashable) -> IO[bytes]:
        """A member as a stream."""
        assert isinstance(locator, tuple)
        file = open(self._uncompressed(), "rb")  # noqa: SIM115
        file.seek(locator[0])
        return io.BufferedReader(_Slice(file, locator[1]))

    def describe(self) -> dict[str, str]:
        """Path and kind."""
        return {"path": str(self.path.resolve()), "kind": "tar"}

    def __reduce__(self) -> tuple[object, ...]:
        return (TarContainer, (self.path, self._uncompressed()))

    def __del__(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)


class _Slice(io.RawIOBase):
    """The next ``size`` bytes of a file, as a file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)[: self._left]  # type: ignore[arg-type]
        content = self._file.read(len(view))
        view[: len(content)] = content
        self._left -= len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def _inflated(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        from isal import igzip

        return igzip.open(path, "rb")
    if start.startswith(b"BZh"):
        import bz2

        return bz2.open(path, "rb")
    return lzma.open(path, "rb")
