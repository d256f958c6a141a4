"""From one device to hundreds of hosts, on paper: the formulas of docs/scaling.md with measured constants.

    python scripts/simulate_scaling.py                          # the table of docs/scaling.md
    python scripts/simulate_scaling.py --images 1e7 --parameters 1e6 --rate 3000 --hosts 1,4,16
    python scripts/simulate_scaling.py --measure                # what this machine can say about the constants

Nothing here has run on more than one machine: what is measured is measured on one, and the rest is arithmetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path

GB, MIB = 1e9, 2**20


@dataclasses.dataclass(frozen=True)
class Measured:
    """Constants of this project, taken by ``--measure``; docs/scaling.md names the machine."""

    order_seconds: float = 1.2e-7
    """For each example, to draw the permutation of an epoch, on one core."""
    order_bytes: float = 40
    """For each example, at most, while it is drawn: positions, two permutations, random words and their sort."""
    index_seconds: float = 6.9e-7
    """For each row, to read index.csv when a store is opened."""
    index_bytes: float = 364
    """For each row, of memory."""
    gather_bytes_per_second: float = 8.3 * GB
    """Random patches copied out of a store in memory, one thread."""
    save_bytes_per_second: float = 0.45 * GB
    """A checkpoint: fetched, hashed, written, hashed again, flushed; in the background."""
    restart_seconds: float = 6.0
    """From the start of a process to its first new step (scripts/crash_test.py, median)."""
    detect_seconds: float = 60.0
    """Until all have stopped after one fell silent (runtime.distributed.HEARTBEAT_SECONDS); a killed one: at once."""


@dataclasses.dataclass(frozen=True)
class Assumed:
    """A cluster, from data sheets: not measured here."""

    devices_per_host: int = 8
    loader_threads: int = 16
    storage_bytes_per_second: float = 10 * GB
    """A host reading from its local NVMe disks, or from object storage."""
    inside_bytes_per_second: float = 300 * GB
    """All-reduce between the devices of a host, each way (NVLink)."""
    network_bytes_per_second: float = 40 * GB
    """All-reduce between hosts, for each device (400 Gbit/s, less overhead)."""
    latency_seconds: float = 1e-5
    """Of one message."""
    hours_between_failures: float = 5000
    """Of one host."""
    start_seconds: float = 120
    """Until the scheduler has started all processes again."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained on what."""

    images: float = 1e9
    image_bytes: float = 96 * 96 * 3
    parameters: float = 23.5e6
    """ResNet-50."""
    rate: float = 20_000
    """Images/s of a step on one device, without any other."""
    batch: int = 256
    """Images of a device in a step."""
    state_copies: float = 4
    """Float32 copies of the parameters in a checkpoint: themselves, Adam's two moments, a moving average."""
    save_seconds: float = 600
    """Between two saves."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of a job on a number of hosts; seconds unless another unit is named."""

    hosts: int
    devices: int
    compute: float
    reduce: float
    load: float
    step: float
    epoch: float
    efficiency: float
    """Share of the step in which the devices compute."""
    host_read: float
    """Bytes/s that each host reads."""
    memory: float
    """Bytes of each host, for the order and the index."""
    save: float
    goodput: float
    """Share of the time that moves training on, given failures and saves."""


def forecast(
    job: Job, hosts: int, measured: Measured | None = None, assumed: Assumed | None = None, devices: int = 0
) -> Forecast:
    """The formulas.

    Args:
        job: what is trained.
        hosts: how many.
        measured: constants of this project.
        assumed: constants of the cluster.
        devices: of each host; by default the cluster's.
    """
    measured, assumed = measured or Measured(), assumed or Assumed()
    local = devices or assumed.devices_per_host
    total = hosts * local
    compute = job.batch / job.rate
    # a ring moves 2 (D-1)/D of the gradients through each device; a tree needs 2 log2 D messages
    link = assumed.inside_bytes_per_second if hosts == 1 else assumed.network_bytes_per_second
    reduce = 2 * (total - 1) / total * 4 * job.parameters / link
    reduce += 2 * math.ceil(math.log2(total)) * assumed.latency_seconds
    reader = min(assumed.storage_bytes_per_second, assumed.loader_threads * measured.gather_bytes_per_second)
    load = local * job.batch * job.image_bytes / reader
    # the loader runs ahead in threads; gradients are counted as if nothing overlapped
    step = max(compute + reduce, load)
    order = job.images * measured.order_seconds
    epoch = math.ceil(job.images / (job.batch * total)) * step + order
    save = 4 * job.parameters * job.state_copies / measured.save_bytes_per_second
    between = max(job.save_seconds, save)
    lost = between / 2 + measured.detect_seconds + assumed.start_seconds + measured.restart_seconds
    lost += (
        job.images * measured.index_seconds + order
    )  # each process opens the store and draws the order anew
    failures_per_second = hosts / (assumed.hours_between_failures * 3600)
    return Forecast(
        hosts=hosts,
        devices=total,
        compute=compute,
        reduce=reduce,
        load=load,
        step=step,
        epoch=epoch,
        efficiency=compute / step,
        host_read=local * job.batch * job.image_bytes / step,
        memory=job.images * (measured.order_bytes + measured.index_bytes),
        save=save,
        goodput=max(0.0, 1 - failures_per_second * lost),
    )


