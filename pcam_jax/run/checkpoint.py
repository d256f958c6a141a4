"""Checkpoints: written in the background, verified when read, the best and the latest kept.

A checkpoint is a folder that takes its plain number only when everything in it is on the disk::

    checkpoints/120/progress.json   step, control, history; digests of each file, of each array, and of itself
    checkpoints/120/state/          the arrays, as Orbax writes them
    checkpoints/140.tmp/            one being written, or what a crash left of it
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pcam_jax.runtime.command import explain_os_error
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import require_space, sync_folder, sync_tree, write_json_atomic

# orbax narrates each save on standard error, and tells every failure twice before it raises it
logging.getLogger("absl").setLevel(logging.CRITICAL)

FORMAT_VERSION = 1
"""Raised when the layout of a checkpoint changes; older ones are upgraded or refused in a sentence."""

PROGRESS, STATE = "progress.json", "state"
_UNFINISHED = ".tmp"
Arrays = dict[str, np.ndarray]


class CheckpointError(Exception):
    """A checkpoint is damaged or cannot be read; the message says how."""


class _NeverComputed(Exception):
    """The arrays do not exist: what failed is the step that makes them, not the save."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One saved moment of a run."""

    step: int
    arrays: Arrays
    """Host arrays by dotted name."""
    progress: dict[str, Any]
    """Control and history as plain values."""


