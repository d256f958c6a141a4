"""Pictures of every kind a reader may meet, as bytes."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(size: tuple[int, int] = (20, 16), seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth random picture of (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BILINEAR).convert(mode)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    drawn = image if isinstance(image, Image.Image) else Image.fromarray(image)
    drawn.save(file, kind, **options)
    return file.getvalue()


def png(seed: int = 0, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> bytes:
    return encoded(picture(size, seed, mode))


def jpeg(seed: int = 0, size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: object) -> bytes:
    return encoded(picture(size, seed, mode), "JPEG", **options)


def turned_jpeg(orientation: int, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(size=size, mode=mode, exif=exif, quality=95)


def png_16_bit(values: np.ndarray) -> bytes:
    """[H, W, 3] uint16 as a 16-bit RGB PNG, which Pillow cannot write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(width, height, 16, zlib.compress(rows))


def giant_png(side: int = 50_000) -> bytes:
    """A header that promises side x side pixels, and nothing behind it."""
    return png_of(side, side, 8, zlib.compress(b""))


def png_of(width: int, height: int, depth: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
