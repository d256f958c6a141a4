"""Synthetic pictures for the page's gallery, from patches of the embedded sample that no run was trained on."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import Image

from pcam_jax.data.sample import CLASS_NAMES, sample_patches

_FIRST, _SLIDES, _FIRST_SLIDE = 4000, 25, 100
"""The sample's test split begins there (`data.sample.embedded_sample`)."""
_PATCHES = 8
_LARGE_FACTOR = 5
_LARGE_TUMOUR = (0.35, 0.65)
"""Share of tumour in the large picture, so that its map has something to show."""


@dataclasses.dataclass(frozen=True)
class ExamplePicture:
    """One picture; ``png`` is its file."""

    name: str
    label: str
    width: int
    height: int
    png: bytes


def example_pictures(image_shape: tuple[int, int, int]) -> list[ExamplePicture]:
    """Patches of a model's size, as many of each class as they come, and one picture of several patches.

    None for models that take pictures of another shape than the sample can have.
    """
    side = image_shape[0]
    if side != image_shape[1] or not 24 <= side <= 256:
        return []
    where = {"slides": _SLIDES, "first_slide": _FIRST_SLIDE}
    patches = sample_patches(_PATCHES, image_size=side, start=_FIRST, **where)
    found = [
        _picture(f"example-{number + 1}.png", image, int(label))
        for number, (image, label) in enumerate(zip(patches.images, patches.labels, strict=True))
    ]
    large = next(
        patch
        for start in range(_FIRST + _PATCHES, _FIRST + _PATCHES + 200)
        if _LARGE_TUMOUR[0]
        < (patch := sample_patches(1, image_size=side * _LARGE_FACTOR, start=start, **where)).masks.mean()
        < _LARGE_TUMOUR[1]
    )
    return [*found, _picture("example-large.png", large.images[0], 1)]


def _picture(name: str, image: np.ndarray, label: int) -> ExamplePicture:
    picture = Image.fromarray(image)
    file = io.BytesIO()
    picture.save(file, "png")
    return ExamplePicture(name, CLASS_NAMES[label], picture.width, picture.height, file.getvalue())
