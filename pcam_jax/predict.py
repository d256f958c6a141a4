"""Predict: ``python -m pcam_jax.predict RUN... INPUT --output FILE``.

Several runs give their mean. The file is written only after it was checked, completely or not at all. With
``--tiles`` the input is a slide or another big picture, and the output a map of probabilities over it.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from pcam_jax.runtime.command import run_command
from pcam_jax.runtime.errors import Interrupted, UserError
from pcam_jax.runtime.files import atomic_write
from pcam_jax.runtime.progress import progress
from pcam_jax.runtime.signals import StopSignals

if TYPE_CHECKING:
    from pcam_jax.data.whole_slide import Slide
    from pcam_jax.inference.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class PredictCommand:
    """Write the probabilities of a split, an image, a folder or a zip, or with --tiles of a slide's squares."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """One or more runs or exported models, then the input: a store, an image, a folder of images, a zip, or Kaggle's
    raw files."""
    output: Path
    """CSV file to write: id,label with the probability of class 1 (or one column for each of several classes). With
    --tiles the beginning of three names: MAP.png (picture), MAP.csv (x, y, prob) and MAP.json (how it was made)."""
    split: str = "test"
    """Which split of a store or of raw files; "all" takes everything."""
    tta: Annotated[str, tyro.conf.arg(metavar="{none,d4}")] = "none"
    """d4 averages over the eight symmetries of the square."""
    sample_submission: Path | None = None
    """Kaggle's sample_submission.csv: the output gets exactly its ids in its order."""
    shard: Annotated[str, tyro.conf.arg(metavar="I/N")] = "0/1"
    """Predict only part I (from 0) of N; the parts may run at once, the last one puts the file together."""
    tiles: tyro.conf.FlagCreatePairsOff[bool] = False
    """The input is one big picture (tiled TIFF, PNG, JPEG; other slides with the extra openslide) to be cut into
    tiles. Stopped, the same command goes on where it was."""
    stride: int | None = None
    """With --tiles: pixels from tile to tile; by default the side of the square it answers for (PCam: 32)."""
    blend: Annotated[str, tyro.conf.arg(metavar="{mean,smooth,nearest}")] = "mean"
    """With --tiles: what a point of the picture shows where tiles overlap (a stride below the default)."""
    level: int | None = None
    """With --tiles: resolution as the number of a pyramid's level, 0 the finest."""
    mpp: float | None = None
    """With --tiles: resolution in micrometres a pixel. Networks for PCam's patches take 0.972 by default where the
    slide says its own; others take level 0."""
    tissue_mask: bool = True
    """With --tiles: leave out glass (saturation below 0.07 after smoothing, as in PCam's selection)."""


def main(argv: list[str]) -> None:
    """Parse the command line, predict, write the file and say what is in it."""
    command = tyro.cli(PredictCommand, args=argv, prog="python -m pcam_jax.predict")
    if len(command.paths) < 2:
        raise UserError(
            "Give one or more runs and then an input: python -m pcam_jax.predict RUN INPUT --output FILE."
        )
    if command.tta not in ("none", "d4"):
        raise UserError(f"--tta is {command.tta!r}: it must be none or d4.")
    _check_tile_options(command)
    if not command.output.absolute().parent.is_dir():
        raise UserError(f"There is no folder {command.output.parent} for --output: make it first.")
    expected = read_submission_ids(command.sample_submission) if command.sample_submission else None

    from pcam_jax.runtime import accelerator, distributed

    accelerator.configure(cpu_devices=accelerator.PREDICTING_DEVICES)
    if command.tiles:
        _predict_tiles(command)
        return
    *runs, place = command.paths

    from pcam_jax.data.images import open_images
    from pcam_jax.inference.averaging import load_predictors, mean_probabilities
    from pcam_jax.inference.parts import Parts, parse_shard

    part, parts = parse_shard(command.shard)
    predictors = load_predictors(runs, tta=command.tta)  # type: ignore[arg-type]
    _say_remarks(predictors)
    source, positions = open_images(place, predictors[0].image_shape, command.split, predictors[0].prepared)
    ids = source.ids[positions]

    def finish(probs: np.ndarray) -> None:
        names = ids
        if expected is not None:
            names, probs = in_order_of(expected, ids, probs, command.sample_submission)
        if distributed.is_first():
            write_submission(command.output, names, probs, class_names=predictors[0].class_names)
        _say_prevalence(probs, predictors[0])
        print(f"Wrote {command.output}.")

    def predict(rows: slice) -> np.ndarray:
        started = time.monotonic()
        with StopSignals() as stop:
            probs = mean_probabilities(predictors, source, positions[rows], stop)
        seconds = max(time.monotonic() - started, 1e-9)
        print(f"{len(probs):,} predictions in {seconds:.1f} s ({len(probs) / seconds:.0f} images/s).")
        return probs

    if parts == 1:
        finish(predict(slice(None)))
        return
    pieces = Parts(command.output, predictors, ids, parts)
    pieces.make(part, predict)
    if not pieces.join(finish):
        waiting = (
            ", ".join(f"{number}/{parts}" for number in pieces.missing()) if pieces.folder.is_dir() else ""
        )
        print(
            f"Part {part}/{parts} is done; "
            + (f"not yet: {waiting}." if waiting else "another put them together.")
        )


