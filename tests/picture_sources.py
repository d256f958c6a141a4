"""Sources of pictures as folders and archives, and what `prepare_store` makes of them."""

from __future__ import annotations

import csv
import tarfile
import zipfile
from pathlib import Path

from pcam_jax.data.convert import prepare_store, report_path
from pcam_jax.data.raw import ReaderOptions
from pcam_jax.data.store import Store


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def prepare(source: Path, tmp_path: Path, **options: object) -> tuple[Store, list[str]]:
    """A store of what is usable, and what was told."""
    told: list[str] = []
    keys = ("on_error", "reader", "workers", "images_per_shard")
    rest = {key: options.pop(key) for key in keys if key in options}
    store = prepare_store(
        source, tmp_path / "store", notify=told.append, options=ReaderOptions(**options), **rest
    )
    return store, told


def problems(tmp_path: Path) -> list[tuple[str, str]]:
    with open(report_path(tmp_path / "store"), newline="") as file:
        return [(row["problem"], row["id"]) for row in csv.DictReader(file)]


def packed(folder: Path, kind: str) -> Path:
    target = folder.with_name(f"{folder.name}.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(target, "w") as archive:
            for path in sorted(folder.rglob("*.*")):
                archive.write(path, path.relative_to(folder))
    else:
        with tarfile.open(target, f"w:{kind.partition('.')[2]}") as archive:
            archive.add(folder, arcname=".")
    return target
