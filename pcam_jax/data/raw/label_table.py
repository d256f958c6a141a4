"""Label tables: CSV files with an id and a label column."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from pcam_jax.data.raw.record import Fault
from pcam_jax.runtime.errors import UserError

_SHOWN = 60  # characters of a wrong value quoted back
_MAX_COLUMNS_SHOWN = 8


def read_label_table(
    content: bytes, where: str, classes: int | None, id_column: str = "id", label_column: str = "label"
) -> tuple[dict[str, int], list[Fault]]:
    """Read ids and labels.

    Args:
        content: the file.
        where: its name, for messages.
        classes: labels must be whole numbers in [0, classes); None ignores them (a sample submission).
        id_column: name of the column of ids.
        label_column: name of the column of labels.

    Returns:
        Id -> label in the file's order (-1 throughout where ``classes`` is None), and the bad rows, which are
        left out. An id that stands twice is a fault; it is kept only if its rows agree.

    Raises:
        UserError: not a text table, or without one of the two columns.
    """
    rows = csv_rows(content, where)
    header = next(rows, None)
    columns = [name.strip() for name in header[1]] if header else []
    for needed in (id_column, label_column):
        if needed not in columns:
            shown = ", ".join(_in_a_line(name[:_SHOWN]) for name in columns[:_MAX_COLUMNS_SHOWN]) or "none"
            raise UserError(f"{where} has no column {needed!r} (its columns: {shown}): name the column so.")
    id_at, label_at = columns.index(id_column), columns.index(label_column)
    labels: dict[str, int] = {}
    first_line: dict[str, int] = {}
    contradictory: set[str] = set()
    faults: list[Fault] = []
    for line, cells in rows:
        if not cells:
            continue
        if len(cells) != len(columns):
            name = cells[id_at].strip()[:_SHOWN] if id_at < len(cells) else ""
            faults.append(_fault("bad row", name, line, f"{len(cells)} cells instead of {len(columns)}"))
            continue
        name = cells[id_at].strip()
        if not name:
            faults.append(_fault("bad row", "", line, "no id"))
            continue
        label = -1 if classes is None else _label(cells[label_at], classes)
        if label is None:
            value = cells[label_at].strip()[:_SHOWN]
            faults.append(
                _fault("bad label", name, line, f"{value!r} is not a class from 0 to {(classes or 0) - 1}")
            )
        elif name in first_line:
            agrees = labels.get(name) == label
            if not agrees:
                contradictory.add(name)
            verdict = "the same label" if agrees else "another label"
            faults.append(
                _fault("duplicate id", name, line, f"stands in line {first_line[name]} too, with {verdict}")
            )
        else:
            labels[name] = label
            first_line[name] = line
    for name in contradictory:
        labels.pop(name, None)
    return labels, faults


def csv_rows(content: bytes, where: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row; decoding and quoting errors become a `UserError`."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text (byte {error.start}): save it as a plain CSV file."
        ) from None
    reader = csv.reader(io.StringIO(text, newline=""))
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{where} line {reader.line_num} is not CSV ({error}): repair or replace it."
            ) from None
        yield reader.line_num, cells


def _in_a_line(name: str) -> str:
    """A name for people; a quote that is never closed makes one of many lines."""
    return name if name.isprintable() else repr(name)


def _label(cell: str, classes: int) -> int | None:
    # "1.0" comes from tables that passed through a program knowing only floats
    text = cell.strip().removesuffix(".0")
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        return None
    return int(text) if int(text) < classes else None


def _fault(problem: str, name: str, line: int, detail: str) -> Fault:
    return Fault(problem, name, "", "", f"line {line}: {detail}")
