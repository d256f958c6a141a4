"""Pictures with a CSV that names them: class, and where wanted group and split, by columns of any name.

The id column holds a path in the source, a file name, or a file name without its suffix. Further columns are kept in
the store's index.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from pathlib import Path

from pcam_jax.data.manifest import INDEX_COLUMNS
from pcam_jax.data.raw.label_table import csv_rows
from pcam_jax.data.raw.pictures import SPLITS, SUFFIXES, PictureReader, some, stem_of
from pcam_jax.data.raw.record import Fault, RawRecord
from pcam_jax.runtime.errors import UserError

_MOST_CLASSES = 1000
_SHOWN = 60


@dataclass(frozen=True)
class TableRow:
    """A row of a table: its line number and its cells by column."""

    line: int
    cells: dict[str, str]


@dataclass(frozen=True)
class Columns:
    """Names of the columns that mean something; empty where there is none."""

    id: str
    label: str = ""
    group: str = ""
    split: str = ""


class TableReader(PictureReader):
    """Reads pictures named by a table; see the module's docstring."""

    name = "table"
    understands = (
        "classes",
        "csv",
        "fit",
        "group_column",
        "group_pattern",
        "id_column",
        "label_column",
        "size",
        "split_column",
    )

    @classmethod
    def recognises(cls, source: Path, members: Collection[str]) -> bool:
        """Whether there are pictures and a CSV."""
        names = [name.lower() for name in members]
        return any(name.endswith(".csv") for name in names) and any(name.endswith(SUFFIXES) for name in names)

    def records(self) -> tuple[list[RawRecord], list[Fault]]:
        """Pictures in the table's order."""
        faults: list[Fault] = []
        self._notes = []
        pictures, others = self.list_pictures(faults)
        path = self._table(others)
        options = self.options
        columns = Columns(
            options.id_column or "id",
            options.label_column or "label",
            options.group_column,
            options.split_column,
        )
        rows, header = read_rows(
            self.text(path, others[path]), f"{self.container.path}: {path}", columns, faults
        )
        self.class_names = self._classes(rows, columns.label)
        self.extra_columns = extra_columns(header, columns)
        records = self._records(rows, columns, pictures, path, faults)
        if not records:
            raise UserError(f"{path} names no picture of {self.container.path}: check --id-column.")
        self.settle_size(record.locator for record in records)
        return records, faults

    def _table(self, others: dict[str, Hashable]) -> str:
        tables = [path for path in others if path.lower().endswith(".csv")]
        wanted = self.options.csv
        if wanted:
            if wanted not in tables:
                raise UserError(
                    f"{self.container.path} has no table {wanted}: it has {some(tables) or 'none'}."
                )
            return wanted
        if len(tables) != 1:
            raise UserError(
                f"{self.container.path} has {len(tables)} CSV tables ({some(tables)}): name one with --csv."
            )
        return tables[0]

    def _classes(self, rows: list[TableRow], column: str) -> tuple[str, ...]:
        values = {row.cells[column] for row in rows} - {""}
        if self.options.classes:
            return self.options.classes
        if not 2 <= len(values) <= _MOST_CLASSES:
            raise UserError(
                f"The column {column!r} has {len(values)} values: there must be 2 to {_MOST_CLASSES} classes."
            )
        if all(value.isascii() and value.isdigit() for value in values):
            return tuple(sorted(values, key=int))
        return tuple(sorted(values))

    def _records(
        self,
        rows: list[TableRow],
        columns: Columns,
        pictures: dict[str, Hashable],
        table: str,
        faults: list[Fault],
    ) -> list[RawRecord]:
        number = {name: label for label, name in enumerate(self.class_names)}
        find = PictureFinder(pictures)
        records = []
        used: dict[str, str] = {}
        for row in rows:
            name, label = row.cells[columns.id], row.cells[columns.label]
            split = row.cells[columns.split].lower() if columns.split else ""
            paths = find(name)
            if label and label not in number:
                detail = f"line {row.line}: {label[:_SHOWN]!r} is none of {', '.join(self.class_names)}"
                faults.append(Fault("bad label", name, "", table, detail))
            elif split and split not in SPLITS:
                faults.append(Fault("bad split", name, "", table, f"line {row.line}: {split[:_SHOWN]!r}"))
            elif not paths:
                faults.append(
                    Fault("label without image", name, "", table, f"line {row.line}: no such picture")
                )
            elif len(paths) > 1:
                faults.append(Fault("ambiguous name", name, "", table, f"may be {some(paths)}"))
            elif paths[0] in used:
                faults.append(
                    Fault("duplicate id", name, "", table, f"{paths[0]} is {used[paths[0]]} already")
                )
            else:
                (path,) = paths
                used[path] = name
                group = row.cells[columns.group] if columns.group else self.group_of(path)
                extra = tuple(row.cells[column] for column in self.extra_columns)
                known = number[label] if label else -1
                records.append(
                    RawRecord(name, known, group, SPLITS.get(split, ""), path, pictures[path], extra=extra)
                )
        named = {path for row in rows for path in find(row.cells[columns.id])}
        for path in sorted(pictures.keys() - named):
            faults.append(Fault("image without label", stem_of(path), "", path, f"{table} does not name it"))
        return records


