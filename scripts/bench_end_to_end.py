"""Images/s of whole epochs through the train command, beside the bare step and Keras's fit on PNG folders.

    python scripts/bench_end_to_end.py --models pcam_model1,pcam_model4 --peers keras --output end-to-end
    python scripts/bench_end_to_end.py --counts 10000,50000,220025 --epochs 1 --rounds 1 --predict --output full-size

The contenders of a cell take turns, round by round. Each round of the train command is a run of its own in a
process of its own, of which the last epoch counts: its training alone, and all of it with validation, checkpoint
and history. With several counts the table shows whether the cost grows linearly, with --predict also that of the
predict command over the whole store. A run of 300 patches before them fills the compilation cache.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from throughput import recipes, record
from throughput.case import Case
from throughput.keras_fit import MISSING
from throughput.memory import MemoryWatch, run_watched
from throughput.rounds import Worker

import pcam_jax
from pcam_jax.data.sample import write_sample_store

VALIDATION_SHARE = 0.1


def main() -> None:
    """Measure each cell and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="train on this store instead of generated ones")
    parser.add_argument("--counts", default="10000", help="labelled patches of the generated stores")
    parser.add_argument("--models", default="pcam_model1,pcam_model4", help="nets, separated by commas")
    parser.add_argument("--batch", type=int, default=32, help="batch size")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of a run; the last is measured")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each contender, in turns")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a round of the bare step")
    parser.add_argument("--predict", action="store_true", help="predict the whole store after each run")
    parser.add_argument("--peers", default="", help="keras adds Keras's fit on PNG folders")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        few = _generated(Path(scratch), 300)
        for model in options.models.split(","):
            _train(options, few, model, Path(scratch))
        for count in [0] if options.store else [int(count) for count in options.counts.split(",")]:
            store = options.store or _generated(Path(scratch), count)
            for model in options.models.split(","):
                cell = _cell(options, store, model, Path(scratch))
                print(markdown(cell).split("\n", 2)[2] if results else markdown(cell), flush=True)
                results += cell
    versions = {name: version(name) for name in ("jax", "grain")}
    record.write(options.output, versions, {"task": "end to end", "results": results}, markdown(results))


def _generated(scratch: Path, count: int) -> Path:
    path = scratch / f"store-{count}"
    return write_sample_store(path, count=count, test_count=1, workers=2).path


def _cell(options: argparse.Namespace, store: Path, model: str, scratch: Path) -> list[dict[str, Any]]:
    """One net on one store: a record for each contender."""
    bare = Worker(Case("ours", "train", model, options.batch, "float32"))
    bare.go(options.seconds / 4)
    bare.speeds.clear()
    peers = []
    if "keras" in options.peers.split(","):
        peers = [KerasFit(store, model, options.batch, scratch, reader) for reader in KerasFit.READERS]
    epochs: list[dict[str, float]] = []
    for number in range(options.rounds):
        turns = [
            lambda: bare.go(options.seconds),
            lambda: epochs.append(_train(options, store, model, scratch)),
        ]
        turns += [peer.epoch for peer in peers]
        for turn in turns if number % 2 == 0 else reversed(turns):
            turn()
    bare.stop()
    facts = {"model": model, "images": len(pcam_jax.open_store(store)), "batch": options.batch}
    step = statistics.median(bare.speeds)
    ours = _median(epochs)
    rows = [
        {**facts, "contender": "bare step", "images_per_second": step, "rounds": bare.speeds},
        {**facts, "contender": "pcam_jax.train", "of_bare_step": ours["images_per_second"] / step, **ours},
    ]
    if options.predict:
        rows.append(
            {
                **facts,
                "contender": "pcam_jax.predict",
                "images_per_second": ours["predict_images_per_second"],
                "command_seconds": ours["predict_seconds"],
                "anonymous_mib": ours["predict_anonymous_mib"],
                "rounds": [entry["predict_images_per_second"] for entry in epochs],
            }
        )
    for peer in peers:
        peer.stop()
        rows.append({**facts, "contender": peer.name, **peer.result(ours["images_per_second"])})
    return rows


