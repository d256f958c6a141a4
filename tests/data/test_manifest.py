import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_jax.data.manifest import (
    Manifest,
    Shard,
    default_images_per_shard,
    manifest_json,
    parse_manifest,
    shard_header,
)

law = settings(deadline=None, derandomize=True, max_examples=300)
SOUND = Manifest(
    format_version=1,
    image_shape=(96, 96, 3),
    count=5,
    class_names=("normal", "tumour"),
    counts={"train": {"normal": 5}},
    shards=(Shard("images-00000.npy", 3, "aa"), Shard("images-00002.npy", 2, "bb")),
    index_digest="cc",
)


def raw(**changed: object) -> dict[str, object]:
    return {**manifest_json(SOUND), **changed}


def test_a_sound_manifest_is_read():
    assert parse_manifest(json.dumps(raw()).encode()) == SOUND
    assert list(SOUND.starts) == [0, 3, 5]
    assert SOUND.image_bytes == 27_648


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"format_version": None}, "format version"),
        ({"image_shape": [96, 96]}, "impossible image_shape"),
        ({"image_shape": [10**9, 10**9, 3]}, "impossible image_shape"),
        ({"image_shape": [96, 96, True]}, "impossible image_shape"),
        ({"count": 6}, "count is not the sum"),
        ({"count": 5.0}, "count is not the sum"),
        ({"class_names": [1]}, "class_names"),
        ({"shards": {}}, "shards"),
        ({"shards": [{"file": "../../etc/passwd", "count": 5, "digest": ""}]}, "shard 0"),
        ({"shards": [{"file": "images-00000.npy", "count": -5, "digest": ""}]}, "shard 0"),
        ({"shards": raw()["shards"][::-1]}, "out of order"),
        ({"index_digest": 3}, "index_digest"),
        ({"source": []}, "source is not an object"),
        ({"class_names": ["normal", "cancer"]}, "checksum does not match"),
    ],
)
def test_an_impossible_manifest_is_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        parse_manifest(json.dumps(raw(**changed)).encode())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@law
@given(st.sampled_from(sorted(raw())), json_values)
def test_fuzzed_fields_give_a_manifest_or_a_value_error(key, value):
    try:
        manifest = parse_manifest(json.dumps(raw(**{key: value})).encode())
    except ValueError:
        return
    assert manifest == SOUND


@law
@given(st.binary(max_size=200) | st.integers(1, 10**6).map(lambda n: b"[" * n))
def test_arbitrary_bytes_are_a_value_error(content):
    with pytest.raises(ValueError):
        parse_manifest(content)


def test_shards_are_files_of_a_few_hundred_megabytes_with_headers_of_one_length():
    assert 9000 < default_images_per_shard((96, 96, 3)) < 10_000
    assert default_images_per_shard((20_000, 20_000, 3)) == 1
    assert len({len(shard_header(count, (96, 96, 3))) for count in (1, 9, 9709, 10**9)}) == 1
