"""Tif files to pixels: a fast path for plain uncompressed ones, `tifffile` for every other."""

from __future__ import annotations

import io
import logging
import struct

import numpy as np

from pcam_jax.data.raw.record import RecordFault

# tags of TIFF 6.0 (Adobe, 1992) that decide how the pixels lie in the file
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_FILL_ORDER, _ORIENTATION, _STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP = 266, 274, 273, 277, 278
_STRIP_BYTES, _PLANAR, _PREDICTOR, _TILE_WIDTH, _SAMPLE_FORMAT = 279, 284, 317, 322, 339
_SHORT, _LONG = 3, 4
_DEFAULT_ONE = (_COMPRESSION, _FILL_ORDER, _ORIENTATION, _PLANAR, _PREDICTOR)
_MAX_TAGS = 200
_DECODABLE = {1, 5, 8, 32773, 32946}  # none, LZW, deflate, PackBits, old deflate


def read_tif(content: memoryview | bytes, out: np.ndarray) -> None:
    """Decode an 8-bit RGB tif into ``out``.

    Args:
        content: the whole file.
        out: [H, W, 3] uint8, C-contiguous; the image must have this shape.

    Raises:
        RecordFault: it is cut short, not a tif, or of another shape or depth.
    """
    offset = find_plain_strip(content, out.shape)
    if offset is None:
        _read_by_tifffile(content, out)
        return
    if offset + out.nbytes > len(content):
        raise RecordFault(
            "unreadable", f"cut short: {len(content)} bytes, its pixels end at byte {offset + out.nbytes}"
        )
    out.reshape(-1)[:] = np.frombuffer(content, np.uint8, out.nbytes, offset)


def find_plain_strip(content: memoryview | bytes, shape: tuple[int, ...]) -> int | None:
    """Where the pixels begin in a tif that holds them as one uncompressed strip of 8-bit RGB.

    Every tag is read, in either byte order; no offset is assumed.

    Args:
        content: the file, or as much of it as there is.
        shape: the expected (H, W, 3).

    Returns:
        The offset of the ``H * W * 3`` bytes (which may lie beyond ``content``), or None if the file is
        anything but such a tif.
    """
    try:
        tags, order = _read_tags(content)
        if tags is None:
            return None
        height, width, samples = shape
        wanted = {_WIDTH: width, _HEIGHT: height, _PHOTOMETRIC: 2, _SAMPLES: samples}
        wanted[_STRIP_BYTES] = height * width * samples
        for tag, value in wanted.items():
            if _single(tags, tag, order) != value:
                return None
        for tag in _DEFAULT_ONE:
            if tag in tags and _single(tags, tag, order) != 1:
                return None
        if _TILE_WIDTH in tags or not _all_equal(content, tags, _BITS, order, samples, 8):
            return None
        # the sample format may stand once for all samples, as in Kaggle's files, or once for each
        unsigned = _SAMPLE_FORMAT not in tags or _single(tags, _SAMPLE_FORMAT, order) == 1
        if not unsigned and not _all_equal(content, tags, _SAMPLE_FORMAT, order, samples, 1):
            return None
        if _ROWS_PER_STRIP in tags and (_single(tags, _ROWS_PER_STRIP, order) or 0) < height:
            return None
        return _single(tags, _STRIP_OFFSETS, order)
    except struct.error:
        return None


_Tags = dict[int, tuple[int, int, int]]


def _read_tags(content: memoryview | bytes) -> tuple[_Tags | None, str]:
    """Tag -> (type, count, value field) of the first directory, or None; and the byte order."""
    start = bytes(content[:4])
    if start == b"II*\0":
        order = "<"
    elif start == b"MM\0*":
        order = ">"
    else:
        return None, "<"
    (directory,) = struct.unpack_from(order + "I", content, 4)
    (count,) = struct.unpack_from(order + "H", content, directory)
    if count > _MAX_TAGS:
        return None, order
    fields = struct.unpack_from(order + "HHII" * count, content, directory + 2)
    return dict(
        zip(fields[::4], zip(fields[1::4], fields[2::4], fields[3::4], strict=True), strict=True)
    ), order


def _single(tags: _Tags, tag: int, order: str) -> int | None:
    kind, count, value = tags.get(tag, (0, 0, 0))
    if count != 1:
        return None
    if kind == _SHORT:
        # a short stands at the start of its four-byte field; what follows is undefined
        return value & 0xFFFF if order == "<" else value >> 16
    return value if kind == _LONG else None


def _all_equal(
    content: memoryview | bytes, tags: _Tags, tag: int, order: str, samples: int, expected: int
) -> bool:
    kind, count, value = tags.get(tag, (0, 0, 0))
    if kind != _SHORT or count != samples or count < 3:
        return False
    return struct.unpack_from(f"{order}{count}H", content, value) == (expected,) * count


def _read_by_tifffile(content: memoryview | bytes, out: np.ndarray) -> None:
    if len(content) > 4 * out.nbytes + 2**16:
        # no tif of this shape is as large: refusing it bounds what decoding can cost
        raise RecordFault("unreadable", f"{len(content)} bytes are too many for {_size(out.shape)} pixels")
    import tifffile  # slow to import, and most sets never need it

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its warnings would name no file
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page = file.pages.first
            image = _decode_page(page, out.shape)
    except RecordFault:
        raise
    except Exception as error:  # a damaged tif can raise nearly anything inside the decoder
        raise RecordFault("unreadable", f"not a readable tif ({type(error).__name__}: {error})") from None
    if image.shape != out.shape or image.dtype != np.uint8:
        raise RecordFault(
            "wrong shape", f"decodes to {image.dtype} {image.shape}, expected {_size(out.shape)}"
        )
    out[:] = image


def _decode_page(page: object, shape: tuple[int, ...]) -> np.ndarray:
    """Check a page's declared size before anything is allocated for it, then decode it."""
    height, width, samples = shape
    declared = (getattr(page, "imagelength", 0), getattr(page, "imagewidth", 0))
    bits, found = getattr(page, "bitspersample", 0), getattr(page, "samplesperpixel", 0)
    if declared != (height, width):
        raise RecordFault("wrong shape", f"{declared[1]}x{declared[0]} pixels, expected {_size(shape)}")
    if bits != 8 or getattr(page, "sampleformat", 1) != 1:
        raise RecordFault("wrong depth", f"{bits} bits a sample, expected 8 unsigned bits")
    if found != samples:
        raise RecordFault("wrong shape", f"{found} samples a pixel, expected {samples} (RGB)")
    if int(getattr(page, "photometric", -1)) != 2:
        raise RecordFault("wrong shape", "its colours are not RGB")
    compression = int(getattr(page, "compression", -1))
    if compression not in _DECODABLE:
        raise RecordFault("unreadable", f"compression {compression} is not supported")
    if max(getattr(page, "tilewidth", 0), getattr(page, "tilelength", 0)) > 4096:
        raise RecordFault("unreadable", "its tiles are absurdly large")
    image: np.ndarray = page.asarray(maxworkers=1)  # type: ignore[attr-defined]
    if image.shape == (samples, height, width) and int(getattr(page, "planarconfig", 1)) == 2:
        image = np.moveaxis(image, 0, -1)
    return image


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
