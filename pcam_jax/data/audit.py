"""What a store holds, and what is wrong with it: counts, duplicates, leaks between splits and from other sets.

Everything here is found in the pixels and the index; nothing is guessed. How it is said is
`pcam_jax.report.audit_text` and `audit_page`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pcam_jax.data.duplicates import exact_duplicates, symmetric_duplicates
from pcam_jax.data.leaks import LEARNT_FROM, Leak, find_leak
from pcam_jax.data.pixel_statistics import PixelStatistics, Stop, measure_pixels
from pcam_jax.data.split import SPLITS
from pcam_jax.data.store import Store

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SplitRow:
    """One split: how many images of each class, without a label, in all, and from how many groups."""

    split: str
    by_class: tuple[int, ...]
    unlabelled: int
    count: int
    groups: int


@dataclass(frozen=True)
class DuplicateFigures:
    """Images that are the same.

    Attributes:
        sets: groups of equal images, as positions.
        surplus: images that could go without losing anything.
        across: positions of images that have an equal in another split.
        conflicting: sets whose members bear different labels.
    """

    sets: list[IntArray]
    surplus: int
    across: IntArray
    conflicting: int


@dataclass(frozen=True)
class Finding:
    """A sentence about the store: ``problem`` (figures would be wrong), ``note`` (know it) or ``fine``."""

    level: str
    sentence: str


@dataclass(frozen=True)
class StoreAudit:
    """Everything found.

    Attributes:
        store: audited.
        split_rule: where the splits come from, in words.
        splits: `[N] str`, "" for images that are not used.
        split_rows: counts.
        pixels: measures of each image.
        exact: duplicates to the byte.
        turned: duplicates only after turning or mirroring.
        shared_groups: groups with images in several splits.
        leaks: one per other set.
        findings: sentences, problems first.
    """

    store: Store
    split_rule: str
    splits: npt.NDArray[np.str_]
    split_rows: list[SplitRow]
    pixels: PixelStatistics
    exact: DuplicateFigures
    turned: DuplicateFigures
    shared_groups: list[str]
    leaks: list[Leak]
    findings: list[Finding]


def audit_store(
    store: Store,
    splits: npt.NDArray[np.str_],
    split_rule: str,
    against: Sequence[str | os.PathLike[str]] = (),
    stop: Stop | None = None,
) -> StoreAudit:
    """Look at every image once.

    Args:
        store: to audit.
        splits: `[N]` split of each image, as training would use it.
        split_rule: where they come from, in words.
        against: other sets to look for inside this store; see `find_leak`.
        stop: asked between batches.

    Raises:
        UserError: as `find_leak`.
    """
    pixels = measure_pixels(store, len(store), stop)
    hashes = store.hashes()
    exact = _duplicate_figures(exact_duplicates(hashes), splits, store.labels)
    turned = _duplicate_figures(symmetric_duplicates(store, pixels.keys, hashes), splits, store.labels)
    leaks = [find_leak(store, splits, pixels, place, stop) for place in against]
    rows = _split_rows(store, splits)
    shared = _shared_groups(store.groups, splits)
    findings = _findings(store, splits, pixels, exact, turned, shared, leaks)
    return StoreAudit(store, split_rule, splits, rows, pixels, exact, turned, shared, leaks, findings)


def sample_by_class(
    labels: npt.NDArray[np.int32], class_count: int, each: int, seed: int = 0
) -> list[IntArray]:
    """Positions of up to ``each`` random images of every class, the unlabelled (-1) last, where there are any."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in (*range(class_count), -1):
        members = np.flatnonzero(labels == label)
        if label >= 0 or len(members):
            chosen.append(np.sort(rng.choice(members, min(each, len(members)), replace=False)))
    return chosen


def _split_rows(store: Store, splits: npt.NDArray[np.str_]) -> list[SplitRow]:
    rows = []
    for split in (*SPLITS, ""):
        mask = splits == split
        if mask.any():
            counts = np.bincount(store.labels[mask] + 1, minlength=len(store.class_names) + 1)
            groups = len(set(store.groups[mask].tolist()) - {""})
            by_class = tuple(counts[1:].tolist())
            rows.append(SplitRow(split or "unused", by_class, int(counts[0]), int(mask.sum()), groups))
    return rows


