from __future__ import annotations

import os
import zlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pcam_jax.runtime.compilation_cache import is_whole, remove_broken_entries


@given(st.binary(max_size=300), st.floats(0, 0.999))
def test_a_cut_entry_is_not_whole(content: bytes, place: float) -> None:
    entry = zlib.compress(content)
    assert is_whole(entry)
    assert not is_whole(entry[: int(place * len(entry))])


def test_zstandard_is_told_by_its_mark() -> None:
    # whether or not it can be read here, it is not taken for broken zlib without being tried
    assert is_whole(bytes.fromhex("28b52ffd0400090000616263b0f9c6a5")) in (True, False)


def test_half_written_entries_go_and_whole_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "a-cache").write_bytes(zlib.compress(b"program"))
    (tmp_path / "b-cache").write_bytes(zlib.compress(b"program")[:-3])
    (tmp_path / "c-cache").write_bytes(b"")
    (tmp_path / "notes").write_bytes(b"mine")
    assert remove_broken_entries(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == [".checked", "a-cache", "notes"]


def test_old_entries_are_looked_at_once(tmp_path: Path) -> None:
    assert remove_broken_entries(tmp_path) == 0
    for name, age in (("old-cache", -1000), ("new-cache", 1)):
        (tmp_path / name).write_bytes(b"?")
        stamp = (tmp_path / ".checked").stat().st_mtime + age
        os.utime(tmp_path / name, (stamp, stamp))
    assert remove_broken_entries(tmp_path) == 1
    assert (tmp_path / "old-cache").exists()


def test_no_folder_is_no_matter(tmp_path: Path) -> None:
    assert remove_broken_entries(tmp_path / "none") == 0
