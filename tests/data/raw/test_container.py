import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_jax.data.raw.container import FolderContainer, ZipContainer, open_container
from pcam_jax.data.raw.record import RecordFault
from pcam_jax.runtime.errors import UserError

CONTENT = {"top.csv": b"id,label\n", "train/a.tif": bytes(range(256)) * 120, "train/empty.tif": b""}
LIMIT = 10**6
law = settings(deadline=None, derandomize=True, max_examples=200)


def write_zip(path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in CONTENT.items():
            archive.writestr(name, content)
    return path


def read_all(container: FolderContainer | ZipContainer) -> dict[str, bytes]:
    return {name: bytes(container.read(place, LIMIT)) for name, place in container.members().items()}


def damage_locator(path: Path, name: str, **changed: int) -> tuple[ZipContainer, tuple[int, ...]]:
    container = ZipContainer(path)
    fields = ("offset", "packed", "size", "crc", "method", "flags")
    place = dict(zip(fields, container.members()[name], strict=True)) | changed
    return container, tuple(place.values())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_gives_back_what_was_put_in(tmp_path, method):
    container = open_container(write_zip(tmp_path / "a.zip", method))
    assert read_all(container) == CONTENT
    assert container.faults() == []


def test_a_folder_gives_its_files_and_no_junk(tmp_path):
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".DS_Store").write_bytes(b"junk")
    (tmp_path / "train/._a.tif").write_bytes(b"junk")
    container = open_container(tmp_path)
    assert read_all(container) == CONTENT


def test_a_folder_reads_files_larger_than_its_buffer_up_to_the_limit(tmp_path):
    content = bytes(range(256)) * 3000
    (tmp_path / "large").write_bytes(content)
    (tmp_path / "small").write_bytes(b"small")
    container = FolderContainer(tmp_path)
    held = container.read("small", LIMIT)  # a view must not keep the buffer from growing
    assert bytes(container.read("large", LIMIT)) == content
    del held
    assert bytes(container.read("small", LIMIT)) == b"small"
    with pytest.raises(RecordFault, match="larger than"):
        FolderContainer(tmp_path).read("large", 100_000)


def test_members_are_read_the_same_in_another_process(tmp_path):
    container = ZipContainer(write_zip(tmp_path / "a.zip"))
    place = container.members()["train/a.tif"]
    copy = pickle.loads(pickle.dumps(container))
    assert bytes(copy.read(place, LIMIT)) == CONTENT["train/a.tif"]
    assert len(pickle.dumps(container)) < 1000  # the listing stays behind


def test_zip64_and_long_local_headers_are_read(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo("train/" + "n" * 300)
        info.extra = struct.pack("<HH", 0xCAFE, 400) + bytes(400)
        info.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(info, "w", force_zip64=True) as member:
            member.write(b"content" * 1000)
    (content,) = read_all(ZipContainer(path)).values()
    assert content == b"content" * 1000


@pytest.mark.parametrize("size", [25, 5 * 2**30])
def test_data_before_the_zip_are_skipped_even_beyond_4_gib(tmp_path, size):
    path = write_zip(tmp_path / "a.zip")
    content = path.read_bytes()
    with open(path, "wb") as file:
        file.seek(size)  # a hole, which takes no room on the disk
        file.write(content)
    assert read_all(ZipContainer(path)) == CONTENT


def test_a_name_that_stands_twice_is_a_fault(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("train/a.tif", b"other")
    container = ZipContainer(path)
    assert read_all(container)["train/a.tif"] == b"other"
    assert [(fault.problem, fault.id) for fault in container.faults()] == [("duplicate file", "a")]


def test_a_member_without_a_name_is_left_aside(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    name = b"train/a.tif"
    content = bytearray(path.read_bytes())
    at = content.rindex(
        name
    )  # in the central directory: the name gives way to an extra field that nobody knows
    content[at : at + len(name)] = b"\xff\xff\x07\0" + bytes(7)
    content[at - 46 + 28 : at - 46 + 32] = b"\0\0" + len(name).to_bytes(2, "little")
    path.write_bytes(content)
    assert set(read_all(ZipContainer(path))) == set(CONTENT) - {"train/a.tif"}


@pytest.mark.parametrize(
    ("changed", "detail"),
    [
        ({"flags": 1}, "encrypted"),
        ({"method": 12}, "compressed by bzip2"),
        ({"method": 77}, "method 77"),
        ({"size": LIMIT + 1}, "declares 1000001 bytes"),
        ({"size": 100}, "larger than its content"),
        ({"crc": 1}, "CRC-32"),
        ({"size": 30_721}, "CRC-32"),
        ({"size": 30_719}, "CRC-32"),
        ({"offset": 10**9}, "outside the zip"),
        ({"offset": -1}, "outside the zip"),
        ({"offset": 2**64 - 1}, "outside the zip"),
        ({"offset": 5}, "points to no file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unreadable_members_are_faults(tmp_path, changed, detail):
    path = write_zip(tmp_path / "a.zip", zipfile.ZIP_STORED if "size" in changed else zipfile.ZIP_DEFLATED)
    if changed == {"size": 100}:
        changed = {"size": 100, "packed": 30_720}
    container, place = damage_locator(path, "train/a.tif", **changed)
    with pytest.raises(RecordFault, match=detail):
        container.read(place, LIMIT)


def test_flipped_bytes_inside_a_member_are_a_fault(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    container = ZipContainer(path)
    place = container.members()["train/a.tif"]
    content = bytearray(path.read_bytes())
    content[place[0] + 60] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(RecordFault):
        container.read(place, LIMIT)


def test_a_bomb_is_found_without_inflating_it(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/a.tif", bytes(50 * 2**20))
    container, place = damage_locator(path, "train/a.tif", size=60_000)
    tracemalloc.start()
    try:
        with pytest.raises(RecordFault, match="more than declared"):
            container.read(place, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cut", [1, 22, 100])
def test_a_truncated_zip_is_no_container_or_an_error(tmp_path, cut):
    path = write_zip(tmp_path / "a.zip")
    path.write_bytes(path.read_bytes()[:-cut])
    assert open_container(path) is None
    with pytest.raises(UserError, match=r"a\.zip"):
        ZipContainer(path).members()


@pytest.fixture(scope="module")
def sound_zip(tmp_path_factory) -> bytes:
    return write_zip(tmp_path_factory.mktemp("zip") / "a.zip").read_bytes()


@law
@given(data=st.data())
def test_fuzzed_zips_give_members_faults_or_a_user_error(sound_zip, tmp_path_factory, data):
    content = bytearray(sound_zip)
    # the directory and the local headers are where parsers break
    directory = sound_zip.index(b"PK\1\2")
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.one_of(st.integers(directory, len(content) - 1), st.integers(0, 100)))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "a.zip"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content)] * 4 + [len(content) - 30]))])
    container = ZipContainer(path)
    try:
        places = container.members().values()
    except UserError:
        return
    for place in places:
        try:
            container.read(place, LIMIT)
        except RecordFault:
            continue
