"""The figures of each epoch, as a table that any tool reads."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import atomic_write
from pcam_jax.training.control import HistoryRow


def write_history(path: Path, rows: list[HistoryRow]) -> None:
    """Write all rows, one an epoch, whole numbers without a point and others in full precision."""
    columns = list(rows[0]) if rows else []
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([[_text(row[column]) for column in columns] for row in rows])


def read_history(path: Path) -> list[HistoryRow]:
    """The rows of `write_history`, values equal bit for bit; empty where there is no file yet.

    Raises:
        UserError: it is no such table (any more).
    """
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [
                {str(column): float(value) for column, value in row.items()}
                for row in csv.DictReader(file, strict=True)
            ]
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it; the checkpoints know their figures too."
        ) from None


def _text(value: float) -> str:
    number = float(value)
    text = str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)
    return "-0.0" if text == "0" and math.copysign(1, number) < 0 else text
