"""Where the time of a step goes: milliseconds of each kind of operation, and the operations that take longest.

    python scripts/profile_step.py --model resnet50 --precision bfloat16 --output profile

The trainer's own step (or the predictor's forward pass) under JAX's profiler, whose times are joined with what the
compiled program says of each operation. Time in which a device has several operations under way is divided among
them.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from throughput import ours, record
from throughput.case import Case, measure_peak
from throughput.program import Operation, read_program

from pcam_jax.runtime.command import run_command
from pcam_jax.runtime.errors import UserError


class Span(NamedTuple):
    """When an operation began and ended, in seconds."""

    start: float
    end: float
    name: str


_PHASES = ("forward", "backward", "other")


def main(argv: list[str]) -> None:
    """Profile one case and print its two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="net")
    parser.add_argument("--task", default="train", choices=("train", "predict"))
    parser.add_argument("--batch", type=int, default=32, help="batch size")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=5, help="steps under the profiler")
    parser.add_argument("--longest", type=int, default=12, help="operations to list")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args(argv)
    case = Case("ours", options.task, options.model, options.batch, options.precision)
    contender = ours.make(case)
    assert contender.program is not None
    operations = read_program(contender.program())
    contender.run(3)
    parts = {name: operation for name, operation in operations.items() if operation.kind}
    devices = profile(contender.run, options.steps, parts)
    if not devices:
        raise UserError(
            "JAX's profiler named no operation of the step: this backend cannot be profiled here."
        )
    facts = {
        "task": "profile",
        "case": dataclasses.asdict(case),
        "device": contender.facts["device"],
        "peak_gflops": measure_peak(contender.matmul()),
        "step_ms": 1e3 * step_seconds(contender.run, options.steps),
        "devices": len(devices),
        **by_kind(rows := measured(parts, devices, options.steps)),
        "longest": rows[: options.longest],
    }
    table = f"{summary(facts)}\n\n{longest(facts['longest'])}"
    print(table)
    record.write(options.output, {name: version(name) for name in ("pcam-jax", "jax")}, facts, table)


def step_seconds(run: Callable[[int], None], steps: int) -> float:
    """Seconds of a step without the profiler."""
    start = time.perf_counter()
    run(steps)
    return (time.perf_counter() - start) / steps


def profile(run: Callable[[int], None], steps: int, names: Container[str]) -> list[list[Span]]:
    """When the named operations were under way in some steps, for each device."""
    spans: dict[tuple[str, Any], list[Span]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(steps)
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        chosen = [plane for plane in planes if plane.name.startswith("/device:")] or [
            plane for plane in planes if plane.name == "/host:CPU"
        ]
        for plane in chosen:
            events = [(event, dict(event.stats)) for line in plane.lines for event in line.events]
            # an operation that the CPU shares out is over where the event of its end says so
            ends = {
                (event.name.removeprefix("end: "), facts["_c"]): event.start_ns + event.duration_ns
                for event, facts in events
                if event.name.startswith("end: ") and "_c" in facts
            }
            for event, facts in events:
                if (name := str(facts.get("hlo_op", ""))) in names:
                    over = max(event.start_ns + event.duration_ns, ends.get((name, facts.get("_p")), 0))
                    device = plane.name, facts.get("device_ordinal")
                    spans[device].append(Span(event.start_ns / 1e9, over / 1e9, name))
    return list(spans.values())


def divided(spans: list[Span]) -> dict[str, float]:
    """Seconds of each name, every instant divided among what is under way."""
    bounds = sorted([(span.start, True, number) for number, span in enumerate(spans)]
                    + [(span.end, False, number) for number, span in enumerate(spans)])  # fmt: skip
    seconds = dict.fromkeys((span.name for span in spans), 0.0)
    open_now: set[int] = set()
    before = 0.0
    for moment, begins, number in bounds:
        for other in open_now:
            seconds[spans[other].name] += (moment - before) / len(open_now)
        before = moment
        (open_now.add if begins else open_now.discard)(number)
    return seconds


def measured(operations: dict[str, Operation], devices: list[list[Span]], steps: int) -> list[dict[str, Any]]:
    """A record for each operation, its milliseconds a step the mean over devices, the longest first."""
    seconds: Counter[str] = Counter()
    for spans in devices:
        seconds.update(divided(spans))
    times = Counter(span.name for spans in devices for span in spans)
    share = 1 / (steps * len(devices)) if devices else 0.0
    rows = [
        {
            **dataclasses.asdict(operations[name]),
            "phase": operations[name].phase,
            "ms": 1e3 * spent * share,
            "times": times[name] * share,
        }
        for name, spent in seconds.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def by_kind(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of a step in all, and of each kind of operation in each phase."""
    total = sum(row["ms"] for row in rows)
    kinds = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        alike = [row for row in rows if row["kind"] == kind]
        phases = {phase: sum(row["ms"] for row in alike if row["phase"] == phase) for phase in _PHASES}
        ms = sum(phases.values())
        kinds.append({"kind": kind, "ms": phases, "share": ms / total, "gflops": _speed(alike)})
    return {"operations_ms": total, "kinds": kinds}


def summary(facts: dict[str, Any]) -> str:
    """Where a step's time goes, as a table."""
    lines = [
        f"{facts['step_ms']:.0f} ms a step of {facts['case']['batch']} images; the operations of each of "
        f"{facts['devices']} devices take {facts['operations_ms']:.0f} ms under the profiler; peak "
        f"{facts['peak_gflops']:.0f} GFLOP/s",
        "",
        "| | forward, ms | backward, ms | other, ms | share | GFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in facts["kinds"]:
        cells = [row["kind"], *(f"{row['ms'][phase]:.1f}" for phase in _PHASES), f"{row['share']:.0%}"]
        lines.append(f"| {' | '.join([*cells, _rounded(row['gflops'])])} |")
    return "\n".join(lines)


def longest(rows: list[dict[str, Any]]) -> str:
    """Operations as a table."""
    lines = ["| operation | result | kind | phase | times | ms | GFLOP/s |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            row["name"],
            row["result"],
            row["kind"],
            row["phase"],
            f"{row['times']:.0f}",
            f"{row['ms']:.2f}",
        ]
        lines.append(f"| {' | '.join([*cells, _rounded(_speed([row]))])} |")
    return "\n".join(lines)


def _speed(rows: list[dict[str, Any]]) -> float:
    """GFLOP/s of some operations."""
    flops, ms = sum(row["flops"] * row["times"] for row in rows), sum(row["ms"] for row in rows)
    return flops / ms / 1e6 if ms else 0.0


def _rounded(gflops: float) -> str:
    return f"{gflops:.0f}" if gflops else ""


if __name__ == "__main__":
    run_command(main)
