"""What a reader says of one image: where it is, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One image that the source should hold.

    Attributes:
        id: the image's name in the store; empty lets the converter use the SHA-1 of its pixels.
        label: class number, -1 where unknown.
        group: slide or patient, empty where unknown.
        split: what the source dictates ("train", "validation", "test"), else empty.
        source: path inside the source, for people.
        locator: what the reader needs to find the image, picklable.
        sha1: hex SHA-1 that the pixels must have, empty where the source does not say.
        extra: values of the reader's `extra_columns`.
    """

    id: str
    label: int
    group: str
    split: str
    source: str
    locator: Hashable = None
    sha1: str = ""
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with one image or one line of a table: a row of the prepare report.

    Attributes:
        problem: its kind in a few words ("label without image").
        id: the image's id as far as it is known.
        split: the split it belongs to.
        source: path inside the source.
        detail: what was found.
    """

    problem: str
    id: str
    split: str
    source: str
    detail: str


class RecordFault(Exception):
    """Raised by `RawReader.read` where one image cannot be used.

    Args:
        problem: its kind in a few words.
        detail: what was found.
    """

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(f"{problem}: {detail}")
        self.problem = problem
        self.detail = " ".join(detail.split())[:300]
