"""Sample grids and heat-map galleries."""

import numpy as np
import pytest

from pcam_jax.report import gallery
from pcam_jax.report.canvas import write_figure
from pcam_jax.runtime.errors import UserError


def patches(count, side=24):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_sample_grid_shows_every_image_with_its_caption_and_centre(tmp_path):
    images = patches(5)
    figure = gallery.draw_sample_grid(images, list("abcde"), columns=3, center=8, title="Training")
    shown = [axes for axes in figure.axes if axes.images]
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in shown] == list("abcde")
    np.testing.assert_array_equal(shown[3].images[0].get_array(), images[3])
    box = shown[0].patches[0]
    assert (box.get_x(), box.get_y(), box.get_width()) == (7.5, 7.5, 8)
    write_figure(figure, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_overlay_gallery_puts_the_heat_beside_the_image(tmp_path):
    images = patches(3)
    heat = np.zeros((3, 24, 24), np.float32)
    heat[:, 5, 7] = 4
    figure = gallery.draw_overlay_gallery(images, heat, ["missed"] * 3, columns=2)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 6
    covered = panels[1].images[1].get_array()
    assert np.unravel_index(covered.argmax(), covered.shape) == (5, 7)
    assert (covered.min(), covered.max()) == (0, 1)
    assert len(panels[0].images) == 1
    write_figure(figure, tmp_path / "overlay.png")


def test_no_heat_leaves_the_tissue_uncovered():
    assert gallery.HEAT_COLORS(0.0)[3] == 0
    assert gallery.HEAT_COLORS(1.0)[3] == pytest.approx(0.8)
    np.testing.assert_array_equal(gallery.scaled_heat(np.full((2, 2), 3.0)), 0)


@pytest.mark.parametrize(
    ("images", "captions", "sentence"),
    [
        (patches(0), None, "at least one"),
        (patches(2)[..., 0], None, "uint8 is needed"),
        (patches(2) / 255, None, "uint8 is needed"),
        (patches(2), ["a"], "1 captions for 2 images"),
    ],
)
def test_bad_images_are_refused(images, captions, sentence):
    with pytest.raises(UserError, match=sentence):
        gallery.draw_sample_grid(images, captions)


def test_bad_heat_is_refused():
    with pytest.raises(UserError, match="the images need"):
        gallery.draw_overlay_gallery(patches(2), np.zeros((2, 8, 8)))
    with pytest.raises(UserError, match="1 of 2 heat maps"):
        gallery.draw_overlay_gallery(patches(2), np.array([np.zeros((24, 24)), np.full((24, 24), np.nan)]))
