"""Maps over slides from the command line: what is written, what a kill costs, how much memory it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from pcam_jax import predict
from pcam_jax.inference import averaging
from pcam_jax.inference.averaging import mean_probabilities
from pcam_jax.inference.predictor import Predictor
from pcam_jax.inference.tiles import tile_probabilities
from pcam_jax.predict import main
from pcam_jax.runtime.errors import UserError

Verb = Callable[..., subprocess.CompletedProcess[str]]


def tissue(height: int, width: int, seed: int = 0) -> np.ndarray:
    picture = np.random.default_rng(seed).integers(0, 120, (height, width, 3), dtype=np.uint8)
    return picture + np.array([120, 20, 90], np.uint8)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """Tissue in the midst of glass, with a resolution."""
    picture = np.full((700, 900, 3), 244, np.uint8)
    picture[120:480, 240:720] = tissue(360, 480)
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path, picture, tile=(128, 128), photometric="rgb", compression="zlib",
        resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "slide.tif")


def test_a_map_from_the_command_line(verb: Verb, tiny_run: Path, slide: Path, tmp_path: Path) -> None:
    done = verb("predict", tiny_run, slide, "--tiles", "--output", tmp_path / "map.png")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "900 x 700 pixels of 0.5 µm (level 0 of 1)." in done.stdout
    assert "1,340 of 4,425 tiles to look at, the rest is glass." in done.stdout
    assert f"Wrote {tmp_path / 'map'}.png, map.csv and map.json." in done.stdout
    assert files(tmp_path) == ["map.csv", "map.json", "map.png"]
    with tifffile.TiffFile(slide) as file:
        expected = tile_probabilities(Predictor.load(tiny_run), file.asarray())
    rows = pd.read_csv(tmp_path / "map.csv")
    assert list(rows) == ["x", "y", "prob"]
    order = np.lexsort((expected.tiles[:, 1], expected.tiles[:, 0]))
    np.testing.assert_array_equal(rows[["y", "x"]], expected.corners()[order])
    np.testing.assert_array_equal(rows["prob"].to_numpy(np.float32), expected.probs[order])
    facts = json.loads((tmp_path / "map.json").read_text())
    assert (facts["tiles"], facts["tiles_of_glass"], facts["stride"]) == (1340, 3085, [12, 12])
    assert facts["tiles_at_or_above_threshold"] == int((rows["prob"] >= facts["threshold"]).sum())
    picture = np.asarray(Image.open(tmp_path / "map.png"))
    assert picture.shape[0] > 700
    np.testing.assert_array_equal(picture[:100, :200], 244)  # glass stays as it is
    assert np.ptp(picture[700:].reshape(-1, 3), axis=0).min() > 100  # the legend


def test_options_of_resolution_overlap_and_mask(tiny_run: Path, slide: Path, tmp_path: Path) -> None:
    for name, options, tiles in (
        ("half", ["--mpp", "1.0"], 370),
        ("dense", ["--stride", "6", "--blend", "smooth"], 5225),
        ("all", ["--no-tissue-mask", "--level", "0", "--tta", "d4"], 4425),
    ):
        main([str(tiny_run), str(slide), "--tiles", "--output", str(tmp_path / name), *options])
        rows = pd.read_csv(tmp_path / f"{name}.csv")
        assert len(rows) == tiles
        assert rows["x"].max() < 900
    half = json.loads((tmp_path / "half.json").read_text())
    assert half["full_resolution_pixels_per_pixel"] == pytest.approx(2)
    assert half["size"] == {"height": 350, "width": 450}


def test_parts_by_several_commands(
    tiny_run: Path, slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_run), str(slide), "--tiles", "--stride", "6", "--output"]
    main([*arguments, str(tmp_path / "whole")])
    main([*arguments, str(tmp_path / "parts"), "--shard", "0/2"])
    assert "Part 0/2 is done; 1 pieces of others are missing." in capsys.readouterr().out
    main([*arguments, str(tmp_path / "parts"), "--shard", "1/2"])
    for suffix in ("csv", "png"):
        assert (tmp_path / f"whole.{suffix}").read_bytes() == (tmp_path / f"parts.{suffix}").read_bytes()


def test_stopped_and_killed_it_goes_on(
    tiny_run: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(tiny_run), str(slide), "--tiles", "--output"]
    main([*arguments, str(tmp_path / "whole")])
    monkeypatch.setattr(predict, "_TILES_PER_PART", 256)
    command = [sys.executable, "-c", _SLOW, *arguments, str(tmp_path / "map")]
    # as many devices as this process has, since parts made on others are not taken up
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "JAX_NUM_CPU_DEVICES": "1"}
    parts = tmp_path / "map.parts"
    for signum in (signal.SIGKILL, signal.SIGTERM):
        before = set(os.listdir(parts)) if parts.exists() else set()
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        deadline = time.monotonic() + 120
        while not (parts.exists() and {name for name in os.listdir(parts) if name.endswith("npz")} - before):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signum)
        said = process.communicate(timeout=60)[1]
        if signum == signal.SIGTERM:
            assert process.returncode == 143
            assert "the same command goes on from there" in said
        assert not (tmp_path / "map.csv").exists()
    kept = sum(len(np.load(path)["probs"]) for path in parts.glob("*.npz"))
    assert 256 <= kept < 1340
    made = []
    monkeypatch.setattr(
        averaging, "mean_probabilities", lambda *rest: made.append(len(rest[2])) or mean_probabilities(*rest)
    )
    main([*arguments, str(tmp_path / "map")])
    assert kept + sum(made) == 1340  # nothing twice
    assert not parts.exists()
    assert (tmp_path / "map.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert (tmp_path / "map.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


# each part takes a moment, so that a signal finds the command between two of them
_SLOW = """
import sys, time
import tiny
tiny.register()
from pcam_jax import predict
from pcam_jax.inference import parts
from pcam_jax.runtime.command import run_command
predict._TILES_PER_PART = 256
make = parts.Parts.make
parts.Parts.make = lambda self, part, work: (make(self, part, work), time.sleep(0.4))[0]
run_command(predict.main, sys.argv[1:])
"""


def test_a_changed_slide_is_not_mixed_with_the_old(
    tiny_run: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "_TILES_PER_PART", 256)
    arguments = [str(tiny_run), str(slide), "--tiles", "--output", str(tmp_path / "map")]
    main([*arguments, "--shard", "0/2"])
    picture = np.full((700, 900, 3), 244, np.uint8)
    picture[120:480, 240:720] = tissue(360, 480, seed=1)
    tifffile.imwrite(slide, picture, tile=(128, 128), photometric="rgb")
    main(arguments)
    rows = pd.read_csv(tmp_path / "map.csv")
    expected = tile_probabilities(Predictor.load(tiny_run), picture)
    order = np.lexsort((expected.tiles[:, 1], expected.tiles[:, 0]))
    np.testing.assert_array_equal(rows["prob"].to_numpy(np.float32), expected.probs[order])


def test_a_slide_of_glass(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((50, 80, 3), 250, np.uint8)).save(tmp_path / "glass.png")
    main([str(tiny_run), str(tmp_path / "glass.png"), "--tiles", "--output", str(tmp_path / "map")])
    assert (tmp_path / "map.csv").read_text() == "x,y,prob\n"
    assert (tmp_path / "map.png").is_file()
    assert "0 of 35 tiles to look at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stride", "5"], "--stride is 5: it must divide 12"),
        (["--blend", "hard"], "--blend is 'hard'"),
        (["--level", "1"], "has levels 0 to 0, and no level 1"),
        (["--level", "0", "--mpp", "1"], "Give --level or --mpp, not both"),
        (["--mpp", "0.1"], "has 0.5 µm a pixel at best"),
        (["--split", "all"], "--split does not go with --tiles"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(
    tiny_run: Path, slide: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        main([str(tiny_run), str(slide), "--tiles", "--output", str(tmp_path / "map"), *arguments])
    assert files(tmp_path) == []


def test_options_of_tiles_without_tiles(tiny_run: Path, tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tissue-mask needs --tiles"):
        main([str(tiny_run), str(tiny_store), "--output", str(tmp_path / "a.csv"), "--no-tissue-mask"])


def test_memory_does_not_grow_with_the_slide(tiny_run: Path, tmp_path: Path) -> None:
    """20,000 x 20,000 pixels are 1.2 GB; what the process allocates stays below a sixth of that."""
    side, count = 256, 79
    piece = tissue(side, side)

    def content() -> object:
        for row in range(count):
            for column in range(count):
                # tissue in two rows of tiles across the whole slide, and the first tile
                yield piece if row in (30, 31) or row == column == 0 else None

    path = tmp_path / "huge.tif"
    tifffile.imwrite(
        path, content(), shape=(20_000, 20_000, 3), dtype="uint8", tile=(side, side), photometric="rgb",
        compression="zlib",
    )  # fmt: skip
    small = tmp_path / "small.png"
    Image.fromarray(tissue(300, 300)).save(small)
    command = [sys.executable, "-c", _MEASURED, tiny_run, small, path, tmp_path / "map"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split("\n")[-2].split())
    facts = json.loads((tmp_path / "map.json").read_text())
    assert facts["tiles"] > 20_000
    assert peak - before < 200 * 2**20


# a small picture first, so that compiled programs and pools of threads are no part of the difference
_MEASURED = """
import sys, threading
import tiny
tiny.register()
from pcam_jax.predict import main

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

run, small, huge, output = sys.argv[1:]
main([run, small, "--tiles", "--output", output + "-small"])
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
main([run, huge, "--tiles", "--stride", "12", "--output", output])
done.set()
watcher.join()
print(before, peak)
"""
