"""Run contenders in turns and write what came out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from throughput import record
from throughput.case import Case

PEERS = {"torch": ("torch-eager", "torch-compile"), "keras": ("keras-tensorflow", "keras-jax")}
MODELS = ("pcam_model1", "pcam_model2", "pcam_model3", "pcam_model4", "pcam_cnn3", "resnet50")


class Worker:
    """A contender's process."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), case.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if os.environ.get("BENCH_QUIET", "1") == "1" else None,
            text=True,
        )
        self.facts = self._answer()
        self.speeds: list[float] = []
        self.memory = 0.0

    @property
    def error(self) -> str | None:
        return self.facts.get("error")

    def go(self, seconds: float) -> None:
        """One round."""
        answer = self._ask(f"go {seconds}")
        if "error" in answer:
            self.facts["error"] = answer["error"]
            return
        self.speeds.append(answer["images"] / answer["seconds"])
        self.memory = answer["peak_memory_mib"]

    def peak(self) -> float:
        """GFLOP/s of this framework's matrix product."""
        return self._ask("peak").get("gflops", 0.0)

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._send("stop")
        self._process.wait(timeout=60)

    def _ask(self, command: str) -> dict[str, Any]:
        try:
            self._send(command)
        except BrokenPipeError:
            return {"error": "the process ended"}
        return self._answer()

    def _send(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with {self._process.wait()}"}


def run_cell(cases: Sequence[Case], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure the systems of one cell in turns; the first case is ours."""
    workers = [Worker(case) for case in cases]
    running = [worker for worker in workers if worker.error is None]
    for worker in running:
        worker.go(seconds / 4)
        worker.speeds.clear()
    for number in range(rounds):
        # every other round backwards, so that no one always follows the same neighbour
        for worker in running if number % 2 == 0 else reversed(running):
            worker.go(seconds)
    peak = max((worker.peak() for worker in running), default=0.0)
    flops = workers[0].facts.get("flops_per_image", 0.0)
    results = [_result(worker, flops, peak) for worker in workers]
    for worker in running:
        worker.stop()
    ours = results[0].get("images_per_second")
    for result in results:
        if ours and result.get("images_per_second"):
            result["ours_over_this"] = ours / result["images_per_second"]
    return results


def _result(worker: Worker, flops: float, peak: float) -> dict[str, Any]:
    facts: dict[str, Any] = dataclasses.asdict(worker.case)
    if worker.error or not worker.speeds:
        return {**facts, "error": worker.error or "no round finished"}
    median = statistics.median(worker.speeds)
    gflops = median * flops / 1e9
    return {
        **facts,
        "images_per_second": median,
        "lowest": min(worker.speeds),
        "highest": max(worker.speeds),
        "rounds": worker.speeds,
        "gflops": gflops,
        "peak_gflops": peak,
        "fraction_of_peak": gflops / peak if peak else None,
        "peak_memory_mib": worker.memory,
        "first_step_seconds": worker.facts["first_step_seconds"],
        "params": worker.facts["params"],
        "versions": worker.facts["versions"],
        "device": worker.facts["device"],
    }


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table."""
    lines = [
        "| model | batch | precision | system | images/s | lowest-highest | ours / this | GFLOP/s | of peak | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        head = f"| {r['model']} | {r['batch']} | {r['precision']} | {r['system']} | "
        if "error" in r:
            lines.append(f"{head}{r['error']} | | | | | |")
            continue
        lines.append(
            f"{head}{r['images_per_second']:.0f} | {r['lowest']:.0f}-{r['highest']:.0f} | "
            f"{r['ours_over_this']:.2f} | {r['gflops']:.0f} | {r['fraction_of_peak']:.2f} | "
            f"{r['peak_memory_mib']:.0f} |"
        )
    return "\n".join(lines)


def main(task: str, description: str, batches: list[int]) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", default=",".join(MODELS), help="nets, separated by commas")
    parser.add_argument("--batches", default=",".join(map(str, batches)), help="batch sizes")
    parser.add_argument("--precisions", default="float32", help="float32, bfloat16 or both")
    parser.add_argument("--peers", default="", help="torch, keras, or single systems such as torch-compile")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each system, in turns")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one round")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    names = [name for name in options.peers.split(",") if name]
    systems = ["ours", *(system for name in names for system in PEERS.get(name, (name,)))]
    results: list[dict[str, Any]] = []
    for precision in options.precisions.split(","):
        for model in options.models.split(","):
            for batch in options.batches.split(","):
                cases = [Case(system, task, model, int(batch), precision) for system in systems]
                cell = run_cell(cases, options.rounds, options.seconds)
                results += cell
                print(
                    markdown(cell) if len(results) == len(cell) else markdown(cell).split("\n", 2)[2],
                    flush=True,
                )
                versions = {name: v for result in results for name, v in result.get("versions", {}).items()}
                record.write(options.output, versions, {"task": task, "results": results}, markdown(results))
