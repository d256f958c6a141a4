"""Counters of the service in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 4, 16, 64, 128, 256)


class Metrics:
    """The figures of one service; threads may share it."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self.requests = Counter(
            "pcam_requests", "Requests answered.", ["path", "method", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "pcam_request_seconds",
            "From the request's head to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.pictures = Counter("pcam_pictures", "Pictures by outcome.", ["outcome"], registry=self._registry)
        self.batches = Histogram(
            "pcam_batch_patches", "Real patches in a batch.", buckets=_ROWS, registry=self._registry
        )
        self.batch_seconds = Histogram(
            "pcam_batch_seconds", "Time of a batch on the device.", buckets=_SECONDS, registry=self._registry
        )
        self.padding = Counter(
            "pcam_padding_patches", "Blank patches that filled batches up.", registry=self._registry
        )
        self.ready = Gauge("pcam_ready", "1 once requests are taken.", registry=self._registry)
        self._waiting = Gauge("pcam_waiting_patches", "Patches in the queue.", registry=self._registry)

    def observe_batch(self, size: int, real: int, seconds: float) -> None:
        """Count a batch."""
        self.batches.observe(real)
        self.batch_seconds.observe(seconds)
        self.padding.inc(size - real)

    def watch_queue(self, waiting: Callable[[], float]) -> None:
        """Ask this for the length of the queue."""
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self._registry)