def table(job: Job, hosts: list[int]) -> str:
    """Forecasts as Markdown; one device alone first."""
    lines = [
        "| hosts | devices | compute, ms | all-reduce, ms | load, ms | step, ms | images/s | efficiency "
        "| GB/s a host | an epoch, h | goodput |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in [forecast(job, 1, devices=1), *(forecast(job, count) for count in hosts)]:
        lines.append(
            f"| {one.hosts} | {one.devices} | {1e3 * one.compute:.1f} | {1e3 * one.reduce:.2f} "
            f"| {1e3 * one.load:.1f} | {1e3 * one.step:.1f} | {job.batch * one.devices / one.step:,.0f} "
            f"| {one.efficiency:.0%} | {one.host_read / GB:.1f} | {one.epoch / 3600:.2f} | {one.goodput:.1%} |"
        )
    return "\n".join(lines)


def summary(job: Job) -> str:
    """What does not depend on the number of hosts."""
    one = forecast(job, 1)
    size = job.images * job.image_bytes
    return (
        f"{job.images:,.0f} images of {job.image_bytes:,.0f} bytes: {size / 1e12:.1f} TB in "
        f"{math.ceil(size / (256 * MIB)):,} shards of 256 MiB. Order and index: {one.memory / GB:,.1f} GB of memory "
        f"and {job.images * (Measured.index_seconds + Measured.order_seconds):,.0f} s at each start. A checkpoint: "
        f"{4e-6 * job.parameters * job.state_copies:,.0f} MB, {one.save:.1f} s in the background."
    )


def measure(share: float = 1.0) -> Measured:
    """Take on this machine what it can say: about half a minute, or a ``share`` of that work."""
    import numpy as np
    import pandas as pd
    import psutil

    from pcam_jax.data.order import permutation
    from pcam_jax.data.store import open_store, write_store
    from pcam_jax.run.checkpoint import Checkpoints

    def seconds(action: object, times: int = 3) -> float:
        taken = []
        for _ in range(times):
            begin = time.perf_counter()
            action()  # type: ignore[operator]
            taken.append(time.perf_counter() - begin)
        return min(taken)

    rng = np.random.default_rng(0)
    drawn = int(5_000_000 * share)
    order = seconds(lambda: permutation(drawn, 0, 0)) / drawn
    with tempfile.TemporaryDirectory() as folder:
        rows = int(500_000 * share)
        index = pd.DataFrame(
            {"id": [f"{number:040x}" for number in range(rows)], "label": np.arange(rows) % 2}
        )
        write_store(Path(folder) / "rows", np.zeros((rows, 1, 1, 3), np.uint8), index, ("a", "b"))
        before = psutil.Process().memory_info().rss
        store = open_store(Path(folder) / "rows")
        begin = time.perf_counter()
        kept = (store.labels, store.ids, store.groups, store.splits)
        row_seconds = (time.perf_counter() - begin) / rows
        row_bytes = max(psutil.Process().memory_info().rss - before, 1) / rows
        del kept
        count = int(8000 * share)
        pixels = rng.integers(0, 256, (count, 96, 96, 3), np.uint8)
        patches = write_store(Path(folder) / "patches", pixels, index[:count], ("a", "b"))
        wanted, out = rng.permutation(count)[: count // 2], np.empty((count // 2, 96, 96, 3), np.uint8)
        patches.gather(np.arange(count))  # into memory
        gather = out.nbytes / seconds(lambda: patches.gather(wanted, out))
        arrays = {
            str(number): rng.normal(size=int(6_250_000 * share)).astype(np.float32) for number in range(8)
        }
        checkpoints, steps = Checkpoints(Path(folder) / "checkpoints"), iter(range(9))

        def save() -> None:
            checkpoints.save(next(steps), arrays, {}, -1)
            checkpoints.wait()

        save()
        saved = sum(array.nbytes for array in arrays.values()) / seconds(save)
        checkpoints.close()
    return dataclasses.replace(
        Measured(),
        order_seconds=order,
        index_seconds=row_seconds,
        index_bytes=row_bytes,
        gather_bytes_per_second=gather,
        save_bytes_per_second=saved,
    )


def main() -> None:
    """Print the table, or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Job):
        kind = int if field.name == "batch" else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--hosts", default="1,2,8,32,128,512", help="numbers of hosts, by commas")
    parser.add_argument("--measure", action="store_true", help="take the constants of this machine instead")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(dataclasses.asdict(measure()), indent=1))
        return
    job = Job(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Job)})
    print(f"{summary(job)}\n\n{table(job, [int(count) for count in options.hosts.split(',')])}")


if __name__ == "__main__":
    main()
