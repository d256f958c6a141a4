"""What a user may tell a reader beside the source."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Literal

from pcam_jax.runtime.errors import UserError

LARGEST_SIZE = 4096
FITS = ("stretch", "crop", "pad")
EDGES = ("pad", "skip")


@dataclass(frozen=True)
class ReaderOptions:
    """Options of the readers; each reader names those that it understands, the others are errors.

    Attributes:
        size: side in pixels to which every image is resized.
        fit: how a picture that is not square becomes so: stretched, its central square, or padded with black.
        edges: tiles smaller than the set's own size are padded by mirroring, or skipped.
        csv: path of the table inside the source, where there are several.
        id_column: column that names the image (a path, a file name, or a file name without suffix).
        label_column: column of the class.
        group_column: column of the slide or patient.
        split_column: column of the split that the set dictates.
        group_pattern: regular expression whose first parenthesis, found in an image's path, is its group.
        classes: class names in the order of their labels; by default sorted.
    """

    size: int | None = None
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    edges: Literal["pad", "skip"] = "pad"
    csv: str = ""
    id_column: str = ""
    label_column: str = ""
    group_column: str = ""
    split_column: str = ""
    group_pattern: str = ""
    classes: tuple[str, ...] = ()

    @property
    def names_columns(self) -> bool:
        """Whether a table or one of its columns is named."""
        return any((self.csv, self.id_column, self.label_column, self.group_column, self.split_column))

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def check(self, reader: str, understood: Collection[str]) -> None:
        """Refuse impossible values, and what ``reader`` does not understand.

        Raises:
            UserError: with the option's name.
        """
        if self.size is not None and not 1 <= self.size <= LARGEST_SIZE:
            raise UserError(f"--size is {self.size}: it must lie between 1 and {LARGEST_SIZE} pixels.")
        for name, allowed in (("fit", FITS), ("edges", EDGES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} is {getattr(self, name)!r}: it must be {' or '.join(allowed)}.")
        if len(set(self.classes)) != len(self.classes):
            raise UserError("--classes names a class twice.")
        for name in self.given():
            if name not in understood:
                known = ", ".join(f"--{option.replace('_', '-')}" for option in sorted(understood))
                raise UserError(
                    f"The reader {reader} has no option --{name.replace('_', '-')}"
                    f" (it has: {known or 'none'}): leave it out, or name another reader with --reader."
                )
