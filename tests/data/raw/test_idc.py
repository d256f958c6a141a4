"""The reader of breast-histopathology-images: what it finds, and what it says of broken sources."""

import shutil

import numpy as np
import picture_files as files
import pytest
from picture_sources import prepare, problems
from PIL import Image

from pcam_jax.data.sample_sources import write_idc_tree
from pcam_jax.runtime.errors import UserError


def test_patients_are_groups_and_edge_tiles_are_mirrored_and_counted(tmp_path):
    source = write_idc_tree(tmp_path / "idc", patients=3, tiles=8, edge_share=0.2)
    store, told = prepare(source, tmp_path)
    assert store.image_shape == (50, 50, 3)
    assert store.class_names == ("benign", "idc")
    sizes = {path.stem: np.asarray(Image.open(path)) for path in source.rglob("*.png")}
    assert sorted(sizes) == list(store.ids)
    assert set(store.groups) == {path.name for path in source.iterdir()}
    for row, name in enumerate(store.ids):
        tile = sizes[name]
        assert name.endswith(f"class{store.labels[row]}")
        assert np.array_equal(store.image(row)[:, : tile.shape[1]], tile)
        assert f"_x{store.index['x'][row]}_y{store.index['y'][row]}_" in name
    edges = [name for name, tile in sizes.items() if tile.shape != (50, 50, 3)]
    assert len(edges) > 0
    assert f"{len(edges)} x edge tile padded" in told[-1]
    assert problems(tmp_path) == [("edge tile padded", name) for name in sorted(edges)]
    mirrored = store.image(list(store.ids).index(edges[0]))
    width = sizes[edges[0]].shape[1]
    assert np.array_equal(mirrored[:, width], sizes[edges[0]][:, -1])


def test_edge_tiles_can_be_skipped(tmp_path):
    source = write_idc_tree(tmp_path / "idc", patients=3, tiles=8, edge_share=0.2)
    edges = sum(np.asarray(Image.open(path)).shape != (50, 50, 3) for path in source.rglob("*.png"))
    store, told = prepare(source, tmp_path, edges="skip")
    assert len(store) == 24 - edges
    assert told == [f"{edges} edge tiles are skipped."]


def test_the_second_copy_in_kaggles_archive_is_left_aside(tmp_path):
    source = write_idc_tree(tmp_path / "idc", patients=2, tiles=4, size=24)
    shutil.copytree(source, tmp_path / "copy")
    shutil.move(tmp_path / "copy", source / "IDC_regular_ps50_idx5")
    store, told = prepare(source, tmp_path)
    assert len(store) == 8
    assert "8 tiles are there twice" in told[0]


def test_a_resumed_run_counts_the_padded_tiles_once(tmp_path, monkeypatch):
    from pcam_jax.data.partial import PartialStore

    source = write_idc_tree(tmp_path / "idc", patients=3, tiles=8, edge_share=0.3)
    whole, _ = prepare(source, tmp_path / "a", images_per_shard=4)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialStore, "mark_done", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "b", images_per_shard=4)
    resumed, told = prepare(source, tmp_path / "b", images_per_shard=4)
    assert "Going on where an earlier run stopped." in told
    assert resumed.manifest.prepare["remarks"] == whole.manifest.prepare["remarks"]


def test_broken_tiles_are_named(tmp_path):
    source = write_idc_tree(tmp_path / "idc", patients=2, tiles=6, size=24, edge_share=0)
    whole = sorted(source.rglob("*.png"))
    whole[0].write_bytes(whole[0].read_bytes()[:100])
    whole[1].write_bytes(b"")
    whole[2].write_bytes(files.giant_png())
    whole[3].rename(whole[3].with_name("tile.png"))
    whole[4].write_bytes(files.png(size=(30, 30)))
    label = whole[5].parent.name
    other = source / whole[5].parent.parent.name / str(1 - int(label))
    other.mkdir(exist_ok=True)
    whole[5].rename(other / whole[5].name)
    with pytest.raises(UserError, match=r"1 x contradictory label .*; see .*--on-error skip"):
        prepare(source, tmp_path)
    found = {name: problem for problem, name in problems(tmp_path)}
    assert found == {
        whole[0].stem: "unreadable",
        whole[1].stem: "empty file",
        whole[2].stem: "too large",
        "tile": "bad name",
        whole[4].stem: "wrong size",
        whole[5].stem: "contradictory label",
    }
    assert len(prepare(source, tmp_path, on_error="skip")[0]) == 6
