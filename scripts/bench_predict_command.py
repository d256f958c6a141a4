"""Images/s of the whole predict command, plain and averaged over the symmetries, beside the bare forward pass.

    python scripts/bench_predict_command.py --models pcam_model1,pcam_model4 --output predict-command

The contenders take turns, round by round. Each round of the command is a process of its own that starts, restores,
compiles from the cache, reads, predicts and writes, on a generated test split as large as PatchCamelyon's on Kaggle.
A prediction of few patches before them fills the cache.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from throughput import record
from throughput.case import Case
from throughput.memory import run_watched
from throughput.rounds import Worker

from pcam_jax.data.sample import write_sample_store

KAGGLE_TEST_PATCHES = 57_458


def main() -> None:
    """Measure each net and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=KAGGLE_TEST_PATCHES, help="test patches to predict")
    parser.add_argument("--models", default="pcam_model1,pcam_model4", help="nets, separated by commas")
    parser.add_argument("--tta", default="none,d4", choices=("none", "none,d4"), help="what to predict with")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each contender, in turns")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a round of the bare step")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        few, many = (
            write_sample_store(Path(scratch) / name, count=64, test_count=count, workers=2).path
            for name, count in (("few", 64), ("many", options.count))
        )
        for model in options.models.split(","):
            results += _net(options, few, many, model, Path(scratch))
            versions = {name: version(name) for name in ("pcam-jax", "jax")}
            facts = {"task": "predict command", "results": results}
            record.write(options.output, versions, facts, markdown(results))
    print(markdown(results))


def _net(
    options: argparse.Namespace, few: Path, many: Path, model: str, scratch: Path
) -> list[dict[str, Any]]:
    """A record for each contender."""
    run = scratch / f"run-{model}"
    recipe = ["--data.store", str(few), "--model.name", model, "--train.epochs", "1"]
    _finished("train", *recipe, "--train.batch-size", "16", "--workdir", str(run))
    bare = Worker(Case("ours", "predict", model, 256, "float32"))
    rounds: dict[str, list[dict[str, float]]] = {tta: [] for tta in options.tta.split(",")}

    def command(tta: str, store: Path = many) -> None:
        words = ["predict", str(run), str(store), "--tta", tta, "--output", str(scratch / "probs.csv")]
        began = time.monotonic()
        anonymous = _finished(*words)
        seconds = time.monotonic() - began
        rounds[tta].append(
            {"images_per_second": options.count / seconds, "seconds": seconds, "anonymous_mib": anonymous}
        )

    bare.go(options.seconds / 4)
    for tta, entries in rounds.items():
        command(tta, few)
        entries.clear()
    bare.speeds.clear()
    turns = [lambda: bare.go(options.seconds), *(functools.partial(command, tta) for tta in rounds)]
    for number in range(options.rounds):
        for turn in turns if number % 2 == 0 else reversed(turns):
            turn()
    bare.stop()
    step = statistics.median(bare.speeds)
    facts = {"model": model, "images": options.count}
    results = [{**facts, "contender": "bare forward pass", "images_per_second": step, "rounds": bare.speeds}]
    for tta, entries in rounds.items():
        medians = {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        speeds = [entry["images_per_second"] for entry in entries]
        if tta == "none":
            plain = medians["seconds"]
            beside = {"contender": "predict", "of_bare": medians["images_per_second"] / step}
        else:
            beside = {"contender": f"predict --tta {tta}", "times_plain": medians["seconds"] / plain}
        results.append({**facts, **medians, **beside, "rounds": speeds})
    return results


def _finished(*words: str) -> float:
    return run_watched([sys.executable, "-m", "pcam_jax", *words])


def markdown(results: list[dict[str, Any]]) -> str:
    """The results as a table."""
    lines = [
        "| net | images | contender | images/s | lowest-highest | of bare | times plain | seconds | RssAnon, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = [
            r["model"],
            f"{r['images']:,}",
            r["contender"],
            f"{r['images_per_second']:.0f}",
            f"{min(r['rounds']):.0f}-{max(r['rounds']):.0f}",
            f"{r['of_bare']:.2f}" if "of_bare" in r else "",
            f"{r['times_plain']:.2f}" if "times_plain" in r else "",
            f"{r['seconds']:.1f}" if "seconds" in r else "",
            f"{r['anonymous_mib']:.0f}" if "anonymous_mib" in r else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
