"""Images/s of prepare on photographs of 1 to 6 megapixels, and what 44,000 of them would take.

    python scripts/bench_photographs.py --output photographs

Makes JPEGs as in siim-isic-melanoma-classification, and prepares them with the whole command, start included, by one
process and by one for each core. Rounds take turns; medians are reported, with the lowest and highest round.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from throughput import record

from pcam_jax.data.sample_sources import write_isic_folder

MANY = 44_000
LARGEST_WIDTH = 2450  # the generator makes widths of 0.6 to 1 of it, and heights of 0.66 to 1 of the width


def main() -> None:
    """Measure, print a table, and write it with its record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=60, help="photographs to make")
    parser.add_argument("--width", type=int, default=LARGEST_WIDTH, help="pixels of the widest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-photographs-") as name:
        folder = Path(name)
        source = write_isic_folder(folder / "isic", count=options.count, width=options.width, test_count=0)
        photographs = sorted((source / "jpeg").rglob("*.jpg"))
        megapixels = [width * height / 1e6 for width, height in map(_size, photographs)]
        ways = [(size, workers) for size in (500, 224) for workers in sorted({1, os.cpu_count() or 1})]
        seconds: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way in ways:
                seconds[way].append(_prepare(source, folder / "store", *way))
    results = [_result(way, taken, len(photographs)) for way, taken in seconds.items()]
    head = (
        f"{len(photographs)} JPEGs of {min(megapixels):.1f} to {max(megapixels):.1f} megapixels "
        f"(mean {statistics.fmean(megapixels):.1f})"
    )
    table = f"{head}\n\n{markdown(results)}"
    print(table)
    versions = {name: importlib.metadata.version(name) for name in ("pcam-jax", "pillow", "numpy")}
    record.write(options.output, versions, {"megapixels": megapixels, "results": results}, table)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def _prepare(source: Path, store: Path, size: int, workers: int) -> float:
    """Seconds of the whole command."""
    shutil.rmtree(store, ignore_errors=True)
    command = [sys.executable, "-m", "pcam_jax.prepare", source, store, "--size", size, "--workers", workers]
    begin = time.perf_counter()
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return time.perf_counter() - begin


def _result(way: tuple[int, int], seconds: list[float], count: int) -> dict[str, Any]:
    rates = [count / taken for taken in seconds]
    median = statistics.median(rates)
    return {
        "size": way[0],
        "workers": way[1],
        "images_per_second": median,
        "lowest": min(rates),
        "highest": max(rates),
        "minutes_for_44000": MANY / median / 60,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """The results as a table."""
    lines = [
        "| to pixels | processes | images/s | lowest-highest | 44,000, minutes |",
        "|---|---|---|---|---|",
    ]
    for row in results:
        lines.append(
            f"| {row['size']} | {row['workers']} | {row['images_per_second']:.0f} "
            f"| {row['lowest']:.0f}-{row['highest']:.0f} | {row['minutes_for_44000']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
