"""Tifs/s of prepare, from a warm folder and from a zip, beside what the work cannot go below.

    python scripts/bench_prepare.py histopathologic-cancer-detection.zip --output prepare

Runs in turns, on the same images in the same order, one core each unless said: the bare read of each file; the
bare inflation of each zip member; the bare writing of as many pixels; what prepare does with each image (read,
decode, hash, compare with its name, write) from the folder and from the zip; a loop of Pillow and one of
tifffile that read and decode and do nothing else; and the whole command as a user runs it.
Without an argument it makes a zip of random patches, which inflate as real ones do not: give a real one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from deflate import deflate_decompress
from throughput import record

from pcam_jax.data.convert_worker import convert
from pcam_jax.data.partial import PartialStore, Plan
from pcam_jax.data.raw import RawReader, RawRecord, find_reader

_PILLOW = "Pillow loop, decode alone"
_PACKAGES = ("pcam-jax", "numpy", "deflate", "tifffile", "pillow")


@dataclass
class Contender:
    """Something that is timed.

    Attributes:
        name: what it does, for the table.
        floor: names of the contenders that together it cannot be faster than.
        run: does it once.
        seconds: of each round by the clock.
        core_seconds: of each round as processor time, which other users of the machine disturb less.
        memory_mib: peak resident memory of the command, where it is one.
    """

    name: str
    floor: tuple[str, ...]
    run: Callable[[], float | None]
    seconds: list[float] = field(default_factory=list)
    core_seconds: list[float] = field(default_factory=list)
    memory_mib: float | None = None

    def time(self) -> None:
        """Run once and note what it took."""
        clock, cores = time.perf_counter(), _core_seconds()
        self.memory_mib = self.run()
        self.seconds.append(time.perf_counter() - clock)
        self.core_seconds.append(_core_seconds() - cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("zip", nargs="?", type=Path, help="zip laid out as Kaggle's")
    parser.add_argument("--count", type=int, default=4000, help="random patches, where no zip is given")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each, in turns")
    parser.add_argument("--scratch", type=Path, help="folder to unpack into and to write stores to")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        archive = options.zip or _random_zip(Path(scratch) / "random.zip", options.count)
        folder = Path(scratch) / "folder"
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
        count, contenders = _contenders(archive, folder, Path(scratch))
        for contender in contenders:
            contender.run()  # warm-up: page cache, imports
        for number in range(options.rounds):
            # every other round backwards, so that no one always follows the same neighbour
            for contender in contenders if number % 2 == 0 else reversed(contenders):
                contender.time()
    results = [_result(contender, contenders, count) for contender in contenders]
    table = markdown(results, count)
    print(table)
    versions = {name: number for name in _PACKAGES if (number := _version(name))}
    record.write(options.output, versions, {"task": "prepare", "images": count, "results": results}, table)


def _contenders(archive: Path, folder: Path, scratch: Path) -> tuple[int, list[Contender]]:
    from_folder, from_zip = find_reader(folder), find_reader(archive)
    records, faults = from_folder.records()
    zip_records, _ = from_zip.records()
    if faults:
        raise SystemExit(f"{archive} has faults, such as {faults[0]}")
    paths = [str(folder / record.source) for record in records]
    read, inflate, write = "read files", "inflate members", "write the pixels"
    contenders = [
        Contender(read, (), lambda: _read(paths)),
        Contender(inflate, (), lambda: _inflate(archive, zip_records)),
        Contender(write, (), lambda: _write(scratch / "bare", len(records), from_folder.image_shape)),
        Contender("prepare's loop, folder", (read, write), lambda: _convert(from_folder, records, scratch)),
        Contender("prepare's loop, zip", (inflate, write), lambda: _convert(from_zip, zip_records, scratch)),
        Contender("tifffile loop, decode alone", (read,), lambda: _tifffile(paths)),
    ]
    if _version("pillow"):
        contenders.append(Contender(_PILLOW, (read,), lambda: _pillow(paths)))
    for kind, source in (("folder", folder), ("zip", archive)):
        for workers in sorted({1, len(os.sched_getaffinity(0))}):
            name = f"the command, {kind}, {workers} process{'es' if workers > 1 else ''}"
            arguments = [str(source), str(scratch / "made"), "--workers", str(workers)]
            contenders.append(Contender(name, (), lambda arguments=arguments: _command(arguments)))  # type: ignore[misc]
    return len(records), contenders


def _read(paths: list[str]) -> None:
    buffer = bytearray(2**16)
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.readv(descriptor, [buffer])
        os.close(descriptor)


def _inflate(archive: Path, records: list[RawRecord]) -> None:
    descriptor = os.open(archive, os.O_RDONLY)
    for entry in records:
        assert isinstance(entry.locator, tuple)
        offset, packed, size, _, method, _ = entry.locator
        content = os.pread(descriptor, 30 + 64 + packed, offset)
        start = 30 + int.from_bytes(content[26:28], "little") + int.from_bytes(content[28:30], "little")
        if method == zipfile.ZIP_DEFLATED:
            deflate_decompress(content[start : start + packed], size)
    os.close(descriptor)


def _write(path: Path, count: int, image_shape: tuple[int, int, int]) -> None:
    """As many pixels into a new file, in pieces as large as prepare's."""
    pieces = Plan("", image_shape, count, count).images_per_task
    block = np.ones((pieces, *image_shape), np.uint8).data.cast("B")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    for start in range(0, count, pieces):
        size = min(pieces, count - start) * len(block) // pieces
        os.pwrite(descriptor, block[:size], start * len(block) // pieces)
    os.close(descriptor)
    path.unlink()


def _convert(reader: RawReader, records: list[RawRecord], scratch: Path) -> None:
    plan = Plan("", reader.image_shape, len(records), len(records))
    partial = PartialStore(scratch / "loop.partial", plan)
    partial.create()
    with partial.held():
        tasks = partial.tasks(records, partial.progress())
        for outcome in convert(reader, tasks, plan.images_per_task, 0, lambda: None):
            assert not outcome.faults
    partial.remove()


def _tifffile(paths: list[str]) -> None:
    for path in paths:
        tifffile.imread(path)


def _pillow(paths: list[str]) -> None:
    from PIL import Image

    for path in paths:
        with Image.open(path) as image:
            np.asarray(image)


def _command(arguments: list[str]) -> float:
    """Run the command in a process of its own; returns its peak resident memory in MiB."""
    command = [sys.executable, "-m", "pcam_jax.prepare", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
    shutil.rmtree(arguments[1])
    return usage.ru_maxrss / 1024


def _core_seconds() -> float:
    """Processor time of this process and of its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _result(contender: Contender, contenders: list[Contender], count: int) -> dict[str, Any]:
    others = {other.name: other.core_seconds for other in contenders}
    result: dict[str, Any] = {
        "name": contender.name,
        "images_per_second": count / statistics.median(contender.seconds),
        "images_per_core_second": count / statistics.median(contender.core_seconds),
        "lowest": count / max(contender.core_seconds),
        "highest": count / min(contender.core_seconds),
        "seconds": contender.seconds,
        "core_seconds": contender.core_seconds,
        "peak_memory_mib": contender.memory_mib,
    }
    for name, compared in (("of_floor", contender.floor), ("over_pillow", (_PILLOW,))):
        if compared and all(other in others for other in compared):
            # of the same round, so that what slows the machine for a while slows both
            rounds = zip(contender.core_seconds, *(others[other] for other in compared), strict=True)
            result[name] = statistics.median(sum(theirs) / own for own, *theirs in rounds)
    return result


def markdown(results: list[dict[str, Any]], count: int) -> str:
    """The results as a table."""
    lines = [
        f"{count:,} tifs, warm page cache",
        "",
        "| | tifs/s | tifs per core second | lowest-highest | of its floor | over Pillow | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [
            result["name"],
            f"{result['images_per_second']:,.0f}",
            f"{result['images_per_core_second']:,.0f}",
            f"{result['lowest']:,.0f}-{result['highest']:,.0f}",
            f"{result['of_floor']:.2f}" if "of_floor" in result else "",
            f"{result['over_pillow']:.1f}x" if "over_pillow" in result else "",
            f"{result['peak_memory_mib']:.0f}" if result["peak_memory_mib"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _random_zip(path: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        rows = []
        for _ in range(count):
            image = rng.integers(0, 256, (96, 96, 3), np.uint8)
            name = hashlib.sha1(image.tobytes()).hexdigest()
            tif = io.BytesIO()
            tifffile.imwrite(tif, image, photometric="rgb")
            archive.writestr(f"train/{name}.tif", tif.getvalue())
            rows.append(f"{name},{rng.integers(2)}\n")
        archive.writestr("train_labels.csv", "id,label\n" + "".join(rows))
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
