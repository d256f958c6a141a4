"""Maps over big pictures, against the predictor on windows cut by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from pcam_jax.data.slide_view import SlideView
from pcam_jax.data.whole_slide import ArraySlide
from pcam_jax.inference import tiles as module
from pcam_jax.inference.predictor import Predictor
from pcam_jax.inference.tiles import (
    TileGrid,
    TileMap,
    TileSource,
    tile_grid,
    tile_probabilities,
    tissue_tiles,
)
from pcam_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def predictor(tiny_run: Path) -> Predictor:
    return Predictor.load(tiny_run)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def centred(
    size: tuple[int, int], stride: int | None = None, shape: tuple[int, ...] = (96, 96, 3)
) -> TileGrid:
    view = SlideView(ArraySlide(np.zeros((*size, 3), np.uint8)))
    return tile_grid(view, shape, stride)  # type: ignore[arg-type]


def test_pcams_windows_answer_for_their_central_square() -> None:
    grid = centred((320, 200))
    assert (grid.side, grid.stride, grid.shape) == ((32, 32), (32, 32), (10, 7))
    np.testing.assert_array_equal(grid.windows(np.array([[0, 0], [2, 1]])), [[-32, -32], [32, 0]])
    assert centred((320, 200), 16).shape == (19, 12)
    assert centred((320, 200), 64).shape == (5, 4)
    assert centred((96, 96)).shape == (3, 3)
    other = centred((50, 120), shape=(50, 50, 3))
    assert (other.side, other.stride, other.shape) == ((50, 50), (50, 50), (1, 3))


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from([4, 8, 16, 32, 64, 96]),
    st.sampled_from([96, 50]),
)
def test_tiles_begin_in_the_picture_and_cover_it(height: int, width: int, stride: int, side: int) -> None:
    if side == 50:
        stride = {4: 5, 8: 10, 16: 25, 32: 50, 64: 100, 96: 150}[stride]
    grid = centred((height, width), stride, (side, side, 3))
    for length, count in zip((height, width), grid.shape, strict=True):
        starts = np.arange(count) * stride
        assert starts[-1] < length
        covered = np.zeros(length, bool)
        for start in starts:
            covered[start : start + grid.side[0]] = True
        assert covered.all() or stride > grid.side[0]
    empty = TileMap(grid, 1.0, np.zeros((0, 2), np.int64), np.zeros(0, np.float32))
    assert np.isnan(empty.image()).all()
    tiles = np.argwhere(np.ones(grid.shape, bool))
    full = TileMap(grid, 1.0, tiles, np.full(len(tiles), 0.25, np.float32)).image()
    assert full.shape == (-(-height // grid.unit[0]), -(-width // grid.unit[1]))
    assert np.nanmax(full) == np.nanmin(full) == 0.25
    assert stride > grid.side[0] or not np.isnan(full).any()


@pytest.mark.parametrize("region", [1024, 30])
@pytest.mark.parametrize("stride", [None, 4, 24])
def test_every_tile_is_the_predictor_on_its_window(
    predictor: Predictor, stride: int | None, region: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REGION_SIDE", region)
    picture = noise(61, 75)
    found = tile_probabilities(predictor, picture, stride=stride, tissue=False)
    step = stride or 12
    mirrored = np.pad(picture, ((0, 12), (0, 12), (0, 0)), mode="symmetric")
    windows = [mirrored[i * step : i * step + 12, j * step : j * step + 12] for i, j in found.tiles]
    np.testing.assert_allclose(found.probs, predictor(np.stack(windows)), rtol=1e-6)
    assert len(found.tiles) == np.prod(found.grid.shape)
    np.testing.assert_array_equal(found.corners(), found.tiles * step)


def test_windows_reach_over_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noise(130, 170)
    view = SlideView(ArraySlide(picture))
    grid = tile_grid(view, (96, 96, 3))
    mirrored = np.pad(picture, ((32, 96), (32, 96), (0, 0)), mode="symmetric")
    for region in (1024, 64, 50):
        monkeypatch.setattr(module, "_REGION_SIDE", region)
        tiles = tissue_tiles(view, grid, None)
        images = TileSource(view, grid, tiles).gather(np.arange(len(tiles)))
        for (row, column), image in zip(tiles, images, strict=True):
            np.testing.assert_array_equal(image, mirrored[row * 32 :, column * 32 :][:96, :96])


def test_glass_is_skipped(predictor: Predictor) -> None:
    picture = np.full((120, 120, 3), 242, np.uint8)
    picture[30:54, 60:96] = noise(24, 36) // 2 + np.array([90, 10, 70], np.uint8)
    found = tile_probabilities(predictor, picture)
    # tiles that touch a coloured pixel, or the one beside it (the picture is smoothed over three)
    assert {tuple(tile) for tile in found.tiles.tolist()} == {
        (row, column) for row in (2, 3, 4) for column in (4, 5, 6, 7, 8)
    }
    image = found.image()
    assert np.isnan(image).sum() == 100 - 15
    blank = tile_probabilities(predictor, np.full((50, 50, 3), 250, np.uint8))
    assert blank.probs.shape == (0,)
    assert np.isnan(blank.image("smooth")).all()


def test_several_predictors_give_their_mean(predictor: Predictor, tiny_run: Path) -> None:
    averaged = Predictor.load(tiny_run, tta="d4")
    picture = noise(40, 40)
    one, other, both = (
        tile_probabilities(which, picture, tissue=False).probs
        for which in (predictor, averaged, [predictor, averaged])
    )
    np.testing.assert_allclose(both, (one.astype(float) + other) / 2, rtol=1e-6)
    assert np.abs(one - other).max() > 1e-5


def overlapping(probs: list[float]) -> TileMap:
    """Tiles in a row, squares of 32 every 16 pixels."""
    grid = TileGrid((32, 16 * (len(probs) + 1)), (96, 96), (32, 32), (16, 16))
    tiles = np.array([[0, number] for number in range(len(probs))])
    return TileMap(grid, 2.0, tiles, np.array(probs, np.float32))


def test_blending() -> None:
    row = overlapping([0.0, 1.0, 0.5])
    np.testing.assert_allclose(row.image("mean"), [[0, 0.5, 0.75, 0.5]] * 2)
    np.testing.assert_allclose(row.image("nearest")[1], [np.nan, 0, 1, 0.5])
    grid = TileGrid((24, 40), (96, 96), (24, 24), (8, 8))
    smooth = TileMap(grid, 1.0, np.array([[0, 0], [0, 1], [0, 2]]), np.array([0, 1, 0], np.float32)).image(
        "smooth"
    )
    # weights 1/2, 1, 1/2 along a square
    np.testing.assert_allclose(smooth[0], [0, 1 / 3, 1 / 2, 1 / 3, 0], rtol=1e-6)


def test_of_several_classes_the_map_shows_all_but_the_first() -> None:
    grid = TileGrid((10, 20), (10, 10), (10, 10), (10, 10))
    found = TileMap(
        grid, 1.0, np.array([[0, 0], [0, 1]]), np.array([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]], np.float32)
    )
    np.testing.assert_allclose(found.image(), [[0.3, 0.8]], rtol=1e-6)


@pytest.mark.parametrize(
    ("picture", "options", "words"),
    [
        (np.zeros((9, 9), np.uint8), {}, r"a picture is uint8 \[H, W, 3\]"),
        (np.zeros((9, 9, 3), np.float32), {}, "a picture is uint8"),
        (np.zeros((0, 9, 3), np.uint8), {}, "a picture is uint8"),
        (np.zeros((9, 9, 3), np.uint8), {"stride": 5}, "must divide 12"),
        (np.zeros((9, 9, 3), np.uint8), {"stride": 0}, "must divide 12"),
        (np.zeros((9000, 9000, 3), np.uint8), {"stride": 1}, "would be cut into 80,802,121 tiles"),
    ],
)
def test_impossible_pictures_and_strides(
    predictor: Predictor, picture: np.ndarray, options: dict[str, int], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        tile_probabilities(predictor, picture, **options)  # type: ignore[arg-type]


def test_a_picture_smaller_than_a_window(predictor: Predictor) -> None:
    assert tiny.IMAGE_SHAPE[0] > 5
    found = tile_probabilities(predictor, noise(5, 3), tissue=False)
    window = np.pad(noise(5, 3), ((0, 7), (0, 9), (0, 0)), mode="symmetric")
    np.testing.assert_allclose(found.probs, predictor(window), rtol=1e-6)
