"""Scenes of the synthetic sample: what lies where in a patch, and how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pcam_jax.data.tissue import (
    GRADES,
    ORIENTATIONS,
    Dice,
    IntArray,
    Plane,
    Texture,
    cell_banks,
    crop,
    stain_table,
    stamp,
)

CENTRE = 32
"""Side of the central square that decides the label."""
PATCH_STREAM, _SLIDE_STREAM = 1, 2  # of random numbers
_LYMPHOID, _REACTIVE, _TUMOUR, _STROMA, _MEMBRANE, _FAT = range(6)
# Background of each kind of tissue: density, then the share of each texture (cloud, grain, fibre) in 64ths.
_EOSIN = np.array(
    [[46, 22, 26, 0], [66, 22, 34, 0], [72, 24, 38, 0], [92, 30, 8, 56], [96, 40, 30, 0], [2, 1, 0, 0]],
    np.int16,
)
_HAEMATOXYLIN = np.array(
    [[32, 12, 24, 0], [26, 12, 22, 0], [28, 14, 24, 0], [12, 6, 4, 14], [26, 20, 10, 0], [0, 0, 0, 0]],
    np.int16,
)
_MARGIN = 16  # room around the plane, for nuclei whose centres lie near its border


def centre_of(image_size: int) -> slice:
    """The rows (and columns) that decide the label."""
    side = min(CENTRE, image_size // 3)
    low = (image_size - side) // 2
    return slice(low, low + side)


@dataclass(frozen=True)
class Slide:
    """What the patches of one slide have in common."""

    colours: npt.NDArray[np.uint32]
    prevalence: float
    grade: float
    density: float
    spacing: float
    blur: float


@lru_cache(maxsize=512)
def slide_of(seed: int, number: int, difficulty: float) -> Slide:
    """The slide of this number, the same whenever it is asked for."""
    dice = Dice(seed, number, _SLIDE_STREAM, 64)
    return Slide(
        colours=stain_table(dice, 0.2 + 0.8 * difficulty),
        prevalence=dice.between(0.2, 0.66),
        grade=dice.between(4.6 - 4 * difficulty, 5 - 1.6 * difficulty),
        density=dice.between(0.72, 1.0),
        spacing=dice.between(7.6, 9.0),
        blur=dice.between(0.0, 0.35),
    )


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    middle = np.float32((size - 1) / 2)
    offsets = np.arange(size, dtype=np.float32) - middle
    return offsets[:, None], offsets[None, :]


def _nest(dice: Dice, size: int, discs: list[tuple[float, float, float]]) -> npt.NDArray[np.bool_]:
    """Union of discs (row, column and radius, from the middle) with an irregular outline."""
    down, across = _grid(size)
    limit = 1 + crop("cloud", dice, size).astype(np.float32) * np.float32(0.5 / 64)
    inside = np.zeros((size, size), bool)
    for row, column, radius in discs:
        inside |= np.square(down - row) + np.square(across - column) < radius * radius * limit
    return inside


def _central_discs(dice: Dice, size: int, difficulty: float) -> list[tuple[float, float, float]]:
    """A nest that reaches well into the central square, and sometimes more beside it."""
    side = centre_of(size).stop - centre_of(size).start
    reach = side * 0.3
    small = 0.1 + 0.3 * difficulty
    pick = dice.one()
    scale = side / CENTRE
    if pick < small:
        radius = dice.between(10, 16) * scale
    elif pick < small + 0.3:
        radius = dice.between(16, 34) * scale
    else:
        radius = dice.between(34, 75) * scale
    discs = [(dice.between(-reach, reach), dice.between(-reach, reach), radius)]
    if dice.chance(0.4):
        discs += _outer_discs(dice, size)
    return discs


def _outer_discs(dice: Dice, size: int) -> list[tuple[float, float, float]]:
    discs = []
    for _ in range(1 + dice.whole(3)):
        angle, away = dice.between(0, 2 * np.pi), dice.between(0.3, 0.62) * size
        discs.append((away * np.sin(angle), away * np.cos(angle), dice.between(0.12, 0.4) * size))
    return discs


def _tissue(dice: Dice, label: bool, size: int, difficulty: float) -> npt.NDArray[np.uint8]:
    """The kind of tissue at each pixel, uint8 [size, size]."""
    down, across = _grid(size)
    half = (centre_of(size).stop - centre_of(size).start) / 2
    kinds = np.full((size, size), _LYMPHOID, np.uint8)
    if dice.chance(0.3):
        angle, shift = dice.between(0, 2 * np.pi), dice.between(-0.25, 0.45) * size
        waves = crop("cloud", dice, size).astype(np.float32) * np.float32(0.25)
        kinds[down * np.sin(angle) + across * np.cos(angle) + waves > shift] = _STROMA
    if dice.chance(0.25):
        kinds[_nest(dice, size, _outer_discs(dice, size))] = _REACTIVE
    if label:
        kinds[_nest(dice, size, _central_discs(dice, size, difficulty))] = _TUMOUR
    else:
        # Nests of harmless cells sit in the centre as tumours do, so that their outline proves nothing.
        if dice.chance(0.3 + 0.25 * difficulty):
            kinds[_nest(dice, size, _central_discs(dice, size, difficulty))] = _REACTIVE
        if dice.chance(0.5):
            around = _nest(dice, size, _outer_discs(dice, size))
            clear = half + 8 + crop("cloud", dice, size).astype(np.float32) * np.float32(0.06)
            around &= (np.abs(down) > clear) | (np.abs(across) > clear)
            kinds[around] = _TUMOUR
    if dice.chance(0.2):
        wobble = 1 + crop("cloud", dice, size).astype(np.float32) * np.float32(0.15 / 64)
        for _ in range(1 + dice.whole(2)):
            row, column = (dice.many(2) - 0.5) * 1.3 * size
            radius = dice.between(0.2, 0.48) * size
            if label:  # the tumour in the centre must stay
                radius = min(radius, max(abs(row), abs(column)) - half * 0.7)
            if radius > 6:
                distance = (np.square(down - row) + np.square(across - column)) * wobble
                kinds[(distance < (radius + 2) ** 2) & (kinds != _FAT)] = _MEMBRANE
                kinds[distance < radius**2] = _FAT
    return kinds


def _scatter(dice: Dice, size: int, spacing: float) -> tuple[IntArray, IntArray]:
    """Cell centres on a jittered hexagonal grid that covers the patch: rows and columns, int64 [K]."""
    rows = np.arange(-spacing * dice.one(), size + spacing / 2, spacing * 0.87)
    columns = np.arange(-spacing * dice.one(), size + spacing / 2, spacing)
    jitter = (dice.many(2, len(rows), len(columns)) - 0.5) * (0.62 * spacing)
    down = rows[:, None] + jitter[0]
    across = columns + (np.arange(len(rows)) % 2)[:, None] * (spacing / 2) + jitter[1]
    down, across = np.rint(down).astype(np.int64).ravel(), np.rint(across).astype(np.int64).ravel()
    near = (np.abs(down - size // 2) < size // 2 + 3) & (np.abs(across - size // 2) < size // 2 + 3)
    return down[near], across[near]


def _add_cells(
    plane: Plane,
    dice: Dice,
    name: str,
    spacing: float,
    shares: list[float],
    kinds: npt.NDArray[np.uint8],
    part: tuple[int, int] | None = None,
    wanted_in: slice | None = None,
) -> None:
    """Scatter cells; those on lymphoid, reactive, tumour and stromal ground are kept with these shares.

    Args:
        plane: where to, uint8, with a margin.
        dice: where from.
        name: the bank.
        spacing: mean distance in pixels.
        shares: four probabilities.
        kinds: the tissue, uint8 [size, size].
        part: first and number of the bank's cells to choose from; all, where None.
        wanted_in: rows and columns in which at least one of the tumour's cells must lie.
    """
    size = len(kinds)
    bank = cell_banks()[name]
    rows, columns = _scatter(dice, size, spacing)
    ground = kinds[np.clip(rows, 0, size - 1), np.clip(columns, 0, size - 1)]
    keep = dice.many(len(rows)) < np.array([*shares, 0, 0])[ground]
    rows, columns = rows[keep], columns[keep]
    if wanted_in is not None:
        low, high = wanted_in.start, wanted_in.stop
        if not ((rows >= low) & (rows < high) & (columns >= low) & (columns < high)).any():
            places = np.argwhere(kinds[wanted_in, wanted_in] == _TUMOUR)
            row, column = places[dice.whole(len(places))] + low
            rows, columns = np.append(rows, row), np.append(columns, column)
    first, count = part or (0, len(bank))
    choice = first + (dice.many(len(rows)) * count).astype(np.int64)
    stamp(plane, bank, rows + _MARGIN, columns + _MARGIN, choice)


def _background(table: npt.NDArray[np.int16], kinds: npt.NDArray[np.uint8], fields: list[Texture]) -> Texture:
    density = table[:, 0][kinds]
    for column, field in enumerate(fields, 1):
        density = density + (table[:, column][kinds] * field >> 6)
    return density


def paint(
    dice: Dice, slide: Slide, label: bool, size: int, difficulty: float
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """One patch: image uint8 [size, size, 3] and tumour mask bool [size, size]."""
    kinds = _tissue(dice, label, size, difficulty)
    direction = dice.whole(ORIENTATIONS)
    cloud = crop("cloud", dice, size)
    fields = [cloud, crop("grain", dice, size), crop("fibre", dice, size, direction)]
    eosin = _background(_EOSIN, kinds, fields)
    haematoxylin = _background(_HAEMATOXYLIN, kinds, fields)
    # Clefts between the cells, where light shines through.
    clefts = crop("grain", dice, size) + (crop("cloud", dice, size) >> 1) - np.int16(dice.between(0, 70))
    gap = 64 - np.clip(clefts * 2, 0, 52)
    eosin, haematoxylin = eosin * gap >> 6, haematoxylin * gap >> 6

    nuclei = np.zeros((size + 2 * _MARGIN, size + 2 * _MARGIN), np.uint8)
    grade = int(np.clip(np.rint(slide.grade + dice.between(-0.8, 0.8)), 0, GRADES - 1))
    dense = slide.density
    _add_cells(nuclei, dice, "lymphocyte", slide.spacing, [dense, 0.16, 0.05, 0.1], kinds)
    _add_cells(nuclei, dice, "reactive", dice.between(11, 13.5), [0.04, 0.9, 0.0, 0.05], kinds)
    if (kinds == _STROMA).any():
        each = len(cell_banks()["spindle"]) // ORIENTATIONS
        shares = [0.02, 0.03, 0.0, 0.55]
        _add_cells(nuclei, dice, "spindle", 14, shares, kinds, (direction * each, each))
    tumour = kinds == _TUMOUR
    if tumour.any():
        evidence = centre_of(size) if label else None
        shares = [0, 0, 0.92, 0]
        _add_cells(nuclei, dice, f"tumour{grade}", 11.5 + 0.9 * grade, shares, kinds, wanted_in=evidence)
    nuclei = nuclei[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    haematoxylin = np.maximum(haematoxylin, nuclei.astype(np.int16))
    eosin -= eosin * (nuclei >> 2) >> 6
    haematoxylin[kinds == _FAT] = 0  # also where nuclei overhang

    if dice.chance(slide.blur):
        haematoxylin, eosin = _soften(haematoxylin), _soften(eosin)
    noise = dice.noise(size)
    haematoxylin, eosin = haematoxylin + (noise >> 2), eosin + (noise >> 2)
    places = np.clip(haematoxylin, 0, 255) >> 1
    places = (places.astype(np.int32) << 7) + (np.clip(eosin, 0, 255) >> 1)
    image = slide.colours[places].view(np.uint8).reshape(size, size, 4)[..., :3]
    return image, tumour


def _soften(plane: Texture) -> Texture:
    """A little out of focus: the binomial filter 1 2 1 in both directions."""
    edged = np.pad(plane, 1, mode="edge")
    edged = edged[:-2] + 2 * edged[1:-1] + edged[2:]
    return (edged[:, :-2] + 2 * edged[:, 1:-1] + edged[:, 2:]) >> 4
