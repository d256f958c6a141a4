from __future__ import annotations

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def images() -> jax.Array:
    """[6, 24, 24, 3] float32 in [0, 1]: smooth random patches with both extremes among their pixels."""
    rng = np.random.default_rng(0)
    coarse = rng.random((6, 6, 6, 3))
    fine = np.kron(coarse, np.ones((1, 4, 4, 1))) * 0.9 + rng.random((6, 24, 24, 3)) * 0.1
    fine[:, 0, 0], fine[:, -1, -1] = 0, 1
    return jax.numpy.asarray(fine, jax.numpy.float32)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(7)
