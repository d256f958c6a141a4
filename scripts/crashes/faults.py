"""The moments at which training is killed."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from crashes.training import Fault, Training, latest_step


def after(seconds: float) -> Callable[[Training], bool]:
    """A moment some time after the first step of this life."""
    start: list[float] = []

    def has_come(training: Training) -> bool:
        start.append(time.monotonic())
        return start[-1] - start[0] >= seconds

    return has_come


def has_saved(training: Training) -> bool:
    """The moment when this life has saved something."""
    return latest_step(training.run) > training.saved_at_start


def moving_on(moment: Callable[[Training], bool]) -> Callable[[Training], bool]:
    """A moment that counts only once this life has saved something, so that every life makes progress."""
    return lambda training: has_saved(training) and moment(training)


def being_written(training: Training) -> list[Path]:
    """Folders of checkpoints that have no number yet."""
    return [training.checkpoints / name for name in training.names() if re.fullmatch(r"\d+\.tmp", name)]


def make_faults(chance: random.Random) -> list[Fault]:
    """Each kind of fault once, with moments of its own."""
    kill = signal.SIGKILL
    arrays = "state.orbax-checkpoint-tmp"

    def holds(name: str) -> Callable[[Training], bool]:
        return lambda training: any((folder / name).exists() for folder in being_written(training))

    def removing(training: Training) -> bool:
        return any(".removed." in name for name in training.names())

    return [
        Fault("SIGKILL at a random moment", kill, moving_on(after(chance.uniform(0, 2)))),
        Fault("SIGKILL when a save begins", kill, moving_on(lambda training: bool(being_written(training)))),
        Fault("SIGKILL while arrays are written", kill, moving_on(holds(arrays))),
        Fault("SIGKILL when the arrays are written", kill, moving_on(holds("state"))),
        Fault("SIGKILL before the rename", kill, moving_on(holds("progress.json"))),
        Fault("SIGKILL after the rename", kill, has_saved),
        Fault("SIGKILL while an old one is removed", kill, moving_on(removing)),
        Fault("SIGKILL in evaluation", kill, moving_on(lambda training: training.evaluating)),
        Fault("SIGTERM at a random moment", signal.SIGTERM, moving_on(after(chance.uniform(0, 2)))),
        Fault("SIGINT at a random moment", signal.SIGINT, moving_on(after(chance.uniform(0, 2)))),
    ]
