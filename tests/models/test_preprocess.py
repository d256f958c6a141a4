from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pcam_jax.models.preprocess import normalize, standardize
from pcam_jax.runtime.errors import UserError

PIXELS = np.array([[0, 128, 255], [255, 0, 51]], np.uint8).reshape(1, 1, 2, 3)


def test_unit_divides_by_255():
    unit = normalize(jnp.asarray(PIXELS))
    np.testing.assert_allclose(unit, PIXELS / 255, rtol=1e-6)
    assert unit.dtype == jnp.float32


def test_imagenet_matches_its_published_constants():
    expected = (PIXELS / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(jnp.asarray(PIXELS), "imagenet"), expected, rtol=1e-5)
    np.testing.assert_allclose(standardize(normalize(jnp.asarray(PIXELS)), "imagenet"), expected, rtol=1e-5)


def test_dtype_is_that_of_the_result():
    assert normalize(jnp.asarray(PIXELS), dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_an_unknown_scheme_is_named():
    with pytest.raises(UserError, match=r"'caffe'.*unit, imagenet"):
        normalize(jnp.asarray(PIXELS), "caffe")
