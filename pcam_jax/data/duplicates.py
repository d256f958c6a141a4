"""Images that are the same: to the byte, or after turning and mirroring."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pcam_jax.data.loader import ImageSource

IntArray = npt.NDArray[np.int64]


def exact_duplicates(hashes: npt.NDArray[np.uint8]) -> list[IntArray]:
    """Groups of two or more images with equal hashes ``[N, 20] uint8``; positions rise within and over groups."""
    return _equal_rows(hashes)


def symmetric_duplicates(
    source: ImageSource, keys: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint8]
) -> list[IntArray]:
    """Groups of images that equal each other after one of the eight symmetries of the square.

    Images whose keys (sums that no symmetry changes) agree are candidates; those are read again and compared by
    their `canonical_hash`, so nothing is found that is not there. Groups of which all members are equal to the byte
    are left to `exact_duplicates`.

    Args:
        source: the images.
        keys: `[N, 9]` from `pcam_jax.data.pixel_statistics`.
        hashes: `[N, 20] uint8`, SHA-1 of each image.
    """
    found = []
    for candidates in _equal_rows(keys):
        if len(np.unique(hashes[candidates], axis=0)) < 2:
            continue
        by_hash: dict[bytes, list[int]] = {}
        for position in candidates:
            digest = canonical_hash(source.gather(np.array([position]))[0])
            by_hash.setdefault(digest, []).append(int(position))
        for members in map(np.array, by_hash.values()):
            if len(np.unique(hashes[members], axis=0)) > 1:
                found.append(members.astype(np.int64))
    return sorted(found, key=lambda group: int(group[0]))


def symmetric_matches(
    source: ImageSource,
    keys: npt.NDArray[np.int64],
    other: ImageSource,
    other_keys: npt.NDArray[np.int64],
) -> list[tuple[int, int]]:
    """Pairs (position in ``source``, position in ``other``) of images equal after one of the eight symmetries."""
    wanted: dict[bytes, list[int]] = {}
    for position, key in enumerate(keys):
        wanted.setdefault(key.tobytes(), []).append(position)
    pairs = []
    canonical: dict[int, bytes] = {}
    for place, key in enumerate(other_keys):
        candidates = wanted.get(key.tobytes(), [])
        if not candidates:
            continue
        digest = canonical_hash(other.gather(np.array([place]))[0])
        for position in candidates:
            if position not in canonical:
                canonical[position] = canonical_hash(source.gather(np.array([position]))[0])
            if canonical[position] == digest:
                pairs.append((position, place))
    return pairs


def canonical_hash(image: npt.NDArray[np.uint8]) -> bytes:
    """The least SHA-1 among an image's symmetries: eight of a square, the four that keep the shape of others.

    Args:
        image: `[H, W, 3] uint8`.
    """
    return min(hashlib.sha1(turned.tobytes(), usedforsecurity=False).digest() for turned in symmetries(image))


def symmetries(image: npt.NDArray[np.uint8]) -> Iterable[npt.NDArray[np.uint8]]:
    """Views of the image turned and mirrored, itself first."""
    for transposed in (False, True)[: 2 if image.shape[0] == image.shape[1] else 1]:
        base = image.swapaxes(0, 1) if transposed else image
        for rows in (1, -1):
            for columns in (1, -1):
                yield base[::rows, ::columns]


def _equal_rows(rows: npt.NDArray[np.generic]) -> list[IntArray]:
    """Groups of two or more equal rows, as rising positions; groups by their first member."""
    if not len(rows):
        return []
    _, numbers, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    groups = np.split(np.argsort(numbers.reshape(-1), kind="stable"), np.cumsum(counts)[:-1])
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))
