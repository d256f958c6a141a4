"""Who trains, who validates, who tests: a function of the index and the [data] settings alone.

What the raw data dictates is kept: rows marked `test` or `validation` in the index stay there. The labelled
rest is divided by `data.validation_fraction`, by `data.folds` and `data.fold`, or by `data.split_file`.
Whole groups (slides, patients) stay on one side wherever groups exist, because patches of one slide resemble
each other far more than patches of another: a model that has seen the slide is flattered by a random split.

The row order of the index changes nothing: every choice hangs on ids, group names and `data.split_seed`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from pcam_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from pcam_jax.config.schema import DataConfig

SPLITS = ("train", "validation", "test")
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def assign_splits(index: pd.DataFrame, data: DataConfig) -> npt.NDArray[np.str_]:
    """The split of each row of the index: str [N] of "train", "validation", "test" or "" (unused).

    Args:
        index: columns id (str), label (int, -1 or missing where unknown), group (str, "" where unknown) and
            split (what the raw data dictates, "" where nothing). Equal ids (equal pixels) share a split.
        data: validation_fraction, train_fraction (of the labelled rows that the raw data leaves to us; None
            takes all that validation leaves), folds, fold, split_by, split_seed, split_file.

    Unlabelled rows are never trained on or validated. Where the raw data names validation rows, these are the
    validation split, and the fraction is not used. The validation rows do not depend on train_fraction, and a
    smaller train_fraction takes a subset of a larger one's rows where there are no groups, so learning curves
    compare like with like.

    Raises:
        UserError: a setting out of range, a group or class too few, an empty split, an unfitting split file.
    """
    _check_settings(data)
    index = index.reset_index(drop=True)
    labels = _labels(index)
    dictated = _text(index, "split")
    unknown = sorted(set(dictated.unique()) - {*SPLITS, ""})
    if unknown:
        raise UserError(f"The index has the split {unknown[0]!r}; it may only be one of {', '.join(SPLITS)}.")
    if data.split_file:
        splits = _from_file(index, labels, dictated, data)
    else:
        splits = _divide(index, labels, dictated.to_numpy(str), data)
    _check_result(splits, labels)
    if data.undersample:
        _undersample(splits, labels, _text(index, "id").to_numpy(str), data.split_seed)
    return splits


def _undersample(
    splits: npt.NDArray[np.str_], labels: IntArray, ids: npt.NDArray[np.str_], seed: int
) -> None:
    """Take training examples of the larger classes out of ``splits`` until all classes are of one size."""
    classes = [np.flatnonzero((splits == "train") & (labels == label)) for label in np.unique(labels)]
    smallest = min(len(members) for members in classes if len(members))
    for members in classes:
        order = np.argsort(_hashes(ids[members], seed, "undersample"), kind="stable")
        splits[members[order[smallest:]]] = ""


def split_warning(
    index: pd.DataFrame, data: DataConfig, splits: npt.NDArray[np.str_] | None = None
) -> str | None:
    """A sentence on what the split does to the validation figure, or None where there is nothing to say.

    Args:
        index: as for `assign_splits`.
        data: as for `assign_splits`.
        splits: its result, if it is at hand.
    """
    if splits is None:
        splits = assign_splits(index, data)
    groups = _text(index, "group").to_numpy(str)
    training, validating = splits == "train", splits == "validation"
    used = training | validating
    if not (groups[used] != "").any():
        return (
            "The store names no slide or patient for its examples, so the split is random: patches of "
            "one slide may stand on both sides, so validation figures flatter what new slides would show."
        )
    shared = validating & (groups != "") & np.isin(groups, groups[training])
    if shared.any():
        return (
            f"{shared.sum():,} of {validating.sum():,} validation examples come from slides or patients "
            "that are also trained on, so the validation figures overstate what the model does on new ones; "
            'data.split_by = "group" without a split file keeps them apart.'
        )
    if (groups[used] == "").any():
        return (
            f"{(groups[used] == '').sum():,} of {used.sum():,} examples name no slide or patient and were "
            "split one by one, so some may resemble examples on the other side."
        )
    return None


def _check_settings(data: DataConfig) -> None:
    if not 0 < data.validation_fraction < 1:
        raise UserError(
            f"data.validation_fraction is {data.validation_fraction:g}; it must lie between 0 and 1, both "
            "excluded."
        )
    if data.train_fraction is not None and not 0 < data.train_fraction <= 1:
        raise UserError(f"data.train_fraction is {data.train_fraction:g}; it must be above 0 and at most 1.")
    if data.split_by not in ("group", "example"):
        raise UserError(f"data.split_by is {data.split_by!r}; it must be 'group' or 'example'.")
    if data.folds < 0 or data.folds == 1:
        raise UserError(f"data.folds is {data.folds}; it must be 0 (a single split) or at least 2.")
    if data.folds and not 0 <= data.fold < data.folds:
        raise UserError(
            f"data.fold is {data.fold}, but the {data.folds} folds are numbered 0 to {data.folds - 1}."
        )
    if data.folds and data.split_file:
        raise UserError("data.split_file fixes the split, so data.folds must be 0; drop one of the two.")


def _check_result(splits: npt.NDArray[np.str_], labels: IntArray) -> None:
    classes = np.unique(labels[np.isin(splits, ("train", "validation"))])
    for split, remedy in (
        ("train", "raise data.train_fraction"),
        ("validation", "raise data.validation_fraction, or use fewer data.folds"),
    ):
        members = labels[splits == split]
        if not len(members):
            raise UserError(f"The {split} split is empty: {remedy}, or add labelled examples.")
        missing = np.setdiff1d(classes, members)
        if len(missing):
            raise UserError(
                f"The {split} split has no example of class {missing[0]}: {remedy}, or try another "
                "data.split_seed."
            )


def _text(index: pd.DataFrame, column: str) -> pd.Series:
    if column not in index:
        return pd.Series("", index=index.index, dtype=str)
    return index[column].astype(object).where(index[column].notna(), "").astype(str)


def _labels(index: pd.DataFrame) -> IntArray:
    return pd.to_numeric(index["label"], errors="coerce").fillna(-1).to_numpy(np.int64)


def _divide(
    index: pd.DataFrame, labels: IntArray, dictated: npt.NDArray[np.str_], data: DataConfig
) -> npt.NDArray[np.str_]:
    splits = np.full(len(index), "", dtype="<U10")
    splits[dictated == "test"] = "test"
    labelled = labels >= 0
    validation = (dictated == "validation") & labelled
    splits[validation] = "validation"
    pool = np.flatnonzero(labelled & ~np.isin(dictated, ("test", "validation")))
    if not len(pool):
        return splits
    # Equal ids are equal pixels: they go together even where nothing else binds them.
    keys = "example " + _text(index, "id").to_numpy(str)[pool]
    groups = _text(index, "group").to_numpy(str)[pool]
    if data.split_by == "group":
        keys = np.where(groups != "", "group " + groups, keys)
    units, members = np.unique(keys, return_inverse=True)
    classes, codes = np.unique(labels[pool], return_inverse=True)
    counts = np.zeros((len(units), len(classes)), np.int64)
    np.add.at(counts, (members, codes), 1)

    training = np.ones(len(units), bool)
    already_validated = 0.0
    if validation.any():
        if data.folds:
            raise UserError(
                "The raw data names its own validation split, so data.folds must be 0 (or give a "
                "data.split_file)."
            )
    else:
        unit_validation = _validation_units(units, counts, data)
        splits[pool[unit_validation[members]]] = "validation"
        training = ~unit_validation
        already_validated = 1 / data.folds if data.folds else data.validation_fraction
    if data.train_fraction is not None:
        share = data.train_fraction / (1 - already_validated)
        if share > 1 + 1e-9:
            raise UserError(
                f"data.train_fraction is {data.train_fraction:g} and validation takes {already_validated:g}, "
                "together more than 1: lower one of them."
            )
        if share < 1 - 1e-9:
            rest = np.flatnonzero(training)
            bins = _partition(units[rest], counts[rest], [share, 1 - share], data.split_seed, "train")
            training[rest[bins != 0]] = False
    splits[pool[training[members]]] = "train"
    return splits


def _validation_units(
    units: npt.NDArray[np.str_], counts: IntArray, data: DataConfig
) -> npt.NDArray[np.bool_]:
    least, what = (data.folds, f"data.folds = {data.folds}") if data.folds else (2, "a validation split")
    if len(units) < least:
        noun = "groups (slides or patients)" if data.split_by == "group" else "examples"
        raise UserError(f"The labelled data has too few {noun} for {what}: {len(units)}.")
    if data.folds:
        fractions = [1 / data.folds] * data.folds
        return _partition(units, counts, fractions, data.split_seed, "folds") == data.fold
    fractions = [data.validation_fraction, 1 - data.validation_fraction]
    return _partition(units, counts, fractions, data.split_seed, "validation") == 0


def _partition(
    units: npt.NDArray[np.str_], counts: IntArray, fractions: Sequence[float], seed: int, purpose: str
) -> IntArray:
    """A bin for each unit, int64 [U], so that bin b holds about fractions[b] of the examples of every class.

    Args:
        units: unit names, sorted, str [U].
        counts: examples of each class in each unit, int64 [U, C].
        fractions: shares of the bins, [B], summing to one.
        seed: data.split_seed.
        purpose: keeps the choices of different calls apart.

    Units of several examples are placed by `_place_groups`; single examples then fill each class up, in the
    order of a keyed hash of their names, so a row added later moves only the rows at the boundary.
    """
    shares = np.asarray(fractions, np.float64)
    bins = np.zeros(len(units), np.int64)
    several = np.flatnonzero(counts.sum(1) > 1)
    single = np.flatnonzero(counts.sum(1) == 1)
    filled = np.zeros((len(shares), counts.shape[1]), np.int64)
    if len(several):
        lone = counts[single].sum(0)
        bins[several] = _place_groups(counts[several], shares, lone, seed, purpose)
        np.add.at(filled, bins[several], counts[several])
    rank = np.argsort(_hashes(units[single], seed, purpose), kind="stable")
    single = single[rank]
    for label, total in enumerate(counts.sum(0)):
        members = single[counts[single, label] == 1]
        places = _apportion(np.maximum(shares * total - filled[:, label], 0), len(members), filled.sum(1))
        bins[members] = np.repeat(np.arange(len(shares)), places)
        filled[:, label] += places
    return bins


def _apportion(wanted: FloatArray, count: int, fill: IntArray) -> IntArray:
    """`count` places in proportion to `wanted`, by largest remainder; ties go to the emptier bin."""
    if not count:
        return np.zeros(len(wanted), np.int64)
    exact = wanted * (count / wanted.sum())
    places = np.floor(exact + 1e-9).astype(np.int64)
    order = np.lexsort((fill, -np.round(exact - places, 9)))
    places[order[: count - places.sum()]] += 1
    return places


def _hashes(names: npt.NDArray[np.str_], seed: int, purpose: str) -> npt.NDArray[np.uint64]:
    key = f"{seed} {purpose}".encode()
    digests = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8, key=key).digest() for name in names)
    return np.frombuffer(digests, "<u8")


def _place_groups(
    counts: IntArray, shares: FloatArray, lone: IntArray, seed: int, purpose: str
) -> npt.NDArray[np.int64]:
    """Random starts improved by single moves; the best balanced is kept.

    A greedy pass from the largest group down would put the large slides into training for every seed; a
    random start gives each group its fair chance of validating.

    Args:
        counts: examples of each class in each group, int64 [G, C].
        shares: shares of the bins, float [B].
        lone: single examples of each class that will be placed afterwards, int64 [C].
        seed: data.split_seed.
        purpose: as in `_partition`.
    """
    # All numbers as shares of the class, plus the whole as one more column, so that no class outweighs
    # another.
    columns = np.concatenate([counts, counts.sum(1, keepdims=True)], 1).astype(np.float64)
    columns /= np.maximum(columns.sum(0), 1)
    # A bin without one class is far worse than any imbalance, unless single examples can still supply it.
    needed = np.append(((counts > 0).sum(0) > 0) & (lone == 0), False)
    stream = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    best_bins, best_cost = np.zeros(len(counts), np.int64), np.inf
    for attempt in range(int(np.clip(20_000 // len(counts), 1, 64))):
        key = np.array([seed % 2**64, stream], np.uint64)
        words = np.random.Philox(key=key, counter=np.array([0, 0, 0, attempt], np.uint64)).random_raw(
            len(counts)
        )
        start = np.searchsorted(np.cumsum(shares)[:-1], words / 2.0**64, side="right").astype(np.int64)
        bins, cost = _improve(start, columns, shares, needed)
        if cost < best_cost - 1e-12:
            best_bins, best_cost = bins, cost
    return best_bins


def _improve(
    bins: IntArray, columns: FloatArray, shares: FloatArray, needed: npt.NDArray[np.bool_]
) -> tuple[IntArray, float]:
    """Move one group at a time while that brings the bins closer to their shares: (bins [G], final cost)."""
    bins = bins.copy()
    filled = np.zeros((len(shares), columns.shape[1]))
    np.add.at(filled, bins, columns)
    present = (columns.sum(0) > 0).astype(np.float64)

    def cost(fill: FloatArray, share: FloatArray) -> FloatArray:
        missing = ((fill < 1e-12) & needed).sum(-1)
        return (np.square(fill - share[..., None] * present)).sum(-1) + 10.0 * missing

    everyone = np.arange(len(bins))
    for _ in range(2 * len(bins)):
        now = cost(filled, shares)
        entering = cost(filled + columns[:, None], shares) - now
        leaving = cost(filled[bins] - columns, shares[bins]) - now[bins]
        change = entering + leaving[:, None]
        change[everyone, bins] = 0.0
        group, target = np.unravel_index(int(np.argmin(change)), change.shape)
        if change[group, target] > -1e-12:
            break
        filled[bins[group]] -= columns[group]
        filled[target] += columns[group]
        bins[group] = target
    return bins, float(cost(filled, shares).sum())


def _from_file(
    index: pd.DataFrame, labels: IntArray, dictated: pd.Series, data: DataConfig
) -> npt.NDArray[np.str_]:
    path = Path(data.split_file)
    table = _read_split_file(path)
    ids = _text(index, "id")
    repeated = table["id"][table["id"].duplicated()]
    # An id that the index itself repeats (equal pixels) may be repeated here too, if its rows agree.
    repeated = repeated[~repeated.isin(ids[ids.duplicated()])]
    agreed = table.drop_duplicates(["id", "split"])
    conflicts = agreed["id"][agreed["id"].duplicated()]
    for culprits, what in ((repeated, "more than once"), (conflicts, "with two different splits")):
        if len(culprits):
            raise UserError(f"The split file {path} lists {_some(culprits)} {what}: each id needs one row.")
    strangers = table["id"][~table["id"].isin(ids)]
    if len(strangers):
        raise UserError(f"The split file {path} lists ids that are not in the store: {_some(strangers)}.")
    chosen = ids.map(agreed.set_index("id")["split"])
    forgotten = ids[chosen.isna() & (labels >= 0) & (dictated != "test")]
    if len(forgotten):
        raise UserError(
            f"The split file {path} leaves out labelled examples of the store: {_some(forgotten)}; list "
            "every id, with an empty split where it is not to be used."
        )
    chosen = chosen.where(chosen.notna(), dictated.where(dictated == "test", ""))
    unlabelled = ids[chosen.isin(("train", "validation")) & (labels < 0)]
    if len(unlabelled):
        raise UserError(
            f"The split file {path} trains or validates unlabelled examples: {_some(unlabelled)}."
        )
    leaked = ids[chosen.isin(("train", "validation")) & (dictated == "test")]
    if len(leaked):
        raise UserError(
            f"The split file {path} trains or validates examples that the raw data calls test: "
            f"{_some(leaked)}."
        )
    return chosen.to_numpy("<U10")


def _read_split_file(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise UserError(f"data.split_file names {path}, which does not exist.") from error
    except (ValueError, UnicodeDecodeError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"The split file {path} cannot be read as a CSV table: {error}") from error
    if not {"id", "split"} <= set(table.columns):
        raise UserError(
            f"The split file {path} needs the columns id and split; it has {list(table.columns)}."
        )
    strange = table[~table["split"].isin((*SPLITS, ""))]
    if len(strange):
        first = strange.iloc[0]
        raise UserError(
            f"The split file {path} gives {first['id']} the split {first['split']!r}; "
            f"it may be {', '.join(SPLITS)} or empty."
        )
    return table[["id", "split"]]


def _some(ids: pd.Series) -> str:
    names = ", ".join(ids.iloc[:3])
    return names if len(ids) <= 3 else f"{names} and {len(ids) - 3:,} more"
