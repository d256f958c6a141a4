"""A slide at one resolution: mirrored borders, reduced levels, overviews, and which level is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_files import PICTURE, scene, write_pyramid

from pcam_jax.data.slide_view import SlideView, view_slide
from pcam_jax.data.whole_slide import ArraySlide, open_slide
from pcam_jax.runtime.errors import UserError


@settings(max_examples=60)
@given(st.integers(-40, 240), st.integers(-40, 320), st.integers(1, 60), st.integers(1, 60))
def test_what_lies_beyond_the_border_is_the_mirror_image(
    top: int, left: int, height: int, width: int
) -> None:
    if top >= 205 or left >= 301 or top + height <= 0 or left + width <= 0:
        return
    mirrored = np.pad(PICTURE, ((100, 100), (100, 100), (0, 0)), mode="symmetric")
    found = SlideView(ArraySlide(PICTURE)).read(top, left, height, width)
    np.testing.assert_array_equal(found, mirrored[top + 100 :, left + 100 :][:height, :width])


def test_a_resolution_is_that_of_a_level_or_reduced_from_a_finer_one(tmp_path: Path) -> None:
    slide = open_slide(write_pyramid(tmp_path / "a.tif", PICTURE))
    for microns, level, reduction in ((0.243, 0, 1), (0.25, 0, 1), (0.49, 1, 1), (0.972, 2, 1)):
        view = view_slide(slide, microns=microns)
        assert (view.level, view.reduction) == (level, pytest.approx(reduction))
    between = view_slide(slide, microns=0.729)  # three pixels of level 0: from level 1, reduced by 1.5
    assert between.level == 1
    assert between.scale == pytest.approx(3, rel=0.01)
    assert between.microns_per_pixel == pytest.approx(0.729, rel=1e-3)
    assert view_slide(slide).level == 0
    slide.close()


def test_a_reduced_view_has_no_seams_and_shows_the_picture(tmp_path: Path) -> None:
    view = SlideView(ArraySlide(PICTURE), 0, 1.7)
    whole = view.read(0, 0, view.height, view.width)
    for top, left in ((0, 0), (13, 29), (60, 100)):
        part = view.read(top, left, 40, 50).astype(int)
        # a level of 255 in each direction for the rounding of the filter's weights
        assert np.abs(part - whole[top : top + 40, left : left + 50]).max() <= 2
    small = Image.fromarray(PICTURE).resize((view.width, view.height), Image.Resampling.BILINEAR)
    assert np.abs(whole.astype(int) - np.asarray(small).astype(int)).max() <= 6


def test_an_overview_is_the_picture_made_small(tmp_path: Path) -> None:
    big = np.tile(scene(1100, 700), (3, 4, 1))
    found = SlideView(ArraySlide(big)).overview(200)
    expected = Image.fromarray(big).resize((found.shape[1], found.shape[0]), Image.Resampling.BOX)
    assert found.shape == (200, 170, 3)
    assert np.abs(found.astype(int) - np.asarray(expected).astype(int)).max() <= 1
    slide = open_slide(write_pyramid(tmp_path / "a.tif", PICTURE))
    coarse = view_slide(slide, level=0).overview(76)
    assert coarse.shape == (52, 76, 3)
    np.testing.assert_array_equal(coarse, np.asarray(Image.fromarray(PICTURE).reduce(4)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": 3}, "has levels 0 to 2, and no level 3"),
        ({"level": 0, "microns": 0.5}, "--level or --mpp, not both"),
        ({"microns": 0.1}, "has 0.243 µm a pixel at best"),
        ({"microns": 0.0}, "must be above 0"),
    ],
)
def test_impossible_resolutions(tmp_path: Path, options: dict[str, float], words: str) -> None:
    slide = open_slide(write_pyramid(tmp_path / "a.tif", PICTURE))
    with pytest.raises(UserError, match=words):
        view_slide(slide, **options)


def test_a_slide_without_a_resolution() -> None:
    with pytest.raises(UserError, match="does not say how many micrometres"):
        view_slide(ArraySlide(PICTURE), microns=1.0)
