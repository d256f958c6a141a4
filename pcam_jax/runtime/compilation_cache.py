"""The folder of compiled programs: jax writes into it in place, so what a crash leaves there must be cleared.

A process killed in the midst of writing an entry, or a full disk, leaves a part of it, which jax finds at every
later start, warns about, and never replaces.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
import warnings
import zlib
from pathlib import Path

_MARKER = ".checked"
_ZSTANDARD = b"\x28\xb5\x2f\xfd"


def remove_broken_entries(folder: Path) -> int:
    """Delete half-written entries made since the last look; returns their number.

    A folder that cannot be read or written is left alone: the cache is a convenience.
    """
    removed = 0
    with contextlib.suppress(OSError):
        marker, now = folder / _MARKER, time.time()
        # an entry being written while we looked must be looked at again
        looked = marker.stat().st_mtime - 60 if marker.exists() else 0.0
        for entry in folder.glob("*-cache"):
            with contextlib.suppress(FileNotFoundError):  # another process clears too
                if entry.stat().st_mtime >= looked and not is_whole(entry.read_bytes()):
                    entry.unlink()
                    removed += 1
        marker.touch()
        os.utime(marker, (now, now))
    return removed


def is_whole(content: bytes) -> bool:
    """Whether an entry, compressed by zlib or zstandard, is complete; True where nobody here can tell."""
    if not content.startswith(_ZSTANDARD):
        stream = zlib.decompressobj()
        try:
            stream.decompress(content)
        except zlib.error:
            return False
        return stream.eof
    for name in ("compression.zstd", "zstandard"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        stream = (
            module.ZstdDecompressor()
            if name == "compression.zstd"
            else module.ZstdDecompressor().decompressobj()
        )
        try:
            stream.decompress(content)
        except Exception:  # each has an error class of its own
            return False
        return bool(stream.eof)
    return True


def ignore_its_warnings() -> None:
    """A program that cannot be read from or written to the cache is compiled as without one: no news."""
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache entry", category=UserWarning
    )
