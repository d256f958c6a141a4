"""Everything that training needs beside a workdir: data, net, order, optimizer and devices, checked together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pcam_jax.config.schema import Config
from pcam_jax.data.order import TrainOrder
from pcam_jax.data.store import Store
from pcam_jax.runtime import accelerator, sharding
from pcam_jax.training.averaging import EpochAverage, keeps_average
from pcam_jax.training.batches import Batches, place_batches
from pcam_jax.training.loss import balanced_weights
from pcam_jax.training.network import build_network
from pcam_jax.training.optimizer import Optimizer, learning_rate_factors, make_optimizer
from pcam_jax.training.state import TrainState, initial_state
from pcam_jax.training.steps import begin_epoch, begin_stage, make_train_step

Weights = tuple[Any, Any]
"""(params, batch_stats), nested dicts of arrays."""


class Setup:
    """What a configuration means on given data and devices.

    Args:
        config: checked settings.
        store: the data.
        split: ``[N]`` names of each example's split.

    Raises:
        UserError: they do not fit together.
    """

    def __init__(self, config: Config, store: Store, split: np.ndarray) -> None:
        self.config, self.store, self.split = config, store, split
        self.net = build_network(config, store.image_shape, len(store.class_names))
        self.train_positions = np.flatnonzero(split == "train")
        self.validation_positions = np.flatnonzero(split == "validation")
        self.order = TrainOrder(
            store.labels[self.train_positions],
            config.train.batch_size,
            config.train.seed,
            config.data.sampling,
        )
        self.total_steps = self.order.epoch_end_step(config.train.epochs)
        self.mesh = sharding.make_mesh()
        self.everywhere = sharding.replicated(self.mesh)
        sharding.check_shares(config.train.batch_size, config.optimizer.accumulate_steps, self.mesh)
        self._shapes = jax.eval_shape(self.net.init, jax.random.key(0))
        self.frozen_epochs = min(config.optimizer.freeze_epochs, config.train.epochs)
        self.optimizer: Optimizer = make_optimizer(
            config.optimizer,
            self.total_steps,
            self._shapes[0],
            self.order.epoch_end_step(self.frozen_epochs),
        )

    def stage(self, epoch: int) -> int:
        """The stage that ``epoch`` (from 1) belongs to: 1, or 2 after frozen epochs."""
        return 2 if 0 < self.frozen_epochs < epoch else 1

    def head_params(self) -> int:
        """Number of parameters of the head."""
        sizes = jax.tree.map(
            lambda depth, leaf: 0 if depth else int(np.prod(leaf.shape)), self.net.depths(), self._shapes[0]
        )
        return sum(jax.tree.leaves(sizes))

    def make_state(self, weights: Weights | None = None) -> TrainState:
        """The state of step 0, on the devices.

        Args:
            weights: to begin with; by default drawn from ``train.seed``.
        """
        if weights is None:
            draw = jax.jit(lambda key: self._state_of(self.net.init(key)), out_shardings=self.everywhere)
            return draw(jax.random.key(self.config.train.seed))
        placed = sharding.put(weights, self.everywhere)
        return jax.jit(self._state_of, out_shardings=self.everywhere)(placed)

    def _state_of(self, weights: Weights) -> TrainState:
        params, batch_stats = weights
        settings = self.config.optimizer
        return initial_state(
            params,
            batch_stats,
            self.optimizer.init(params),
            ema=settings.ema_decay > 0,
            average=keeps_average(settings, batch_stats),
        )

    def place_batches(self, say: Callable[[str], None]) -> Batches:
        """The training batches, from the home that ``data.placement`` chooses."""
        placement = self.config.data.placement
        return place_batches(placement, self.store, self.train_positions, self.order, self.mesh, say)

    def make_step(
        self, batches: Batches, *, frozen: bool, optimizer: Optimizer | None = None
    ) -> Callable[..., Any]:
        """The jitted step as a function of (state, *arguments of the batches); it consumes the state.

        Args:
            batches: whose arguments it takes.
            frozen: only the head learns.
            optimizer: instead of the run's own.
        """
        classes = len(self.store.class_names)
        balanced = self.config.loss.class_weights == "balanced"
        labels = self.store.labels[self.train_positions]
        step = make_train_step(
            self.net,
            optimizer or self.optimizer,
            self.config,
            classes=classes,
            class_weights=balanced_weights(labels, classes) if balanced else None,
            lr_factors=learning_rate_factors(self.config.optimizer, self.net.depths(), frozen=frozen),
            train_body=not frozen,
            mesh=self.mesh,
        )
        return jax.jit(
            batches.adapt(step),
            donate_argnums=0,
            out_shardings=self.everywhere,
            compiler_options=accelerator.compiler_options(),
        )

    def make_average(self, batches: Batches) -> EpochAverage:
        """What brings averages up to date after each epoch."""
        return EpochAverage(self.net, self.optimizer, self.config, self.order, batches, self.mesh)

    def make_epoch_starts(self) -> tuple[Callable[..., TrainState], Callable[..., TrainState]]:
        """The jitted `begin_epoch` and, for where a stage begins, `begin_stage`; they consume the state."""
        begin = jax.jit(begin_epoch, donate_argnums=0, out_shardings=self.everywhere)
        unfreeze = jax.jit(
            lambda state: begin_stage(state, self.optimizer), donate_argnums=0, out_shardings=self.everywhere
        )
        return begin, unfreeze
