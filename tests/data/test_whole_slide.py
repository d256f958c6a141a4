"""Big pictures by parts: every rectangle must be what the whole picture says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import PICTURE, write_pyramid

from pcam_jax.data.slide_view import SlideView
from pcam_jax.data.whole_slide import ArraySlide, TiffSlide, open_slide
from pcam_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib", "predictor": True},
        {"tile": None, "rowsperstrip": 7},
        {"tile": None},
        {"bigtiff": True},
    ],
    ids=["tiled", "deflate", "strips", "one strip", "bigtiff"],
)
def test_every_rectangle_is_that_of_the_picture(tmp_path: Path, options: dict[str, object]) -> None:
    big = {"bigtiff": True} if options.pop("bigtiff", False) else {}
    with tifffile.TiffWriter(tmp_path / "a.tif", **big) as file:
        file.write(PICTURE, **{"tile": (64, 48), "photometric": "rgb", **options})
    slide = open_slide(tmp_path / "a.tif")
    view, whole = SlideView(slide), SlideView(ArraySlide(PICTURE))
    mirrored = np.pad(PICTURE, ((90, 90), (90, 90), (0, 0)), mode="symmetric")
    for top, left, height, width in [
        (0, 0, 205, 301),
        (63, 47, 2, 2),
        (204, 300, 1, 1),
        (-90, -90, 385, 481),
    ]:
        expected = mirrored[top + 90 : top + 90 + height, left + 90 : left + 90 + width]
        np.testing.assert_array_equal(view.read(top, left, height, width), expected)
        np.testing.assert_array_equal(whole.read(top, left, height, width), expected)
    slide.close()


@pytest.mark.parametrize("mode", ["YCbCr", "RGB"])
def test_jpeg_strips_with_shared_tables(tmp_path: Path, mode: str) -> None:
    """As libtiff writes them: tables in a tag of their own, colours named by a tag."""
    Image.fromarray(PICTURE).convert(mode).save(tmp_path / "a.tif", compression="jpeg", quality=95)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page = file.pages[0]
        assert page.jpegtables
        assert len(page.dataoffsets) > 1
        assert page.photometric.name == mode.upper()
    slide = open_slide(tmp_path / "a.tif")
    assert isinstance(slide, TiffSlide)
    found = slide.read(0, 0, 0, 205, 301).astype(int)
    assert np.abs(found - PICTURE).mean() < 4
    assert np.abs(found - PICTURE).max() < 40
    np.testing.assert_array_equal(slide.read(0, 150, 7, 40, 50), found[150:190, 7:57])
    slide.close()


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    grey = PICTURE[..., 0]
    tifffile.imwrite(tmp_path / "grey.tif", grey, tile=(64, 48))
    alpha = np.where(np.arange(301) < 150, 255, 0).astype(np.uint8)
    layered = np.concatenate([PICTURE, np.broadcast_to(alpha[None, :, None], (205, 301, 1))], axis=2)
    tifffile.imwrite(
        tmp_path / "rgba.tif", layered, tile=(64, 48), photometric="rgb", extrasamples=["unassalpha"]
    )
    np.testing.assert_array_equal(
        open_slide(tmp_path / "grey.tif").read(0, 3, 5, 9, 9), grey[3:12, 5:14, None].repeat(3, 2)
    )
    found = open_slide(tmp_path / "rgba.tif").read(0, 0, 145, 4, 10)
    np.testing.assert_array_equal(found[:, :5], PICTURE[:4, 145:150])
    assert (found[:, 5:] == 255).all()


def test_missing_tiles_are_glass(tmp_path: Path) -> None:
    write_sparse_tiff(tmp_path / "a.tif", 256, {(0, 0): PICTURE[64:128, :64], (1, 2): PICTURE[:64, :64]})
    slide = open_slide(tmp_path / "a.tif")
    whole = slide.read(0, 0, 0, 256, 256)
    np.testing.assert_array_equal(whole[64:128, 128:192], PICTURE[:64, :64])
    np.testing.assert_array_equal(whole[:64, :64], PICTURE[64:128, :64])
    whole[64:128, 128:192] = whole[:64, :64] = 255
    assert (whole == 255).all()


def write_sparse_tiff(path: Path, length: int, tiles: dict[tuple[int, int], np.ndarray]) -> Path:
    """A square picture of ``length`` pixels of which only some tiles are there, (0, 0) among them."""
    side = next(iter(tiles.values())).shape[0]
    count = -(-length // side)

    def content() -> object:
        for row in range(count):
            for column in range(count):
                yield tiles.get((row, column))

    tifffile.imwrite(
        path, content(), shape=(length, length, 3), dtype="uint8", tile=(side, side), photometric="rgb",
        compression="zlib",
    )  # fmt: skip
    return path


def test_levels_and_resolution(tmp_path: Path) -> None:
    slide = open_slide(write_pyramid(tmp_path / "a.tif", PICTURE))
    assert [(level.height, level.width) for level in slide.levels] == [(205, 301), (103, 151), (52, 76)]
    assert slide.microns_per_pixel == pytest.approx(0.243, rel=1e-3)
    slide.close()


def test_printers_resolution_is_no_magnification(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", PICTURE, photometric="rgb", resolution=(72, 72), resolutionunit="INCH"
    )
    slide = open_slide(tmp_path / "a.tif")
    assert slide.microns_per_pixel is None


@pytest.mark.parametrize(
    ("description", "microns"),
    [("Aperio Image Library v1\n40000x30000|AppMag = 40|MPP = 0.2525", 0.2525), ("MPP = fog", None)],
)
def test_aperios_description(tmp_path: Path, description: str, microns: float | None) -> None:
    tifffile.imwrite(tmp_path / "a.tif", PICTURE, photometric="rgb", description=description, metadata=None)
    assert open_slide(tmp_path / "a.tif").microns_per_pixel == microns


def test_other_pictures(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png")
    np.testing.assert_array_equal(slide.read(0, 5, 6, 7, 8), PICTURE[5:12, 6:14])
    assert isinstance(slide, ArraySlide)


def test_openslide_reads_what_it_alone_knows(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    # OpenSlide takes a generic tiled TIFF whatever its suffix; .svslide leads to it
    path = write_pyramid(tmp_path / "a.svslide", PICTURE, compression="zlib")
    slide = open_slide(path)
    assert type(slide).__name__ == "OpenSlideFile"
    np.testing.assert_array_equal(slide.read(0, 11, 13, 60, 70), PICTURE[11:71, 13:83])
    slide.close()
    with pytest.raises(UserError, match="is not a slide that can be read"):
        open_slide(Path(__file__))


def broken(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"{name}.tif"
    if name == "16 bits":
        tifffile.imwrite(path, PICTURE.astype(np.uint16), photometric="rgb")
    elif name == "planar":
        tifffile.imwrite(path, np.moveaxis(PICTURE, -1, 0), photometric="rgb", planarconfig="separate")
    elif name == "stack":
        tifffile.imwrite(path, np.stack([PICTURE, PICTURE]), photometric="rgb")
    elif name == "cut":
        tifffile.imwrite(path, PICTURE, photometric="rgb", tile=(64, 48))
        path.write_bytes(path.read_bytes()[:-3000])
    elif name == "header":
        path.write_bytes(b"II*\0" + bytes(40))
    elif name == "garbage":
        tifffile.imwrite(path, PICTURE, photometric="rgb", tile=(64, 48), compression="zlib")
        content = bytearray(path.read_bytes())
        content[-2000:] = bytes(2000)
        path.write_bytes(content)
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("16 bits", "has 16 bits a sample"),
        ("planar", "plane by plane"),
        ("stack", "a stack of 2 pictures"),
        ("cut", "ends too early"),
        ("header", "cannot be read as a TIFF file"),
        ("garbage", "cannot be decoded"),
        ("empty", "cannot be used"),
        ("folder", "is a folder"),
        ("missing", "There is no"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, words: str) -> None:
    path = broken(tmp_path, name)
    with pytest.raises(UserError, match=words):
        open_slide(path).read(0, 0, 0, 205, 301)
