"""Temporary plain copies of what cannot be read in place: compressed tars, compressed h5 files."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO

from isal import igzip, isal_zlib

from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.progress import progress

_BLOCK = 4 * 2**20
_SPARE_BYTES = 64 * 2**20
_INFLATE_ERROR: type[Exception] = isal_zlib.error  # type: ignore[assignment]  # mistyped in its stub
_USUAL_RATIO = 1.2  # PCam's h5 files and tars of JPEGs hardly shrink


class TemporaryCopy:
    """A temporary file, deleted with this object; workers get its path and never delete it.

    Attributes:
        path: of the file. The folder is that of ``TMPDIR``, by default the system's.
    """

    def __init__(self, stream: IO[bytes], what: str, size: int) -> None:
        """Copy a stream.

        Args:
            stream: read to its end.
            what: its name, for messages.
            size: bytes it will have, as well as that is known.

        Raises:
            UserError: the disk has no room, or the stream is damaged.
        """
        folder = Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
        if free < size + _SPARE_BYTES:
            raise UserError(
                f"{what} needs about {size / 1e6:,.0f} MB of temporary space, but {folder} has {free / 1e6:,.0f} "
                f"MB free: set TMPDIR to a folder on another disk."
            )
        descriptor, name = tempfile.mkstemp(prefix="pcam_jax-", suffix=".unpacked")
        self.path = Path(name)
        self._finalizer = weakref.finalize(self, _remove, name)
        try:
            with (
                os.fdopen(descriptor, "wb") as target,
                progress(size or None, f"unpack {Path(what).name}", "B") as bar,
            ):
                while block := stream.read(_BLOCK):
                    target.write(block)
                    bar.update(len(block))
                    # what a compressed file will need is a guess, and a few megabytes of it can promise terabytes
                    if shutil.disk_usage(folder).free < _SPARE_BYTES:
                        raise UserError(
                            f"{what} needs more temporary space than {folder} has: set TMPDIR to a folder on another "
                            "disk, if it really is so large."
                        )
        except (EOFError, igzip.BadGzipFile, _INFLATE_ERROR) as error:
            self.close()
            raise UserError(f"{what} is damaged or incomplete ({error}): download it again.") from None
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and error.errno is None:
                raise UserError(f"{what} is damaged ({error}): download it again.") from None
            raise

    def close(self) -> None:
        """Delete the file now."""
        self._finalizer()


def _remove(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)


def gunzip(stream: IO[bytes], what: str, packed_size: int) -> TemporaryCopy:
    """Inflate a gzip stream of ``packed_size`` bytes into a temporary file; raises UserError."""
    with stream, igzip.GzipFile(fileobj=stream) as plain:
        return TemporaryCopy(plain, what, int(packed_size * _USUAL_RATIO))  # type: ignore[arg-type]
