"""Schedules and update rules, composed from optax so that plateaus and frozen parts need no extra state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pcam_jax.config.schema import OptimizerConfig
from pcam_jax.runtime.errors import UserError
from pcam_jax.training import schedule_free

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An update rule and its schedule.

    The learning rate is an argument of `update`, so that the plateau's factor (in the state of the run) and
    the factors of frozen or slower layers apply without rebuilding anything.
    """

    schedule: Schedule
    """Learning rate before plateau factors, of the step ``[] int32``."""
    init: Callable[[Any], Any]
    """Optimizer state of given params."""
    update: Callable[..., tuple[Any, Any]]
    """(grads, opt_state, params, learning rate, factors) -> (updates to add to params, new opt_state).

    ``factors``, a tree like params of floats or None for all ones, multiplies each array's learning rate.
    """
    eval_params: Callable[[Any, Any], Any]
    """(opt_state, params) -> the params to evaluate; other than params for schedule-free only."""


def make_schedule(config: OptimizerConfig, total_steps: int, peak_lr: float | None = None) -> Schedule:
    """The learning rate as a function of the step ``[] int32``, as ``float32``.

    ``constant`` and ``plateau`` stay at the peak (a plateau's factor lies outside). ``cosine`` rises linearly
    over the warm-up and falls to ``min_lr`` (Loshchilov & Hutter 2017, arXiv:1608.03983). ``one_cycle`` rises
    from a 25th of the peak along a half cosine and falls to ``min_lr`` along another (Smith & Topin 2018,
    arXiv:1708.07120). For schedule_free_adamw ``constant`` rises over the warm-up, then stays.

    Args:
        config: the optimizer's settings.
        total_steps: steps of the whole schedule.
        peak_lr: instead of ``config.peak_lr``.
    """
    peak = config.peak_lr if peak_lr is None else peak_lr
    ramp = round(config.warmup_fraction * total_steps) if config.name == "schedule_free_adamw" else 0
    if ramp:
        return lambda step: jnp.asarray(peak * jnp.minimum(1.0, (step + 1) / ramp), jnp.float32)
    if config.schedule in ("constant", "plateau"):
        return lambda step: jnp.full((), peak, jnp.float32)
    if config.schedule == "cosine":
        warmup = round(config.warmup_fraction * total_steps)
        start = 0.0 if warmup else peak
        return optax.warmup_cosine_decay_schedule(
            start, peak, warmup, max(total_steps, warmup + 1), config.min_lr
        )
    rise = max(1, round((config.warmup_fraction or 0.3) * total_steps))
    fall = max(1, total_steps - rise)

    def one_cycle(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        up = peak / 25 + (peak - peak / 25) * 0.5 * (1 - jnp.cos(jnp.pi * jnp.clip(step / rise, 0, 1)))
        down = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((step - rise) / fall, 0, 1)))
        return jnp.where(step < rise, up, config.min_lr + (peak - config.min_lr) * down)

    return one_cycle


def staged_schedule(config: OptimizerConfig, total_steps: int, frozen_steps: int) -> Schedule:
    """One schedule while the body is frozen, at ``freeze_lr``, and another for the steps after.

    Args:
        config: the optimizer's settings.
        total_steps: steps of the whole run.
        frozen_steps: how many of them, from the start, train the head alone; 0 for none.
    """
    if not frozen_steps:
        return make_schedule(config, total_steps)
    first = make_schedule(config, frozen_steps, config.freeze_lr or config.peak_lr)
    second = make_schedule(config, max(1, total_steps - frozen_steps))
    return lambda step: jnp.where(step < frozen_steps, first(step), second(step - frozen_steps))


def learning_rate_factors(config: OptimizerConfig, depths: Any, *, frozen: bool) -> Any:
    """What each array's learning rate is multiplied by: a tree like ``depths`` of floats, or None for all ones.

    Args:
        config: its ``layer_decay`` slows each part of the body relative to the one after it (Howard & Ruder
            2018, arXiv:1801.06146).
        depths: distance of each array from the head, from ``Net.depths``.
        frozen: the body stands still.
    """
    if frozen:
        return jax.tree.map(lambda depth: float(depth == 0), depths)
    if config.layer_decay == 1.0:
        return None
    return jax.tree.map(lambda depth: config.layer_decay**depth, depths)


