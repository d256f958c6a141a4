"""Drawing materials of the synthetic slides: random numbers, textures, cells, stains.

Everything is drawn in two planes of optical density, haematoxylin (nuclei) and eosin (the rest), each uint8,
and turned into colour by Beer-Lambert's law, as light through a stained section is (Ruifrok & Johnston 2001,
"Quantification of histochemical staining by color deconvolution").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Plane = npt.NDArray[np.uint8]
Texture = npt.NDArray[np.int16]

TILE = 256
"""Period of the textures, in pixels."""
ORIENTATIONS = 8
"""Directions in which fibres and spindle cells run."""
GRADES = 6
"""Kinds of tumour nuclei, from 0 (hard to tell from reactive cells) to 5 (large, pale, with nucleoli)."""

_TEXTURE_STREAM, _CELL_STREAM = 91, 92
_DEEPEST = (2.9, 1.8)  # optical density of haematoxylin and eosin at level 255


class Dice:
    """Uniform numbers that depend on (seed, index, stream) alone.

    They come from the raw words of Philox, which numpy keeps stable between its versions.
    """

    def __init__(self, seed: int, index: int, stream: int, count: int = 512) -> None:
        key = np.array([seed % 2**64, index], np.uint64)
        self._words = np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], np.uint64))
        self._block = count
        self._values = self._draw(count)
        self._used = 0

    def _draw(self, count: int) -> FloatArray:
        return (self._words.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def many(self, *shape: int) -> FloatArray:
        """Uniform in [0, 1), float64 of the given shape."""
        count = math.prod(shape)
        if self._used + count > len(self._values):
            self._values, self._used = self._draw(max(count, self._block)), 0
        self._used += count
        return self._values[self._used - count : self._used].reshape(shape)

    def one(self) -> float:
        """One uniform number in [0, 1)."""
        if self._used == len(self._values):
            self._values, self._used = self._draw(self._block), 0
        self._used += 1
        return float(self._values[self._used - 1])

    def between(self, low: float, high: float) -> float:
        """One uniform number in [low, high)."""
        return low + (high - low) * self.one()

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.one() < probability

    def whole(self, count: int) -> int:
        """An integer in [0, count)."""
        return int(self.one() * count)

    def noise(self, size: int) -> Texture:
        """Triangular noise of mean 0 and deviation 6.5, int16 [size, size]."""
        raw = self._words.random_raw(-(-size * size // 8)).view(np.uint8)[: size * size]
        return ((raw & 15).astype(np.int16) + (raw >> 4) - 15).reshape(size, size)


# ---------------------------------------------------------------- textures


@lru_cache(maxsize=1)
def _textures() -> dict[str, Texture]:
    """Each texture ORIENTATIONS times, twice its period a side, so that a crop never wraps around."""
    frequency = np.fft.fftfreq(TILE)
    down, across = frequency[:, None], frequency[None]
    radius = np.hypot(down, across)
    made: dict[str, list[Texture]] = {"cloud": [], "grain": [], "fibre": []}
    for kind in range(ORIENTATIONS):
        angle = np.pi * kind / ORIENTATIONS
        along = down * np.sin(angle) + across * np.cos(angle)
        athwart = down * np.cos(angle) - across * np.sin(angle)
        white = np.fft.fft2(Dice(0, kind, _TEXTURE_STREAM, TILE * TILE).many(TILE, TILE) - 0.5)
        for name, passed in {
            "cloud": np.exp(-np.square(radius / 0.03)),
            "grain": np.exp(-np.square(radius / 0.17)) - np.exp(-np.square(radius / 0.04)),
            "fibre": np.exp(-np.square(along / 0.02) - np.square(athwart / 0.13)),
        }.items():
            field = np.fft.ifft2(white * passed).real
            field -= field.mean()
            tile = np.clip(np.rint(field / field.std() * 28), -64, 64).astype(np.int16)
            made[name].append(np.tile(tile, (2, 2)))
    return {name: np.stack(fields) for name, fields in made.items()}


def crop(name: str, dice: Dice, size: int, kind: int | None = None) -> Texture:
    """A random piece of a texture of mean 0 and deviation 28 within [-64, 64], int16 [size, size].

    Args:
        name: "cloud" (tens of pixels), "grain" (a few pixels) or "fibre" (long in one direction).
        dice: where from.
        size: side of the piece.
        kind: which of the ORIENTATIONS pieces; any, where None.
    """
    fields = _textures()[name]
    field = fields[dice.whole(len(fields)) if kind is None else kind]
    top, left = dice.whole(TILE), dice.whole(TILE)
    if size <= TILE:
        return field[top : top + size, left : left + size]
    rows, columns = (top + np.arange(size)) % TILE, (left + np.arange(size)) % TILE
    return field[rows[:, None], columns]


# ---------------------------------------------------------------- cells


@dataclass(frozen=True)
class Nucleus:
    """How a kind of nucleus looks; ranges are (low, high), lengths in pixels, densities in levels of 255."""

    radius: tuple[float, float]
    aspect: tuple[float, float]
    wobble: float  # deviation of the outline, as a share of the radius
    body: tuple[float, float]  # density of the interior
    rim: float  # density added at the membrane
    mottle: float  # chromatin texture, as a share of the body
    nucleolus: float  # density added at nucleoli
    nucleoli: float  # mean number of nucleoli


@dataclass(frozen=True)
class CellBank:
    """Nuclei drawn beforehand: uint8 [count, size * size] densities of haematoxylin."""

    size: int
    sprites: Plane

    def __len__(self) -> int:
        return len(self.sprites)


def _draw_cells(
    kind: Nucleus, number: int, count: int, size: int, angles: FloatArray | None = None
) -> CellBank:
    """`count` variants of one kind; `angles` fixes their directions, radians [count]."""
    dice = Dice(0, number, _CELL_STREAM, 64 * count)

    def spread(low: float, high: float) -> FloatArray:
        return low + (high - low) * dice.many(count, 1, 1)

    radius, aspect = spread(*kind.radius), np.sqrt(spread(*kind.aspect))
    angle = spread(0, np.pi) if angles is None else angles[:, None, None]
    middle = (size - 1) / 2
    down, across = np.mgrid[:size, :size] - middle
    down, across = down - spread(-0.5, 0.5), across - spread(-0.5, 0.5)
    along = (across * np.cos(angle) + down * np.sin(angle)) / (radius * aspect)
    athwart = (down * np.cos(angle) - across * np.sin(angle)) / (radius / aspect)
    turn = np.arctan2(athwart, along)
    outline = 1.0 + sum(
        spread(-kind.wobble, kind.wobble) * np.cos(order * turn + spread(0, 2 * np.pi)) for order in (2, 3, 4)
    )
    reach = np.hypot(along, athwart) / outline  # 1 on the outline
    inside = np.clip((1 - reach) * radius / 1.2 + 0.5, 0, 1)
    mottle = sum(
        np.cos(spread(-1.6, 1.6) * down + spread(-1.6, 1.6) * across + spread(0, 2 * np.pi)) for _ in range(5)
    ) / np.sqrt(2.5)
    density = spread(*kind.body) * (1 + kind.mottle * mottle)
    density = density + kind.rim * np.exp(-np.square((reach - 0.9) * radius / 1.0))
    for _ in range(2):
        shown = spread(0, 1) < kind.nucleoli / 2
        distance, way = 0.45 * radius * np.sqrt(spread(0, 1)), spread(0, 2 * np.pi)
        gap = np.hypot(down - distance * np.sin(way), across - distance * np.cos(way))
        density = density + shown * kind.nucleolus * np.exp(-np.square(gap / spread(1.1, 1.7)))
    drawn = np.clip(np.rint(density * inside), 0, 255).astype(np.uint8)
    return CellBank(size, drawn.reshape(count, size * size))


def _tumour_nucleus(grade: int) -> Nucleus:
    share = grade / (GRADES - 1)
    return Nucleus(
        radius=(4.4 + 0.8 * share, 5.6 + 2.4 * share),
        aspect=(1.0, 1.5 + 0.3 * share),
        wobble=0.04 + 0.05 * share,
        body=(72 - 12 * share, 132 - 22 * share),
        rim=32 + 22 * share,
        mottle=0.16 + 0.14 * share,
        nucleolus=45 + 65 * share,
        nucleoli=0.7 + 0.8 * share,
    )


_LYMPHOCYTE = Nucleus((3.0, 4.1), (1.0, 1.3), 0.06, (150, 215), 22, 0.2, 0, 0)
_REACTIVE = Nucleus((4.0, 5.4), (1.0, 1.7), 0.03, (66, 128), 28, 0.14, 25, 0.5)
_SPINDLE = Nucleus((2.7, 3.6), (4.0, 7.0), 0.04, (105, 170), 10, 0.12, 0, 0)


@lru_cache(maxsize=1)
def cell_banks() -> dict[str, CellBank]:
    """The banks "lymphocyte", "reactive", "spindle" and "tumour0" to "tumour5".

    Spindle cells are sorted by direction: those of orientation k are the k-th of ORIENTATIONS equal parts.
    """
    each = 24
    angles = np.repeat(np.arange(ORIENTATIONS) * np.pi / ORIENTATIONS, each)
    banks = {
        "lymphocyte": _draw_cells(_LYMPHOCYTE, 0, 256, 13),
        "reactive": _draw_cells(_REACTIVE, 1, 128, 19),
        "spindle": _draw_cells(_SPINDLE, 2, ORIENTATIONS * each, 25, angles),
    }
    for grade in range(GRADES):
        banks[f"tumour{grade}"] = _draw_cells(_tumour_nucleus(grade), 3 + grade, 128, 27)
    return banks


def stamp(plane: Plane, bank: CellBank, rows: IntArray, columns: IntArray, choice: IntArray) -> None:
    """Lay nuclei over a density plane, the darker winning where they overlap.

    Args:
        plane: uint8 [h, w], changed in place, with room for a whole sprite around every centre.
        bank: the nuclei.
        rows: centres, int [K].
        columns: centres, int [K].
        choice: which nucleus of the bank, int [K].
    """
    width = plane.shape[1]
    half = bank.size // 2
    window = (np.arange(bank.size)[:, None] * width + np.arange(bank.size)).ravel()
    corners = (rows - half) * width + columns - half
    places = (corners[:, None] + window).ravel()
    np.maximum.at(plane.reshape(-1), places, bank.sprites[choice].ravel())


# ---------------------------------------------------------------- stain

_BLUE_HAEMATOXYLIN, _BROWN_HAEMATOXYLIN = (0.57, 0.79, 0.20), (0.50, 0.68, 0.53)
_PINK_EOSIN, _SALMON_EOSIN = (0.13, 0.92, 0.36), (0.20, 0.80, 0.56)


def stain_table(dice: Dice, jitter: float) -> npt.NDArray[np.uint32]:
    """A slide's colours: packed bytes R, G, B, 0 at [haematoxylin // 2 * 128 + eosin // 2], uint32 [16384].

    Two laboratories' habits (blue-violet and pink, brown and salmon) are mixed, each stain's direction and
    strength jittered, and the light behind the slide tinted.

    Args:
        dice: the slide's own.
        jitter: 0 gives every slide nearly the same stain, 1 as much variety as real slides show.
    """
    brown = float(np.clip(0.35 + (dice.one() - 0.4) * 2.2 * jitter, 0, 1))
    directions = []
    for first, second in ((_BLUE_HAEMATOXYLIN, _BROWN_HAEMATOXYLIN), (_PINK_EOSIN, _SALMON_EOSIN)):
        way = np.array(first) * (1 - brown) + np.array(second) * brown
        way = np.maximum(way + 0.1 * jitter * (dice.many(3) - 0.5), 0.02)
        directions.append(way / np.linalg.norm(way))
    strength = np.exp(jitter * 0.55 * (dice.many(2) - 0.5))
    light = 247 - 8 * dice.many(3)
    level = np.arange(0, 256, 2) / 255
    density = (
        level[:, None, None] * _DEEPEST[0] * strength[0] * directions[0]
        + level[None, :, None] * _DEEPEST[1] * strength[1] * directions[1]
    )
    colours = np.zeros((len(level), len(level), 4), np.uint8)
    colours[..., :3] = np.rint(light * np.exp(-density))
    return colours.view("<u4").reshape(-1)