class PictureFinder:
    """Finds pictures by what a table calls them: path, file name, or file name without its suffix."""

    def __init__(self, pictures: Collection[str]) -> None:
        self._paths = set(pictures)
        self._by_name: defaultdict[str, list[str]] = defaultdict(list)
        for path in pictures:
            base = path.rpartition("/")[2]
            self._by_name[base].append(path)
            self._by_name[base.rpartition(".")[0]].append(path)

    def __call__(self, name: str) -> list[str]:
        """The paths that ``name`` may mean."""
        if name in self._paths:
            return [name]
        return self._by_name.get(name, [])


def read_rows(
    content: bytes, where: str, columns: Columns, faults: list[Fault]
) -> tuple[list[TableRow], list[str]]:
    """Rows of a table with an id, the first of each id; what is wrong is added to ``faults``.

    Returns:
        The rows, and the header.

    Raises:
        UserError: it is no text table, or lacks a column.
    """
    rows = csv_rows(content, where)
    first = next(rows, None)
    header = [name.strip() for name in first[1]] if first else []
    for option, needed in (("id", columns.id), ("label", columns.label), ("group", columns.group),
                           ("split", columns.split)):  # fmt: skip
        if needed and needed not in header:
            shown = ", ".join(name[:_SHOWN] for name in header[:12]) or "none"
            raise UserError(
                f"{where} has no column {needed!r} (it has: {shown}): name one with --{option}-column."
            )
    found: list[TableRow] = []
    lines: dict[str, int] = {}
    table = where.rpartition(": ")[2]
    for line, cells in rows:
        if not cells:
            continue
        if len(cells) != len(header):
            detail = f"line {line}: {len(cells)} cells instead of {len(header)}"
            faults.append(Fault("bad row", "", "", table, detail))
            continue
        row = TableRow(line, dict(zip(header, (cell.strip() for cell in cells), strict=True)))
        name = row.cells[columns.id]
        if not name:
            faults.append(Fault("bad row", "", "", table, f"line {line}: no id"))
        elif name in lines:
            detail = f"line {line}: stands in line {lines[name]} too; the first counts"
            faults.append(Fault("duplicate id", name, "", table, detail))
        else:
            lines[name] = line
            found.append(row)
    return found, header


def extra_columns(header: list[str], columns: Columns) -> tuple[str, ...]:
    """Columns of a table to keep in the index: those that mean nothing to us and clash with nothing of ours."""
    ours = {*INDEX_COLUMNS, columns.id, columns.label, columns.group, columns.split, ""}
    return tuple(dict.fromkeys(name for name in header if name not in ours))