def make_optimizer(
    config: OptimizerConfig, total_steps: int, params: Any, frozen_steps: int = 0
) -> Optimizer:
    """Build the update rule.

    Weight decay touches only arrays of two or more axes (kernels), never biases or normalisation, and is
    decoupled from the gradient for adamw, muon and schedule_free_adamw (Loshchilov & Hutter 2019,
    arXiv:1711.05101).

    Args:
        config: the optimizer's settings.
        total_steps: steps of the whole run, for the schedule.
        params: nested dict of arrays or ShapeDtypeStructs; only shapes are used.
        frozen_steps: steps at the start that train the head alone.

    Raises:
        UserError: schedule_free_adamw with another schedule than constant (it replaces schedules), or with
            beta1 = 0 (then there is no average).
    """
    schedule = staged_schedule(config, total_steps, frozen_steps)
    if config.name == "schedule_free_adamw":
        return _schedule_free(config, schedule)
    kernels = jax.tree.map(lambda leaf: len(leaf.shape) >= 2, params)
    decay = [optax.add_decayed_weights(config.weight_decay, mask=kernels)] if config.weight_decay else []
    decoupled = config.name in ("adamw", "muon")
    chain = optax.chain(
        *([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []),
        *([] if decoupled else decay),
        _direction(config, params),
        *(decay if decoupled else []),
    )

    def update(
        grads: Any, opt_state: Any, params: Any, learning_rate: Any, factors: Any = None
    ) -> tuple[Any, Any]:
        direction, opt_state = chain.update(grads, opt_state, params)
        factors = _ones(params) if factors is None else factors
        return jax.tree.map(
            lambda leaf, factor: -learning_rate * factor * leaf, direction, factors
        ), opt_state

    return Optimizer(schedule, chain.init, update, lambda opt_state, params: params)


def _direction(config: OptimizerConfig, params: Any) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name in ("adam", "adamw"):
        return adam
    if config.name == "rmsprop":
        # as Keras: mean square decays by 0.9, epsilon under the root
        parts = [optax.scale_by_rms(0.9, config.epsilon)]
        return optax.chain(*parts, *([optax.trace(config.momentum)] if config.momentum else []))
    if config.name == "sgd":
        return optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
    # Muon (Jordan et al. 2024, github.com/KellerJordan/Muon) for kernels, as matrices [inputs, outputs], scaled as
    # in Liu et al. 2025 (arXiv:2502.16982); Adam for all else
    kernels = jax.tree.map(_is_muon_kernel, params)
    labels = jax.tree.map(lambda kernel: "muon" if kernel else "adam", kernels)

    def axes(arrays: Any) -> Any:
        # a function, since the partition shows muon a tree without the other arrays
        return jax.tree.map(
            lambda leaf: optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1),
            arrays,
        )

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=config.momentum or 0.95, weight_dimension_numbers=axes),
        optax.stateless_with_tree_map(lambda leaf, _: _MUON_RMS * max(_matrix(leaf)) ** 0.5 * leaf),
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)


# the root mean square of Adam's updates, which makes one learning rate and weight decay fit both (Liu et al. 2025)
_MUON_RMS = 0.2


def _is_muon_kernel(leaf: Any) -> bool:
    """Whether an array is a matrix worth orthogonalising: not a vector, nor one filter for each channel."""
    return len(leaf.shape) >= 2 and min(_matrix(leaf)) > 1 and (len(leaf.shape) == 2 or leaf.shape[-2] > 1)


def _matrix(leaf: Any) -> tuple[int, int]:
    """(inputs, outputs) of a kernel."""
    return math.prod(leaf.shape[:-1]), leaf.shape[-1]


def _ones(params: Any) -> Any:
    return jax.tree.map(lambda _: 1.0, params)


def _schedule_free(config: OptimizerConfig, schedule: Schedule) -> Optimizer:
    if config.schedule != "constant":
        raise UserError(
            f"optimizer.schedule is {config.schedule!r}: schedule_free_adamw replaces the schedule, so set it "
            'to "constant".'
        )
    if config.beta1 == 0:
        raise UserError("optimizer.beta1 is 0: schedule_free_adamw needs it above 0, such as 0.9.")
    inner = schedule_free.make_update(config)

    def update(
        grads: Any, opt_state: Any, params: Any, learning_rate: Any, factors: Any = None
    ) -> tuple[Any, Any]:
        if config.clip_norm:
            grads, _ = optax.clip_by_global_norm(config.clip_norm).update(grads, optax.EmptyState())
        factors = _ones(params) if factors is None else factors
        return inner(grads, opt_state, params, learning_rate, factors)

    return Optimizer(schedule, schedule_free.init, update, schedule_free.make_eval_params(config))
