"""Predictions made in parts by separate commands, put together by whichever ends last.

``OUTPUT.parts/2-of-8.npz`` holds one part. Parts are cut along whole batches, so that each batch is computed as
without parts and the file that is put together has the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pcam_jax.inference.predictor import Predictor, batch_shares
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import atomic_write, folder_lock

_WAIT_SECONDS = 600


def parse_shard(text: str) -> tuple[int, int]:
    """``I/N`` as (I, N).

    Raises:
        UserError: it is not, or I is not below N.
    """
    part, slash, parts = text.partition("/")
    if slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts):
        return int(part), int(parts)
    raise UserError(f"--shard is {text!r}: it must be I/N with I from 0 to N-1, for example 0/4.")


class Parts:
    """The parts of one file of predictions.

    Args:
        output: the file that they will make.
        predictors: what predicts.
        ids: ``[N]`` all examples, in order.
        parts: number of parts.
    """

    def __init__(self, output: Path, predictors: Sequence[Predictor], ids: np.ndarray, parts: int) -> None:
        self.folder = output.with_name(output.name + ".parts")
        self._parts = parts
        self.shares = batch_shares(len(ids), predictors[0].batch_size, parts)
        self._fingerprint = _fingerprint(predictors, ids, parts)

    def make(self, part: int, predict: Callable[[slice], np.ndarray]) -> None:
        """Predict one part and store it, unless it is there already.

        Args:
            part: which.
            predict: probabilities ``[n]`` or ``[n, K] float32`` of a slice of the examples.
        """
        self.folder.mkdir(exist_ok=True)
        if self._read(part) is None:
            probs = predict(slice(*self.shares[part]))
            with atomic_write(self._path(part), "wb") as file:
                np.savez(file, probs=probs, fingerprint=self._fingerprint)

    def missing(self) -> list[int]:
        """Parts that are not there yet, or were made by other weights or of other images."""
        return [part for part in range(self._parts) if self._read(part) is None]

    def join(self, write: Callable[[np.ndarray], None]) -> bool:
        """Put all parts together with ``write`` and remove them, if none is missing.

        Of several that end at once one does it, and the others find nothing left to do.

        Returns:
            Whether this call has.
        """
        with contextlib.ExitStack() as held:
            if not self._lock(held) or self.missing():
                return False
            parts = [self._read(part) for part in range(self._parts)]
            write(np.concatenate([part for part in parts if part is not None]))
            shutil.rmtree(self.folder)
            return True

    def _lock(self, held: contextlib.ExitStack) -> bool:
        """Hold the folder, after another part has looked at it; False if that one removed it."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                held.enter_context(folder_lock(self.folder, "a prediction in parts"))
            except FileNotFoundError:
                return False
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return self.folder.is_dir()

    def _path(self, part: int) -> Path:
        return self.folder / f"{part}-of-{self._parts}.npz"

    def _read(self, part: int) -> np.ndarray | None:
        try:
            with open(self._path(part), "rb") as file, np.load(file, allow_pickle=False) as stored:
                if str(stored["fingerprint"]) != self._fingerprint:
                    return None
                probs = stored["probs"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or cut short
            return None
        first, last = self.shares[part]
        return probs if len(probs) == last - first else None


def _fingerprint(predictors: Sequence[Predictor], ids: np.ndarray, parts: int) -> str:
    """Tells apart what must not be mixed: weights, calibration, symmetries, images, batches, number of parts."""
    digest = hashlib.sha256(f"{parts} {len(ids)}\n".encode())
    for predictor in predictors:
        digest.update(predictor.fingerprint().encode())
    digest.update("\0".join(ids.tolist()).encode())
    return digest.hexdigest()