class Checkpoints:
    """The checkpoints in a folder, one sub-folder named after its step.

    One thread writes: it fetches the arrays, hashes them, has Orbax write them, makes them durable, gives the
    folder its name and removes what is no longer kept. The training loop only hands it a snapshot.

    Args:
        path: the folder; made on the first save.
        keep: how many of the latest to keep, beside the best.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path = path
        self._keep = keep
        self._thread: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        if not self.path.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.path.iterdir() if entry.name.isdecimal())

    # ---- saving

    def save(
        self,
        step: int,
        arrays: Mapping[str, Any],
        progress: dict[str, Any],
        best_step: int,
        *,
        replace: bool = False,
    ) -> None:
        """Save in the background, after the save before has ended; durable after `wait`.

        Args:
            step: steps done.
            arrays: by dotted name; numpy or single-device jax arrays that nothing changes or donates.
            progress: plain values, saved as JSON.
            best_step: the step that is kept however old.
            replace: take the place of this step's checkpoint where there is one (saved when a signal came before
                the epoch's evaluation); otherwise that one is left alone.

        Raises:
            UserError: an earlier save failed (disk full, folder gone).
        """
        self.wait()
        if step in self.steps() and not replace:
            return
        if self._thread is None:
            with self._explained():
                self.path.mkdir(exist_ok=True)
                self._clear()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        values = json.loads(json.dumps(progress))  # a copy: the run goes on while it is written
        self._saving = self._thread.submit(self._write, step, dict(arrays), values, best_step)

    def check(self) -> None:
        """Return at once, unless a save has failed.

        Raises:
            UserError: it has.
        """
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Return when all saves are durable.

        Raises:
            UserError: a save failed; it is said once.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._explained():
                saving.result()

    def close(self) -> None:
        """Wait and end the thread.

        Raises:
            UserError: a save failed.
        """
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _write(self, step: int, arrays: dict[str, Any], progress: dict[str, Any], best_step: int) -> None:
        try:
            host = {name: np.asarray(arrays.pop(name)) for name in list(arrays)}
        except Exception as error:
            raise _NeverComputed from error
        unfinished = self.path / f"{step}{_UNFINISHED}"
        unfinished.mkdir()
        require_space(unfinished, sum(array.nbytes + 1024 for array in host.values()))
        with _orbax() as orbax:
            orbax.save((unfinished / STATE).absolute(), args=ocp.args.PyTreeSave(host))
        content = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "digests": {name: leaf_digest(array) for name, array in host.items()},
            "files": file_digests(unfinished),
            **progress,
        }
        write_json_atomic(unfinished / PROGRESS, {**content, "digest": _progress_digest(content)})
        sync_tree(unfinished)
        if step in self.steps():
            self.remove(step)
        os.rename(unfinished, self.path / str(step))
        sync_folder(self.path)
        for old in self.steps()[: -self._keep]:
            if old != best_step:
                self.remove(old)

    def _clear(self) -> None:
        """Delete what a crash left of a checkpoint being written or removed."""
        for leftover in self.path.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(leftover)

    def remove(self, step: int) -> None:
        """Delete a checkpoint; a crash in the midst leaves no half of it under its number."""
        doomed = self.path / f"{step}.removed{_UNFINISHED}"
        os.rename(self.path / str(step), doomed)
        shutil.rmtree(doomed)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the writer raises into one sentence."""
        try:
            yield
        except _NeverComputed as error:
            raise error.__cause__ or error from None
        except Exception as error:  # tensorstore reports a full disk as a ValueError
            text = str(error)
            if "No space left" in text:
                advice = "the disk is full; free some space"
            elif "File too large" in text:
                advice = "a file grew past the largest size allowed here; raise the limit"
            elif "Permission denied" in text or "Read-only" in text:
                advice = "the folder cannot be written to; mend that"
            else:
                sentence = explain_os_error(error) if isinstance(error, OSError) else None
                advice = (sentence or f"{_first_line(error)}; mend that").rstrip(".")
            raise UserError(
                f"Saving a checkpoint in {self.path} failed: {advice}, then go on with --resume."
            ) from error

    # ---- reading

    def load(self, step: int) -> Checkpoint:
        """Read one checkpoint and verify it against its digests.

        Raises:
            CheckpointError: it is missing, unreadable or damaged.
            UserError: another version of this package wrote it.
        """
        folder = self.path / str(step)
        if not folder.is_dir():
            raise CheckpointError(f"there is no checkpoint {step} in {self.path}")
        progress = self._read_progress(folder, step)
        digests, files = progress["digests"], progress["files"]
        # before orbax sees them: its threads print tracebacks over files that make no sense
        present = file_digests(folder)
        for name, digest in files.items():
            if present.get(name) != digest:
                what = "has changed" if name in present else "is missing"
                raise CheckpointError(f"checkpoint {step} is damaged (its file {name} {what})")
        try:
            # asking for arrays by name: an untyped restore turns arrays without axes into Python numbers
            as_arrays = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in digests}
            with _orbax() as orbax:
                arrays: Arrays = orbax.restore(
                    (folder / STATE).absolute(),
                    args=ocp.args.PyTreeRestore(dict.fromkeys(as_arrays, 0), restore_args=as_arrays),
                )
        except Exception as error:  # tensorstore, zarr and JSON errors share no base class
            raise CheckpointError(f"checkpoint {step} is unreadable ({_first_line(error)})") from error
        for name, digest in digests.items():
            if name not in arrays:
                raise CheckpointError(f"checkpoint {step} is damaged ({name} is missing)")
            if digest != leaf_digest(np.asarray(arrays[name])):
                raise CheckpointError(f"checkpoint {step} is damaged ({name} does not match its digest)")
        return Checkpoint(step, arrays, progress)

    def latest_history(self) -> list[dict[str, float]]:
        """Figures of each epoch as the latest readable checkpoint knows them; empty if none does."""
        for step in reversed(self.steps()):
            with contextlib.suppress(CheckpointError):
                return self._read_progress(self.path / str(step), step)["history"]
        return []

    def _read_progress(self, folder: Path, step: int) -> dict[str, Any]:
        try:
            progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            digest = progress.pop("digest")
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"checkpoint {step} is unreadable ({_first_line(error)})") from error
        if digest != _progress_digest(progress):
            raise CheckpointError(f"checkpoint {step} is damaged ({PROGRESS} does not match its digest)")
        # only now, lest a flipped bit pass for another version
        version = progress.get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            raise UserError(
                f"{folder} has checkpoint format {version}, "
                + (
                    f"newer than this version of pcam_jax reads ({FORMAT_VERSION}): update pcam_jax."
                    if newer
                    else f"which this version of pcam_jax no longer reads ({FORMAT_VERSION}): use the version "
                    "named in the run's environment.json."
                )
            )
        if progress.get("step") != step:
            raise CheckpointError(f"checkpoint {step} is damaged (it says it is of step {progress['step']})")
        return progress

    def load_latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The latest good checkpoint, and a sentence for each damaged one passed over.

        Damaged checkpoints that are newer than the good one are removed, since the run will reach their steps
        again, and so are remains of a crash: only for who holds the run's lock.
        """
        self._clear()
        complaints = []
        damaged = []
        for step in reversed(self.steps()):
            try:
                checkpoint = self.load(step)
            except CheckpointError as error:
                complaints.append(f"{error}; going back to the one before it")
                damaged.append(step)
                continue
            break
        else:
            checkpoint = None
        for step in damaged:
            self.remove(step)
        return checkpoint, complaints


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint by its name inside, as hex, but for the progress file.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        try:
            if name != PROGRESS and path.is_file():
                with open(path, "rb") as file:
                    digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    return digests


def leaf_digest(array: np.ndarray) -> str:
    """SHA-256 over dtype, shape and bytes of an array, as hex."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@functools.cache
def _ignore_closed_loops() -> None:
    """Let tensorstore's threads find orbax's event loop closed, after another write failed, without a traceback.

    That failure itself is raised where it belongs.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    _ignore_closed_loops()
    process = jax.process_index()
    # whoever saves or reads does so alone, however many train or predict
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,  # weights hardly shrink, and a flipped bit stays one bit
        multiprocessing_options=alone,
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as orbax:
        yield orbax


def _progress_digest(progress: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")
