"""A folder of pictures for each class, optionally inside folders that name a split.

``[train|val|test/]<class>/.../picture``. Classes are numbered in the order of their names, or as ``--classes`` says.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from pcam_jax.data.raw.pictures import SPLITS, SUFFIXES, PictureReader, some
from pcam_jax.data.raw.record import Fault, RawRecord
from pcam_jax.runtime.errors import UserError

_MOST_CLASSES = 1000


class FoldersReader(PictureReader):
    """Reads class folders; see the module's docstring."""

    name = "folders"
    understands = ("classes", "fit", "group_pattern", "size")

    @classmethod
    def recognises(cls, source: Path, members: Collection[str]) -> bool:
        """Whether there are at least two folders of pictures that are no splits."""
        pictures = [name for name in members if name.lower().endswith(SUFFIXES)]
        root = _common_folder(pictures)
        return len({named for path in pictures if (named := _class_and_split(path[len(root) :])[0])}) > 1

    def records(self) -> tuple[list[RawRecord], list[Fault]]:
        """Pictures by path; an id is the path without its suffix."""
        faults: list[Fault] = []
        self._notes = []
        pictures, others = self.list_pictures(faults)
        if others:
            self._notes.append(f"Left aside, no pictures: {some(others)}.")
        root = _common_folder(list(pictures))
        found = {path: _class_and_split(path[len(root) :]) for path in pictures}
        self.class_names = self._classes({named for named, _ in found.values() if named})
        number = {named: label for label, named in enumerate(self.class_names)}
        records: list[RawRecord] = []
        first: dict[str, str] = {}
        for path, (named, split) in found.items():
            name = str(PurePosixPath(path[len(root) :]).with_suffix(""))
            if not named and split != "test":
                faults.append(Fault("no class", name, split, path, "lies beside the class folders"))
            elif named and named not in number:
                faults.append(Fault("unknown class", name, split, path, f"--classes does not name {named}"))
            elif name in first:
                faults.append(Fault("duplicate id", name, split, path, f"also {first[name]}"))
            else:
                first[name] = path
                label = number[named] if named else -1
                records.append(RawRecord(name, label, self.group_of(path), split, path, pictures[path]))
        if not records:
            raise UserError(f"{self.container.path} has no picture in a class folder.")
        self.settle_size(record.locator for record in records)
        return records, faults

    def _classes(self, named: set[str]) -> tuple[str, ...]:
        classes = self.options.classes or tuple(sorted(named))
        missing = [name for name in classes if name not in named]
        if missing:
            raise UserError(f"--classes names {missing[0]!r}, which is no folder of {self.container.path}.")
        if not 2 <= len(classes) <= _MOST_CLASSES:
            raise UserError(
                f"{self.container.path} has {len(classes)} class folders: there must be 2 to {_MOST_CLASSES}."
            )
        return classes


def _common_folder(paths: list[str]) -> str:
    """The deepest folder ("" or "folder/") that holds all pictures and is no split."""
    root = ""
    while True:
        tops = {path[len(root) :].partition("/")[0] for path in paths}
        if len(tops) != 1 or not all("/" in path[len(root) :] for path in paths):
            return root
        (top,) = tops
        if top.lower() in SPLITS:
            return root
        inner = f"{root}{top}/"
        if not any("/" in path[len(inner) :] for path in paths):
            return root  # the only class folder
        root = inner


def _class_and_split(path: str) -> tuple[str, str]:
    """(class, split) by the folders of a path below the root, either empty where there is none."""
    first, *rest = path.split("/")
    if rest and first.lower() in SPLITS:
        return (rest[0] if len(rest) > 1 else "", SPLITS[first.lower()])
    return (first if rest else "", "")
