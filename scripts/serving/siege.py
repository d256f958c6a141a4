"""Good and bad requests at once, and what is a fault in the answers."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
import statistics
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from serving.client import Service, encoded, form, patch_files, running_service, zipped

MEBIBYTE = 2**20
WARM_SHARE = 0.2
"""Share of a siege after which memory is taken to have settled."""
GROWTH = 0.1
"""Largest growth of memory from then on, as a share."""
_CLIENTS = 4
_BAD_CLIENTS = 2


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


Act = Callable[[Service, np.random.Generator], tuple[int, dict[str, str], bytes] | None]


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
