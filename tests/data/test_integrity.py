import numpy as np
import pandas as pd
import pytest

from pcam_jax.data.integrity import verify_store
from pcam_jax.data.store import open_store, write_store
from pcam_jax.runtime.errors import UserError

SIZE = 4 * 4 * 3


@pytest.fixture
def store(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (1000, 4, 4, 3), np.uint8)
    index = pd.DataFrame({"id": [f"p{n}" for n in range(1000)]})
    return write_store(tmp_path / "store", images, index, ("normal", "tumour"), images_per_shard=400)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def test_a_sound_store_has_no_damage(store):
    seen = []
    assert verify_store(store.path, seen=seen.append) == []
    assert sum(seen) == 1000


def test_a_flipped_byte_is_found_and_named_though_opening_misses_it(store):
    flip(store.path / "images-00001.npy", -(SIZE * 399) + 5)  # image 1 of that shard
    flip(store.path / "images-00002.npy", -(SIZE * 3))
    open_store(store.path)
    damages = verify_store(store.path)
    assert [(damage.file, damage.id) for damage in damages] == [
        ("images-00001.npy", "p401"),
        ("images-00002.npy", "p997"),
    ]
    assert str(damages[0]) == "images-00001.npy: image p401 differs from its SHA-1"


def test_damaged_tables_do_not_stop_the_images_from_being_checked(store):
    flip(store.path / "images-00000.npy", -SIZE)
    flip(store.path / "index.csv", 30)
    (store.path / "images-00001.npy").write_bytes(b"")
    told = [str(damage) for damage in verify_store(store.path)]
    assert told == [
        "index.csv: was altered",
        "images-00000.npy: image number 399 differs from its SHA-1",
        "images-00001.npy: has 0 bytes instead of 19328",
    ]


def test_without_hashes_the_shard_is_named(store):
    (store.path / "hashes.npy").write_bytes(b"no numpy file")
    flip(store.path / "images-00000.npy", -SIZE)
    assert [(damage.file, damage.id) for damage in verify_store(store.path)] == [
        ("hashes.npy", ""),
        ("images-00000.npy", ""),
    ]


def test_an_altered_manifest_is_an_error(store):
    flip(store.path / "manifest.json", -100)
    with pytest.raises(UserError, match=r"manifest\.json"):
        verify_store(store.path)
