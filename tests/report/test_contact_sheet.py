from __future__ import annotations

import jax
import numpy as np

from pcam_jax.config.schema import AugmentConfig
from pcam_jax.report.contact_sheet import augmentation_sheet

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def test_one_column_for_each_operation_that_is_on() -> None:
    config = AugmentConfig(horizontal_flip=True, fill="nearest", erase_probability=0.1, erase_area=0.5)
    sheet = augmentation_sheet(IMAGES, config, jax.random.key(0), draws=2)
    grid = np.reshape(sheet.axes, (2, -1))
    titles = [axes.get_title() for axes in grid[0]]
    assert titles == ["original", "symmetry", "erasing", "all, draw 1", "all, draw 2"]
    pictures = [[np.asarray(axes.images[0].get_array()) for axes in row] for row in grid]
    for row, image in zip(pictures, IMAGES, strict=True):
        np.testing.assert_array_equal(row[0], image)
        assert any((row[1] == candidate).all() for candidate in (image, image[:, ::-1]))
        assert (row[2] != image).any()


def test_nothing_on_shows_the_images_as_they_are() -> None:
    sheet = augmentation_sheet(IMAGES, AugmentConfig(), jax.random.key(0), draws=1)
    assert [axes.get_title() for axes in sheet.axes[:2]] == ["original", "all, draw 1"]
    np.testing.assert_array_equal(sheet.axes[1].images[0].get_array(), IMAGES[0])
