"""Averages that are made at the ends of epochs, and the batch statistics that belong to them.

Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407) takes the mean of the weights at the ends of
the last epochs; schedule-free optimizers average at each step. No training step ran with such weights, so the
running statistics of batch normalisation, which lag behind other weights, do not fit them: they are measured
anew, on training images as evaluation would see them (Wu & Johnson 2021, arXiv:2105.07576).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pcam_jax.config.schema import Config, OptimizerConfig
from pcam_jax.data.order import TrainOrder
from pcam_jax.models.preprocess import normalize
from pcam_jax.models.registry import Net
from pcam_jax.runtime import accelerator, sharding
from pcam_jax.runtime.signals import Stop
from pcam_jax.training.batches import Batches
from pcam_jax.training.optimizer import Optimizer
from pcam_jax.training.state import TrainState

_EXAMPLES = 2048  # the paper finds no gain beyond a thousand
_SCHEDULE_FREE = "schedule_free_adamw"


def keeps_average(config: OptimizerConfig, batch_stats: Any) -> bool:
    """Whether a run's state holds an average made at the ends of epochs.

    Args:
        config: the optimizer's settings.
        batch_stats: of the net; a net without can evaluate schedule-free weights as they are.
    """
    return config.swa_epochs > 0 or (
        config.name == _SCHEDULE_FREE and not config.ema_decay and bool(jax.tree.leaves(batch_stats))
    )


class EpochAverage:
    """Brings the average in a state up to date after an epoch.

    Args:
        net: the network.
        optimizer: its rule.
        config: of the run.
        order: what the training steps read; the first of them serve for the statistics.
        batches: where their images are.
        mesh: the devices.
    """

    def __init__(
        self, net: Net, optimizer: Optimizer, config: Config, order: TrainOrder, batches: Batches, mesh: Mesh
    ) -> None:
        self._optimizer, self._config, self._batches = optimizer, config, batches
        self._count = min(-(-_EXAMPLES // order.batch_size), order.epoch_end_step(1))
        self._everywhere = everywhere = sharding.replicated(mesh)
        self._averaged = jax.jit(self._next_params, out_shardings=everywhere)
        self._measure = jax.jit(
            batches.adapt(make_statistics_step(net, config)),
            out_shardings=everywhere,
            compiler_options=accelerator.compiler_options(),
        )
        self._finish = jax.jit(finished_statistics, out_shardings=everywhere)

    def after_epoch(self, state: TrainState, epoch: int, stop: Stop) -> TrainState:
        """The state with its average after ``epoch`` (from 1), or as it is where nothing is averaged.

        Args:
            state: at the end of the epoch.
            epoch: its number.
            stop: polled between batches.

        Raises:
            Interrupted: a signal came; the state is then as it was.
        """
        settings = self._config.optimizer
        first = self._config.train.epochs - settings.swa_epochs + 1 if settings.swa_epochs else 1
        if not state.average or epoch < first:
            return state
        params, batch_stats, count = self._averaged(state)
        if jax.tree.leaves(batch_stats) and epoch > settings.freeze_epochs:
            batch_stats = self._statistics(params, batch_stats, stop)
        average = {"params": params, "batch_stats": batch_stats, "count": count}
        return dataclasses.replace(state, average=average)

    def _next_params(self, state: TrainState) -> tuple[Any, Any, jax.Array]:
        """The averaged params, copies of the running statistics, and how many epochs are in the average."""
        copies = jax.tree.map(jnp.copy, state.batch_stats)
        if not self._config.optimizer.swa_epochs:
            return self._optimizer.eval_params(state.opt_state, state.params), copies, jnp.ones((), jnp.int32)
        count = state.average["count"] + 1
        mean = jax.tree.map(
            lambda mean, new: jnp.where(count == 1, new, mean + (new - mean) / count),
            state.average["params"],
            state.params,
        )
        return mean, copies, count

    def _statistics(self, params: Any, batch_stats: Any, stop: Stop) -> Any:
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), (batch_stats, batch_stats))
        carry = (params, *sharding.put((*zeros, np.zeros((), np.int32)), self._everywhere))
        for arguments in self._batches.arguments(0, self._count):
            carry = self._measure(carry, *arguments)
            stop.check()
        return self._finish(*carry[1:])


def make_statistics_step(net: Net, config: Config) -> Any:
    """Build the function that adds one batch to the statistics.

    Args:
        net: the network.
        config: its pixel scaling and seed.

    Returns:
        A function of ((params, mean, spread, count), images ``[B, H, W, 3] uint8``, labels ``[B]``) to the next
        such tuple: of each statistic the mean over batches and the sum of squared distances from it (Welford
        1962), which `finished_statistics` joins.
    """

    def step(carry: tuple[Any, Any, Any, Any], images: jax.Array, labels: jax.Array) -> Any:
        params, mean, spread, count = carry
        key = jax.random.fold_in(jax.random.key(config.train.seed), count)
        found = net.batch_statistics(params, mean, normalize(images, config.model.normalization), key=key)
        moved = jax.tree.map(lambda old, new: old + (new - old) / (count + 1), mean, found)
        spread = jax.tree.map(
            lambda s, old, now, new: s + (new - old) * (new - now), spread, mean, moved, found
        )
        return params, moved, spread, count + 1

    return step


def finished_statistics(mean: Any, spread: Any, count: Any) -> Any:
    """Statistics over all batches: a variance is the mean of the batches' plus that of their means."""
    if "var" in mean:
        return {"mean": mean["mean"], "var": mean["var"] + spread["mean"] / count}
    return {name: finished_statistics(mean[name], spread[name], count) for name in mean}
