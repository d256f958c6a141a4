"""What is served, with its state and what requests hold, and how the files of a request become pictures."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pcam_jax.web.batching import Busy
from pcam_jax.web.examples import ExamplePicture, example_pictures
from pcam_jax.web.limits import Limits, Refusal
from pcam_jax.web.metrics import Metrics
from pcam_jax.web.model import ServedModel, Wanted
from pcam_jax.web.pictures import Picture, Unusable, pixels_of, read_picture
from pcam_jax.web.uploads import Upload, unzipped

WARM_UP_SECONDS = 5
"""After which a request may come again that was turned away because the service is not ready."""


@dataclasses.dataclass
class ReadFiles:
    """What became of the files of a request: pictures, and results where there is an error."""

    pictures: list[Picture]
    results: list[dict[str, Any] | None]
    first_error: Unusable | None


class Service:
    """A model with its state: warming up, ready, closing.

    Args:
        model: what is served.
        metrics: its figures.
        limits: of requests.
        token_needed: told by `GET /model`.
    """

    def __init__(
        self, model: ServedModel, metrics: Metrics, limits: Limits, *, token_needed: bool = False
    ) -> None:
        self.model = model
        self.metrics = metrics
        self.limits = limits
        self.token_needed = token_needed
        self.state = "warming up"
        self.failure: BaseException | None = None
        self.examples: list[ExamplePicture] = []
        self._held = 0
        self._closing = threading.Event()
        self._decoders = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="decode")
        metrics.watch_queue(lambda: model.waiting)

    def warm_up(self) -> bool:
        """Compile everything, then be ready; False where it was closed before."""
        self.examples = example_pictures(self.model.image_shape)
        if not self.model.warm_up(self._closing.is_set):
            return False
        if self.state == "warming up":
            self.state = "ready"
            self.metrics.ready.set(1)
        return True

    def begin_closing(self) -> None:
        """From now on, requests are turned away."""
        self.state = "closing"
        self.metrics.ready.set(0)
        self._closing.set()

    def close(self, timeout: float) -> None:
        """Answer what was taken and end the threads."""
        self.begin_closing()
        self.model.close(timeout)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def check_open(self) -> None:
        """Turn a request away before its body is read.

        Raises:
            Refusal: 503 while not ready or full.
        """
        if self.state != "ready":
            raise Refusal(503, f"The service is {self.state}: try again soon.", WARM_UP_SECONDS)
        try:
            self.model.check_room()
        except Busy as busy:
            raise too_busy(busy.retry_after) from None

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count a request's bytes against what all may hold.

        Raises:
            Refusal: 503 where it would be too much.
        """
        if self._held and self._held + size > self.limits.held_bytes:
            raise too_busy(1)
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    async def read(self, uploads: Sequence[Upload], wanted: Wanted, preview: bool) -> ReadFiles:
        """Decode a request's files in another thread, so that others are answered meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, self._read, uploads, wanted, preview)

    def _read(self, uploads: Sequence[Upload], wanted: Wanted, preview: bool) -> ReadFiles:
        files = unzipped(uploads, self.limits)
        shape = self.model.image_shape
        if sum(pixels_of(file, shape) for file in files) > self.limits.request_pixels:
            raise Refusal(
                413,
                f"The pictures have more than {self.limits.request_pixels:,} pixels together: send fewer at once.",
            )
        pictures: list[Picture] = []
        results: list[dict[str, Any] | None] = []
        first_error: Unusable | None = None
        rows = plain = 0
        for file in files:
            try:
                picture = read_picture(file, self.model.intake, self.limits, preview=preview)
            except Unusable as error:
                first_error = first_error or error
                results.append({"name": file.name, "error": error.sentence})
                continue
            plain += picture.grid is None
            rows += len(picture.patches) * (8 if wanted.uncertainty and picture.grid is None else 1)
            if rows > self.model.capacity:
                raise Refusal(
                    413, f"The pictures make more than {self.model.capacity:,} patches: send fewer at once."
                )
            if wanted.heat and plain > self.limits.heat_maps:
                raise Refusal(
                    413, f"Heat maps are drawn for at most {self.limits.heat_maps} patches a request."
                )
            pictures.append(picture)
            results.append(None)
        return ReadFiles(pictures, results, first_error)


def too_busy(seconds: int) -> Refusal:
    """What a request is told that may come again in ``seconds``."""
    return Refusal(503, f"The service is busy: try again in {seconds} s.", seconds)
