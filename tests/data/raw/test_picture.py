import io
import tracemalloc

import numpy as np
import picture_files as files
import pytest
from PIL import Image

from pcam_jax.data.raw.picture import decode_picture, picture_size
from pcam_jax.data.raw.record import RecordFault


def decode(content: bytes, size: tuple[int, int] = (20, 16), **options) -> tuple[np.ndarray, str]:
    out = np.full((size[1], size[0], 3), 99, np.uint8)
    return out, decode_picture(content, out, **options)


def test_a_plain_picture_comes_out_as_it_went_in():
    out, remark = decode(files.png(3))
    assert remark == ""
    assert np.array_equal(out, np.asarray(files.picture(seed=3)))


@pytest.mark.parametrize(
    ("content", "problem", "detail"),
    [
        (b"", "empty file", "zero bytes"),
        (files.png()[:200], "unreadable", ""),
        (files.jpeg(size=(20, 16))[:-200], "unreadable", "truncated"),
        (b"<!DOCTYPE html><html>", "unreadable", "web page"),
        (b"P6 nonsense", "unreadable", "not a picture"),
        (files.giant_png(), "too large", "2,500,000,000 pixels are more than 150,000,000"),
        (files.png(size=(21, 16)), "wrong size", "21x16 instead of 20x16"),
        (files.turned_jpeg(6, (16, 21)), "wrong size", "21x16 instead of 20x16"),
        (
            files.encoded(
                files.picture(), "TIFF", save_all=True, append_images=[files.picture(seed=1)]
            ),
            "several frames",
            "2 pictures",
        ),
        (files.encoded(Image.fromarray(np.ones((16, 20), np.float32)), "TIFF"), "unreadable", "floating"),
    ],
)  # fmt: skip
def test_unusable_pictures_are_faults(content, problem, detail):
    with pytest.raises(RecordFault) as fault:
        decode(content)
    assert fault.value.problem == problem
    assert detail in fault.value.detail.lower()


def test_a_giant_header_costs_no_memory():
    tracemalloc.start()
    for resize in (False, True):
        with pytest.raises(RecordFault, match="too large"):
            decode(files.giant_png(), resize=resize)
    # Pillow's own limit lies above ours: the smaller giant meets ours alone
    with pytest.raises(RecordFault, match="169,000,000 pixels are more than 150,000,000"):
        decode(files.giant_png(13_000), resize=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


class TestUnusualButUsable:
    def test_grey(self):
        out, remark = decode(files.png(mode="L"))
        assert remark == "grey"
        assert np.array_equal(out[..., 0], np.asarray(files.picture(mode="L")))
        assert np.array_equal(out[..., 0], out[..., 2])

    def test_transparency_is_laid_on_white(self):
        layered = files.picture(mode="RGBA")
        layered.putalpha(Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 16, 0).repeat(10, 1)))
        out, remark = decode(files.encoded(layered))
        assert remark == "transparency laid on white"
        assert (out[:, :10] == 255).all()
        assert np.array_equal(out[:, 10:], np.asarray(files.picture())[:, 10:])

    def test_palette(self):
        out, remark = decode(files.encoded(files.picture().quantize(255)))
        assert remark == ""
        assert np.abs(out.astype(int) - np.asarray(files.picture())).mean() < 4

    def test_16_bits_lose_the_lower_byte(self):
        values = np.random.default_rng(0).integers(0, 65536, (16, 20, 3)).astype(np.uint16)
        out, remark = decode(files.png_16_bit(values))
        assert remark == "16 bits reduced to 8"
        assert np.array_equal(out, values >> 8)
        grey = io.BytesIO()
        Image.fromarray(values[..., 0]).save(grey, "PNG")
        out, remark = decode(grey.getvalue())
        assert remark == "16 bits reduced to 8"
        assert np.array_equal(out[..., 1], values[..., 0] >> 8)

    def test_cmyk(self):
        out, remark = decode(files.jpeg(size=(20, 16), mode="CMYK", quality=95))
        assert remark == "CMYK converted"
        assert np.abs(out.astype(int) - np.asarray(files.picture())).mean() < 8

    @pytest.mark.parametrize("orientation", range(2, 9))
    def test_exif_orientation_is_applied(self, orientation):
        wide = orientation < 5
        content = files.turned_jpeg(orientation)
        out, remark = decode(content, (64, 48) if wide else (48, 64))
        assert remark == "turned as its EXIF says"
        assert picture_size(content) == out.shape[:2]
        flat = np.asarray(files.picture((64, 48))).astype(int)
        turned = {
            2: flat[:, ::-1], 3: flat[::-1, ::-1], 4: flat[::-1], 5: flat.swapaxes(0, 1),
            6: np.rot90(flat, -1), 7: flat[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(flat),
        }[orientation]  # fmt: skip
        assert np.abs(out - turned).mean() < 4


class TestResizing:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_filters_instead_of_picking_pixels(self, kind):
        """A fine chequerboard becomes grey; picking pixels would leave it black and white."""
        board = Image.fromarray((np.indices((640, 640)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
        out, _ = decode(files.encoded(board, kind), (40, 40), resize=True)
        assert np.abs(out.astype(int) - 128).max() < 12

    def test_a_reduced_jpeg_is_close_to_the_full_one(self):
        content = files.jpeg(size=(800, 600), quality=95)
        out, _ = decode(content, (50, 50), resize=True)
        full = Image.open(io.BytesIO(content)).resize((50, 50), Image.Resampling.LANCZOS)
        assert np.abs(out.astype(int) - np.asarray(full)).max() <= 4

    def test_fits(self):
        content = files.encoded(Image.fromarray(np.full((20, 40, 3), 200, np.uint8)))
        padded, _ = decode(content, (20, 20), resize=True, fit="pad")
        assert (padded[:4] == 0).all()
        assert (padded[6:14] == 200).all()
        assert (decode(content, (20, 20), resize=True, fit="crop")[0] == 200).all()
        assert (decode(content, (20, 20), resize=True)[0] == 200).all()

    def test_the_orientation_comes_before_the_size(self):
        out, _ = decode(files.turned_jpeg(6, (600, 300)), (30, 60), resize=True)
        upright = np.rot90(np.asarray(files.picture((600, 300))), -1)
        wanted = np.asarray(Image.fromarray(upright).resize((30, 60), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(out - wanted).mean() < 4
