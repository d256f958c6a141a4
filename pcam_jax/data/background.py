"""Where a slide holds tissue and where glass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import uniform_filter

LEAST_SATURATION = 0.07
"""PatchCamelyon's own rule: patches whose blurred pixels all stay below this saturation (HSV) were left out as glass
(Veeling et al. 2018, arXiv:1806.03962, and the data set's description)."""
_BAND = 256  # rows at a time: floats take several times the picture's room
_LEAST_VALUE = 20.0  # of 255: scanners fill what they did not scan with black


def tissue_mask(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which pixels of an overview show stained tissue.

    Args:
        picture: ``[h, w, 3] uint8``.

    Returns:
        ``[h, w] bool``.
    """
    mask = np.empty(picture.shape[:2], bool)
    for first in range(0, len(mask), _BAND):
        # a row more on each side, which the smoothing sees
        above = min(first, 1)
        band = picture[first - above : first + _BAND + 1].astype(np.float32)
        smooth = uniform_filter(band, (3, 3, 1), mode="nearest")[above : above + _BAND]
        brightest = smooth.max(axis=2)
        colored = brightest - smooth.min(axis=2) >= LEAST_SATURATION * brightest
        mask[first : first + _BAND] = colored & (brightest >= _LEAST_VALUE)
    return mask


def boxes_with_tissue(
    mask: npt.NDArray[np.bool_],
    tops: npt.NDArray[np.float64],
    lefts: npt.NDArray[np.float64],
    size: tuple[float, float],
) -> npt.NDArray[np.bool_]:
    """Which boxes of a lattice touch a pixel of tissue.

    Args:
        mask: ``[h, w]``.
        tops: upper edges of the rows of boxes, ``[r]``, in pixels of the mask.
        lefts: left edges of its columns, ``[c]``.
        size: height and width of every box.

    Returns:
        ``[r, c] bool``.
    """
    counts = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    counts[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    first_row, last_row = _ends(tops, size[0], mask.shape[0])
    first_column, last_column = _ends(lefts, size[1], mask.shape[1])
    inside = (
        counts[np.ix_(last_row, last_column)]
        - counts[np.ix_(first_row, last_column)]
        - counts[np.ix_(last_row, first_column)]
        + counts[np.ix_(first_row, first_column)]
    )
    return inside > 0


def _ends(
    starts: npt.NDArray[np.float64], size: float, length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    # a box edge that meets a pixel's edge up to rounding does not take that pixel in
    first = np.clip(np.floor(starts + 1e-6), 0, length - 1).astype(np.int64)
    last = np.clip(np.ceil(starts + size - 1e-6), 1, length).astype(np.int64)
    return first, np.maximum(last, first + 1)
