"""What is refused before anything is decoded, with limits small enough to meet."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import itertools
import struct
import zipfile
from collections.abc import AsyncIterator

import numpy as np
import picture_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kaggle_source import tif_bytes
from service import form

from pcam_jax.web.limits import Limits, Refusal
from pcam_jax.web.pictures import Intake, Unusable, corners, pixels_of, read_picture, tile_grid
from pcam_jax.web.uploads import Upload, kind_of, receive, shown_name, unzipped

SMALL = Limits(
    body_bytes=4000,
    file_bytes=2000,
    unpacked_bytes=5000,
    files=5,
    pixels=400,
    tiles=50,
    receive_seconds=0.2,
)
INTAKE = Intake((12, 12, 3))


async def pieces(body: bytes, size: int = 64, pause: float = 0) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        await asyncio.sleep(pause)
        yield body[start : start + size]


def received(
    body: bytes, kind: str, length: int | None = None, pause: float = 0, size: int = 64
) -> list[Upload]:
    return asyncio.run(receive(pieces(body, size, pause), kind, length, SMALL))


def refused(status: int, words: str, body: bytes, kind: str, **options: object) -> None:
    with pytest.raises(Refusal, match=words) as refusal:
        received(body, kind, **options)  # type: ignore[arg-type]
    assert refusal.value.status == status


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@given(
    st.lists(st.tuples(st.text(min_size=1), st.binary(max_size=200)), min_size=1, max_size=4),
    st.integers(1, 300),
)
@settings(max_examples=40)
def test_files_arrive_as_they_were_sent(files: list[tuple[str, bytes]], size: int) -> None:
    body, kind = form(
        [(name.encode("utf-8", "replace").decode().replace("\\", "/"), content) for name, content in files]
    )
    found = received(body, kind, size=size)
    assert [upload.content for upload in found] == [content for _, content in files]
    for upload in found:
        assert "/" not in upload.name
        assert upload.name.isprintable()


def test_bodies_that_are_refused() -> None:
    body, kind = form([("a", b"x" * 100)])
    refused(415, "multipart/form-data", body, "application/json")
    refused(415, "multipart/form-data", body, "multipart/form-data")
    refused(413, "larger than", body, kind, length=4001)
    refused(413, "larger than", *form([("a", b"x" * 4000)]))
    refused(413, "more than 5 files", *form([("a", b"x")] * 6))
    refused(408, "did not arrive within 0.2 seconds", body, kind, pause=0.15)
    refused(400, "ends too early", body[:-10], kind)
    refused(400, "damaged", b"nonsense", kind)
    refused(400, "ends too early", b"", kind)
    plain = body.replace(b'; filename="a"', b"")
    refused(400, "There is no file", plain, kind)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\patch.tif", "patch.tif"),
        ("a\x00b\x1b[31m.png", "a\ufffdb\ufffd[31m.png"),
        ("///", "unnamed"),
        ("x" * 999, "x" * 200),
    ],
)
def test_names_are_only_shown(name: str, shown: str) -> None:
    assert shown_name(name) == shown


def unpack(content: bytes) -> list[Upload]:
    return unzipped([Upload("a.zip", content)], SMALL)


def test_zips_that_are_refused() -> None:
    cases = {
        "unpacks to more than": (413, zip_of({str(n): bytes(1999) for n in range(4)})),
        "more than 5 files": (413, zip_of({str(n): b"x" for n in range(6)})),
        "lists too many": (413, zip_of({str(n): b"" for n in range(25)})),
        "without pictures": (422, zip_of({})),
        "is a zip without": (422, zip_of({"name": b"x"}).replace(b"name", b"\0ame")),  # no name
        "damaged zip": (422, b"PK\x03\x04" + bytes(50)),
    }
    for words, (status, content) in cases.items():
        with pytest.raises(Refusal, match=words) as refusal:
            unpack(content)
        assert refusal.value.status == status
    zip64 = zip_of({"a": b"x"})
    end = zip64.rfind(b"PK\x05\x06")
    with pytest.raises(Refusal, match="lists too many"):
        unpack(zip64[:end] + b"PK\x06\x07" + bytes(16) + zip64[end:])


def test_members_of_a_zip_that_cannot_be_used() -> None:
    one = zip_of({"good.png": b"x", "bomb.png": bytes(3000), "inner.zip": zip_of({"a": b"b"})})
    errors = {upload.name: upload.error for upload in unpack(one)}
    assert errors["good.png"] == ""
    assert "unpacks to more than" in errors["bomb.png"]
    assert "zip inside a zip" in errors["inner.zip"]
    (packed,) = unpack(zip_of({"a.png": b"x" * 50}, zipfile.ZIP_LZMA))
    assert "compression is not supported" in packed.error
    locked = bytearray(zip_of({"a.png": b"x" * 50}))
    at = locked.rfind(b"PK\x01\x02")
    struct.pack_into("<H", locked, at + 8, 1)
    (found,) = unpack(bytes(locked))
    assert "encrypted" in found.error
    broken = bytearray(zip_of({"a.png": b"abc" * 50}, zipfile.ZIP_STORED))
    broken[50] ^= 255
    (found,) = unpack(bytes(broken))
    assert "damaged" in found.error


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 422, "empty"),
        (b"GIF89a" + bytes(90), 415, "not a picture"),
        (b"<html>", 415, "not a picture"),
        (bytes(2001), 413, "larger than"),
        (picture_files.giant_png(), 422, "too large"),
        (picture_files.giant_png(1000), 413, "at most 400 are taken"),
        (picture_files.png(size=(11, 30)), 422, "takes 12 x 12"),
        (picture_files.png(size=(12, 12))[:-80], 422, "cannot be read"),
        (picture_files.jpeg(size=(12, 12)) + b"\xff\xda" * 101, 422, "more than 100 scans"),
        (tif_bytes(np.zeros((12, 12, 3), np.uint8))[:-9], 422, "cannot be read"),
    ],
)
def test_pictures_that_are_refused(content: bytes, status: int, words: str) -> None:
    with pytest.raises(Unusable, match=words) as unusable:
        read_picture(Upload("a", content), INTAKE, SMALL)
    assert unusable.value.status == status
    assert "0x" not in unusable.value.sentence


@pytest.mark.parametrize(
    ("content", "pixels"),
    [
        (tif_bytes(np.zeros((12, 12, 3), np.uint8)), 144),
        (tif_bytes(np.zeros((12, 12, 3), np.uint8))[:200], 144),  # what is cut off is said when it is read
        (tif_bytes(np.zeros((40, 30, 3), np.uint8)), 1200),
        (picture_files.png(size=(19, 16)), 304),
        (b"II*\0" + bytes(20), 0),
        (b"text", 0),
    ],
)
def test_pixels_are_counted_by_the_header(content: bytes, pixels: int) -> None:
    assert pixels_of(Upload("a", content), (12, 12, 3)) == pixels


def test_pictures_are_resized_where_training_was() -> None:
    picture = read_picture(
        Upload("a", picture_files.png(size=(19, 16))), Intake((12, 12, 3), resize=True), SMALL
    )
    assert picture.patches.shape == (1, 12, 12, 3)
    assert (picture.width, picture.height, picture.grid) == (19, 16, None)


@given(st.integers(96, 3000), st.integers(96, 3000))
@settings(max_examples=60)
def test_tiles_cover_a_picture(height: int, width: int) -> None:
    grid = tile_grid(height, width, (96, 96, 3), 2048)
    for starts, size in ((grid.tops, height), (grid.lefts, width)):
        assert starts[0] == 0
        assert starts[-1] == size - 96
        assert all(0 < after - before <= 96 for before, after in itertools.pairwise(starts))
    assert len(grid.tops) * len(grid.lefts) <= 2048


def test_too_many_tiles() -> None:
    assert corners(96, 96, 32) == (0,)
    with pytest.raises(Unusable, match=r"makes 2,209 tiles: at most 2,048"):
        tile_grid(4500, 4500, (96, 96, 3), 2048)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_a_sentence(content: bytes) -> None:
    with pytest.raises(Unusable) as unusable:
        read_picture(Upload("a", content), INTAKE, dataclasses.replace(SMALL, file_bytes=100))
    assert unusable.value.sentence.endswith(".")


@given(st.sampled_from(["tif", "packed", "png", "jpeg"]), st.data())
@settings(max_examples=250)
def test_damaged_pictures_are_read_or_refused(kind: str, data: st.DataObject) -> None:
    pixels = picture_files.picture((12, 12), 3)
    whole = {
        "tif": lambda: tif_bytes(np.asarray(pixels)),
        "packed": lambda: picture_files.encoded(pixels, "TIFF", compression="tiff_lzw"),
        "png": lambda: picture_files.encoded(pixels),
        "jpeg": lambda: picture_files.encoded(pixels, "JPEG", progressive=True),
    }[kind]()
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    try:
        picture = read_picture(Upload("a", bytes(content)), INTAKE, SMALL)
    except Unusable as unusable:
        assert unusable.status in (413, 415, 422)  # noqa: PT017
        assert unusable.sentence.endswith(".")  # noqa: PT017
        assert unusable.sentence.isprintable()  # noqa: PT017
    else:
        assert picture.patches.shape[1:] == (12, 12, 3)
        assert picture.patches.dtype == np.uint8


@given(st.data())
@settings(max_examples=150)
def test_damaged_zips_are_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(zip_of({"a.png": picture_files.png(size=(12, 12)), "b.png": b"x" * 99}))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert kind_of(bytes(content)) == "zip"
    try:
        found = unpack(bytes(content))
    except Refusal as refusal:
        assert refusal.status in (413, 422)  # noqa: PT017
    else:
        assert sum(len(upload.content) for upload in found) <= SMALL.unpacked_bytes
