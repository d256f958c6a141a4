"""What is told of a source's images: faults and remarks by kind, and the table that names each."""

from __future__ import annotations

import csv
from dataclasses import astuple
from pathlib import Path

from pcam_jax.data.raw.record import Fault
from pcam_jax.runtime.files import atomic_write

_NAMED_PER_PROBLEM = 3
_NAME_LENGTH = 80


def summarise(faults: list[Fault]) -> str:
    """Faults by kind with the first names of each: "2 x label without image (a, b)"."""
    if len(faults) == 1:
        (fault,) = faults
        return f"{fault.problem}: {_name(fault)} ({fault.detail})"
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(fault.problem, []).append(fault)
    told = []
    for problem, found in kinds.items():
        names = [_name(fault) for fault in found[:_NAMED_PER_PROBLEM]]
        more = ", ..." if len(found) > len(names) else ""
        told.append(f"{len(found):,} x {problem} ({', '.join(names)}{more})")
    return ", ".join(told)


def _name(fault: Fault) -> str:
    # a file name may hold line breaks, and bytes that are no text
    name = " ".join((fault.id or f"{fault.source} {fault.detail}").split())
    return _printable(name[:_NAME_LENGTH])


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def report_path(store: Path) -> Path:
    """Where the faults of a store's source are listed."""
    return store.with_name(store.name + ".prepare_report.csv")


def write_report(store: Path, faults: list[Fault]) -> Path:
    """List all faults and remarks beside the store; returns the file."""
    path = report_path(store)
    with atomic_write(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["problem", "id", "split", "source", "detail"])
        table.writerows([_printable(cell) for cell in astuple(fault)] for fault in faults)
    return path
