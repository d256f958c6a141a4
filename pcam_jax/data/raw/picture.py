"""Pictures of any common kind to 8-bit RGB pixels of one size."""

from __future__ import annotations

import io
import re
import warnings
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from pcam_jax.data.raw.record import RecordFault

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
MOST_PIXELS = 150_000_000
"""Larger pictures are refused by their header alone; a decoded pixel costs up to four bytes."""
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_ORIENTATION = 0x0112
_DRAFT_MARGIN = 2  # a JPEG is decoded at no less than twice the size wanted, then filtered down
_DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, MemoryError)

Fit = Literal["stretch", "crop", "pad"]


def picture_size(content: bytes | memoryview) -> tuple[int, int]:
    """(height, width) by the header alone, as displayed (EXIF orientation applied).

    Raises:
        RecordFault: it is no picture, or too large.
    """
    with _quiet(), _opened(content) as picture:
        width, height = picture.size
        return (width, height) if _quarter_turned(picture) else (height, width)


def decode_picture(
    content: bytes | memoryview, out: np.ndarray, *, resize: bool = False, fit: Fit = "stretch"
) -> str:
    """Decode a picture into ``out``.

    Grey and palette pictures become RGB, transparency is laid on white, 16-bit channels lose their lower byte,
    CMYK is converted, EXIF orientation is applied. Resizing filters (Lanczos, with the filter widened by the
    reduction, so that nothing aliases); JPEGs are first decoded at a reduced scale where that loses nothing.

    Args:
        content: PNG, JPEG, TIFF, BMP or WebP.
        out: [H, W, 3] uint8.
        resize: change the size to that of ``out``; otherwise another size is a fault.
        fit: how another shape is fitted: stretched, cut to the middle, or padded with black.

    Returns:
        What was unusual about the picture, a few words for each thing, joined by commas; or an empty string.

    Raises:
        RecordFault: it is damaged, too large, has several frames, or has another size than ``out``.
    """
    if not len(content):
        raise RecordFault("empty file", "zero bytes")
    with _quiet(), _opened(content) as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format not in ("MPO", "JPEG"):
            raise RecordFault("several frames", f"{frames} pictures in one file")
        height, width = out.shape[:2]
        if _quarter_turned(picture):
            height, width = width, height
        if not resize and picture.size != (width, height):
            found = picture.size if (height, width) == out.shape[:2] else picture.size[::-1]
            raise RecordFault(
                "wrong size", f"{found[0]}x{found[1]} instead of {out.shape[1]}x{out.shape[0]}; "
                "--size N resizes"
            )  # fmt: skip
        try:
            if resize and picture.format in ("JPEG", "MPO"):
                _draft(picture, width, height, fit)
            remark = _remark(picture, content)
            shown = ImageOps.exif_transpose(_to_rgb(picture))
        except _DECODING_ERRORS as error:
            raise RecordFault("unreadable", str(error) or type(error).__name__) from None
        assert shown is not None
        if resize:
            shown = _fitted(shown, out.shape[1], out.shape[0], fit)
        out[:] = np.asarray(shown)
    return remark


class _quiet(warnings.catch_warnings):  # noqa: N801
    """Pillow's warnings name no file; what matters among them is a fault or a remark of ours."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


def _opened(content: bytes | memoryview) -> Image.Image:
    if not len(content):
        raise RecordFault("empty file", "zero bytes")
    try:
        picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise RecordFault("unreadable", _what_else(bytes(content[:64]))) from None
    except Image.DecompressionBombError as error:  # Pillow's own limit, met before the size can be asked for
        found = re.search(r"\d+", str(error))
        pixels = f"{int(found[0]):,} pixels are" if found else "it is"
        raise RecordFault("too large", f"{pixels} more than {MOST_PIXELS:,}") from None
    except _DECODING_ERRORS as error:
        raise RecordFault("unreadable", str(error) or type(error).__name__) from None
    width, height = picture.size
    if width * height > MOST_PIXELS:
        picture.close()
        raise RecordFault("too large", f"{width * height:,} pixels are more than {MOST_PIXELS:,}")
    return picture


def _what_else(start: bytes) -> str:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head")):
        return "a web page (HTML) under a picture's name"
    return "not a picture of a known kind"


def _quarter_turned(picture: Image.Image) -> bool:
    return _orientation(picture) in (5, 6, 7, 8)


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except _DECODING_ERRORS:
        return 1  # damaged EXIF says nothing


def _draft(picture: Image.Image, width: int, height: int, fit: Fit) -> None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8 where more than the wanted detail is left."""
    across, down = picture.size
    if fit == "stretch":
        least = max(width / across, height / down)
    else:
        least = (max if fit == "crop" else min)(width / across, height / down)
    scale = min(1.0, least * _DRAFT_MARGIN)
    picture.draft(picture.mode, (int(across * scale), int(down * scale)))


def _remark(picture: Image.Image, content: bytes | memoryview) -> str:
    found = []
    if picture.mode == "CMYK":
        found.append("CMYK converted")
    elif picture.mode in ("L", "1"):
        found.append("grey")
    elif picture.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in picture.info:
        found.append("transparency laid on white")
    if _is_16_bit(picture, content):
        found.append("16 bits reduced to 8")
    if _orientation(picture) not in (0, 1):
        found.append("turned as its EXIF says")
    return ", ".join(found)


def _is_16_bit(picture: Image.Image, content: bytes | memoryview) -> bool:
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        return True
    # Pillow itself reduces 16-bit RGB; the depth stands in the IHDR chunk, which comes first
    return picture.format == "PNG" and content[24] == 16


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integer pixels beyond 16 bits")
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        grey.info, exif = picture.info, picture.getexif()
        rgb = grey.convert("RGB")
        rgb.getexif().update(exif)
        return rgb
    if picture.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        rgb = Image.new("RGB", layered.size, "white")
        rgb.paste(layered, mask=layered.getchannel("A"))
        rgb.getexif().update(picture.getexif())
        return rgb
    return picture.convert("RGB")


def _fitted(picture: Image.Image, width: int, height: int, fit: Fit) -> Image.Image:
    if picture.size == (width, height):
        return picture
    if fit == "crop":
        return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    if fit == "pad":
        return ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
