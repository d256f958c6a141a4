"""The files of a request: received in memory under limits, told apart by their content, zips opened.

Nothing is written to disk. A file's name is only ever repeated to the one who sent it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import logging
import struct
import zipfile
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from pcam_jax.web.limits import Limits, Refusal, in_mebibytes

# it repeats what was sent, which is nobody's business; the sender hears of it
logging.getLogger("python_multipart").setLevel(logging.ERROR)

KINDS = ("tif", "png", "jpeg", "zip")
_STARTS = {
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
}
_LONGEST_NAME = 200
_JUNK = ("__MACOSX/", ".DS_Store", "Thumbs.db", "desktop.ini")
_END_OF_DIRECTORY = struct.Struct("<4s4H2LH")
_DIRECTORY_BYTES = 2**20  # some thousand entries; zipfile makes objects of all before one can be read


@dataclasses.dataclass(frozen=True)
class Upload:
    """One file: its name for people, and its content, or a sentence why it has none."""

    name: str
    content: bytes
    error: str = ""


def kind_of(content: bytes) -> str | None:
    """One of `KINDS` by the content's first bytes, or None."""
    return next((kind for start, kind in _STARTS.items() if content.startswith(start)), None)


def shown_name(name: str) -> str:
    """A name safe to show: its last part, without control characters, not too long."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    printable = "".join(character if character.isprintable() else "\ufffd" for character in last)
    return printable[:_LONGEST_NAME] or "unnamed"


async def receive(
    body: AsyncIterator[bytes], content_type: str, length: int | None, limits: Limits
) -> list[Upload]:
    """Read a multipart/form-data body; parts without a file name are left out.

    Args:
        body: pieces of the body as they come.
        content_type: of the request.
        length: what the request says of the body's size, in bytes.
        limits: of the service.

    Raises:
        Refusal: another content type, a damaged body, too many bytes or files, or too slow.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refusal(415, "Send the pictures as multipart/form-data, as `curl -F files=@patch.tif` does.")
    form = _Form(limits)
    too_large = Refusal(
        413, f"The request is larger than {in_mebibytes(limits.body_bytes)}: send fewer pictures at once."
    )
    if length is not None and length > limits.body_bytes:
        raise too_large
    received = 0
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())  # type: ignore[arg-type]
        async with asyncio.timeout(limits.receive_seconds):
            async for piece in body:
                received += len(piece)
                if received > limits.body_bytes:
                    raise too_large
                parser.write(piece)
    except TimeoutError:
        raise Refusal(
            408, f"The request did not arrive within {limits.receive_seconds:g} seconds: send less at once."
        ) from None
    except (MultipartParseError, ValueError) as error:
        raise Refusal(400, f"The multipart body is damaged ({_brief(error)}): send it again.") from None
    if not form.ended:
        raise Refusal(400, "The multipart body ends too early: send it again.")
    if not form.files:
        raise Refusal(
            400, "There is no file in the request: send at least one, as `curl -F files=@patch.tif` does."
        )
    return form.files


def unzipped(uploads: Sequence[Upload], limits: Limits) -> list[Upload]:
    """The uploads with those that are zips replaced by the pictures in them, in order.

    A picture that cannot be taken out has an error instead of content.

    Raises:
        Refusal: a zip that nothing can be read from, or more pictures or bytes than allowed.
    """
    found: list[Upload] = []
    left = limits.unpacked_bytes
    for upload in uploads:
        if kind_of(upload.content) != "zip":
            found.append(upload)
        else:
            members = _members(upload, limits, left)
            left -= sum(len(member.content) for member in members)
            found += members
        if len(found) > limits.files:
            raise Refusal(413, f"There are more than {limits.files:,} pictures: send fewer at once.")
    return found


