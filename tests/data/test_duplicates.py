"""Equal images are found, to the byte and under the eight symmetries, and nothing else is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pcam_jax.data.duplicates import (
    canonical_hash,
    exact_duplicates,
    symmetric_duplicates,
    symmetric_matches,
    symmetries,
)
from pcam_jax.data.manifest import sha1_of
from pcam_jax.data.pixel_statistics import measure_pixels


class Images:
    """Images in memory as a source."""

    def __init__(self, images):
        self.images = images
        self.image_shape = images.shape[1:]
        self.labels = np.zeros(len(images), np.int32)

    def gather(self, indices, out=None):
        return self.images[np.asarray(indices)]


def hashes_of(images):
    return np.array([np.frombuffer(sha1_of(image), np.uint8) for image in images])


def noise(count, height=8, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3)))


@given(images)
def test_every_symmetry_has_the_same_canonical_hash_and_key(image):
    turned = [*symmetries(image)]
    square = image.shape[0] == image.shape[1]
    assert len(turned) == (8 if square else 4)
    assert {canonical_hash(one) for one in turned} == {canonical_hash(image)}
    source = Images(np.stack(turned))
    keys = measure_pixels(source, len(turned)).keys
    assert len(np.unique(keys, axis=0)) == 1


def test_symmetries_of_an_image_without_any_differ():
    turned = [*symmetries(noise(1)[0])]
    assert len({one.tobytes() for one in turned}) == 8
    np.testing.assert_array_equal(turned[0], noise(1)[0])


def test_the_canonical_hash_tells_images_apart():
    assert len({canonical_hash(image) for image in noise(200)}) == 200


def test_exact_duplicates():
    pictures = noise(6)
    pictures[4] = pictures[1]
    pictures[5] = pictures[1]
    pictures[3] = pictures[2]
    assert [group.tolist() for group in exact_duplicates(hashes_of(pictures))] == [[1, 4, 5], [2, 3]]
    assert exact_duplicates(hashes_of(noise(6))) == []
    assert exact_duplicates(np.zeros((0, 20), np.uint8)) == []


def test_turned_duplicates_are_found_and_plain_ones_left_to_the_others():
    pictures = noise(8)
    pictures[3] = pictures[0][::-1]
    pictures[5] = np.rot90(pictures[2])
    pictures[6] = pictures[2]  # equal to the byte, beside a turned one
    pictures[7] = pictures[1]  # equal to the byte only
    source = Images(pictures)
    keys = measure_pixels(source, 8).keys
    found = symmetric_duplicates(source, keys, hashes_of(pictures))
    assert [group.tolist() for group in found] == [[0, 3], [2, 5, 6]]


def test_equal_keys_alone_are_not_enough():
    """Shuffled pixels have the same sums, but are another image."""
    pictures = noise(2)
    pictures[1] = pictures[0].reshape(-1, 3)[np.random.default_rng(1).permutation(64)].reshape(8, 8, 3)
    source = Images(pictures)
    keys = measure_pixels(source, 2).keys
    np.testing.assert_array_equal(keys[0], keys[1])
    assert symmetric_duplicates(source, keys, hashes_of(pictures)) == []


def test_oblong_images_are_not_transposed():
    pictures = noise(3, height=4, width=6)
    pictures[1] = pictures[0][::-1, ::-1]
    source = Images(pictures)
    found = symmetric_duplicates(source, measure_pixels(source, 3).keys, hashes_of(pictures))
    assert [group.tolist() for group in found] == [[0, 1]]


def test_matches_between_two_sets():
    ours, theirs = Images(noise(5)), Images(noise(4, seed=1))
    theirs.images[2] = ours.images[3].swapaxes(0, 1)
    theirs.images[0] = ours.images[1]
    keys = [measure_pixels(source, len(source.images)).keys for source in (ours, theirs)]
    assert sorted(symmetric_matches(ours, keys[0], theirs, keys[1])) == [(1, 0), (3, 2)]


def test_measures_of_known_images():
    pictures = np.zeros((4, 6, 6, 3), np.uint8)
    pictures[1] = 255
    pictures[2] = 100, 150, 200
    pictures[3, :3] = 255
    found = measure_pixels(Images(pictures), 4)
    np.testing.assert_allclose(found.brightness, [0, 255, 150, 127.5])
    np.testing.assert_allclose(found.spread, [0, 0, 0, 127.5])
    np.testing.assert_allclose(found.saturated, [1, 1, 0, 1])
    assert found.blank.tolist() == [True, True, True, False]
    assert found.burnt.tolist() == [False, False, False, True]
    np.testing.assert_allclose(found.channel_mean([1, 2]), [177.5, 202.5, 227.5])
    np.testing.assert_allclose(found.channel_std([1, 2]), [77.5, 52.5, 27.5])


def test_measures_equal_numpys_on_any_image():
    pictures = noise(20)
    found = measure_pixels(Images(pictures), 20)
    grey = pictures.astype(float).mean(axis=3)
    np.testing.assert_allclose(found.brightness, grey.mean(axis=(1, 2)))
    np.testing.assert_allclose(found.spread, grey.std(axis=(1, 2)))
    every = np.arange(20)
    np.testing.assert_allclose(found.channel_mean(every), pictures.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(found.channel_std(every), pictures.reshape(-1, 3).std(axis=0))


def test_stains_are_told_apart():
    """Light through one stain alone, as Beer and Lambert have it."""
    stains = {"haematoxylin": [0.650, 0.704, 0.286], "eosin": [0.072, 0.990, 0.105]}
    for number, (name, densities) in enumerate(stains.items()):
        color = np.round(256 * 10 ** -np.array(densities) - 1).astype(np.uint8)
        found = measure_pixels(Images(np.broadcast_to(color, (1, 4, 4, 3)).copy()), 1)
        values = [found.haematoxylin[0], found.eosin[0]]
        assert values[number] == pytest.approx(1, abs=0.03), name
        assert values[1 - number] == pytest.approx(0, abs=0.03), name
