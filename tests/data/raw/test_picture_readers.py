"""What holds for every reader of picture files: layouts are told apart, archives are as good as folders."""

import shutil
import tarfile

import picture_files as files
import pytest
from picture_sources import packed, prepare, problems, write

from pcam_jax.data.raw import find_reader
from pcam_jax.data.sample_sources import write_idc_tree, write_isic_folder
from pcam_jax.runtime.errors import UserError


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_every_archive_gives_the_folders_store(tmp_path, kind, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    source = write_idc_tree(tmp_path / "idc", patients=2, tiles=4, size=24)
    plain, _ = prepare(source, tmp_path / "a")
    archived, _ = prepare(packed(source, kind), tmp_path / "b")
    assert archived.digest == plain.digest
    assert list(temporary.iterdir()) == []


def test_layouts_are_told_apart(tmp_path):
    write_idc_tree(tmp_path / "idc", patients=2, tiles=2, size=24)
    write_isic_folder(tmp_path / "isic", count=4, patients=2, width=60, test_count=0)
    write(tmp_path / "folders", {"a/1.png": files.png(), "b/2.png": files.png()})
    write(tmp_path / "table", {"train/1.png": files.png(), "test/2.png": files.png(), "t.csv": b"id,label\n"})
    for name in ("idc", "isic", "folders", "table"):
        assert find_reader(tmp_path / name).name == name
    for name in ("one", "none"):
        write(tmp_path / name, {"a/1.png" if name == "one" else "x.txt": files.png()})
        with pytest.raises(UserError, match="is of no known layout"):
            find_reader(tmp_path / name)


def test_a_damaged_tar_is_said_in_a_sentence(tmp_path):
    source = write_idc_tree(tmp_path / "idc", patients=2, tiles=4, size=24)
    for kind in ("tar", "tar.gz"):
        archive = packed(source, kind)
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size * 2 // 3])
        with pytest.raises(UserError, match=r"damaged|beyond the end|unreadable"):
            prepare(archive, tmp_path)


def test_a_flipped_bit_in_a_compressed_tar_is_said_in_a_sentence(tmp_path):
    archive = packed(write(tmp_path / "set", {"a/1.png": files.png(), "b/2.png": files.png(1)}), "tar.gz")
    sound, said = archive.read_bytes(), set()
    for at in range(300, len(sound) - 8, 97):
        archive.write_bytes(sound[:at] + bytes([sound[at] ^ 64]) + sound[at + 1 :])
        try:
            prepare(archive, tmp_path)
        except UserError as error:
            said.add(str(error).split("(")[0])
    assert any("is damaged" in sentence for sentence in said)


def test_a_bomb_fills_no_disk(tmp_path, monkeypatch):
    """A gz of a megabyte that would take a gigabyte, where 100 MB are free."""
    import gzip
    import tempfile

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    real = shutil.disk_usage(tmp_path)

    def usage(path):
        written = sum(file.stat().st_size for file in (tmp_path / "tmp").iterdir())
        return real._replace(free=100 * 2**20 - written)

    monkeypatch.setattr("shutil.disk_usage", usage)
    with (
        gzip.open(tmp_path / "set.tar.gz", "wb", compresslevel=1) as file,
        tarfile.open(fileobj=file, mode="w") as archive,
    ):
        for name in ("a/1.png", "b/2.png"):
            member = tarfile.TarInfo(name)
            member.size = 2**29
            archive.addfile(member, Zeros(2**29))
    with pytest.raises(UserError, match="needs more temporary space than"):
        prepare(tmp_path / "set.tar.gz", tmp_path)
    assert not list((tmp_path / "tmp").iterdir())


class Zeros:
    """A file of zeros."""

    def __init__(self, size):
        self.left = size

    def read(self, count):
        count = min(count, self.left)
        self.left -= count
        return bytes(count)


def test_a_tar_with_links_and_repeats(tmp_path):
    source = write(tmp_path / "set", {"a/1.png": files.png(), "b/2.png": files.png(1)})
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(source, arcname="set")
        archive.add(source / "a/1.png", arcname="set/a/1.png")
        link = tarfile.TarInfo("set/a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        archive.addfile(link)
    with pytest.raises(UserError):
        prepare(tmp_path / "set.tar", tmp_path)
    assert sorted(problems(tmp_path)) == [("duplicate file", "1"), ("not a plain file", "link")]
    assert len(prepare(tmp_path / "set.tar", tmp_path, on_error="skip")[0]) == 2


def test_a_full_temporary_folder_is_said_before_anything_is_written(tmp_path, monkeypatch):
    archive = packed(write(tmp_path / "set", {"a/1.png": files.png(), "b/2.png": files.png()}), "tar.gz")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"temporary space.*set TMPDIR"):
        prepare(archive, tmp_path)
