"""Kaggle's *histopathologic-cancer-detection*: `train/` and `test/` of tifs, `train_labels.csv`.

Every file is named after the SHA-1 of its pixels. `sample_submission.csv` gives the test ids and their order.
A folder or a zip is read in place; either split may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pcam_jax.data.raw.container import Container, explain_unreadable_file
from pcam_jax.data.raw.label_table import read_label_table
from pcam_jax.data.raw.options import ReaderOptions
from pcam_jax.data.raw.record import Fault, RawRecord, RecordFault
from pcam_jax.data.raw.tif import read_tif
from pcam_jax.runtime.errors import UserError

LABELS, SUBMISSION = "train_labels.csv", "sample_submission.csv"
_TABLE_LIMIT = 256 * 2**20
_TIF_LIMIT = 16 * 2**20
_ID = re.compile(r"[0-9a-f]{40}")
_TIF = (".tif", ".tiff")


class KaggleReader:
    """Reads the competition's files; see the module's docstring and `RawReader`."""

    name = "kaggle"
    class_names = ("normal", "tumour")
    image_shape = (96, 96, 3)
    extra_columns: tuple[str, ...] = ()
    understands: tuple[str, ...] = ()
    in_process_below = 10_000

    def __init__(
        self, source: Path, container: Container | None, options: ReaderOptions | None = None
    ) -> None:
        if container is None:
            explain_unreadable_file(source)
            raise UserError(
                f"{source} is neither a folder nor a zip: give the competition's zip or its folder."
            )
        self._container = container
        self._notes: list[str] = []

    @classmethod
    def recognises(cls, source: Path, members: Collection[str]) -> bool:
        """Whether the tables or the tif folders are there."""
        return bool(_roots(members))

    def records(self) -> tuple[list[RawRecord], list[Fault]]:
        """Training images by id, then test images in the order of `sample_submission.csv` (else by id)."""
        members = self._container.members()
        root = self._root(members)
        self._container.forget()
        inside = {name[len(root) :]: place for name, place in members.items() if name.startswith(root)}
        train, test = _tifs(inside, "train"), _tifs(inside, "test")
        faults = list(self._container.faults())
        self._notes = []
        for split, tifs in (("train", train), ("test", test)):
            for name in [name for name in tifs if not _ID.fullmatch(name)]:
                path = tifs.pop(name)
                faults.append(
                    Fault("bad name", name, split, path, "the name is not a SHA-1 in 40 hex digits")
                )
        train_records = self._train(inside, train, faults)
        test_records = self._test(inside, test, faults)
        both = {record.id for record in train_records} & test.keys()
        for name in sorted(both):
            faults.append(
                Fault("in both splits", name, "train", train[name], f"the same patch is {test[name]}")
            )
        records = [record for record in train_records if record.id not in both] + test_records
        if not records and not faults:
            raise UserError(
                f"{self._container.path} holds no images: expected train/ID.tif or test/ID.tif, "
                f"with {LABELS} beside train."
            )
        return records, faults

    def _train(
        self, inside: dict[str, Hashable], tifs: dict[str, str], faults: list[Fault]
    ) -> list[RawRecord]:
        if LABELS not in inside:
            if not tifs:
                self._notes.append("There are no training images: the store holds the test split alone.")
                return []
            raise UserError(
                f"{self._container.path} has training images but no {LABELS}: put it beside the train folder."
            )
        has_folder = any(name.startswith("train/") for name in inside)
        if not has_folder and any(name.startswith("test/") for name in inside):
            self._notes.append(
                f"There is no train folder: {LABELS} is left aside, the store holds the test split."
            )
            return []
        labels, bad_rows = read_label_table(
            self._text(inside, LABELS), f"{self._container.path}: {LABELS}", classes=len(self.class_names)
        )
        faults += [replace(fault, split="train", source=LABELS) for fault in bad_rows]
        known_bad = {fault.id for fault in bad_rows}
        records = []
        for name in sorted(labels.keys() | tifs.keys()):
            if name not in tifs:
                faults.append(
                    Fault("label without image", name, "train", LABELS, f"there is no train/{name}.tif")
                )
            elif name in labels:
                path = tifs[name]
                records.append(RawRecord(name, labels[name], "", "train", path, inside[path], sha1=name))
            elif name not in known_bad:
                faults.append(
                    Fault("image without label", name, "train", tifs[name], f"{LABELS} has no such id")
                )
        return records

    def _test(
        self, inside: dict[str, Hashable], tifs: dict[str, str], faults: list[Fault]
    ) -> list[RawRecord]:
        if not any(name.startswith("test/") for name in inside):
            if SUBMISSION in inside:
                self._notes.append(f"There is no test folder: {SUBMISSION} is left aside.")
            return []
        order = sorted(tifs)
        if SUBMISSION in inside:
            where = f"{self._container.path}: {SUBMISSION}"
            table, bad_rows = read_label_table(self._text(inside, SUBMISSION), where, classes=None)
            faults += [replace(fault, split="test", source=SUBMISSION) for fault in bad_rows]
            order = list(table)
            for name in sorted(tifs.keys() - table.keys() - {fault.id for fault in bad_rows}):
                faults.append(
                    Fault("not in the submission", name, "test", tifs[name], f"{SUBMISSION} has no such id")
                )
        records = []
        for name in order:
            if name in tifs:
                path = tifs[name]
                records.append(RawRecord(name, -1, "", "test", path, inside[path], sha1=name))
            else:
                detail = f"there is no test/{name}.tif"
                faults.append(Fault("test id without image", name, "test", SUBMISSION, detail))
        return records

    def read(self, record: RawRecord, out: np.ndarray) -> None:
        """Put one tif's pixels into ``out``."""
        read_tif(self._container.read(record.locator, _TIF_LIMIT), out)

    def describe(self) -> dict[str, Any]:
        """Reader, path and kind of the source."""
        return {"reader": self.name, **self._container.describe()}

    def notes(self) -> list[str]:
        """Which split is missing."""
        return self._notes

    def _text(self, inside: dict[str, Hashable], name: str) -> bytes:
        try:
            return bytes(self._container.read(inside[name], _TABLE_LIMIT))
        except RecordFault as fault:
            raise UserError(f"{self._container.path}: {name} cannot be read: {fault.detail}.") from None

    def _root(self, members: dict[str, Hashable]) -> str:
        roots = _roots(members)
        if not roots:
            raise UserError(
                f"{self._container.path} is not laid out as Kaggle's: "
                f"expected {LABELS} beside train/ or test/."
            )
        if len(roots) > 1:
            places = ", ".join(root or "the top" for root in roots[:3])
            raise UserError(f"{self._container.path} holds several sets ({places}): give the path of one.")
        return roots[0]


def _roots(members: Collection[str]) -> list[str]:
    """Prefixes ("" or "folder/") under which the tables or the tif folders lie."""
    roots = set()
    for name in members:
        parent, _, base = name.rpartition("/")
        if base in (LABELS, SUBMISSION):
            roots.add(f"{parent}/" if parent else "")
        elif base.lower().endswith(_TIF):
            grandparent, _, split = parent.rpartition("/")
            if split in ("train", "test"):
                roots.add(f"{grandparent}/" if grandparent else "")
    return sorted(roots, key=lambda root: (root.count("/"), root))


def _tifs(inside: dict[str, Hashable], split: str) -> dict[str, str]:
    """Id -> path of the tifs directly in a split's folder."""
    found = {}
    for path in inside:
        folder, _, base = path.rpartition("/")
        stem, dot, suffix = base.rpartition(".")
        if folder == split and (dot + suffix).lower() in _TIF:
            found[stem] = path
    return found
