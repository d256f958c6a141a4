import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pcam_jax.config.schema import DataConfig
from pcam_jax.data.sample import (
    SamplePatches,
    embedded_sample,
    sample_masks,
    sample_patches,
    write_sample_store,
)
from pcam_jax.data.scene import centre_of
from pcam_jax.data.split import assign_splits
from pcam_jax.data.store import open_store
from pcam_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def patches() -> SamplePatches:
    return sample_patches(800, seed=3)


def in_centre(patches: SamplePatches) -> np.ndarray:
    centre = centre_of(patches.images.shape[1])
    return patches.masks[:, centre, centre].any((1, 2))


def test_shapes_and_types(patches):
    assert patches.images.shape == (800, 96, 96, 3)
    assert patches.images.dtype == np.uint8
    assert patches.labels.dtype == np.int32
    assert patches.masks.dtype == np.bool_
    assert set(patches.groups) == set(range(100))
    assert 0.3 < patches.labels.mean() < 0.55


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [24, 50, 96, 300])
def test_the_label_is_tumour_in_the_centre(size, difficulty):
    patches = sample_patches(12 if size == 300 else 60, seed=1, image_size=size, difficulty=difficulty)
    np.testing.assert_array_equal(in_centre(patches), patches.labels == 1)


def test_the_central_square_is_that_of_patchcamelyon():
    assert centre_of(96) == slice(32, 64)


def test_tumour_around_the_centre_does_not_count(patches):
    negatives = patches.labels == 0
    assert 0.25 < patches.masks[negatives].any((1, 2)).mean() < 0.75


def test_positive_centres_hold_more_than_a_speck(patches):
    centre = centre_of(96)
    share = patches.masks[patches.labels == 1][:, centre, centre].mean((1, 2))
    assert share.min() > 0.05


def test_a_patch_depends_on_its_number_alone():
    whole = sample_patches(30, seed=5)
    backwards = [sample_patches(5, seed=5, start=start) for start in (25, 5, 0, 20, 10, 15)]
    for part, start in zip(backwards, (25, 5, 0, 20, 10, 15), strict=True):
        rows = slice(start, start + 5)
        np.testing.assert_array_equal(part.images, whole.images[rows])
        np.testing.assert_array_equal(part.masks, whole.masks[rows])
        np.testing.assert_array_equal(part.labels, whole.labels[rows])
        np.testing.assert_array_equal(part.groups, whole.groups[rows])


