"""Images/s of the loaders beside the bare gather they are made of, warm and cold, with memory and waiting.

    python scripts/bench_loader.py --output loader
    python scripts/bench_loader.py --store data/pcam --batch 256 --output loader

Contenders take turns, round by round, in one process. "cold" rounds drop the store from the page cache first
(posix_fadvise DONTNEED), "waiting" rounds consume a batch every --step-ms milliseconds and report which share of
the time the consumer waited. Medians are reported, with the lowest and highest round.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from throughput import record

from pcam_jax.data.loader import EvalLoader, TrainLoader
from pcam_jax.data.order import TrainOrder
from pcam_jax.data.store import Store, open_store, write_store

MIB = 2**20


def make_store(path: Path, count: int, size: int) -> Store:
    """A store of random pixels: what they show makes no difference to reading them."""

    def images() -> Iterator[np.ndarray]:
        for begin in range(0, count, 500):
            generator = np.random.default_rng(begin)
            yield generator.integers(0, 256, (min(500, count - begin), size, size, 3), np.uint8)

    index = pd.DataFrame({"id": [str(n) for n in range(count)], "label": np.arange(count) % 2})
    return write_store(path, images(), index, ("normal", "tumour"))


def drop_from_memory(store: Store) -> None:
    for shard in store.manifest.shards:
        descriptor = os.open(store.path / shard.file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_into_memory(store: Store) -> None:
    """Through the mapping itself, so that its page tables are filled as after a first epoch."""
    buffer = np.empty((500, *store.image_shape), np.uint8)
    for begin in range(0, len(store) - 500, 500):
        store.gather(np.arange(begin, begin + 500), out=buffer)


def anonymous_mib() -> float:
    """Memory that is this process's own, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


class MemoryWatch(threading.Thread):
    """The largest RssAnon while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = anonymous_mib()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.highest = max(self.highest, anonymous_mib())

    def stop(self) -> float:
        self._done.set()
        self.join()
        return self.highest


class Bench:
    """The contenders; each takes a round number and returns (images, seconds, share of waiting or None)."""

    def __init__(self, path: Path, batch: int, steps: int, step_seconds: float) -> None:
        self.path, self.batch, self.steps, self.step_seconds = path, batch, steps, step_seconds
        self.store = open_store(path)
        self.count = len(self.store)
        self.labels = np.arange(self.count) % 2

    def opened(self, cold: bool) -> Store:
        """A fresh mapping: pages that are mapped cannot be dropped, so the last round's has to go first."""
        del self.store
        gc.collect()
        self.store = open_store(self.path)
        if cold:
            drop_from_memory(self.store)
        else:
            read_into_memory(self.store)
        return self.store

    def gather(self, turn: int, cold: bool = False) -> tuple[int, float, float | None]:
        store, order = self.opened(cold), TrainOrder(self.count, self.batch, turn)
        batches = [order.indices(step) for step in range(self.steps)]
        begin = time.perf_counter()
        for indices in batches:
            store.gather(indices)
        return self.steps * self.batch, time.perf_counter() - begin, None

    def train(
        self, turn: int, cold: bool = False, balanced: bool = False, pause: float = 0.0
    ) -> tuple[int, float, float | None]:
        store = self.opened(cold)
        order = TrainOrder(self.labels, self.batch, turn, "balanced" if balanced else "natural")
        order.indices(0)
        loader = TrainLoader(store, np.arange(self.count), order, 0, self.steps)
        begin = time.perf_counter()
        for _ in loader:
            if pause:
                time.sleep(pause)
        seconds = time.perf_counter() - begin
        return self.steps * self.batch, seconds, loader.waited_seconds / seconds if pause else None

    def evaluate(self, turn: int, cold: bool = False) -> tuple[int, float, float | None]:
        store = self.opened(cold)
        count = min(self.count, self.steps * self.batch)
        loader = EvalLoader(store, np.arange(count), self.batch)
        begin = time.perf_counter()
        seen = sum(int(batch["mask"].sum()) for batch in loader)
        return seen, time.perf_counter() - begin, None

    def contenders(self) -> dict[str, Callable[[int], tuple[int, float, float | None]]]:
        pause = self.step_seconds
        return {
            "gather, warm": self.gather,
            "train, warm": self.train,
            "train balanced, warm": lambda turn: self.train(turn, balanced=True),
            "evaluation, warm": self.evaluate,
            "train, warm, waiting": lambda turn: self.train(turn, pause=pause),
            "gather, cold": lambda turn: self.gather(turn, cold=True),
            "train, cold": lambda turn: self.train(turn, cold=True),
            "evaluation, cold": lambda turn: self.evaluate(turn, cold=True),
            "train, cold, waiting": lambda turn: self.train(turn, cold=True, pause=pause),
        }


def measure(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    contenders = bench.contenders()
    for run in contenders.values():
        run(0)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    waits: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, float] = dict.fromkeys(contenders, 0.0)
    for number in range(rounds):
        # every other round backwards, so that no one always follows the same neighbour
        for name in contenders if number % 2 == 0 else reversed(contenders):
            watch = MemoryWatch()
            watch.start()
            images, seconds, waited = contenders[name](number + 1)
            memory[name] = max(memory[name], watch.stop())
            speeds[name].append(images / seconds)
            if waited is not None:
                waits[name].append(waited)
    results = []
    for name, found in speeds.items():
        bare = statistics.median(speeds["gather, cold" if "cold" in name else "gather, warm"])
        results.append(
            {
                "contender": name,
                "images_per_second": statistics.median(found),
                "lowest": min(found),
                "highest": max(found),
                "rounds": found,
                "over_gather": None if waits[name] else statistics.median(found) / bare,
                "waited_share": statistics.median(waits[name]) if waits[name] else None,
                "rss_anon_mib": memory[name],
            }
        )
    return results


def markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| | images/s | lowest-highest | of the bare gather | time waited | RssAnon MiB |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        ratio = "" if r["over_gather"] is None else f"{r['over_gather']:.2f}"
        waited = "" if r["waited_share"] is None else f"{r['waited_share']:.1%}"
        lines.append(
            f"| {r['contender']} | {r['images_per_second']:,.0f} | {r['lowest']:,.0f}-{r['highest']:,.0f} "
            f"| {ratio} | {waited} | {r['rss_anon_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="an existing store; without it, random pixels")
    parser.add_argument("--count", type=int, default=20_000, help="images of the random store")
    parser.add_argument("--size", type=int, default=96, help="their height and width")
    parser.add_argument("--batch", type=int, default=256, help="images of a batch")
    parser.add_argument("--steps", type=int, default=60, help="batches of a round")
    parser.add_argument("--step-ms", type=float, default=20.0, help="pause of the waiting contenders")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contender, in turns")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = options.store
        if path is None:
            path = Path(scratch) / "store"
            make_store(path, options.count, options.size)
        bench = Bench(path, options.batch, options.steps, options.step_ms / 1000)
        results = measure(bench, options.rounds)
    versions = {name: version(name) for name in ("numpy", "grain", "jax")}
    facts = {
        "images": bench.count,
        "image_shape": list(bench.store.image_shape),
        "shards": len(bench.store.manifest.shards),
        "batch": options.batch,
    }
    print(markdown(results))
    record.write(options.output, versions, {**facts, "results": results}, f"{facts}\n\n{markdown(results)}")


if __name__ == "__main__":
    main()
