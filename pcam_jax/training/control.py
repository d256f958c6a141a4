"""What the run decides between epochs, as a value that a checkpoint can hold."""

from __future__ import annotations

import dataclasses
from typing import Any

from pcam_jax.config.schema import Config

HistoryRow = dict[str, float]
"""One epoch's figures by name, as in ``history.csv``."""


@dataclasses.dataclass(frozen=True)
class Control:
    """Early stopping and plateau state after some epochs; `after_epoch` gives the next value."""

    epoch: int = 0
    """Epochs completed and evaluated."""
    best_step: int = -1
    """Step of the best checkpoint so far, or -1."""
    best_value: float = float("nan")
    """Its monitored figure."""
    epochs_without_improvement: int = 0
    """Of the monitored figure, for early stopping."""
    plateau_best: float = float("nan")
    """Best value of the plateau's metric."""
    plateau_epochs: int = 0
    """Epochs without improvement of the plateau's metric since the last reduction."""
    lr_scale: float = 1.0
    """Factor that plateaus have put on the learning rate."""
    stop_reason: str = ""
    """Why training ended before its last epoch, or empty."""
    collapsed: bool = False
    """Whether all validation examples got one probability in the last epoch."""

    def after_epoch(self, row: HistoryRow, config: Config) -> Control:
        """The control after one more epoch with the given figures.

        A figure that is not a number never counts as an improvement; the first epoch always does, so that a
        best checkpoint exists. Frozen epochs, and those before `train.early_stop_from_epoch`, never stop a run
        that has others, and its second stage starts with the whole learning rate.
        """
        value = row[config.train.monitor]
        improved = self.best_step < 0 or _better(value, self.best_value, config.train.monitor)
        waited = 0 if improved else self.epochs_without_improvement + 1
        frozen = self.epoch < config.optimizer.freeze_epochs < config.train.epochs
        if frozen or self.epoch < config.train.early_stop_from_epoch:
            waited = 0  # the body may still learn, or the net still find its start
        patience = config.train.early_stop_patience
        reason = ""
        if patience and waited >= patience:
            epochs = f"{patience} epoch{'s' if patience > 1 else ''}"
            reason = f"{config.train.monitor} did not improve for {epochs}"
        after_plateau = self._after_plateau(row, config)
        if frozen and self.epoch + 1 == config.optimizer.freeze_epochs:
            after_plateau = dataclasses.replace(
                self, plateau_best=float("nan"), plateau_epochs=0, lr_scale=1.0
            )
        return dataclasses.replace(
            after_plateau,
            epoch=self.epoch + 1,
            best_step=int(row["step"]) if improved else self.best_step,
            best_value=value if improved else self.best_value,
            epochs_without_improvement=waited,
            stop_reason=reason,
        )

    def _after_plateau(self, row: HistoryRow, config: Config) -> Control:
        settings = config.optimizer
        if settings.schedule != "plateau":
            return self
        value = row[settings.plateau_metric]
        if self.epoch == 0 or _better(value, self.plateau_best, settings.plateau_metric):
            return dataclasses.replace(self, plateau_best=value, plateau_epochs=0)
        if self.plateau_epochs + 1 < settings.plateau_patience:
            return dataclasses.replace(self, plateau_epochs=self.plateau_epochs + 1)
        floor = settings.min_lr / settings.peak_lr
        scale = max(self.lr_scale * settings.plateau_factor, floor)
        return dataclasses.replace(self, plateau_epochs=0, lr_scale=scale)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Control:
        """The inverse of `to_dict`."""
        return cls(**values)


def _better(value: float, best: float, metric: str) -> bool:
    if value != value:
        return False
    if best != best:
        return True
    return value < best if metric.endswith("loss") else value > best