def _train(options: argparse.Namespace, store: Path, model: str, scratch: Path) -> dict[str, float]:
    """One run of the train command; figures of its last epoch, and the most anonymous memory it held."""
    with tempfile.TemporaryDirectory(dir=scratch) as workdir:
        command = [
            sys.executable,
            "-m",
            "pcam_jax.train",
            "--data.store",
            str(store),
            "--workdir",
            f"{workdir}/run",
        ]
        command += ["--model.name", model, "--train.batch-size", str(options.batch)]
        command += ["--train.epochs", str(options.epochs), "--optimizer.schedule", "constant"]
        command += ["--data.validation-fraction", str(VALIDATION_SHARE)]
        command += ["--train.cpu-devices", str(recipes.cpu_devices(model))]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        watch = MemoryWatch(process.pid)
        watch.start()
        spoken = _timed_lines(process)
        if process.wait() != 0:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        watch.join()
        seconds = time.monotonic() - began
        with open(f"{workdir}/run/history.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        predicted = _predict(Path(workdir), store) if options.predict else {}
    stamps = [moment for moment, line in spoken if line.startswith("epoch")]
    last = rows[-1]
    return {
        "images_per_second": float(last["images_per_second"]),
        "wait_share": float(last["wait_share"]),
        "epoch_seconds": stamps[-1] - stamps[-2] if len(stamps) > 1 else float(last["seconds"]),
        "train_seconds": float(last["seconds"]),
        "command_seconds": seconds,
        "anonymous_mib": watch.highest,
        **predicted,
    }


def _predict(workdir: Path, store: Path) -> dict[str, float]:
    """The predict command over a whole store, from its start to its end."""
    command = [sys.executable, "-m", "pcam_jax.predict", str(workdir / "run"), str(store)]
    command += ["--split", "all", "--output", str(workdir / "probs.csv")]
    began = time.monotonic()
    anonymous = run_watched(command)
    seconds = time.monotonic() - began
    return {
        "predict_seconds": seconds,
        "predict_images_per_second": len(pcam_jax.open_store(store)) / seconds,
        "predict_anonymous_mib": anonymous,
    }


def _timed_lines(process: subprocess.Popen[str]) -> list[tuple[float, str]]:
    """What the process says, with the moment of each line; its progress bar is thrown away."""
    assert process.stdout is not None
    assert process.stderr is not None
    drain = threading.Thread(target=process.stderr.read, daemon=True)
    drain.start()
    return [(time.monotonic(), line) for line in process.stdout]


class KerasFit:
    """Keras's `fit` the way the published notebooks read: PNG files in a folder for each class."""

    READERS: ClassVar = {"generator": "ImageDataGenerator", "dataset": "image_dataset_from_directory"}

    def __init__(self, store: Path, model: str, batch: int, scratch: Path, reader: str) -> None:
        self.name = f"Keras fit, PNG folders by {self.READERS[reader]}"
        folder = scratch / f"png-{store.name}"
        if not folder.exists():
            _write_pictures(store, folder)
        script = Path(__file__).parent / "throughput/keras_fit.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(folder), model, str(batch), reader],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.speeds: list[float] = []
        self.error = ""
        self.epoch()
        self.speeds.clear()

    def epoch(self) -> None:
        """One epoch."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self.error:
            return
        try:
            self._process.stdin.write("epoch\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            self.speeds.append(float(line))
        elif self._process.wait() == MISSING:
            self.error = "keras or tensorflow is not installed: pip install 'pcam-jax[peers]'"
        else:
            self.error = f"its process ended with {self._process.returncode}"

    def stop(self) -> None:
        """End its process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def result(self, ours: float) -> dict[str, Any]:
        """Its row."""
        if self.error:
            return {"error": self.error}
        median = statistics.median(self.speeds)
        return {"images_per_second": median, "ours_over_this": ours / median, "rounds": self.speeds}


def _write_pictures(path: Path, folder: Path, most: int = 10_000) -> None:
    """The first labelled images of a store as PNG files in a folder for each class."""
    store = pcam_jax.open_store(path)
    for position in [p for p in range(len(store)) if store.splits[p] != "test"][:most]:
        place = folder / str(store.labels[position])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(store.gather([position])[0]).save(place / f"{position}.png")


def _median(rounds: list[dict[str, float]]) -> dict[str, Any]:
    figures = {name: statistics.median(entry[name] for entry in rounds) for name in rounds[0]}
    return {**figures, "rounds": [entry["images_per_second"] for entry in rounds]}


def markdown(results: list[dict[str, Any]]) -> str:
    """The results as a table."""
    lines = [
        "| net | images | contender | images/s | lowest-highest | of bare step | pcam_jax / this | waited | "
        "epoch with validation, s | whole command, s | RssAnon, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        head = f"| {r['model']} | {r['images']:,} | {r['contender']} | "
        if "error" in r:
            lines.append(f"{head}{r['error']} | | | | | | | |")
            continue
        cells = [
            f"{r['images_per_second']:.0f}",
            f"{min(r['rounds']):.0f}-{max(r['rounds']):.0f}",
            f"{r['of_bare_step']:.2f}" if "of_bare_step" in r else "",
            f"{r['ours_over_this']:.1f}" if "ours_over_this" in r else "",
            f"{r['wait_share']:.1%}" if "wait_share" in r else "",
            f"{r['epoch_seconds']:.1f}" if "epoch_seconds" in r else "",
            f"{r['command_seconds']:.0f}" if "command_seconds" in r else "",
            f"{r['anonymous_mib']:.0f}" if "anonymous_mib" in r else "",
        ]
        lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
