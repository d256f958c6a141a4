"""The pages of a slide in TIFF: which can be read, how their segments are decoded, and their resolution.

JPEG segments, which most scanners write, are decoded by Pillow, where tifffile would want imagecodecs (26 MB).
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from pcam_jax.runtime.errors import UserError

_LARGEST_SEGMENT = 256 * 2**20
_JPEG = (7, 33007)


@contextlib.contextmanager
def damage_explained(path: Path) -> Iterator[None]:
    """Errors of tifffile at a damaged file, as a sentence.

    Raises:
        UserError: in their place.
    """
    try:
        yield
    except (
        tifffile.TiffFileError, ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError
    ) as error:  # fmt: skip
        raise UserError(f"{path} cannot be read as a TIFF file ({error}).") from None


def single_page(path: Path, level: Any) -> Any:
    """The one page of a level.

    Raises:
        UserError: it has several.
    """
    if len(level.pages) != 1 or level.keyframe is None:
        raise UserError(f"{path} holds a stack of {len(level.pages)} pictures: --tiles takes one picture.")
    return level.keyframe


def check_page(path: Path, page: Any) -> None:
    """Whether a page can be read by parts here.

    Raises:
        UserError: its pixels, compression or segments are of another kind, or its segments are too large.
    """
    if page.bitspersample != 8 or page.sampleformat != 1:
        raise UserError(f"{path} has {page.bitspersample} bits a sample: 8 unsigned bits are needed.")
    if int(page.photometric) not in (0, 1, 2, 6) or page.samplesperpixel not in (1, 3, 4):
        raise UserError(f"{path} has colours that are neither RGB nor grey.")
    if page.samplesperpixel > 1 and int(page.planarconfig) != 1:
        raise UserError(f"{path} holds its colours plane by plane: save it with interleaved RGB.")
    if int(page.photometric) == 6 and page.compression not in _JPEG:
        raise UserError(f"{path} has YCbCr colours without JPEG: the extra pcam-jax[openslide] may read it.")
    if page.compression not in (*_JPEG, *_decodable(page.compression)):
        name = getattr(page.compression, "name", page.compression)
        raise UserError(
            f"{path} is compressed as {name}, which is not read here: pip install 'pcam-jax[openslide]' may help."
        )
    rows, columns = (
        (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    )
    if rows * columns * page.samplesperpixel > _LARGEST_SEGMENT:
        raise UserError(
            f"{path} is one piece of {columns}x{rows} pixels and cannot be read by parts: save it tiled "
            "(for example with `vips tiffsave --tile --pyramid`)."
        )


def _decodable(compression: int) -> tuple[int, ...]:
    return (int(compression),) if compression in tifffile.TIFF.DECOMPRESSORS else ()


def decode_segment(page: Any, index: int, content: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of a segment, ``[h, w]`` or ``[h, w, samples]``; what decoders raise is left to the caller."""
    if page.compression in _JPEG:
        return _decode_jpeg(content, page.jpegtables, int(page.photometric))
    decoded = page.decode(content, index)[0]
    return np.asarray(decoded)[0]


def _decode_jpeg(content: bytes, tables: bytes | None, photometric: int) -> npt.NDArray[np.uint8]:
    """A JPEG segment, whose tables may stand elsewhere and whose colours the TIFF tag names."""
    if photometric in (2, 6) and b"Adobe" not in content[:64]:
        # the marker says whether the three components are RGB (0) or YCbCr (1)
        marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x01" if photometric == 6 else b"\x00")
        content = content[:2] + marker + content[2:]
    if tables:
        content = tables[:-2] + content[2:]
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
        return np.asarray(picture if picture.mode in ("RGB", "L") else picture.convert("RGB"))


def named_microns(file: Any, page: Any) -> str | float | None:
    """Micrometres a pixel as the file has it: from Aperio's description, OME-XML, or the resolution tags."""
    description = page.description or ""
    aperio = re.search(r"\bMPP = ([0-9.]+)", description)
    ome = re.search(r'PhysicalSizeX="([0-9.eE+-]+)"', file.ome_metadata or "")
    other_unit = re.search(r'PhysicalSizeXUnit="([^"]+)"', file.ome_metadata or "")
    if aperio:
        return aperio[1]
    if ome and (other_unit is None or other_unit[1] in ("µm", "&#181;m", "um")):
        return ome[1]
    across, _ = page.get_resolution("MICROMETER") if 282 in page.tags else (0, 0)
    return 1 / across if across > 0 else None