_TILE_OPTIONS = ("stride", "blend", "level", "mpp", "tissue_mask")
_OTHER_OPTIONS = ("split", "sample_submission")
_TILES_PER_PART = 2048  # what a kill can cost


def _check_tile_options(command: PredictCommand) -> None:
    """Options of the other kind of input would silently do nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(PredictCommand)}
    for name in _OTHER_OPTIONS if command.tiles else _TILE_OPTIONS:
        if getattr(command, name) != defaults[name]:
            option = name.replace("_", "-")
            where = "does not go with" if command.tiles else "needs"
            raise UserError(f"--{option} {where} --tiles.")


def _predict_tiles(command: PredictCommand) -> None:
    """A map of probabilities over a slide, made in parts that outlive a kill."""
    from pcam_jax.data.whole_slide import open_slide
    from pcam_jax.inference.averaging import load_predictors
    from pcam_jax.inference.parts import parse_shard

    part, parts = parse_shard(command.shard)
    *runs, place = command.paths
    output = command.output
    if output.suffix.lower() in (".png", ".csv", ".json"):
        output = output.with_suffix("")
    with contextlib.closing(open_slide(place)) as slide:
        predictors = load_predictors(runs, tta=command.tta)  # type: ignore[arg-type]
        _say_remarks(predictors)
        _map_slide(command, slide, predictors, output, part, parts)


def _map_slide(
    command: PredictCommand,
    slide: Slide,
    predictors: Sequence[Predictor],
    output: Path,
    part: int,
    parts: int,
) -> None:
    from pcam_jax.data.slide_view import view_slide
    from pcam_jax.inference.averaging import mean_probabilities
    from pcam_jax.inference.parts import Parts
    from pcam_jax.inference.tiles import Blend, TileMap, TileSource, natural_microns, tile_grid, tissue_tiles
    from pcam_jax.report.tile_map import meaning_of, write_tile_map

    shape = predictors[0].image_shape
    microns = command.mpp
    if microns is None and command.level is None:
        microns = natural_microns(slide, shape)
    view = view_slide(slide, level=command.level, microns=microns)
    grid = tile_grid(view, shape, command.stride, command.blend)
    resolution = view.microns_per_pixel
    print(
        f"{slide.name}: {view.width:,} x {view.height:,} pixels"
        + (f" of {resolution:.3g} µm" if resolution else ", how large is not said")
        + f" (level {view.level} of {len(slide.levels)}"
        + (f", reduced by {view.reduction:.3g})." if view.reduction != 1 else ").")
    )
    overview = view.overview()
    tiles = tissue_tiles(view, grid, overview if command.tissue_mask else None)
    whole = grid.shape[0] * grid.shape[1]
    print(
        f"{len(tiles):,} of {whole:,} tiles to look at"
        + (", the rest is glass." if command.tissue_mask else ".")
    )

    names = predictors[0].class_names
    threshold = float(np.mean([predictor.operating_point.threshold for predictor in predictors]))
    blend: Blend = command.blend  # type: ignore[assignment]
    how = {"models": [str(path) for path in command.paths[:-1]], "tta": command.tta}

    def finish(probs: np.ndarray) -> None:
        found = TileMap(grid, view.scale, tiles, probs)
        positive = write_tile_map(output, view, overview, found, blend, names, threshold, how)
        if len(tiles):
            share = f"{positive:,} tiles ({positive / len(tiles):.1%})"
            print(f"{share} are {meaning_of(names)} (at {threshold:.3g}).")
        print(f"Wrote {output}.png, {output.name}.csv and {output.name}.json.")

    if not len(tiles):
        finish(np.zeros(0 if len(names) == 2 else (0, len(names)), np.float32))
        return
    source = TileSource(view, grid, tiles)
    ids = [f"{row} {column}" for row, column in tiles.tolist()]
    ids[0] += f" of {slide.identity} {view.scale!r} {grid}"
    pieces = Parts(output, predictors, np.array(ids), -(-len(tiles) // _TILES_PER_PART))
    started, done = time.monotonic(), 0

    def predict(rows: slice) -> np.ndarray:
        nonlocal done
        probs = mean_probabilities(predictors, source, np.arange(len(tiles))[rows], stop)
        done += len(probs)
        return probs

    with StopSignals() as stop, progress(len(tiles), "predict", "tile") as bar:
        try:
            for number in range(part, len(pieces.shares), parts):
                pieces.make(number, predict)
                bar.update(pieces.shares[number][1] - pieces.shares[number][0])
        except Interrupted as error:
            raise Interrupted(
                error.signum,
                f"Stopped; what is done lies in {pieces.folder}: the same command goes on from there.",
            ) from None
    seconds = max(time.monotonic() - started, 1e-9)
    print(f"{done:,} tiles in {seconds:.1f} s ({done / seconds:.0f} tiles/s).")
    if not pieces.join(finish):
        missing = len(pieces.missing()) if pieces.folder.is_dir() else 0
        print(
            f"Part {part}/{parts} is done; "
            + (f"{missing} pieces of others are missing." if missing else "another put them together.")
        )


def _say_remarks(predictors: Sequence[Predictor]) -> None:
    for remark in dict.fromkeys(remark for predictor in predictors for remark in predictor.remarks):
        print(f"Warning: {remark}.")


def write_submission(
    path: str | Path,
    ids: Sequence[str] | np.ndarray,
    probs: np.ndarray,
    *,
    class_names: Sequence[str] = (),
) -> None:
    """Check and write a submission, atomically.

    Args:
        path: the CSV file.
        ids: ``[N]`` names, in the order wanted.
        probs: ``[N]`` probabilities of class 1 (columns ``id,label``) or ``[N, K]`` (one column for each class).
        class_names: column names where there are more than two classes.

    Raises:
        UserError: lengths differ, there are no rows, an id is empty, unprintable or occurs twice, or a
            probability is not a number in [0, 1]; the message names the first culprit.
    """
    names, values = np.asarray(ids, dtype=np.str_), np.asarray(probs, np.float64)
    if len(names) != len(values):
        raise UserError(
            f"A submission needs one probability per id: {len(names)} ids, {len(values)} probabilities."
        )
    if not len(names):
        raise UserError("There is nothing to submit: no ids.")
    unique, counts = np.unique(names, return_counts=True)
    if counts.max() > 1:
        raise UserError(
            f"{np.sum(counts > 1)} ids occur more than once in the submission: {unique[counts > 1][0]}."
        )
    if (names == "").any():
        raise UserError(f"Row {int(np.flatnonzero(names == '')[0]) + 1} of the submission has no id.")
    unwritable = [name for name in names.tolist() if not name.isprintable()]
    if unwritable:
        raise UserError(f"{len(unwritable)} ids hold unprintable characters, the first {unwritable[0]!r}.")
    table = values.reshape(len(values), -1)
    bad = ~np.all((table >= 0) & (table <= 1), axis=1)
    if bad.any():
        raise UserError(
            f"{int(bad.sum())} predictions are not probabilities, the first for {names[bad][0]} "
            f"({table[bad][0].tolist()}): nothing was written."
        )
    columns = (
        ["label"] if table.shape[1] == 1 else list(class_names) or [str(k) for k in range(table.shape[1])]
    )
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", *columns])
        writer.writerows(
            [name, *(f"{value:.9g}" for value in row)] for name, row in zip(names, table, strict=True)
        )


def read_submission_ids(path: Path) -> np.ndarray:
    """The ids of a sample submission in its order, ``[N]`` str.

    Raises:
        UserError: the file is missing, has no column ``id``, or repeats an id.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"There is no sample submission {path}: check the path.") from None
    except ValueError as error:
        raise UserError(f"{path} is not a CSV table ({error}).") from None
    if "id" not in table:
        raise UserError(f"{path} has no column 'id': it has {', '.join(map(str, table.columns))}.")
    repeated = table.loc[table["id"].duplicated(), "id"]
    if len(repeated):
        raise UserError(f"{path} repeats {len(repeated)} ids, the first {repeated.iloc[0]}.")
    return table["id"].to_numpy(dtype=np.str_)


