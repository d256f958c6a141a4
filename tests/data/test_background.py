"""Where tissue is, and which squares hold some."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_jax.data.background import boxes_with_tissue, tissue_mask


def test_tissue_is_what_has_colour() -> None:
    picture = np.full((60, 60, 3), 240, np.uint8)
    picture[10:30, 10:30] = (200, 120, 190)
    picture[40:50, 40:50] = 3  # what was not scanned
    picture[:, 58:] = (238, 240, 236)  # tinted glass
    mask = tissue_mask(picture)
    assert mask[11:29, 11:29].all()
    assert not mask[:8].any()
    assert not mask[33:].any()
    assert not mask[:, 33:].any()


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.floats(0.3, 9), st.floats(0.3, 9))
def test_boxes_with_tissue_agree_with_looking(seed: int, step: float, size: float) -> None:
    mask = np.random.default_rng(seed).random((17, 23)) < 0.03
    tops, lefts = np.arange(0, 16, step), np.arange(0, 22, step)
    found = boxes_with_tissue(mask, tops, lefts, (size, size))
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            rows = slice(int(top + 1e-6), max(int(np.ceil(top + size - 1e-6)), int(top + 1e-6) + 1))
            columns = slice(int(left + 1e-6), max(int(np.ceil(left + size - 1e-6)), int(left + 1e-6) + 1))
            assert found[i, j] == mask[rows, columns].any()
