from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile

from pcam_jax.data.stain import REFERENCE_DENSITY, REFERENCE_STAINS, macenko_normalize, stain_vectors

MINI = Path(__file__).parents[2] / "../shared/data/pcam-mini/histopathologic-cancer-detection.zip"
SCANNERS = {
    "bluish": [[0.70, 0.62, 0.35], [0.10, 0.95, 0.30]],
    "reddish": [[0.50, 0.75, 0.43], [0.30, 0.85, 0.43]],
}


def unit(rows: object) -> np.ndarray:
    matrix = np.asarray(rows, np.float64)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def mixtures(seed: int = 0, side: int = 96) -> np.ndarray:
    """Stain amounts [side * side, 2] with nearly pure pixels of both stains and some background."""
    rng = np.random.default_rng(seed)
    share = rng.beta(0.4, 0.4, side * side)[:, None]
    amounts = np.concatenate([share, 1 - share], 1) * rng.gamma(3, 0.35, (side * side, 1))
    amounts[: side * side // 5] = 0
    return amounts


def scanned(amounts: np.ndarray, stains: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """The uint8 image that a scanner with these stains makes of the amounts."""
    side = int(len(amounts) ** 0.5)
    densities = amounts @ stains + np.random.default_rng(1).normal(0, noise, (len(amounts), 3))
    return np.clip(np.round(240 * np.exp(-densities) - 1), 0, 255).astype(np.uint8).reshape(side, side, 3)


def degrees_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.rad2deg(np.arccos(np.clip((unit(a) * unit(b)).sum(1), -1, 1)))


@pytest.mark.parametrize("scanner", SCANNERS)
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_known_stains_are_recovered(scanner: str, noise: float) -> None:
    stains = unit(SCANNERS[scanner])
    densities = -np.log((scanned(mixtures(), stains, noise).reshape(-1, 3).astype(float) + 1) / 240)
    found = stain_vectors(densities[(densities >= 0.15).all(1)])
    assert found is not None
    assert degrees_between(found, stains).max() < 3


def test_two_scanners_of_one_tissue_come_to_agree() -> None:
    amounts = mixtures()
    one, two = (scanned(amounts, unit(stains)) for stains in SCANNERS.values())
    before = np.abs(one.astype(int) - two).mean()
    a, b = macenko_normalize(np.stack([one, two])).astype(int)
    assert before > 10
    assert np.abs(a - b).mean() < before / 5


def test_an_image_of_the_reference_comes_back() -> None:
    stains = unit(REFERENCE_STAINS)
    amounts = mixtures()
    tissue = (amounts @ stains >= 0.15).all(1)
    amounts *= REFERENCE_DENSITY / np.percentile(amounts[tissue], 99, axis=0)
    image = scanned(amounts, stains)
    assert np.abs(macenko_normalize(image[None])[0].astype(int) - image).mean() < 4


def test_each_image_is_normalised_on_its_own() -> None:
    images = np.stack([scanned(mixtures(seed), unit(SCANNERS["bluish"])) for seed in (0, 1)])
    together = macenko_normalize(images)
    assert together.dtype == np.uint8
    assert together.shape == images.shape
    np.testing.assert_array_equal(together[1], macenko_normalize(images[1:])[0])
    assert macenko_normalize(images[:0]).shape == (0, 96, 96, 3)


def test_blank_patches_pass_unchanged() -> None:
    white, faint = np.full((32, 32, 3), 255, np.uint8), np.full((32, 32, 3), 225, np.uint8)
    speck = white.copy()
    speck[0, :5] = 40
    blanks = np.stack([white, faint, speck])
    np.testing.assert_array_equal(macenko_normalize(blanks), blanks)


def test_patches_the_method_cannot_read_stay_sane() -> None:
    rng = np.random.default_rng(0)
    odd = {
        "black": np.zeros((32, 32, 3), np.uint8),
        "one colour": np.broadcast_to(np.array([120, 60, 130], np.uint8), (32, 32, 3)),
        "grey": np.repeat(rng.integers(0, 200, (32, 32, 1), dtype=np.uint8), 3, 2),
        "noise": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        "one stain": scanned(
            np.stack([rng.gamma(3, 0.3, 1024), np.zeros(1024)], 1), unit(SCANNERS["bluish"])
        ),
        "half black": np.concatenate([np.zeros((16, 32, 3), np.uint8), np.full((16, 32, 3), 255, np.uint8)]),
    }
    out = dict(zip(odd, macenko_normalize(np.stack(list(odd.values()))), strict=True))
    for name, image in odd.items():
        assert abs(float(out[name].mean()) - image.mean()) < 90, name
    # One stain keeps its picture: dark stays dark, light stays light.
    order = np.corrcoef(out["one stain"].mean(2).ravel(), odd["one stain"].mean(2).ravel())[0, 1]
    assert order > 0.95


@pytest.mark.skipif(not MINI.exists(), reason="the real patches of pcam-mini are not here")
def test_real_patches_look_more_alike() -> None:
    with zipfile.ZipFile(MINI) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("train/"))[:120]
        images = np.stack([tifffile.imread(io.BytesIO(archive.read(name))) for name in names])
    normalized = macenko_normalize(images)
    spread, after = images.mean((1, 2)).std(0), normalized.mean((1, 2)).std(0)
    assert (after < 0.9 * spread).all()
    structure = [
        np.corrcoef(a.mean(2).ravel(), b.mean(2).ravel())[0, 1]
        for a, b in zip(images, normalized, strict=True)
    ]
    assert np.quantile(structure, 0.05) > 0.9
