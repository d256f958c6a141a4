"""The format of a store: its manifest, its file names and its digests."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pcam_jax.runtime.errors import UserError

FORMAT_VERSION = 1
INDEX_COLUMNS = ("id", "label", "group", "split", "source")
UNKNOWN_LABEL = -1
SHARD_BYTES = 256 * 2**20
"""Aim for the size of a shard: large enough to be few files, small enough to share among processes."""

HASHES_FILE = "hashes.npy"


_MANIFEST_LIMIT = 256 * 2**20
_SHARD_FILE = re.compile(r"images-[0-9]{5,9}\.npy")


@dataclass(frozen=True)
class Shard:
    """One images file: its name in the store, its number of images and its digest (hex SHA-256)."""

    file: str
    count: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        format_version: of the store's layout; readers refuse what they do not know.
        image_shape: (H, W, 3) of every image.
        count: number of images.
        class_names: names of labels 0, 1, ...
        counts: images by split, then by class name ("unknown" for those without a label).
        shards: the images files in order.
        index_digest: hex SHA-256 of `index.csv`.
        source: where the images came from, as the reader says.
        prepare: the settings that decided the store's bytes.
    """

    format_version: int
    image_shape: tuple[int, int, int]
    count: int
    class_names: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    shards: tuple[Shard, ...]
    index_digest: str
    source: dict[str, Any] = field(default_factory=dict)
    prepare: dict[str, Any] = field(default_factory=dict)

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.image_shape)

    @cached_property
    def starts(self) -> np.ndarray:
        """[number of shards + 1] int64: the store's row at which each shard begins, then the count."""
        return np.concatenate([[0], np.cumsum([shard.count for shard in self.shards])]).astype(np.int64)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all that a model can learn from: shape, classes, images, index."""
        content = {
            "format_version": self.format_version,
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
            "shards": [[shard.count, shard.digest] for shard in self.shards],
            "index": self.index_digest,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        UserError: no such store, or a manifest that is not one.
    """
    path = folder / "manifest.json"
    if not folder.exists():
        raise UserError(
            f"There is no store at {folder}: make one with `python -m pcam_jax.prepare SOURCE {folder}`."
        )
    if not path.is_file():
        raise UserError(
            f"{folder} is not a store, it has no manifest.json: "
            f"make one with `python -m pcam_jax.prepare SOURCE STORE`."
        )
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise UserError(f"{path} is not a store's manifest, it is too large: prepare the store again.")
    try:
        return parse_manifest(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete the store and prepare it again.") from None


def parse_manifest(content: bytes) -> Manifest:
    """Turn the bytes of a manifest into a `Manifest`.

    Raises:
        ValueError: it is not JSON, or a field is missing, of the wrong kind or impossible.
    """
    try:
        raw = json.loads(content)
    except (UnicodeDecodeError, RecursionError, ValueError):
        raise ValueError("it is not valid JSON") from None
    if not isinstance(raw, dict):
        raise ValueError("it is not a JSON object")
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}, this program reads {FORMAT_VERSION}")
    shape, names, shards = raw.get("image_shape"), raw.get("class_names"), raw.get("shards")
    if not (isinstance(shape, list) and len(shape) == 3 and all(_is_count(n, 1, 65536) for n in shape)):
        raise ValueError(f"impossible image_shape {str(shape)[:80]}")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("class_names is not a list of names")
    if not isinstance(shards, list):
        raise ValueError("shards is not a list")
    parsed = tuple(_parse_shard(entry, number) for number, entry in enumerate(shards))
    if any(one.file >= following.file for one, following in itertools.pairwise(parsed)):
        raise ValueError("shards are out of order")
    if not _is_count(raw.get("count"), 0, 2**48) or raw["count"] != sum(shard.count for shard in parsed):
        raise ValueError("count is not the sum of the shards' counts")
    if not isinstance(raw.get("index_digest"), str):
        raise ValueError("index_digest is missing")
    for key in ("counts", "source", "prepare"):
        if not isinstance(raw.get(key, {}), dict):
            raise ValueError(f"{key} is not an object")
    if raw.get("checksum") != _checksum(raw):
        raise ValueError("its checksum does not match its content")
    return Manifest(
        format_version=version,
        image_shape=(shape[0], shape[1], shape[2]),
        count=raw["count"],
        class_names=tuple(names),
        counts=raw.get("counts", {}),
        shards=parsed,
        index_digest=raw["index_digest"],
        source=raw.get("source", {}),
        prepare=raw.get("prepare", {}),
    )


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """The content of manifest.json: the fields, the digest for people to compare, a checksum over all of it."""
    raw: dict[str, Any] = json.loads(json.dumps({**asdict(manifest), "digest": manifest.digest}))
    return {**raw, "checksum": _checksum(raw)}


def _checksum(raw: dict[str, Any]) -> str:
    content = {key: value for key, value in raw.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse_shard(entry: Any, number: int) -> Shard:
    if not isinstance(entry, dict) or not _SHARD_FILE.fullmatch(str(entry.get("file"))):
        raise ValueError(f"shard {number} is not described")
    if not _is_count(entry.get("count"), 1, 2**40) or not isinstance(entry.get("digest"), str):
        raise ValueError(f"shard {number} has no count or digest")
    return Shard(entry["file"], entry["count"], entry["digest"])


def _is_count(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def shard_name(number: int) -> str:
    """File name of an images shard."""
    return f"images-{number:05d}.npy"


def shard_header(count: int, image_shape: tuple[int, int, int]) -> bytes:
    """The .npy header of a shard of ``count`` images."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|u1", "fortran_order": False, "shape": (count, *image_shape)}
    )
    return buffer.getvalue()


def default_images_per_shard(image_shape: tuple[int, int, int]) -> int:
    """Images that fill about `SHARD_BYTES`, at least one."""
    return max(1, SHARD_BYTES // math.prod(image_shape))


def shard_digest(hashes: np.ndarray) -> str:
    """Hex SHA-256 over the images' SHA-1 digests ([n, 20] uint8)."""
    return hashlib.sha256(np.ascontiguousarray(hashes).tobytes()).hexdigest()


def sha1_of(image: np.ndarray) -> bytes:
    """The 20-byte SHA-1 of an image's raw row-major bytes ([H, W, 3] uint8)."""
    return hashlib.sha1(np.ascontiguousarray(image).data, usedforsecurity=False).digest()
