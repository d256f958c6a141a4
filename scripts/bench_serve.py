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
import dataclasses
import http.client
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from throughput import record

from pcam_jax.data.sample import sample_patches
from pcam_jax.inference.predictor import Predictor

MEBIBYTE = 2**20
WARM_SHARE = 0.2
"""Share of a siege after which memory is taken to have settled."""
GROWTH = 0.1
"""Largest growth of memory from then on, as a share."""
_READY_SECONDS = 600
_CLIENTS = 4
_BAD_CLIENTS = 2


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


# ------------------------------------------------------------------------------------------ throughput and waiting


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


# ------------------------------------------------------------------------------------------------------- the siege


@dataclasses.dataclass
class Tally:
    """What came back, by kind of request."""

    answers: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(self, kind: str, outcome: str, fault: str = "") -> None:
        with self.lock:
            self.answers[kind, outcome] += 1
            if fault and len(self.faults) < 20:
                self.faults.append(f"{kind}: {fault}")


Act = Callable[["Service", np.random.Generator], "tuple[int, dict[str, str], bytes] | None"]


def siege(run: Path, seconds: float) -> dict[str, Any]:
    """Good and bad requests at once, from several clients.

    Returns:
        Answers by kind, the service's memory over time, and ``faults`` that should not have been.
    """
    tally = Tally()
    with running_service(run) as service:
        shape = service.json("GET", "/model")["image_shape"]
        good, bad = good_acts(patch_files((shape[0], shape[1], 3), 64)), bad_acts(shape)
        until = time.monotonic() + seconds

        def client(number: int) -> None:
            acts, rng = good if number < _CLIENTS else bad, np.random.default_rng(number)
            while time.monotonic() < until:
                names = list(acts)
                name = names[int(rng.integers(len(names)))]
                try:
                    judge(tally, name, acts[name](service, rng), wanted_good=number < _CLIENTS)
                except Exception as error:  # a client that fails must not end the siege unnoticed
                    tally.add(name, "no answer", f"{type(error).__name__}: {error}")

        memory: list[tuple[float, int]] = []
        with ThreadPoolExecutor(_CLIENTS + _BAD_CLIENTS) as pool:
            clients = [pool.submit(client, number) for number in range(_CLIENTS + _BAD_CLIENTS)]
            started = time.monotonic()
            while not all(one.done() for one in clients):
                memory.append((time.monotonic() - started, service.resident_bytes()))
                time.sleep(min(1.0, seconds / 20))
            for one in clients:
                one.result()
        if service.json("GET", "/readyz") != {"status": "ready"}:
            tally.faults.append("the service is not ready afterwards")
    settled = [size for at, size in memory if at >= WARM_SHARE * seconds]
    third = max(1, len(settled) // 3)
    early, late = (statistics.median(part) for part in (settled[:third], settled[-third:]))
    if late > (1 + GROWTH) * early:
        tally.faults.append(f"memory grew from {early / MEBIBYTE:.0f} to {late / MEBIBYTE:.0f} MiB")
    return {
        "run": run.name,
        "seconds": seconds,
        "answers": [
            {"request": kind, "answer": outcome, "count": count}
            for (kind, outcome), count in sorted(tally.answers.items())
        ],
        "memory_early_mib": early / MEBIBYTE,
        "memory_late_mib": late / MEBIBYTE,
        "memory_highest_mib": max(size for _, size in memory) / MEBIBYTE,
        "memory_mib": [[round(at, 1), round(size / MEBIBYTE, 1)] for at, size in memory],
        "faults": tally.faults,
    }


def judge(
    tally: Tally, name: str, answer: tuple[int, dict[str, str], bytes] | None, *, wanted_good: bool
) -> None:
    """Count an answer; say what is wrong with it."""
    if answer is None:
        tally.add(name, "left")  # the client did, as it meant to
        return
    status, headers, body = answer
    fault = ""
    if status == 503:
        fault = "" if headers.get("retry-after") else "503 without Retry-After"
        time.sleep(0.2)
    elif status >= 500:
        fault = f"{status} {body[:200]!r}"
    elif wanted_good != (status == 200):
        fault = f"answered {status} {body[:200]!r}"
    if not fault and status != 200 and "json" in headers.get("content-type", ""):
        sentence = json.loads(body).get("error", "")
        fault = "" if sentence.endswith(".") else f"{status} without a sentence: {body[:200]!r}"
    tally.add(name, str(status), fault)


def good_acts(files: Sequence[bytes]) -> dict[str, Act]:
    """What people send."""

    def some(rng: np.random.Generator, most: int) -> list[tuple[str, bytes]]:
        rows = rng.integers(len(files), size=int(rng.integers(1, most + 1)))
        return [(f"{row}.tif", files[row]) for row in rows]

    def converted(content: bytes, kind: str) -> bytes:
        return encoded(Image.open(io.BytesIO(content)), kind)

    png, jpeg = converted(files[0], "png"), converted(files[0], "jpeg")
    large = encoded(Image.open(io.BytesIO(files[0])).resize((700, 500)), "png")
    return {
        "one patch": lambda service, rng: service.predict(some(rng, 1)),
        "up to 64 patches": lambda service, rng: service.predict(some(rng, 64)),
        "with uncertainty": lambda service, rng: service.predict(some(rng, 8), "?uncertainty=true"),
        "with heat maps": lambda service, rng: service.predict(some(rng, 4), "?heat=true"),
        "png and jpeg": lambda service, rng: service.predict([("a.png", png), ("b.jpg", jpeg)]),
        "a zip": lambda service, rng: service.predict([("a.zip", zipped(some(rng, 16)))]),
        "a picture in tiles": lambda service, rng: service.predict([("large.png", large)], "?preview=true"),
        "the page": lambda service, rng: service.ask("GET", "/"),
        "metrics": lambda service, rng: service.ask("GET", "/metrics"),
    }


def bad_acts(shape: Sequence[int]) -> dict[str, Act]:
    """What they should not."""
    good = patch_files((shape[0], shape[1], 3), 1)[0]
    bomb = zipped([(f"{number}.png", bytes(31 * MEBIBYTE)) for number in range(10)])
    giant = encoded(Image.new("1", (20_000, 20_000)), "png")

    def damaged(service: Service, rng: np.random.Generator) -> Any:
        content = bytearray(encoded(Image.open(io.BytesIO(good)), "png"))
        del content[int(rng.integers(8, len(content) - 12)) :]
        return service.predict([("cut.png", bytes(content))])

    def leaving(service: Service, rng: np.random.Generator) -> None:
        body, kind = form([("a.tif", good)] * 8)
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        sent = (head.encode() + body)[: int(rng.integers(1, len(body)))]
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(sent)

    def body_of(content: bytes, kind: str) -> Act:
        return lambda service, rng: service.ask("POST", "/predict", content, {"Content-Type": kind})

    return {
        "no picture": lambda service, rng: service.predict([("a.tif", rng.bytes(2000))]),
        "a cut png": damaged,
        "a picture too small": lambda service, rng: service.predict(
            [("tiny.png", encoded(Image.new("RGB", (5, 5)), "png"))]
        ),
        "a zip bomb": lambda service, rng: service.predict([("bomb.zip", bomb)]),
        "a pixel bomb": lambda service, rng: service.predict([("giant.png", giant)]),
        "too many files": lambda service, rng: service.predict([("a", b"x")] * 1100),
        "too many bytes": lambda service, rng: service.predict([("a.tif", bytes(70 * MEBIBYTE))]),
        "json instead of a form": body_of(b"{}", "application/json"),
        "a form cut off": body_of(form([("a.tif", good)])[0][:200], "multipart/form-data; boundary=x"),
        "a wrong parameter": lambda service, rng: service.predict([("a.tif", good)], "?heat=perhaps"),
        "a wrong method": lambda service, rng: service.ask("DELETE", "/predict"),
        "a wrong address": lambda service, rng: service.ask("GET", f"/{uuid.uuid4().hex}"),
        "another site": lambda service, rng: service.ask("GET", "/model", headers={"Host": "evil.example"}),
        "someone who leaves": leaving,
    }


def siege_table(facts: dict[str, Any]) -> str:
    """Answers by kind of request, and memory."""
    kinds: dict[str, Counter[str]] = {}
    for one in facts["answers"]:
        kinds.setdefault(one["request"], Counter())[one["answer"]] += one["count"]
    lines = ["| request | answers |", "|---|---|"]
    for kind, found in kinds.items():
        lines.append(f"| {kind} | {', '.join(f'{answer}: {count:,}' for answer, count in found.items())} |")
    lines += [
        "",
        f"{sum(one['count'] for one in facts['answers']):,} requests in {facts['seconds']:.0f} s; memory "
        f"{facts['memory_early_mib']:.0f} MiB once settled, {facts['memory_late_mib']:.0f} MiB at the end, "
        f"{facts['memory_highest_mib']:.0f} MiB at most; {len(facts['faults']) or 'no'} faults.",
        *(f"FAULT {fault}" for fault in facts["faults"]),
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ the service, from outside


class Service:
    """A service in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers, body."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()

    def predict(self, files: Sequence[tuple[str, bytes]], query: str = "") -> Any:
        body, kind = form(files)
        return self.ask("POST", f"/predict{query}", body, {"Content-Type": kind})

    def json(self, method: str, path: str) -> Any:
        return json.loads(self.ask(method, path)[2])

    def resident_bytes(self) -> int:
        """Memory in use."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def running_service(run: Path) -> Iterator[Service]:
    """``serve RUN`` on a free port, warm."""
    command = [sys.executable, "-m", "pcam_jax.serve", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = 0
        for line in process.stdout:
            if line.startswith("Serving "):
                port = int(line.split("http://")[1].split("/")[0].rpartition(":")[2])
            if line.startswith("Ready "):
                break
        else:
            sys.exit(f"error: the service of {run} ended before it was ready")
        yield Service(process, port)
        if process.poll() is not None:
            sys.exit(f"error: the service of {run} ended on its own with code {process.returncode}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def patch_files(image_shape: Sequence[int], count: int) -> list[bytes]:
    """Synthetic patches as uncompressed tif files, as PatchCamelyon's are."""
    side = image_shape[0]
    drawn = (
        sample_patches(count, image_size=side, seed=5).images if side >= 24 else _noise(count, image_shape)
    )
    return [encoded(Image.fromarray(image), "tiff") for image in drawn]


def _noise(count: int, image_shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *image_shape), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def zipped(members: Sequence[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, content) in enumerate(members):
            archive.writestr(f"{number}-{name}", content)
    return file.getvalue()


def form(files: Sequence[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A multipart/form-data body of files, and its content type."""
    boundary = uuid.uuid4().hex
    parts = []
    for name, content in files:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        parts += [head.encode(), content, b"\r\n"]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "fastapi", "uvicorn", "numpy")}


if __name__ == "__main__":
    main()