def in_order_of(
    expected: np.ndarray, ids: np.ndarray, probs: np.ndarray, path: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions in the order of the expected ids.

    Raises:
        UserError: ids are missing or extra; the first of each is named.
    """
    place = {name: position for position, name in enumerate(ids)}
    missing = [name for name in expected if name not in place]
    extra = sorted(set(place) - set(expected))
    if missing or extra:
        parts = [f"{len(missing)} of its ids have no prediction (first {missing[0]})"] if missing else []
        parts += [f"{len(extra)} predictions are not in it (first {extra[0]})"] if extra else []
        raise UserError(f"The predictions do not fit {path}: {'; '.join(parts)}.")
    order = np.array([place[name] for name in expected], np.int64)
    return expected, probs[order]


def _say_prevalence(probs: np.ndarray, predictor: Predictor) -> None:
    """A sanity check: how many are called positive, beside the share in training."""
    counts = np.array(predictor.training_counts, float)
    if probs.ndim == 1:
        threshold = predictor.operating_point.threshold
        called = (
            f"{np.mean(probs >= threshold):.1%} are called {predictor.class_names[1]} (at {threshold:.3g})"
        )
        print(f"{called}; in training {counts[1] / counts.sum():.1%} were.")
        return
    shares = np.bincount(np.argmax(probs, axis=1), minlength=len(counts)) / len(probs)
    for name, share, known in zip(predictor.class_names, shares, counts / counts.sum(), strict=True):
        print(f"  {name}: {share:.1%} predicted; {known:.1%} in training.")


if __name__ == "__main__":
    run_command(main)
