import contextlib
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from kaggle_source import SHAPE, tif_bytes

from pcam_jax.data.raw.record import RecordFault
from pcam_jax.data.raw.tif import find_plain_strip, read_tif

IMAGE = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
law = settings(deadline=None, derandomize=True, max_examples=300)


def decode(content: bytes) -> np.ndarray:
    out = np.full(SHAPE, 7, np.uint8)
    read_tif(content, out)
    return out


def written_by_tifffile(image: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, image, **{"photometric": "rgb", **options})
    return file.getvalue()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("gap", [0, 1, 63])
def test_finds_the_strip_wherever_it_lies_in_either_byte_order(order, gap):
    content = tif_bytes(IMAGE, order, gap)
    assert find_plain_strip(content, SHAPE) == len(content) - IMAGE.nbytes
    assert np.array_equal(decode(content), IMAGE)
    assert np.array_equal(tifffile.imread(io.BytesIO(content)), IMAGE)


def test_takes_the_fast_path_for_what_tifffile_writes():
    content = written_by_tifffile(IMAGE)
    assert find_plain_strip(content, SHAPE) is not None
    assert np.array_equal(decode(content), IMAGE)


def test_takes_a_sample_format_that_stands_once_for_each_sample():
    content = tif_bytes(IMAGE, gap=6)
    at = len(content) - IMAGE.nbytes - 6
    three = tif_bytes(IMAGE, gap=6, t339=(3, 3, at))
    three = three[:at] + struct.pack("<3H", 1, 1, 1) + three[at + 6 :]
    assert find_plain_strip(three, SHAPE) == len(three) - IMAGE.nbytes
    signed = three[:at] + struct.pack("<3H", 1, 2, 1) + three[at + 6 :]
    assert find_plain_strip(signed, SHAPE) is None


@pytest.mark.parametrize(
    "options",
    [
        {"rowsperstrip": 8},
        {"tile": (32, 32)},
        {"compression": "deflate"},
        {"compression": "deflate", "predictor": True},
        {"bigtiff": True},
        {"byteorder": ">", "rowsperstrip": 40},
    ],
    ids=str,
)
def test_other_tifs_go_through_tifffile(options):
    content = written_by_tifffile(IMAGE, **options)
    assert find_plain_strip(content, SHAPE) is None
    assert np.array_equal(decode(content), IMAGE)


def test_planar_tifs_are_turned():
    content = written_by_tifffile(np.moveaxis(IMAGE, -1, 0).copy(), planarconfig="separate")
    assert np.array_equal(decode(content), IMAGE)


@pytest.mark.parametrize(
    "changed",
    [
        {"t259": (3, 1, 5)},  # LZW
        {"t262": (3, 1, 6)},  # YCbCr
        {"t266": (3, 1, 2)},  # bits in the other order
        {"t274": (3, 1, 3)},  # rotated
        {"t278": (4, 1, 8)},  # more strips than one
        {"t284": (3, 1, 2)},  # planes
        {"t317": (3, 1, 2)},  # predictor
        {"t322": (3, 1, 32)},  # tiles
        {"t339": (3, 1, 2)},  # signed
        {"t256": (4, 1, 95)},
        {"t279": (4, 1, 27_647)},
        {"t277": (3, 1, 4)},
        {"t256": (5, 1, 96)},  # a rational width
    ],
    ids=str,
)
def test_the_fast_path_refuses_what_it_does_not_know(changed):
    assert find_plain_strip(tif_bytes(IMAGE, **changed), SHAPE) is None


@pytest.mark.parametrize(
    ("content", "problem", "detail"),
    [
        (tif_bytes(IMAGE)[:9000], "unreadable", "cut short: 9000 bytes"),
        (written_by_tifffile(IMAGE, rowsperstrip=8)[:9000], "unreadable", ""),
        (b"", "unreadable", "not a readable tif"),
        (b"<html>", "unreadable", "not a readable tif"),
        (tif_bytes(IMAGE[:95, :95].copy()), "wrong shape", "95x95 pixels, expected 96x96"),
        (written_by_tifffile(IMAGE.astype(np.uint16)), "wrong depth", "16 bits"),
        (written_by_tifffile(IMAGE.astype(np.int8)), "wrong depth", "8 bits"),
        (written_by_tifffile(IMAGE[..., 0].copy(), photometric="minisblack"), "wrong shape", "1 samples"),
        (
            written_by_tifffile(np.dstack([IMAGE, IMAGE[..., 0]]), extrasamples=[2]),
            "wrong shape",
            "4 samples",
        ),
        (tif_bytes(IMAGE, t256=(4, 1, 50_000), t257=(4, 1, 50_000)), "wrong shape", "50000x50000"),
        (tif_bytes(IMAGE, t259=(3, 1, 7)), "unreadable", "compression 7"),
        (tif_bytes(IMAGE, t322=(4, 1, 2**31), t323=(4, 1, 2**31)), "unreadable", ""),
        (b"II*\0" + bytes(10**6), "unreadable", "1000004 bytes are too many"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_files_are_faults_that_say_why(content, problem, detail):
    with pytest.raises(RecordFault) as caught:
        decode(content)
    assert caught.value.problem == problem
    assert detail in caught.value.detail


def test_a_deflate_bomb_costs_bounded_memory():
    bomb = zlib.compress(bytes(2**28), 9)
    content = tif_bytes(IMAGE, t259=(3, 1, 8), t279=(4, 1, len(bomb)))
    content = content[: len(content) - IMAGE.nbytes] + bomb
    tracemalloc.start()
    try:
        with pytest.raises(RecordFault, match="too many"):
            decode(content)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


PLAIN = tif_bytes(IMAGE, gap=20)
HEADER = len(PLAIN) - IMAGE.nbytes


@law
@given(edits=st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_fuzzed_headers_decode_or_are_faults(edits):
    content = bytearray(PLAIN)
    for at, value in edits:
        content[at] = value
    with contextlib.suppress(RecordFault):
        decode(bytes(content))


@law
@given(
    order=st.sampled_from([b"II*\0", b"MM\0*", b"II+\0", b""]),
    body=st.binary(max_size=400),
)
def test_arbitrary_bytes_are_faults(order, body):
    with pytest.raises(RecordFault):
        decode(order + body)


def test_a_damaged_compressed_tif_never_crashes():
    content = written_by_tifffile(IMAGE, compression="deflate", rowsperstrip=16)
    rng = np.random.default_rng(1)
    for _ in range(100):
        damaged = bytearray(content)
        for at in rng.integers(0, 400, 3):
            damaged[at] = rng.integers(256)
        try:
            decode(bytes(damaged))
        except RecordFault:
            continue
