"""What a request may cost, and how it is refused."""

from __future__ import annotations

import dataclasses

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds that hold before anything is decoded; `GET /model` tells them."""

    body_bytes: int = 64 * MEBIBYTE
    """Bytes of one request."""
    held_bytes: int = 256 * MEBIBYTE
    """Bytes of all requests that are being received or read at once; more are told to come back."""
    file_bytes: int = 32 * MEBIBYTE
    """Bytes of one picture, also inside a zip."""
    unpacked_bytes: int = 256 * MEBIBYTE
    """Bytes that the zips of one request may unpack to."""
    files: int = 1024
    """Pictures in one request, those inside zips included."""
    pixels: int = 4096 * 4096
    """Pixels of one picture."""
    request_pixels: int = 4 * 4096 * 4096
    """Pixels of all pictures of one request."""
    tiles: int = 2048
    """Patches that one picture may be cut into."""
    heat_maps: int = 64
    """Patches of one request for which heat maps are drawn."""
    receive_seconds: float = 60.0
    """Time in which a request must have arrived."""


class Refusal(Exception):
    """An answer that is not a prediction: a status and one sentence.

    Args:
        status: HTTP status.
        sentence: what is wrong and what to do.
        retry_after: seconds after which to try again.
    """

    def __init__(self, status: int, sentence: str, retry_after: int | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.retry_after = retry_after


def in_mebibytes(size: int) -> str:
    """A size in words."""
    return f"{size / MEBIBYTE:.3g} MiB"
