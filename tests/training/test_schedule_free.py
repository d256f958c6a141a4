from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from pcam_jax.config.schema import OptimizerConfig
from pcam_jax.runtime.errors import UserError
from pcam_jax.training.optimizer import make_optimizer

DICE = np.random.default_rng(3)
PARAMS = {
    "kernel": DICE.normal(size=(3, 4)).astype(np.float32),
    "bias": DICE.normal(size=4).astype(np.float32),
}
GRADS = [
    {name: DICE.normal(size=leaf.shape).astype(np.float32) for name, leaf in PARAMS.items()} for _ in range(6)
]


def config(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(
        **{
            "name": "schedule_free_adamw",
            "peak_lr": 0.05,
            "schedule": "constant",
            "weight_decay": 0.1,
            **changes,
        }
    )


def follow(settings: OptimizerConfig, total_steps: int = 12) -> tuple[Any, Any, Any]:
    """Params, state and averaged params after all gradients."""
    optimizer = make_optimizer(settings, total_steps, PARAMS)
    params: Any = jax.tree.map(jnp.asarray, PARAMS)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step, grads in enumerate(GRADS):
        updates, state = update(grads, state, params, optimizer.schedule(jnp.int32(step)))
        params = optax.apply_updates(params, updates)
    return params, state, optimizer.eval_params(state, params)


def reference(settings: OptimizerConfig, rates: list[float]) -> tuple[Any, Any]:
    """The sequences y and x as the paper writes them, in float64, x kept on its own."""
    y = {name: leaf.astype(np.float64) for name, leaf in PARAMS.items()}
    z, x = dict(y), dict(y)
    second = {name: np.zeros(leaf.shape) for name, leaf in y.items()}
    weights: list[float] = []
    for number, (grads, rate) in enumerate(zip(GRADS, rates, strict=True), start=1):
        weights.append(max(rates[:number]) ** 2)
        share = weights[-1] / sum(weights)
        for name, grad in grads.items():
            second[name] = settings.beta2 * second[name] + (1 - settings.beta2) * grad.astype(np.float64) ** 2
            direction = grad / (np.sqrt(second[name] / (1 - settings.beta2**number)) + settings.epsilon)
            if y[name].ndim >= 2:
                direction = direction + settings.weight_decay * y[name]
            z[name] = z[name] - rate * direction
            x[name] = (1 - share) * x[name] + share * z[name]
            y[name] = (1 - settings.beta1) * z[name] + settings.beta1 * x[name]
    return y, x


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        (config(), [0.05] * 6),
        (config(beta1=0.5, beta2=0.9, epsilon=0.01), [0.05] * 6),
        (config(warmup_fraction=1 / 3), [0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05]),
    ],
)
def test_the_sequences_are_those_of_the_paper(settings: OptimizerConfig, rates: list[float]) -> None:
    params, _, averaged = follow(settings)
    y, x = reference(settings, rates)
    for name in PARAMS:
        np.testing.assert_allclose(params[name], y[name], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(averaged[name], x[name], rtol=2e-5, atol=2e-6)


def test_it_agrees_with_optax() -> None:
    settings = config(clip_norm=1.0)
    inner = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_rms(settings.beta2, settings.epsilon, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim >= 2, tree)),
        optax.scale_by_learning_rate(0.05),
    )
    theirs = optax.contrib.schedule_free(inner, 0.05, b1=settings.beta1)
    params: Any = jax.tree.map(jnp.asarray, PARAMS)
    state, update = theirs.init(params), jax.jit(theirs.update)
    for grads in GRADS:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    ours, _, averaged = follow(settings)
    for name in PARAMS:
        np.testing.assert_allclose(ours[name], params[name], rtol=2e-5, atol=2e-6)
        expected = optax.contrib.schedule_free_eval_params(state, params)[name]
        np.testing.assert_allclose(averaged[name], expected, rtol=2e-5, atol=2e-6)


def test_a_rate_of_zero_moves_nothing() -> None:
    optimizer = make_optimizer(config(), 10, PARAMS)
    updates, state = optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS, 0.0)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(updates))
    assert np.isfinite(float(state.weight_sum))


def test_no_momentum_means_no_average() -> None:
    with pytest.raises(UserError, match=r"optimizer\.beta1 is 0"):
        make_optimizer(config(beta1=0.0), 10, PARAMS)


def test_muons_steps_have_the_size_of_adams_and_spare_filters_and_single_outputs() -> None:
    params = {
        "kernel": jnp.zeros((3, 3, 16, 64)),
        "wide": jnp.zeros((512, 32)),
        "depthwise": jnp.zeros((3, 3, 1, 32)),
        "head": jnp.zeros((32, 1)),
        "bias": jnp.zeros(8),
    }
    optimizer = make_optimizer(OptimizerConfig(name="muon", schedule="constant"), 10, params)
    grads = {name: jnp.asarray(DICE.normal(size=leaf.shape), jnp.float32) for name, leaf in params.items()}
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params, 1.0)
    for name in ("kernel", "wide"):  # 0.2, up to the spread that five Newton-Schulz steps leave
        assert 0.13 < float(jnp.sqrt(jnp.mean(updates[name] ** 2))) < 0.25
    for name in ("depthwise", "head", "bias"):  # Adam's first step
        np.testing.assert_allclose(updates[name], -jnp.sign(grads[name]), rtol=1e-3)
