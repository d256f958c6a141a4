"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): averaging in place of a decaying schedule.

Ours rather than optax's, because the learning rate and each array's factor are arguments here: frozen and slower
layers must slow the averaged sequences too, not only the params between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pcam_jax.config.schema import OptimizerConfig


class ScheduleFreeState(NamedTuple):
    """Beside the params, which are where gradients are taken (the paper's y)."""

    base: Any
    """The sequence that gradients move (the paper's z); a tree like params."""
    second_moment: Any
    """Decayed mean of squared gradients; a tree like params."""
    steps: jax.Array
    """Updates done, ``[] int32``."""
    weight_sum: jax.Array
    """Sum of the squares of the largest learning rate so far at each update, ``[] float32``."""
    largest_rate: jax.Array
    """Largest learning rate so far, ``[] float32``."""


def init(params: Any) -> ScheduleFreeState:
    """The state before the first update."""
    zero = jnp.zeros((), jnp.float32)
    return ScheduleFreeState(
        jax.tree.map(jnp.copy, params),
        jax.tree.map(jnp.zeros_like, params),
        jnp.zeros((), jnp.int32),
        zero,
        zero + 0,
    )


def make_update(config: OptimizerConfig) -> Callable[..., tuple[Any, ScheduleFreeState]]:
    """The function of (grads, state, params, learning rate, factors) to (updates, state).

    With d = g / (sqrt(v / (1 - beta2^t)) + epsilon) + weight_decay * y and c = r^2 / sum of r^2, r being the
    largest learning rate so far: z' = z - lr d, x' = (1 - c) x + c z', y' = (1 - beta1) z' + beta1 x', where
    x is never stored. Weight decay leaves arrays of one axis alone.
    """

    def update(
        grads: Any, state: ScheduleFreeState, params: Any, learning_rate: Any, factors: Any
    ) -> tuple[Any, ScheduleFreeState]:
        count = state.steps + 1
        largest = jnp.maximum(state.largest_rate, learning_rate)
        weight_sum = state.weight_sum + largest**2
        share = jnp.where(weight_sum > 0, largest**2 / jnp.where(weight_sum > 0, weight_sum, 1.0), 0.0)
        correction = 1 - config.beta2**count
        second = jax.tree.map(
            lambda v, g: config.beta2 * v + (1 - config.beta2) * g * g, state.second_moment, grads
        )

        def step(g: Any, v: Any, y: Any, factor: Any) -> Any:
            direction = g / (jnp.sqrt(v / correction) + config.epsilon)
            if y.ndim >= 2:
                direction = direction + config.weight_decay * y
            return learning_rate * factor * direction

        steps = jax.tree.map(step, grads, second, params, factors)
        base = jax.tree.map(jnp.subtract, state.base, steps)
        # y' - y; exactly zero for an array that stands still, since then z equals y
        updates = jax.tree.map(
            lambda z, y, moved: share * (z - y) + (config.beta1 * (1 - share) - 1) * moved,
            state.base,
            params,
            steps,
        )
        return updates, ScheduleFreeState(base, second, count, weight_sum, largest)

    return update


def make_eval_params(config: OptimizerConfig) -> Callable[[ScheduleFreeState, Any], Any]:
    """The function of (state, params) to the averaged params (the paper's x)."""

    def eval_params(state: ScheduleFreeState, params: Any) -> Any:
        # (y - (1 - beta1) z) / beta1, in the form that is exact where y equals z
        return jax.tree.map(lambda z, y: z + (y - z) / config.beta1, state.base, params)

    return eval_params
