"""Where raw files lie: a folder, a zip or a tar, listed once and read member by member, never unpacked to disk."""

from __future__ import annotations

import errno
import os
import struct
import zipfile
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import IO, Protocol

from deflate import DeflateError, crc32, deflate_decompress

from pcam_jax.data.raw.record import Fault, RecordFault
from pcam_jax.runtime.errors import UserError

_JUNK = ("__MACOSX/", ".DS_Store", "Thumbs.db", "desktop.ini")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_SLACK = 64  # the extra field of a local header is rarely longer; a longer one costs a second read
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_METHODS = {12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd", 99: "AES encryption"}


class Container(Protocol):
    """A named collection of files. Cheap to pickle: the listing stays behind, files are opened where used."""

    path: Path

    def members(self) -> dict[str, Hashable]:
        """Relative path with "/" -> locator for `read`, for every plain file; listed once and kept."""

    def forget(self) -> None:
        """Drop the listing, which may be large."""

    def faults(self) -> list[Fault]:
        """What is wrong with the listing itself."""

    def read(self, locator: Hashable, limit: int) -> memoryview | bytes:
        """The bytes of a member, valid until the next call; raises RecordFault beyond ``limit`` bytes."""

    def open(self, locator: Hashable) -> IO[bytes]:
        """A member of any size as a stream; raises OSError."""

    def describe(self) -> dict[str, str]:
        """Path and kind, for the manifest."""


def open_container(path: Path) -> Container | None:
    """The container at ``path``, or None for a plain file."""
    if path.is_dir():
        return FolderContainer(path)
    if zipfile.is_zipfile(path):
        return ZipContainer(path)
    from pcam_jax.data.raw.tar import TarContainer, is_tar

    return TarContainer(path) if is_tar(path) else None


class FolderContainer:
    """Files under a folder, as deep as ``depth`` folders below it."""

    def __init__(self, path: Path, depth: int = 6) -> None:
        self.path = path
        self._depth = depth
        self._buffer = bytearray(2**16)
        self._listing: dict[str, Hashable] | None = None

    def members(self) -> dict[str, Hashable]:
        """Relative path -> the same path."""
        if self._listing is None:
            self._listing = {name: name for name in sorted(_walk(str(self.path), "", self._depth))}
        return self._listing

    def forget(self) -> None:
        """Drop the listing."""
        self._listing = None

    def faults(self) -> list[Fault]:
        """A folder's listing has no faults of its own."""
        return []

    def read(self, locator: Hashable, limit: int) -> memoryview:
        """The bytes of a file, in a buffer that the next call uses again."""
        path = os.path.join(self.path, str(locator))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.readv(descriptor, [self._buffer])
            # a read that fills the buffer may not be all; a larger one takes its place (and stays)
            while size == len(self._buffer):
                if size > limit:
                    raise RecordFault("unreadable", f"larger than {limit} bytes")
                self._buffer = self._buffer + bytes(min(size, limit + 1 - size))
                size += os.readv(descriptor, [memoryview(self._buffer)[size:]])
        finally:
            os.close(descriptor)
        return memoryview(self._buffer)[:size]

    def open(self, locator: Hashable) -> IO[bytes]:
        """A file as a stream."""
        return open(self.path / str(locator), "rb")

    def describe(self) -> dict[str, str]:
        """Path and kind."""
        return {"path": str(self.path.resolve()), "kind": "folder"}

    def __reduce__(self) -> tuple[object, ...]:
        return (FolderContainer, (self.path, self._depth))


def _walk(root: str, prefix: str, depth: int) -> Iterator[str]:
    with os.scandir(os.path.join(root, prefix)) as entries:
        for entry in entries:
            if entry.name in _JUNK or entry.name.startswith("."):
                continue
            if entry.is_dir():
                if depth:
                    yield from _walk(root, f"{prefix}{entry.name}/", depth - 1)
            elif entry.is_file():
                yield prefix + entry.name


class ZipContainer:
    """Members of a zip: the central directory is read once, each member with one `pread` and no seek.

    `zipfile` parses the directory (zip64 included); the members are read here, since opening each through
    `zipfile` costs more than inflating it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._faults: list[Fault] = []
        self._listing: dict[str, Hashable] | None = None

    def members(self) -> dict[str, Hashable]:
        """Relative path -> (offset, compressed size, size, CRC-32, method, flags).

        Raises:
            UserError: not a zip, or a damaged one.
        """
        if self._listing is not None:
            return self._listing
        listing: dict[str, Hashable] = {}
        self._faults = []
        for entry in self._entries():
            name = entry.filename
            base = name.rpartition("/")[2]
            if not base or name.startswith(_JUNK[0]) or base in _JUNK or base.startswith("."):
                continue
            if name in listing:
                self._faults.append(
                    Fault(
                        "duplicate file", Path(name).stem, "", name, "the zip holds it twice; the last counts"
                    )
                )
            listing[name] = (
                entry.header_offset,
                entry.compress_size,
                entry.file_size,
                entry.CRC,
                entry.compress_type,
                entry.flag_bits,
            )
        self._listing = listing
        return listing

    def forget(self) -> None:
        """Drop the listing."""
        self._listing = None

    def _entries(self) -> list[zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.infolist()
        except Exception as error:  # a damaged directory can raise nearly anything inside zipfile
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise  # the disk's fault; EINVAL comes of seeking to an impossible place
            explain_unreadable_file(self.path)
            raise UserError(f"{self.path} is not a readable zip ({error}): download it again.") from None

    def faults(self) -> list[Fault]:
        """Names that occur twice."""
        return self._faults

    def read(self, locator: Hashable, limit: int) -> bytes | memoryview:
        """The inflated bytes of a member, checked against its CRC-32."""
        assert isinstance(locator, tuple)
        offset, packed_size, size, crc, method, flags = locator
        if flags & 1:
            raise RecordFault(
                "unreadable", "encrypted: unpack the zip with its password, then give the folder"
            )
        if method not in (_STORED, _DEFLATED):
            raise RecordFault("unreadable", f"compressed by {_METHODS.get(method, f'method {method}')}")
        if size > limit:
            raise RecordFault("unreadable", f"declares {size} bytes, more than {limit}")
        if packed_size > size + size // 1000 + 1024:
            raise RecordFault("unreadable", "its compressed size is larger than its content")
        packed = self._packed(offset, packed_size)
        if method == _STORED:
            content: bytes | memoryview = packed
        else:
            try:
                content = memoryview(deflate_decompress(packed, size))  # refuses to inflate further
            except DeflateError:
                raise RecordFault(
                    "unreadable", "its compressed data are damaged, or more than declared"
                ) from None
        if len(content) != size or crc32(content) != crc:
            raise RecordFault("unreadable", "its content does not match the zip's CRC-32")
        return content

    def _packed(self, offset: int, size: int) -> memoryview:
        if not 0 <= offset < 2**60:
            raise RecordFault("unreadable", "lies outside the zip")
        if self._descriptor < 0:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        # a name is nearly always the listing's, of 50 bytes; header, name and data come in one read
        wanted = _LOCAL_HEADER.size + 64 + _LOCAL_SLACK + size
        content = memoryview(os.pread(self._descriptor, wanted, offset))
        if len(content) < _LOCAL_HEADER.size:
            raise RecordFault("unreadable", "lies outside the zip")
        magic, name_size, extra_size = _LOCAL_HEADER.unpack_from(content)
        if magic != b"PK\3\4":
            raise RecordFault("unreadable", "the zip's directory points to no file")
        start = _LOCAL_HEADER.size + name_size + extra_size
        if start + size > wanted:
            return memoryview(os.pread(self._descriptor, size, offset + start))
        return content[start : start + size]

    def open(self, locator: Hashable) -> IO[bytes]:
        """A member as a stream."""
        assert isinstance(locator, tuple)
        with zipfile.ZipFile(self.path) as archive:
            (entry,) = [entry for entry in archive.infolist() if entry.header_offset == locator[0]]
            return archive.open(entry)  # keeps the file open for as long as it is read

    def describe(self) -> dict[str, str]:
        """Path and kind."""
        return {"path": str(self.path.resolve()), "kind": "zip"}

    def __reduce__(self) -> tuple[object, ...]:
        return (ZipContainer, (self.path,))

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def explain_unreadable_file(source: Path) -> None:
    """Raise a `UserError` if ``source`` is a file that plainly is not what its name says.

    Raises:
        UserError: it is empty, a web page saved under another name, or an incomplete zip.
    """
    if not source.is_file():
        return
    with open(source, "rb") as file:
        start = file.read(1024)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        raise UserError(f"{source} is empty: download it again.")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError(
            f"{source} is a web page (HTML), not an archive: the download needs a login or another address; "
            f"download it again."
        )
    if start.startswith(b"PK"):
        raise UserError(f"{source} is a damaged or incomplete zip: download it again.")
