"""SIIM-ISIC melanoma photographs: JPEGs of varying size and a CSV of patients and targets.

``train.csv`` has ``image_name,patient_id,...,target`` (1 is malignant); ``test.csv`` the same without a target; the
pictures are ``ISIC_*.jpg`` anywhere below, as in Kaggle's *siim-isic-melanoma-classification* (``jpeg/train/``,
``jpeg/test/``). Patients are the groups, the other columns are kept in the index. Pictures are resized, to 500x500
unless ``--size`` says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable
from dataclasses import replace
from pathlib import Path

from pcam_jax.data.raw.container import Container
from pcam_jax.data.raw.options import ReaderOptions
from pcam_jax.data.raw.pictures import PictureReader, some, stem_of
from pcam_jax.data.raw.record import Fault, RawRecord
from pcam_jax.data.raw.table import Columns, TableRow, extra_columns, read_rows
from pcam_jax.runtime.errors import UserError

USUAL_SIZE = 500
_PICTURE = re.compile(r"ISIC_\d+[^/]*\.jpe?g", re.IGNORECASE)
_ID, _GROUP, _LABEL = "image_name", "patient_id", "target"


class IsicReader(PictureReader):
    """Reads the photographs; see the module's docstring."""

    name = "isic"
    class_names = ("benign", "malignant")
    understands = ("fit", "size")
    in_process_below = 200  # a photograph of megapixels takes tens of milliseconds

    def __init__(
        self, source: Path, container: Container | None, options: ReaderOptions | None = None
    ) -> None:
        given = options or ReaderOptions()
        super().__init__(source, container, replace(given, size=given.size or USUAL_SIZE))

    @classmethod
    def recognises(cls, source: Path, members: Collection[str]) -> bool:
        """Whether there are pictures named ISIC_... and a CSV."""
        return any(name.lower().endswith(".csv") for name in members) and any(
            _PICTURE.fullmatch(name.rpartition("/")[2]) for name in members
        )

    def records(self) -> tuple[list[RawRecord], list[Fault]]:
        """Photographs in the tables' order, those with a target first."""
        faults: list[Fault] = []
        self._notes = []
        pictures, others = self.list_pictures(faults)
        paths = self._paths(pictures, faults)
        tables = self._tables(others, faults)
        if not any(header is not None and _LABEL in header for _, _, header in tables):
            raise UserError(
                f"{self.container.path} has no table with the columns {_ID}, {_GROUP} and {_LABEL}: "
                f"put train.csv beside the pictures."
            )
        self.extra_columns = tuple(
            dict.fromkeys(name for _, _, header in tables for name in extra_columns(header, _columns(header)))
        )
        records: list[RawRecord] = []
        listed: set[str] = set()
        for path, rows, header in tables:
            labelled = _LABEL in header
            split = "" if labelled else "test"
            here = self._held(rows, paths)
            if not here and not labelled:
                self._notes.append(f"{path} is left aside: none of its pictures is there.")
                continue
            for row in rows:
                record = self._record(row, path, split, labelled, paths, pictures, faults)
                if row.cells[_ID] in listed:
                    detail = f"line {row.line}: another table names it too"
                    faults.append(Fault("duplicate id", row.cells[_ID], split, path, detail))
                elif record is not None:
                    records.append(record)
                listed.add(row.cells[_ID])
        for name in sorted(paths.keys() - listed):
            faults.append(Fault("image without label", name, "", paths[name], "no table names it"))
        if not records:
            raise UserError(
                f"{self.container.path}: none of the pictures is named by {some(p for p, _, _ in tables)}."
            )
        return records, faults

    def _paths(self, pictures: dict[str, Hashable], faults: list[Fault]) -> dict[str, str]:
        """Image name -> path."""
        paths: dict[str, str] = {}
        for path in pictures:
            name = stem_of(path)
            if not _PICTURE.fullmatch(path.rpartition("/")[2]):
                faults.append(Fault("bad name", name, "", path, "not ISIC_NUMBER.jpg"))
            elif name in paths:
                faults.append(Fault("duplicate id", name, "", path, f"also {paths[name]}"))
            else:
                paths[name] = path
        return paths

    def _tables(
        self, others: dict[str, Hashable], faults: list[Fault]
    ) -> list[tuple[str, list[TableRow], list[str]]]:
        """(path, rows, header) of each table of photographs, those with targets first."""
        tables = []
        for path, place in others.items():
            if not path.lower().endswith(".csv"):
                continue
            content = self.text(path, place)
            names = [
                name.strip()
                for name in content[:4096].decode("utf-8-sig", "replace").split("\n")[0].split(",")
            ]
            if _ID not in names or _GROUP not in names:
                self._notes.append(f"{path} is left aside: no columns {_ID} and {_GROUP}.")
                continue
            rows, header = read_rows(content, f"{self.container.path}: {path}", _columns(names), faults)
            tables.append((path, rows, header))
        return sorted(tables, key=lambda table: (_LABEL not in table[2], table[0]))

    @staticmethod
    def _held(rows: list[TableRow], paths: dict[str, str]) -> bool:
        return any(row.cells[_ID] in paths for row in rows)

    def _record(
        self,
        row: TableRow,
        table: str,
        split: str,
        labelled: bool,
        paths: dict[str, str],
        pictures: dict[str, Hashable],
        faults: list[Fault],
    ) -> RawRecord | None:
        name = row.cells[_ID]
        target = row.cells.get(_LABEL, "").removesuffix(".0")
        if labelled and target not in ("0", "1"):
            detail = f"line {row.line}: {target[:60]!r} is not 0 or 1"
            faults.append(Fault("bad label", name, split, table, detail))
            return None
        if name not in paths:
            detail = f"line {row.line}: there is no {name}.jpg"
            faults.append(Fault("label without image", name, split, table, detail))
            return None
        extra = tuple(row.cells.get(column, "") for column in self.extra_columns)
        label = int(target) if labelled else -1
        path = paths[name]
        return RawRecord(name, label, row.cells[_GROUP], split, path, pictures[path], extra=extra)


def _columns(header: list[str]) -> Columns:
    return Columns(_ID, _LABEL if _LABEL in header else "", _GROUP)
