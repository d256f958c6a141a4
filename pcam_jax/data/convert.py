"""Raw files to a store: every image read, checked and hashed once, over processes, restartable, atomic."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pcam_jax.data.convert_worker import NO_HASH, WorkerLost, convert
from pcam_jax.data.manifest import FORMAT_VERSION, default_images_per_shard, read_manifest
from pcam_jax.data.partial import PartialStore, Plan, Progress
from pcam_jax.data.prepare_report import report_path, summarise, write_report
from pcam_jax.data.raw import Fault, RawReader, RawRecord, ReaderOptions, find_reader
from pcam_jax.data.store import Store, open_store, write_tables
from pcam_jax.runtime.errors import Interrupted, UserError
from pcam_jax.runtime.progress import progress
from pcam_jax.runtime.signals import StopSignals

_SPARE_BYTES = 2**20
_POLL_SECONDS = 0.1


def prepare_store(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    on_error: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    reader: str | None = None,
    images_per_shard: int | None = None,
    options: ReaderOptions | None = None,
    notify: Callable[[str], None] | None = None,
) -> Store:
    """Make a store of a raw source, or go on with one that an earlier call began.

    The store appears at once and complete, or not at all. Every fault of the source is listed in
    `<store>.prepare_report.csv`.

    Args:
        source: a folder or a zip, read in place.
        store: the folder to make.
        on_error: ``"stop"`` looks at everything, then raises if anything is wrong; ``"skip"`` leaves out what
            is wrong.
        workers: processes; by default one per core, or this one alone for a small set.
        reader: name of the raw layout, by default found by looking at the source.
        images_per_shard: by default as many as make about 256 MiB.
        options: of the reader, such as the size to which images are resized.
        notify: called with sentences for the user.

    Returns:
        The opened store. One that exists already and was made from the same source is opened as it is.

    Raises:
        UserError: the source or the destination is unusable.
        Interrupted: SIGINT or SIGTERM came; the same call goes on where it stopped.
        OSError: the disk is full or fails.
    """
    made = prepare_part(
        source,
        store,
        on_error=on_error,
        workers=workers,
        reader=reader,
        images_per_shard=images_per_shard,
        options=options,
        notify=notify,
    )
    assert made is not None
    return made


def prepare_part(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    part: int = 0,
    parts: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    reader: str | None = None,
    images_per_shard: int | None = None,
    options: ReaderOptions | None = None,
    notify: Callable[[str], None] | None = None,
) -> Store | None:
    """As `prepare_store`, but make only every ``parts``-th shard, beginning with ``part``.

    The parts may run at once, on one machine or on several that share the disk, or one after the other, or on
    machines whose `<store>.partial` folders are then copied into one. Who finds all parts done puts the store
    together; its bytes are those of a run in one piece.

    Returns:
        The store, or None while other parts are not done.
    """
    if on_error not in ("stop", "skip"):
        raise UserError(f"on_error must be stop or skip, not {on_error!r}.")
    if not 0 <= part < parts:
        raise UserError(f"There is no part {part} of {parts}: the parts are 0 to {parts - 1}.")
    for name, value in (("workers", workers), ("images_per_shard", images_per_shard)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}.")
    target = Path(os.path.abspath(store))
    _refuse_occupied(target)
    raw = find_reader(Path(source), reader, options)
    records, faults = raw.records()
    per_shard = images_per_shard or default_images_per_shard(raw.image_shape)
    fingerprint = _fingerprint(raw, records, faults, options)
    plan = Plan(fingerprint, raw.image_shape, len(records), per_shard, parts)
    tell = notify or (lambda sentence: None)
    if (target / "manifest.json").exists():
        return _existing(target, plan, on_error, tell)
    for note in raw.notes():
        tell(note)
    job = _Job(
        target, raw, records, faults, PartialStore(_partial_folder(target), plan, part), on_error, tell
    )
    return job.run(workers)


class _Job:
    """One run of `prepare_part`, after its arguments are understood."""

    def __init__(
        self,
        target: Path,
        reader: RawReader,
        records: list[RawRecord],
        faults: list[Fault],
        partial: PartialStore,
        on_error: str,
        tell: Callable[[str], None],
    ) -> None:
        self.target = target
        self.reader = reader
        self.records = records
        self.listing_faults = faults
        self.partial = partial
        self.on_error = on_error
        self.tell = tell

    def run(self, workers: int | None) -> Store | None:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.partial.create()
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise UserError(
                f"{self.target} cannot be made ({error.strerror}): choose another place."
            ) from None
        with StopSignals() as signals, self.partial.held() as message:
            if (self.target / "manifest.json").exists():  # finished by another run since we looked
                return _existing(self.target, self.partial.plan, self.on_error, self.tell)
            if message:
                self.tell(message)
            try:
                if not self.partial.is_done(self.partial.part):
                    self._fill(workers, signals.check)
                    self._stop_on_faults(self.partial.progress())
                    self.partial.mark_done(signals.check)
                return self._put_together(signals.check)
            except Interrupted as interruption:
                done = int(self.partial.progress().filled.sum())
                raise Interrupted(
                    interruption.signum,
                    f"Stopped: {done:,} of {len(self.records):,} images are done; "
                    f"the same command goes on from there.",
                ) from None
            except (KeyboardInterrupt, WorkerLost):
                raise
            except BaseException:
                self.partial.remove()
                raise

    def _fill(self, workers: int | None, check: Callable[[], None]) -> None:
        """Fill this part's slots."""
        plan = self.partial.plan
        known = self.partial.progress()
        self._check_space(known)
        mine = sum(len(plan.rows(shard)) for shard in plan.shards_of(self.partial.part))
        processes = _processes(workers, mine, plan.images_per_task, self.reader.in_process_below)
        tasks = self.partial.tasks(self.records, known)
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(progress(mine, "prepare", "img"))
            outcomes = convert(self.reader, tasks, plan.images_per_task, processes, check)
            for outcome in stack.enter_context(contextlib.closing(outcomes)):
                if outcome.error is not None:
                    number, path = outcome.error
                    raise OSError(number, os.strerror(number), path)
                self.partial.note(outcome)
                bar.update(len(outcome.hashes) // len(NO_HASH))

    def _check_space(self, known: Progress) -> None:
        needed = self.partial.missing_bytes(known) + _SPARE_BYTES
        free = shutil.disk_usage(self.partial.folder).free
        if free < needed:
            raise UserError(
                f"The store needs {_megabytes(needed)} but {self.target.parent} has {_megabytes(free)} free: "
                f"free some space, or choose a folder on another disk."
            )

    def _faults(self, known: Progress) -> list[Fault]:
        found = list(self.listing_faults)
        for row, problem, detail in known.faults:
            record = self.records[row]
            found.append(Fault(problem, record.id, record.split, record.source, detail))
        return found

    def _stop_on_faults(self, known: Progress) -> None:
        faults = self._faults(known)
        if not faults or (self.on_error == "skip" and known.hashes.any()):
            return
        report = write_report(self.target, faults)
        source = self.reader.describe().get("path", "the source")
        advice = "repair the source, or leave them out with --on-error skip"
        if self.on_error == "skip":
            advice = "nothing is left to prepare"
        raise UserError(f"{source}: {summarise(faults)}; see {report}: {advice}.")

    def _put_together(self, check: Callable[[], None]) -> Store | None:
        """Publish if all parts are done; says so and returns None if not."""
        part, parts = self.partial.part, self.partial.plan.parts
        if parts == 1:
            return self._publish(check)
        # one part at a time looks whether all are done, so that of two last ones neither leaves it to the other
        while not (self.target / "manifest.json").exists():
            check()
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(self.partial.merging())
                except (UserError, FileNotFoundError):  # another part looks, or has just published
                    time.sleep(_POLL_SECONDS)
                    continue
                waiting = self.partial.undone_parts()
                if not waiting:
                    return self._publish(check)
                not_yet = ", ".join(f"{number}/{parts}" for number in waiting)
                self.tell(f"Part {part}/{parts} is done; not yet: {not_yet}.")
                return None
        return open_store(self.target)

    def _publish(self, check: Callable[[], None]) -> Store:
        """Write the tables beside the shards and give the store its name."""
        known = self.partial.progress()
        faults = self._faults(known)
        self._stop_on_faults(known)
        shards = self.partial.close_gaps(known, check)
        rows = np.flatnonzero(known.hashes.any(axis=1))
        kept = [self.records[row] for row in rows]
        hashes = known.hashes[rows]
        columns: dict[str, list[Any]] = {
            "id": [record.id or sha1.tobytes().hex() for record, sha1 in zip(kept, hashes, strict=True)],
            "label": [record.label for record in kept],
            "group": [record.group for record in kept],
            "split": [record.split for record in kept],
            "source": [record.source for record in kept],
        }
        for number, name in enumerate(self.reader.extra_columns):
            columns[name] = [record.extra[number] for record in kept]
        plan = self.partial.plan
        settings: dict[str, Any] = {
            "fingerprint": plan.fingerprint,
            "images_per_shard": plan.images_per_shard,
            "left_out": len(faults),
        }
        remarked = self._remarks(known)
        remarks = Counter(fault.problem for fault in remarked)
        if remarks:
            settings["remarks"] = dict(sorted(remarks.items()))
        write_tables(
            self.partial.slots,
            columns,
            hashes,
            shards,
            self.reader.image_shape,
            self.reader.class_names,
            self.reader.describe(),
            settings,
        )
        if faults or remarks:
            report = write_report(self.target, faults + remarked)
            if faults:
                self.tell(f"Left out: {summarise(faults)}; see {report}.")
            if remarks:
                counted = ", ".join(f"{count:,} x {remark}" for remark, count in sorted(remarks.items()))
                self.tell(f"Kept, though unusual: {counted}; see {report}.")
        else:
            report_path(self.target).unlink(missing_ok=True)  # of an earlier try
        self.partial.publish(self.target)
        return open_store(self.target)

    def _remarks(self, known: Progress) -> list[Fault]:
        """One for each thing that was unusual, of which a picture may have several."""
        told = ((self.records[row], kind) for row, remark, _ in known.remarks for kind in remark.split(", "))
        return [Fault(kind, record.id, record.split, record.source, "kept") for record, kind in told]


def _partial_folder(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _refuse_occupied(target: Path) -> None:
    if not target.exists() or (target / "manifest.json").exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file: choose another name for the store.")
    if any(target.iterdir()):
        raise UserError(f"{target} exists and is not a store: choose another name, or delete it first.")


def _existing(target: Path, plan: Plan, on_error: str, tell: Callable[[str], None]) -> Store:
    made_with: dict[str, Any] = read_manifest(target).prepare
    same = made_with.get("fingerprint") == plan.fingerprint
    same = same and made_with.get("images_per_shard") == plan.images_per_shard
    if not same or (made_with.get("left_out") and on_error == "stop"):
        raise UserError(
            f"{target} exists already and was made from another source or with other settings: "
            f"choose another name, or delete it first."
        )
    store = open_store(target)
    shutil.rmtree(_partial_folder(target), ignore_errors=True)  # a kill right after the rename leaves it
    tell(f"{target} is already prepared from this source: {len(store):,} images.")
    return store


def _fingerprint(
    reader: RawReader, records: list[RawRecord], faults: list[Fault], options: ReaderOptions | None
) -> str:
    """Hex digest of what decides the store's bytes, save how the images are dealt into shards."""
    digest = hashlib.sha256(
        repr((FORMAT_VERSION, reader.name, reader.image_shape, reader.class_names)).encode()
    )
    if options is not None and options.given():
        digest.update(repr(sorted(options.given().items())).encode())
    for record in records:
        # where the pixels' own hash is known it does not matter where they lie
        place = record.sha1 or repr(record.locator)
        line = (record.id, record.label, record.group, record.split, record.source, place)
        digest.update(repr((*line, *record.extra)).encode())
    for fault in faults:
        digest.update(repr(astuple(fault)).encode())
    return digest.hexdigest()


def _processes(workers: int | None, images: int, images_per_task: int, in_process_below: int) -> int:
    """Worker processes to start; 0 works in this one."""
    if workers is None and images < in_process_below:
        return 0
    # macOS has no affinities
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = workers or cores
    useful = min(wanted, -(-images // images_per_task))
    return 0 if useful <= 1 else useful


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
