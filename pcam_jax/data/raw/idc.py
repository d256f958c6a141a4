"""*breast-histopathology-images*: 50x50 PNG tiles of invasive ductal carcinoma slides.

Laid out ``<patient>/<0|1>/<patient>_idx5_x<X>_y<Y>_class<0|1>.png``, label 1 where the tile is IDC (Janowczyk and
Madabhushi 2016, Journal of Pathology Informatics 7:29). Kaggle's archive holds the whole set twice, the second
time inside IDC_regular_ps50_idx5; one of the two is read. Tiles at the border of a slide can be smaller than the
others: they are padded by mirroring, or skipped with ``--edges skip``, and counted either way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable
from pathlib import Path

import numpy as np

from pcam_jax.data.raw.container import Container
from pcam_jax.data.raw.options import ReaderOptions
from pcam_jax.data.raw.picture import decode_picture, picture_size
from pcam_jax.data.raw.pictures import FILE_LIMIT, PictureReader, stem_of
from pcam_jax.data.raw.record import Fault, RawRecord, RecordFault
from pcam_jax.runtime.errors import UserError

_NAME = re.compile(r"(?P<patient>[^_/]+)_idx\d+_x(?P<x>\d+)_y(?P<y>\d+)_class(?P<label>[01])\.png")
_USUAL_SIDE = 50


class IdcReader(PictureReader):
    """Reads the tiles; patients are the groups; the tile's corner on its slide is kept as columns x and y."""

    name = "idc"
    class_names = ("benign", "idc")
    extra_columns = ("x", "y")
    understands = ("edges", "fit", "size")
    in_process_below = 10_000

    def __init__(
        self, source: Path, container: Container | None, options: ReaderOptions | None = None
    ) -> None:
        super().__init__(source, container, options)
        self._tile = (_USUAL_SIDE, _USUAL_SIDE)

    @classmethod
    def recognises(cls, source: Path, members: Collection[str]) -> bool:
        """Whether a tile's name is among the files."""
        return any(_NAME.fullmatch(name.rpartition("/")[2]) for name in members)

    def records(self) -> tuple[list[RawRecord], list[Fault]]:
        """Tiles by name."""
        faults: list[Fault] = []
        self._notes = []
        pictures, _ = self.list_pictures(faults)
        tiles = self._one_of_each(pictures, faults)
        records = []
        for tile in sorted(tiles):
            path, found = tiles[tile], _NAME.fullmatch(tile)
            assert found is not None
            folder = path.split("/")[-2] if "/" in path else ""
            if folder in ("0", "1") and folder != found["label"]:
                faults.append(
                    Fault("contradictory label", stem_of(tile), "", path, f"lies in folder {folder}")
                )
                continue
            place, corner = pictures[path], (found["x"], found["y"])
            records.append(
                RawRecord(stem_of(tile), int(found["label"]), found["patient"], "", path, place, extra=corner)
            )
        if not records:
            raise UserError(f"{self.container.path} holds no tile like PATIENT_idx5_x1_y1_class0.png.")
        self._settle_tile([record.locator for record in records])
        if self.options.edges == "skip":
            whole = [record for record in records if not self._is_edge(record)]
            self._notes.append(f"{len(records) - len(whole):,} edge tiles are skipped.")
            records = whole
        return records, faults

    def _is_edge(self, record: RawRecord) -> bool:
        try:
            height, width = picture_size(self.container.read(record.locator, FILE_LIMIT))
        except (RecordFault, OSError):
            return False  # a fault, told when it is read
        return height <= self._tile[0] and width <= self._tile[1] and (height, width) != self._tile

    def _one_of_each(self, pictures: dict[str, Hashable], faults: list[Fault]) -> dict[str, str]:
        """Tile name -> path; of a set that is there twice, the copy nearer to the top."""
        tiles: dict[str, str] = {}
        copies = 0
        for path in sorted(pictures, key=lambda path: (path.count("/"), path)):
            tile = path.rpartition("/")[2]
            if not _NAME.fullmatch(tile):
                faults.append(Fault("bad name", stem_of(path), "", path, "not PATIENT_idx5_xX_yY_classC.png"))
            elif tile not in tiles:
                tiles[tile] = path
            elif tiles[tile].count("/") < path.count("/"):
                copies += 1
            else:
                faults.append(Fault("duplicate id", stem_of(tile), "", path, f"also {tiles[tile]}"))
        if copies:
            self._notes.append(
                f"{copies:,} tiles are there twice, in a folder within: these copies are left aside."
            )
        return tiles

    def _settle_tile(self, places: list[Hashable]) -> None:
        """The usual size of a tile, by the headers of some."""
        sizes: Counter[tuple[int, int]] = Counter()
        for place in places[:: max(1, len(places) // 64)]:
            try:
                sizes[picture_size(self.container.read(place, FILE_LIMIT))] += 1
            except RecordFault:
                continue
        if sizes:
            self._tile = max(sizes, key=lambda size: (sizes[size], size))
        if self.options.size is None:
            self.image_shape = (*self._tile, 3)

    def read(self, record: RawRecord, out: np.ndarray) -> str | None:
        """Decode one tile, mirrored to its full size where the slide ended, then resized if asked."""
        content = self.container.read(record.locator, FILE_LIMIT)
        height, width = picture_size(content)
        whole_height, whole_width = self._tile
        resize = self.options.size is not None
        if (height, width) == self._tile:
            return decode_picture(content, out, resize=resize, fit=self.options.fit)
        if height > whole_height or width > whole_width:
            raise RecordFault("wrong size", f"{width}x{height} is more than {whole_width}x{whole_height}")
        part = np.empty((height, width, 3), np.uint8)
        remark = decode_picture(content, part)
        missing = ((0, whole_height - height), (0, whole_width - width), (0, 0))
        tile = np.pad(part, missing, mode="symmetric")
        if resize:
            from PIL import Image

            side = (out.shape[1], out.shape[0])
            tile = np.asarray(Image.fromarray(tile).resize(side, Image.Resampling.LANCZOS))
        out[:] = tile
        return ", ".join(filter(None, (remark, "edge tile padded")))