def test_another_process_draws_the_same_pixels():
    program = """
import hashlib, sys
from pcam_jax.data.sample import sample_patches
print(hashlib.sha1(sample_patches(20, seed=9).images.tobytes()).hexdigest(), "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = hashlib.sha1(sample_patches(20, seed=9).images.tobytes()).hexdigest()
    assert done.stdout.split() == [expected, "False"]


def test_seeds_draw_different_patches():
    first, second = (sample_patches(20, seed=seed) for seed in (0, 1))
    assert (first.images != second.images).any((1, 2, 3)).all()


def test_slides_have_stains_of_their_own():
    patches = sample_patches(200, seed=2, slides=10)
    means = patches.images.reshape(200, -1, 3).mean(1)
    ratio = means[:, 0] / means[:, 2]  # red against blue: the laboratory, not the tissue
    within = np.mean([ratio[patches.groups == slide].std() for slide in range(10)])
    between = np.std([ratio[patches.groups == slide].mean() for slide in range(10)])
    assert between > 1.5 * within


def held_out_auroc(features: np.ndarray, patches: SamplePatches) -> float:
    """AUROC of logistic regression on slides that it has not seen."""
    train = patches.groups < 65
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(features[train], patches.labels[train])
    return float(roc_auc_score(patches.labels[~train], model.decision_function(features[~train])))


def test_colour_alone_says_little(patches):
    """A net has to look at nuclei: the mean colour of a patch stays far from the answer."""
    assert held_out_auroc(patches.images.reshape(800, -1, 3).mean(1), patches) < 0.68


def test_difficulty_makes_it_harder():
    def auroc_of_hand_made_features(difficulty: float) -> float:
        made = sample_patches(800, seed=4, difficulty=difficulty)
        centre = centre_of(96)
        grey = made.images[:, centre, centre].astype(np.float32).mean(3)
        edges = [np.abs(grey[:, k:] - grey[:, :-k]).mean((1, 2)) for k in (1, 2, 4, 8)]
        quantiles = np.quantile(grey.reshape(800, -1), [0.05, 0.15, 0.3, 0.5, 0.7, 0.9], axis=1)
        return held_out_auroc(np.stack([*edges, *quantiles], 1), made)

    easy, hard = auroc_of_hand_made_features(0.0), auroc_of_hand_made_features(1.0)
    assert easy > hard + 0.04
    assert hard > 0.6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"count": -1}, "-1 patches"),
        ({"count": 1, "image_size": 8}, "at least 24 pixels"),
        ({"count": 1, "difficulty": 2}, "between 0 and 1"),
        ({"count": 1, "slides": 0}, "from 0 slides"),
    ],
)
def test_impossible_samples_are_sentences(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        sample_patches(**arguments)


def test_a_store_holds_the_patches_and_their_masks(tmp_path):
    store = write_sample_store(tmp_path / "sample", count=50, test_count=11, seed=7, images_per_shard=20)
    patches = sample_patches(50, seed=7, slides=50)
    assert len(store) == 61
    assert store.class_names == ("normal", "tumour")
    np.testing.assert_array_equal(store.gather(np.arange(50)), patches.images)
    np.testing.assert_array_equal(store.labels[:50], patches.labels)
    np.testing.assert_array_equal(sample_masks(store, [3, 0, 49]), patches.masks[[3, 0, 49]])
    for row in (0, 60):
        assert store.ids[row] == hashlib.sha1(store.gather([row]).tobytes()).hexdigest()
    assert (store.splits[50:] == "test").all()
    assert not set(store.groups[:50]) & set(store.groups[50:])
    splits = assign_splits(store.index, DataConfig())
    assert (splits == "validation").sum() == pytest.approx(10, abs=1)
    assert sorted(os.listdir(tmp_path)) == ["sample"]


def test_workers_draw_the_same_store(tmp_path):
    one = write_sample_store(tmp_path / "one", count=24, image_size=32)
    two = write_sample_store(tmp_path / "two", count=24, image_size=32, workers=2)
    assert one.digest == two.digest


def test_an_existing_store_is_not_overwritten(tmp_path):
    (tmp_path / "sample").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_sample_store(tmp_path / "sample", count=4)
    with pytest.raises(UserError, match="at least one labelled patch"):
        write_sample_store(tmp_path / "other", count=0)
    assert not (tmp_path / "other").exists()


def test_stores_without_masks_say_so(tmp_path):
    store = write_sample_store(tmp_path / "sample", count=4, image_size=32)
    (tmp_path / "sample" / "masks.npy").unlink()
    with pytest.raises(UserError, match="no tumour masks"):
        sample_masks(store, [0])


def test_two_processes_may_make_the_embedded_sample_at_once(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    program = """
from pcam_jax.data.sample import embedded_sample
print(embedded_sample(count=60, test_count=8))
"""
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    running = [
        subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    paths = {printed.strip() for printed, _ in outputs}
    assert len(paths) == 1
    assert len(open_store(paths.pop())) == 68
    assert len(os.listdir(tmp_path / "pcam_jax")) == 1


def test_a_damaged_embedded_sample_is_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = embedded_sample(count=8, test_count=2)
    digest = open_store(path).digest
    (path / "images-00000.npy").write_bytes(b"")
    assert embedded_sample(count=8, test_count=2) == path
    assert open_store(path).digest == digest


def test_a_read_only_home_falls_back_to_a_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = embedded_sample(count=4, test_count=1)
    assert tmp_path in path.parents
    assert len(open_store(path)) == 5