def _duplicate_figures(
    sets: list[IntArray], splits: npt.NDArray[np.str_], labels: npt.NDArray[np.int32]
) -> DuplicateFigures:
    across, conflicting = [], 0
    for members in sets:
        if len(set(splits[members].tolist()) - {""}) > 1:
            across.append(members)
        conflicting += len(set(labels[members].tolist()) - {-1}) > 1
    return DuplicateFigures(
        sets=sets,
        surplus=sum(len(members) - 1 for members in sets),
        across=np.concatenate(across) if across else np.zeros(0, np.int64),
        conflicting=conflicting,
    )


def _shared_groups(groups: npt.NDArray[np.str_], splits: npt.NDArray[np.str_]) -> list[str]:
    used = (groups != "") & (splits != "")
    seen = Counter(name for name, _ in set(zip(groups[used].tolist(), splits[used].tolist(), strict=True)))
    return sorted(name for name, in_splits in seen.items() if in_splits > 1)


def _findings(
    store: Store,
    splits: npt.NDArray[np.str_],
    pixels: PixelStatistics,
    exact: DuplicateFigures,
    turned: DuplicateFigures,
    shared: list[str],
    leaks: list[Leak],
) -> list[Finding]:
    found = [finding for leak in leaks for finding in _leak_findings(leak)]
    for figures, how in ((exact, "to the byte"), (turned, "after turning or mirroring")):
        if len(figures.across):
            found.append(
                Finding("problem", f"Images with an equal ({how}) in another split: {len(figures.across):,}.")
            )
        if figures.conflicting:
            found.append(
                Finding(
                    "problem",
                    f"Sets of images equal {how} that bear different labels: {figures.conflicting:,}.",
                )
            )
        if figures.surplus:
            found.append(Finding("note", f"Images that repeat another one {how}: {figures.surplus:,}."))
        else:
            found.append(Finding("fine", f"No image repeats another one {how}."))
    if shared:
        found.append(
            Finding(
                "problem",
                f"Groups (slides or patients) with images in several splits: {len(shared):,}, {shared[0]} for one; "
                "validation figures flatter.",
            )
        )
    elif (store.groups != "").any():
        found.append(Finding("fine", "No group (slide or patient) has images in several splits."))
    else:
        found.append(
            Finding(
                "note",
                "No image names its group (slide or patient), so images of one may be on both sides of a split.",
            )
        )
    found += _pixel_findings(store, splits, pixels)
    return sorted(found, key=lambda finding: ("problem", "note", "fine").index(finding.level))


def _leak_findings(leak: Leak) -> list[Finding]:
    total = sum(leak.by_split.values())
    found = []
    if leak.harmful:
        parts = ", ".join(
            f"{leak.by_split[split]:,} in {split}" for split in LEARNT_FROM if leak.by_split[split]
        )
        found.append(
            Finding(
                "problem",
                f"{_number(leak.harmful, 'image')} of {leak.name} decide the model here ({parts}), "
                f"{leak.example} for one: figures on that set would be wrong.",
            )
        )
    elif total:
        found.append(
            Finding("note", f"{_number(total, 'image')} of {leak.name} here, none in train or validation.")
        )
    else:
        found.append(Finding("fine", f"None of the {_number(leak.count, 'image')} of {leak.name} is here."))
    if leak.shared_training:
        found.append(
            Finding("note", f"{_number(leak.shared_training, 'training image')} of {leak.name} here as well.")
        )
    if leak.turned:
        found.append(
            Finding("problem", f"{leak.turned:,} more of {leak.name} decide it, turned or mirrored.")
        )
    return found


def _pixel_findings(store: Store, splits: npt.NDArray[np.str_], pixels: PixelStatistics) -> list[Finding]:
    found = []
    for mask, what in ((pixels.blank, "Blank"), (pixels.burnt, "Mostly black or white")):
        if mask.any():
            counts = np.bincount(store.labels[mask & (store.labels >= 0)], minlength=len(store.class_names))
            named = [f"{n:,} {name}" for n, name in zip(counts, store.class_names, strict=True) if n]
            by_class = f" ({', '.join(named)})" if named else ""
            first = store.ids[np.flatnonzero(mask)[0]]
            found.append(
                Finding(
                    "note",
                    f"{what}: {_number(int(mask.sum()), 'image')}{by_class}, {first} for one.",
                )
            )
    for split in LEARNT_FROM:
        labels = store.labels[(splits == split) & (store.labels >= 0)]
        counts = np.bincount(labels, minlength=len(store.class_names))
        if len(labels) and (counts == 0).any():
            absent = store.class_names[int(np.flatnonzero(counts == 0)[0])]
            found.append(Finding("problem", f"The split {split} has no image of class {absent}."))
    return found


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
