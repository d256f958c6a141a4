import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_jax.data.manifest import shard_header
from pcam_jax.data.store import Store, open_store, write_store
from pcam_jax.runtime.errors import UserError

COUNT, SHAPE = 50, (8, 6, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), np.uint8)
law = settings(deadline=None, derandomize=True, max_examples=50)


def index_of(count: int = COUNT) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": [f"{n:03}" for n in range(count)],  # leading zeros must survive
            "label": [n % 3 - 1 for n in range(count)],
            "group": ["NA" if n % 2 else "" for n in range(count)],  # not to be read as missing
            "split": ["train" if n < 30 else "test" for n in range(count)],
            "age": range(count),
        }
    )


def make(path: Path) -> Store:
    return write_store(path, IMAGES, index_of(), ("normal", "tumour"), {"made": "here"}, images_per_shard=14)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make(tmp_path_factory.mktemp("store") / "s")


def test_gives_back_what_was_written(store):
    assert len(store) == COUNT
    assert store.image_shape == SHAPE
    assert store.class_names == ("normal", "tumour")
    assert store.labels.dtype == np.int32
    assert list(store.ids[:2]) == ["000", "001"]
    assert list(store.groups[:2]) == ["", "NA"]
    assert list(store.splits) == ["train"] * 30 + ["test"] * 20
    assert list(store.index.columns) == ["id", "label", "group", "split", "source", "age"]
    assert store.manifest.counts == {
        "train": {"normal": 10, "tumour": 10, "unknown": 10},
        "test": {"normal": 7, "tumour": 6, "unknown": 7},
    }
    assert [shard.count for shard in store.manifest.shards] == [14, 14, 14, 8]
    assert np.array_equal(np.load(store.path / "images-00003.npy"), IMAGES[42:])


@law
@given(st.lists(st.integers(0, COUNT - 1), max_size=40), st.booleans())
def test_gather_is_fancy_indexing(store, indices, into):
    out = np.empty((len(indices), *SHAPE), np.uint8) if into else None
    gathered = store.gather(indices, out)
    assert np.array_equal(gathered, IMAGES[np.array(indices, np.int64)])
    assert out is None or gathered is out


@pytest.mark.parametrize("indices", [[-1], [COUNT], [[0]]])
def test_gather_refuses_indices_out_of_range(store, indices):
    with pytest.raises(IndexError):
        store.gather(indices)


@pytest.mark.parametrize("out", [np.empty((2, *SHAPE), np.uint8), np.empty((1, *SHAPE), np.float32)])
def test_gather_refuses_a_buffer_of_another_kind(store, out):
    with pytest.raises(ValueError):
        store.gather([0], out)


def test_images_stay_on_the_disk_and_cannot_be_written(store):
    images = store._shard(0)
    assert isinstance(images.base, np.memmap)
    assert not images.flags.writeable
    assert len(pickle.dumps(store)) < 2000
    assert np.array_equal(pickle.loads(pickle.dumps(store)).gather([49, 0]), IMAGES[[49, 0]])


def test_an_index_of_ids_alone_is_filled_in(tmp_path):
    index = pd.DataFrame({"age": [1.5, None], "id": ['a "b", c', "2"]}, index=[7, 7])
    store = write_store(tmp_path / "s", IMAGES[:2], index, ("normal", "tumour"))
    assert list(store.index.columns) == ["id", "label", "group", "split", "source", "age"]
    assert list(store.ids) == ['a "b", c', "2"]
    assert list(store.labels) == [-1, -1]
    assert store.manifest.counts == {"": {"unknown": 2}}
    assert (store.path / "index.csv").read_text().splitlines()[1:] == ['"a ""b"", c",-1,,,,1.5', "2,-1,,,,"]


def test_batches_and_single_images_make_the_same_store(store, tmp_path):
    batches = (IMAGES[n : n + 20] for n in range(0, COUNT, 20))
    again = write_store(
        tmp_path / "batches",
        batches,
        index_of(),
        ("normal", "tumour"),
        {"made": "there"},
        images_per_shard=14,
    )
    assert again.digest == store.digest
    assert {file.name for file in again.path.iterdir()} == {file.name for file in store.path.iterdir()}


def test_the_digest_speaks_for_images_index_and_classes(store, tmp_path):
    other_image = IMAGES.copy()
    other_image[13, 0, 0, 0] ^= 1
    other_label = index_of()
    other_label.loc[0, "label"] = 0
    digests = {
        write_store(tmp_path / str(n), *made, images_per_shard=14).digest
        for n, made in enumerate(
            [
                (other_image, index_of(), ("normal", "tumour")),
                (IMAGES, other_label, ("normal", "tumour")),
                (IMAGES, index_of(), ("normal", "cancer")),
            ]
        )
    }
    assert len(digests | {store.digest}) == 4


def test_nothing_is_left_of_a_store_that_cannot_be_made(tmp_path):
    def odd_images():
        yield IMAGES[0]
        yield IMAGES[0][:4]

    for images, index in [
        (odd_images(), index_of(2)),
        (IMAGES.astype(np.int16), index_of()),
        (IMAGES, index_of(49)),
        (IMAGES[:0], index_of(0)),
        (IMAGES, index_of().assign(label=2)),
        (IMAGES, index_of().assign(label=-2)),
    ]:
        with pytest.raises(ValueError):
            write_store(tmp_path / "s", images, index, ("normal", "tumour"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(store):
    with pytest.raises(UserError, match="exists already"):
        make(store.path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(at: int):
    def action(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    return action


def remove(path: Path) -> None:
    path.unlink()


HEADER = len(shard_header(14, SHAPE))


@pytest.mark.parametrize(
    ("file", "action"),
    [
        ("images-00001.npy", cut),
        ("images-00001.npy", remove),
        ("images-00001.npy", flip(20)),
        ("images-00001.npy", flip(HEADER + 5)),
        ("images-00001.npy", flip(-5)),
        ("index.csv", cut),
        ("index.csv", flip(100)),
        ("index.csv", remove),
        ("hashes.npy", cut),
        ("hashes.npy", flip(3)),
        ("hashes.npy", flip(-3)),
        ("hashes.npy", remove),
        ("manifest.json", cut),
        ("manifest.json", flip(40)),
        ("manifest.json", flip(-90)),
    ],
)
def test_opening_finds_what_was_cut_altered_or_removed(tmp_path, store, file, action):
    damaged = tmp_path / "damaged"
    shutil.copytree(store.path, damaged)
    action(damaged / file)
    with pytest.raises(UserError) as caught:
        open_store(damaged)
    assert file in str(caught.value)
    assert "prepare" in str(caught.value)


def test_opening_what_is_no_store_is_an_error(tmp_path):
    with pytest.raises(UserError, match="There is no store at"):
        open_store(tmp_path / "none")
    with pytest.raises(UserError, match="has no manifest"):
        open_store(tmp_path)
