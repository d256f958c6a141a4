"""Files that exist completely or not at all, and folders that one process holds at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pcam_jax.runtime.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that takes its name only if the block succeeds.

    The content is flushed to disk before the rename, and the rename before returning, so that a
    crash or power loss leaves either the old file or the new one, never a part. On an exception nothing is
    left behind.

    Args:
        path: the file to write.
        mode: ``"w"`` for text (UTF-8, newlines as given) or ``"wb"`` for bytes.

    Yields:
        The open file.
    """
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        text_options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with os.fdopen(descriptor, mode, **text_options) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete what `atomic_write` left in a folder when its process was killed; only for who holds the folder."""
    for path in Path(folder).glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}\.tmp", path.name):
            path.unlink(missing_ok=True)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path``, completely or not at all."""
    with atomic_write(path) as file:
        file.write(text)


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, completely or not at all."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def require_space(folder: str | os.PathLike[str], size: int) -> None:
    """Fail now if a file of ``size`` bytes could not be written into a folder.

    Raises:
        OSError: ENOSPC or EFBIG, as the write would.
    """
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(folder))
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if largest != resource.RLIM_INFINITY and largest < size:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), os.fspath(folder))


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse to sync a folder; the rename itself still holds
    finally:
        os.close(descriptor)


def sync_tree(path: str | os.PathLike[str]) -> None:
    """Make every file below a folder, and the folders themselves, durable."""
    for folder, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(folder)


@contextlib.contextmanager
def folder_lock(path: str | os.PathLike[str], purpose: str) -> Iterator[None]:
    """Hold ``<path>/.lock`` while the block runs.

    The kernel drops the lock when the process dies, however it dies, so a crash never leaves a stale one.

    Args:
        path: an existing folder.
        purpose: what the holder does with it, for the message ("a training run").

    Raises:
        UserError: another process holds the lock.
    """
    with open(Path(path) / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{path} is in use by {purpose} ({holder}): wait for it to end, or choose another folder."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
        file.truncate(0)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