class _Form:
    """Collects the parts of a multipart body that are files."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.files: list[Upload] = []
        self.ended = False
        self._field, self._value = bytearray(), bytearray()
        self._name: str | None = None
        self._content = bytearray()
        self._parts = 0

    def callbacks(self) -> dict[str, Any]:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._limits.files:
            raise Refusal(413, f"There are more than {self._limits.files:,} files: send fewer at once.")
        self._name, self._content = None, bytearray()

    def _header(self) -> None:
        if bytes(self._field).lower() == b"content-disposition":
            name = parse_options_header(bytes(self._value))[1].get(b"filename")
            if name is not None:
                self._name = name.decode("utf-8", "replace")
        self._field, self._value = bytearray(), bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            return  # a plain field of the form
        if len(self._content) + end - start > self._limits.body_bytes:
            raise Refusal(413, f"{shown_name(self._name)} is too large.")
        self._content += data[start:end]

    def _end(self) -> None:
        if self._name is not None:
            self.files.append(Upload(shown_name(self._name), bytes(self._content)))
        self._content = bytearray()

    def _finish(self) -> None:
        self.ended = True


def _members(upload: Upload, limits: Limits, budget: int) -> list[Upload]:
    damaged = Refusal(422, f"{upload.name} is a damaged zip: make it again.")
    _check_directory(upload, limits)
    try:
        archive = zipfile.ZipFile(io.BytesIO(upload.content))
    except Exception:  # a damaged directory can raise nearly anything inside zipfile
        raise damaged from None
    with archive:
        entries = [entry for entry in archive.infolist() if not _is_junk(entry.filename)]
        if not entries:
            raise Refusal(
                422, f"{upload.name} is a zip without pictures: put tif, png or jpeg files into it."
            )
        if len(entries) > limits.files:
            raise Refusal(413, f"{upload.name} holds more than {limits.files:,} files: send fewer at once.")
        found = []
        for entry in entries:
            member = _member(archive, entry, min(limits.file_bytes, budget))
            if member is None:
                if budget < limits.file_bytes:
                    raise Refusal(
                        413,
                        f"{upload.name} unpacks to more than {in_mebibytes(limits.unpacked_bytes)}: send fewer "
                        "pictures at once.",
                    )
                error = f"It unpacks to more than {in_mebibytes(limits.file_bytes)}."
                member = Upload(shown_name(entry.filename), b"", error)
            budget -= len(member.content)
            found.append(member)
        return found


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> Upload | None:
    """A member, or None where it is longer than the limit."""
    name = shown_name(entry.filename)
    if entry.flag_bits & 1:
        return Upload(name, b"", "It is encrypted: send it without a password.")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return Upload(name, b"", "Its compression is not supported: use deflate, as most programs do.")
    try:
        with archive.open(entry) as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, struct.error, zlib.error):
        return Upload(name, b"", "It is damaged inside the zip.")
    except zipfile.BadZipFile:
        return Upload(name, b"", "It is damaged inside the zip.")
    if len(content) > limit:
        return None
    if kind_of(content) == "zip":
        return Upload(name, b"", "It is a zip inside a zip: unpack it first.")
    return Upload(name, content)


def _check_directory(upload: Upload, limits: Limits) -> None:
    """Refuse what would be costly to list: `zipfile` makes an object of every entry before the first is read."""
    content = upload.content
    at = content.rfind(b"PK\x05\x06", max(0, len(content) - _END_OF_DIRECTORY.size - 2**16))
    with contextlib.suppress(struct.error):
        fields = _END_OF_DIRECTORY.unpack_from(content, at) if at >= 0 else None
        if fields is not None:
            entries, size = fields[4], fields[5]
            zip64 = content[max(0, at - 20) : at].startswith(b"PK\x06\x07")
            if zip64 or size > _DIRECTORY_BYTES or entries > 4 * limits.files:
                raise Refusal(413, f"{upload.name} lists too many files: send fewer at once.")
            return
    raise Refusal(422, f"{upload.name} is a damaged zip: make it again.")


def _is_junk(name: str) -> bool:
    base = name.rpartition("/")[2]  # empty for a folder
    return not base or name.startswith(_JUNK[0]) or base in _JUNK or base.startswith(".")


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:80] if str(error) else type(error).__name__
