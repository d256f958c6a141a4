"""Every parser of bytes that come from outside, and the errors with which it may refuse them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.seeds import SIDE, files_of_a_store, make_seeds
from pcam_jax.config.files import load_config
from pcam_jax.config.schema import Config
from pcam_jax.data.manifest import parse_manifest
from pcam_jax.data.raw.container import open_container
from pcam_jax.data.raw.label_table import read_label_table
from pcam_jax.data.raw.picture import decode_picture
from pcam_jax.data.raw.record import RecordFault
from pcam_jax.data.raw.tif import read_tif
from pcam_jax.data.store import open_store
from pcam_jax.models.weight_files import read_weight_file
from pcam_jax.predict import read_submission_ids
from pcam_jax.run.checkpoint import PROGRESS, CheckpointError, Checkpoints
from pcam_jax.run.history import read_history
from pcam_jax.run.operating_point import FILE, read_operating_point
from pcam_jax.run.search_space import read_space
from pcam_jax.runtime.errors import UserError

Parse = Callable[[bytes, Path], Any]
"""Takes the content, and a folder for it where it reads files."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A parser: what it is tried on, and what it may raise."""

    seeds: list[bytes]
    parse: Parse
    refusals: tuple[type[Exception], ...]


def make_targets() -> dict[str, Target]:
    """Every parser of bytes that come from outside this process, by name."""
    store = files_of_a_store()

    def picture(content: bytes, folder: Path) -> None:
        decode_picture(content, np.empty((SIDE, SIDE, 3), np.uint8), resize=True)

    def tif(content: bytes, folder: Path) -> None:
        read_tif(content, np.empty((SIDE, SIDE, 3), np.uint8))

    def opened(content: bytes, folder: Path) -> None:
        """A store whose index is the content; its digest would find every change, so the table alone is read."""
        for name, sound in {**store, "index.csv": content}.items():
            (folder / name).write_bytes(sound)
        open_store(folder).index  # noqa: B018

    def progress(path: Path) -> None:
        # not load: Orbax would read the arrays of every input that is still sound
        Checkpoints(path.parent)._read_progress(path.parent, 3)

    fault, said = (RecordFault,), (UserError,)
    parsers: dict[str, tuple[Parse, tuple[type[Exception], ...]]] = {
        "tif": (tif, fault),
        "picture": (picture, fault),
        "zip": (of_file("a.zip", read_archive), said),
        "tar": (of_file("a.tar", read_archive), said),
        "labels": (lambda content, _: read_label_table(content, "labels.csv", 2), said),
        "manifest": (lambda content, _: parse_manifest(content), (ValueError,)),
        "index": (opened, said),
        "config": (of_file("c.toml", load_config), said),
        "space": (of_file("s.toml", lambda path: read_space(path, Config())), said),
        "progress": (of_file(PROGRESS, progress), (*said, CheckpointError)),
        "history": (of_file("history.csv", read_history), said),
        "operating_point": (of_file(FILE, lambda path: read_operating_point(path.parent)), said),
        "submission": (of_file("s.csv", read_submission_ids), said),
        "weights": (of_file("w.safetensors", lambda path: read_weight_file(str(path))), said),
    }
    seeds = make_seeds(store)
    return {name: Target(seeds[name], parse, refusals) for name, (parse, refusals) in parsers.items()}


def of_file(name: str, parse: Callable[[Path], Any]) -> Parse:
    """A parser of a file of that name."""

    def write_and_parse(content: bytes, folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return parse(folder / name)

    return write_and_parse


def read_archive(path: Path) -> None:
    """Whatever can be read of the members of an archive."""
    container = open_container(path)
    for place in container.members().values() if container else ():
        with contextlib.suppress(RecordFault):
            container.read(place, 10_000)  # type: ignore[union-attr]
