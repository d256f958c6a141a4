"""Raw layouts: one reader per way in which image sets are handed out, found by looking at the source.

A reader lists what the source should hold (`records`) and reads one image at a time (`read`); everything
else (processes, hashing, progress, writing) is the converter's. A new layout is a module with a class that
fulfils `RawReader`, and a line in `READERS`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pcam_jax.data.raw.container import Container, explain_unreadable_file, open_container
from pcam_jax.data.raw.options import ReaderOptions
from pcam_jax.data.raw.record import Fault, RawRecord, RecordFault
from pcam_jax.runtime.errors import UserError


class RawReader(Protocol):
    """What the converter asks of a raw layout.

    A reader is pickled into worker processes: it must open files lazily and not carry its listing along.

    Attributes:
        name: its key in `READERS`.
        class_names: names of labels 0, 1, ..., known once `records` was called.
        image_shape: (H, W, 3), likewise.
        extra_columns: names of columns that the index gets beside its own; values are in `RawRecord.extra`.
        understands: fields of `ReaderOptions` that it takes.
        in_process_below: sets smaller than this are read by one process: starting others would take longer.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    extra_columns: tuple[str, ...]
    understands: tuple[str, ...]
    in_process_below: int

    def __init__(
        self, source: Path, container: Container | None, options: ReaderOptions | None = None
    ) -> None:
        """Take ``source``, with its container if it is a folder or an archive; raises UserError if unusable."""

    @classmethod
    def recognises(cls, source: Path, members: Collection[str]) -> bool:
        """Whether a source with these members (none for a plain file) is of this layout."""

    def records(self) -> tuple[list[RawRecord], list[Fault]]:
        """List the images in the store's order, and what is wrong with the listing itself.

        The result must depend on the source's content alone, so that shares of it can be made by different
        processes and put together. Raises UserError where the listing cannot be had.
        """

    def read(self, record: RawRecord, out: np.ndarray) -> str | None:
        """Put an image's pixels into ``out`` ([H, W, 3] uint8); raises RecordFault or OSError.

        Returns a few words where something about the image is worth counting ("grey"), else nothing.
        """

    def describe(self) -> dict[str, Any]:
        """Where the images come from, for the manifest: small, and the same on every run."""

    def notes(self) -> list[str]:
        """Sentences worth telling the user once, after `records`."""


__all__ = ["READERS", "Fault", "RawReader", "RawRecord", "ReaderOptions", "RecordFault", "find_reader"]

READERS = {
    "kaggle": ("pcam_jax.data.raw.kaggle", "KaggleReader", "train/ and test/ of tifs with train_labels.csv"),
    "pcam_h5": ("pcam_jax.data.raw.pcam_h5", "PcamH5Reader", "camelyonpatch_level_2_split_*.h5 or .h5.gz"),
    "idc": ("pcam_jax.data.raw.idc", "IdcReader", "PATIENT/CLASS/PATIENT_idx5_x1_y1_class0.png"),
    "isic": ("pcam_jax.data.raw.isic", "IsicReader", "ISIC_*.jpg with a table image_name,patient_id,target"),
    "folders": ("pcam_jax.data.raw.folders", "FoldersReader", "a folder of images for each class"),
    "table": ("pcam_jax.data.raw.table", "TableReader", "images with a CSV of their classes"),
}
"""Name -> module, class, what the layout looks like. Asked in this order."""


def find_reader(source: Path, name: str | None = None, options: ReaderOptions | None = None) -> RawReader:
    """The reader for a source.

    Args:
        source: a folder or an archive.
        name: of a reader in `READERS`, or None to look at the source.
        options: for the reader.

    Raises:
        UserError: no such source, no such reader, no layout that is known, or an option that the reader lacks.
    """
    if name is not None and name not in READERS:
        raise UserError(f"There is no reader {name!r}: known are {', '.join(READERS)}.")
    if not os.path.exists(source):
        raise UserError(f"There is no {source}: give the path of a downloaded zip or of an unpacked folder.")
    if (source / "manifest.json").is_file() and (source / "hashes.npy").is_file():
        raise UserError(f"{source} is a prepared store already: give the raw images that it was made of.")
    container = open_container(source)
    members = container.members() if container is not None else {}
    wanted = options or ReaderOptions()
    for known, (module, kind, _) in READERS.items():
        if name not in (None, known):
            continue
        reader: type[RawReader] = getattr(importlib.import_module(module), kind)
        if name is None and known == "folders" and wanted.names_columns:
            continue  # class folders may hold a table too: who names its columns means the table
        if name == known or reader.recognises(source, members.keys()):
            wanted.check(known, reader.understands)
            return reader(source, container, wanted)
    explain_unreadable_file(source)
    layouts = "; ".join(f"{known}: {layout}" for known, (_, _, layout) in READERS.items())
    raise UserError(f"{source} is of no known layout ({layouts}): check the path, or name one with --reader.")
