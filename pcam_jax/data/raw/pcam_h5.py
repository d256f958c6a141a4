"""PatchCamelyon as its authors publish it: `camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`, plain or .gz.

(Veeling et al. 2018, arXiv:1806.03962.) ``x`` is [N, H, W, 3] uint8, ``y`` [N, 1, 1, 1]; ``*_meta.csv`` names each
patch's slide, which becomes its group. An id is the SHA-1 of the pixels, the same as the patch's name in Kaggle's
competition; the original holds duplicates, whose ids are equal.

HDF5 needs a plain file: one that is compressed, or lies in a zip or tar, is copied to the temporary folder first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any

import numpy as np

from pcam_jax.data.raw.container import Container, FolderContainer, explain_unreadable_file
from pcam_jax.data.raw.label_table import csv_rows
from pcam_jax.data.raw.options import ReaderOptions
from pcam_jax.data.raw.record import Fault, RawRecord, RecordFault
from pcam_jax.data.raw.unpacked import TemporaryCopy, gunzip
from pcam_jax.runtime.errors import UserError, require

_FILE = re.compile(r"camelyonpatch_level_2_split_(train|valid|test)_(x|y|meta)\.(?:h5|csv)(\.gz)?")
_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_BLOCK = 128  # patches read at once: HDF5 costs far more per call than per byte
_TABLE_LIMIT = 2**30
_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class PcamH5Reader:
    """Reads the h5 files; see the module's docstring and `RawReader`."""

    name = "pcam_h5"
    class_names = ("normal", "tumour")
    image_shape = (96, 96, 3)
    extra_columns = ("coord_x", "coord_y")
    understands: tuple[str, ...] = ()
    in_process_below = 10_000

    def __init__(
        self, source: Path, container: Container | None, options: ReaderOptions | None = None
    ) -> None:
        if container is None and not _FILE.fullmatch(source.name):
            explain_unreadable_file(source)
            raise UserError(
                f"{source} is not named camelyonpatch_level_2_split_...: give the folder of these files."
            )
        # a single file stands for its folder: x alone has no labels
        self._container: Container = container or FolderContainer(source.parent, depth=0)
        self._notes: list[str] = []
        self._copies: dict[str, TemporaryCopy] = {}
        self._paths: dict[str, Path] = {}
        self._open: dict[str, Any] = {}
        self._block: tuple[str, int, np.ndarray] | None = None

    @classmethod
    def recognises(cls, source: Path, members: Collection[str]) -> bool:
        """Whether one of the files is there."""
        return any(_FILE.fullmatch(name.rpartition("/")[2]) for name in [*members, source.name])

    def records(self) -> tuple[list[RawRecord], list[Fault]]:
        """Patches in the order of the files: train, valid, test."""
        require("h5py", extra="h5")
        members = self._container.members()
        faults = list(self._container.faults())
        self._notes = []
        files: dict[tuple[str, str], str] = {}
        for path in sorted(members):
            found = _FILE.fullmatch(path.rpartition("/")[2])
            if found is None:
                continue
            key = (found[1], found[2])
            if key in files and not path.endswith(".gz"):
                files[key] = path  # the plain copy of the two
            files.setdefault(key, path)
        records: list[RawRecord] = []
        shapes: dict[str, tuple[int, int, int]] = {}
        for split in _SPLITS:
            if (split, "x") not in files:
                if any(other == split for other, _ in files):
                    self._notes.append(f"There is no {split}_x.h5: this split is left aside.")
                continue
            records += self._split(split, files, members, shapes)
        if not records:
            raise UserError(
                f"{self._container.path} has no camelyonpatch_level_2_split_..._x.h5 with patches."
            )
        if len(set(shapes.values())) > 1:
            raise UserError(
                f"The splits of {self._container.path} have patches of different sizes: {shapes}."
            )
        self.image_shape = next(iter(shapes.values()))
        return records, faults

    def _split(
        self,
        split: str,
        files: dict[tuple[str, str], str],
        members: dict[str, Hashable],
        shapes: dict[str, tuple[int, int, int]],
    ) -> list[RawRecord]:
        path = files[split, "x"]
        images = self._dataset(split, "x", path, members[path])
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise UserError(f"{path} holds {images.dtype} {images.shape} instead of uint8 (N, H, W, 3).")
        count = images.shape[0]
        shapes[split] = tuple(images.shape[1:])
        if (split, "y") in files:
            label_path = files[split, "y"]
            labels = np.asarray(self._dataset(split, "y", label_path, members[label_path])).reshape(-1)
            if len(labels) != count:
                raise UserError(
                    f"{label_path} has {len(labels):,} labels for {count:,} patches: download both again."
                )
            if not np.isin(labels, (0, 1)).all():
                raise UserError(f"{label_path} has labels other than 0 and 1.")
        else:
            labels = np.full(count, -1)
            self._notes.append(f"There is no {split}_y.h5: its patches are without label.")
        slides, coordinates = [""] * count, [("", "")] * count
        if (split, "meta") in files:
            meta = files[split, "meta"]
            slides, coordinates = self._meta(meta, members[meta], count)
        else:
            self._notes.append(f"There is no {split}_meta.csv: its patches name no slide.")
        return [
            RawRecord("", int(label), slide, _SPLITS[split], f"{path}[{row}]", (split, row), extra=corner)
            for row, (label, slide, corner) in enumerate(zip(labels, slides, coordinates, strict=True))
        ]

    def _meta(self, path: str, place: Hashable, count: int) -> tuple[list[str], list[tuple[str, str]]]:
        """The slide of each patch, and its coordinates there."""
        try:
            content = bytes(self._container.read(place, _TABLE_LIMIT))
        except RecordFault as fault:
            raise UserError(f"{path} cannot be read: {fault.detail}.") from None
        if path.endswith(".gz"):
            copy = gunzip(self._container.open(place), path, len(content))
            content = copy.path.read_bytes()
            copy.close()
        rows = csv_rows(content, path)
        header = next(rows, (0, []))[1]
        if "wsi" not in header:
            raise UserError(f"{path} has no column 'wsi': it should name each patch's slide.")
        columns = [header.index(name) if name in header else -1 for name in ("wsi", "coord_x", "coord_y")]
        found = [
            [cells[at] if at >= 0 else "" for at in columns] for _, cells in rows if len(cells) == len(header)
        ]
        if len(found) != count:
            raise UserError(f"{path} has {len(found):,} rows for {count:,} patches: download it again.")
        return [row[0] for row in found], [(row[1], row[2]) for row in found]

    def _dataset(self, split: str, key: str, path: str, place: Hashable) -> Any:
        import h5py

        name = f"{split} {key}"
        if name not in self._paths:
            self._paths[name] = self._plain_file(name, path, place)
        try:
            self._open[name] = file = h5py.File(self._paths[name], "r")
            return file[key]
        except KeyError:
            raise UserError(f"{path} has no dataset {key!r}: it is not PatchCamelyon's.") from None
        except OSError as error:
            explain_unreadable_file(self._paths[name])
            what = "is cut short" if "truncated" in str(error) else "is no readable HDF5 file"
            raise UserError(f"{path} {what}: download it again.") from None

    def _plain_file(self, name: str, path: str, place: Hashable) -> Path:
        """A file that HDF5 can open: the one there is, or a temporary copy."""
        in_folder = isinstance(self._container, FolderContainer)
        if in_folder and not path.endswith(".gz"):
            return self._container.path / path
        what = f"{self._container.path}/{path}"
        if path.endswith(".gz"):
            if in_folder:
                explain_unreadable_file(self._container.path / path)
            size = os.path.getsize(self._container.path / path) if in_folder else _size_of(place)
            self._copies[name] = gunzip(self._container.open(place), what, size)
        else:
            with self._container.open(place) as stream:
                self._copies[name] = TemporaryCopy(stream, what, _size_of(place))
        return self._copies[name].path

    def read(self, record: RawRecord, out: np.ndarray) -> str | None:
        """Put one patch's pixels into ``out``; neighbours are read along with it."""
        import h5py

        assert isinstance(record.locator, tuple)
        split, row = record.locator
        start = row - row % _BLOCK
        if self._block is None or self._block[:2] != (split, start):
            name = f"{split} x"
            if name not in self._open:
                self._open[name] = h5py.File(self._paths[name], "r")
            try:
                self._block = (split, start, self._open[name]["x"][start : start + _BLOCK])
            except OSError as error:
                raise RecordFault("unreadable", f"HDF5: {error}") from None
        out[:] = self._block[2][row - start]
        return None

    def describe(self) -> dict[str, Any]:
        """Reader, path and kind of the source."""
        return {"reader": self.name, **self._container.describe()}

    def notes(self) -> list[str]:
        """Which files are missing."""
        return self._notes

    def __getstate__(self) -> dict[str, Any]:
        # workers open the files themselves, and leave temporary copies to this process
        return {**self.__dict__, "_open": {}, "_copies": {}, "_block": None}


def _size_of(place: Hashable) -> int:
    """Bytes of a member of a zip or tar, as its listing says."""
    assert isinstance(place, tuple)
    return int(place[2] if len(place) == 6 else place[1])
