"""Images/s of the service beside the bare predictor, and how long requests wait; or a siege by good and bad requests.

    python scripts/bench_serve.py runs/m1 runs/cnn3 --output serve
    python scripts/bench_serve.py runs/m1 --mixed 600 --output siege

The bare predictor takes batches that lie in memory, one dispatched before the last is fetched. The service runs in a
process of its own and is sent uncompressed 96x96 tif files by clients on this machine, whose work counts against it.
Both take turns, round by round. ``--mixed`` sends for so many seconds what people send and what they should not, and
fails where an answer is a 5xx (but for 503 with Retry-After), has no sentence, or the service's memory grows.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from serving.client import Service, form, patch_files, running_service
from serving.siege import siege, siege_table
from throughput import record

from pcam_jax.inference.predictor import Predictor


def main() -> None:
    """Measure each run, or besiege the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="runs or exported models, each served alone")
    parser.add_argument("--files", type=int, default=64, help="files of a large request")
    parser.add_argument("--clients", type=int, default=2, help="clients that send large requests at once")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both contenders, in turns")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a round")
    parser.add_argument("--singles", type=int, default=200, help="requests of one file for the waiting times")
    parser.add_argument("--mixed", type=float, default=0, help="besiege for so many seconds instead")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    if options.mixed:
        facts = siege(options.runs[0], options.mixed)
        table = siege_table(facts)
    else:
        results = [measure(run, options) for run in options.runs]
        facts, table = {"results": results}, markdown(results)
    print(table)
    record.write(options.output, _versions(), {"task": "serve", **facts}, table)
    if facts.get("faults"):
        sys.exit(1)


def measure(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Throughput of both, and waiting times of the service."""
    predictor = Predictor.load(run)
    files = patch_files(predictor.image_shape, options.files)
    images = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in files])
    bare: list[float] = []
    served: list[float] = []
    large: list[float] = []
    with running_service(run) as service:
        bare_rate(predictor, images, 0)
        for _ in range(options.rounds):
            bare.append(bare_rate(predictor, images, options.seconds))
            rate, waits = served_rate(service, files, options.clients, options.seconds)
            served.append(rate)
            large += waits
        alone = single_waits(service, files, 1, options.singles)
        together = single_waits(service, files, 8, options.singles)
        decisions = service.json("GET", "/model")
    return {
        "run": run.name,
        "network": predictor.net.name if hasattr(predictor, "net") else "exported",
        "image_shape": list(predictor.image_shape),
        "heat_maps": decisions["heat_maps"],
        "files": options.files,
        "clients": options.clients,
        "bare_images_per_second": statistics.median(bare),
        "served_images_per_second": statistics.median(served),
        "of_bare": statistics.median(served) / statistics.median(bare),
        "bare_rounds": bare,
        "served_rounds": served,
        "large_request_ms": percentiles(large),
        "single_request_ms": percentiles(alone),
        "single_requests_of_8_clients_ms": percentiles(together),
    }


def bare_rate(predictor: Predictor, images: np.ndarray, seconds: float) -> float:
    """Images/s of the jitted predictor, batch after batch, at least two."""
    pending, batches, started = None, 0, time.perf_counter()
    while batches < 2 or time.perf_counter() - started < seconds:
        logits = predictor.dispatch(images)
        if pending is not None:
            np.asarray(pending)
        pending, batches = logits, batches + 1
    np.asarray(pending)
    return batches * len(images) / (time.perf_counter() - started)


def served_rate(
    service: Service, files: Sequence[bytes], clients: int, seconds: float
) -> tuple[float, list[float]]:
    """Images/s through the service, and the seconds each request took."""
    body, kind = form([(f"{number}.tif", content) for number, content in enumerate(files)])
    waits: list[float] = []

    def client(until: float) -> None:
        with contextlib.closing(service.connect()) as connection:
            done = 0
            while done < 1 or time.perf_counter() < until:
                waits.append(timed_request(connection, body, kind, len(files)))
                done += 1

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for one in [pool.submit(client, started + seconds) for _ in range(clients)]:
            one.result()
    return len(waits) * len(files) / (time.perf_counter() - started), waits


def single_waits(service: Service, files: Sequence[bytes], clients: int, count: int) -> list[float]:
    """Seconds of requests of one file each, from so many clients at once."""
    bodies = [form([("patch.tif", content)]) for content in files]

    def client(number: int) -> list[float]:
        with contextlib.closing(service.connect()) as connection:
            asked = range(number, count + clients, clients)  # the first opens the connection
            return [timed_request(connection, *bodies[row % len(bodies)], 1) for row in asked][1:]

    with ThreadPoolExecutor(clients) as pool:
        return [wait for waits in pool.map(client, range(clients)) for wait in waits]


def timed_request(connection: http.client.HTTPConnection, body: bytes, kind: str, count: int) -> float:
    """Seconds from the first byte sent to the last one received."""
    started = time.perf_counter()
    connection.request("POST", "/predict", body, {"Content-Type": kind})
    answer = connection.getresponse()
    content = answer.read()
    seconds = time.perf_counter() - started
    if answer.status != 200 or len(json.loads(content)["results"]) != count:
        sys.exit(f"error: the service answered {answer.status}: {content[:300]!r}")
    return seconds


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    return {name: float(np.percentile(seconds, q)) * 1000 for name, q in (("p50", 50), ("p99", 99))}


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """One row for each run."""

    def waits(value: dict[str, float]) -> str:
        return f"{value['p50']:.3g} / {value['p99']:.3g}"

    first = results[0]
    lines = [
        f"| network | bare, images/s | served, images/s | of bare | {first['files']} files, {first['clients']} "
        "clients: p50 / p99, ms | 1 file: p50 / p99, ms | 1 file, 8 clients: p50 / p99, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['network']} | {one['bare_images_per_second']:.4g} | {one['served_images_per_second']:.4g} "
        f"| {one['of_bare']:.0%} | {waits(one['large_request_ms'])} | {waits(one['single_request_ms'])} "
        f"| {waits(one['single_requests_of_8_clients_ms'])} |"
        for one in results
    ]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "fastapi", "uvicorn", "numpy")}


if __name__ == "__main__":
    main()
