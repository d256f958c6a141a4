"""pcam_jax: the trainer's own step and the predictor's own forward pass.

Beside ``ours`` two variants show what was gained: ``ours-malloc`` leaves the allocator as it is, and ``ours-plain``
runs the same nets as JAX comes, with XLA's own convolutions and pools and its default options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pcam_jax
from pcam_jax.config.schema import Config, ModelConfig, TrainConfig
from pcam_jax.models import shares
from pcam_jax.models.platform import portable_formulations
from pcam_jax.models.registry import Net, build_model
from pcam_jax.runtime import accelerator, sharding
from pcam_jax.training.optimizer import make_optimizer
from pcam_jax.training.state import initial_state
from pcam_jax.training.steps import make_eval_step, make_train_step
from throughput import recipes
from throughput.case import MATMUL_SIDE, Case, Contender, batches


def make(case: Case) -> Contender:
    if case.system == "ours":
        predicting = case.task == "predict"
        accelerator.configure(
            cpu_devices=accelerator.PREDICTING_DEVICES if predicting else recipes.cpu_devices(case.model)
        )
    plain = case.system == "ours-plain"
    options = {} if plain else accelerator.compiler_options()
    shape = (case.side, case.side, 3)
    net = build_model(case.model, image_shape=shape, outputs=1, dtype=jnp.dtype(case.precision))
    steps, compiled = (_train if case.task == "train" else _predict)(case, net, options)

    def run(count: int) -> None:
        with portable_formulations() if plain else contextlib.nullcontext():
            steps(count)

    facts = {
        "versions": {"pcam_jax": getattr(pcam_jax, "__version__", ""), "jax": jax.__version__},
        "device": accelerator.device_summary(),
        "params": net.param_count,
        "flops_per_image": _flops(dataclasses.replace(case, precision="float32")),
    }
    return Contender(run, lambda: matmul(case.precision), facts, lambda: compiled().as_text())


Step = tuple[Callable[[int], None], Callable[[], jax.stages.Compiled]]
"""Does so many steps; compiles one."""


def _train(case: Case, net: Net, options: dict[str, str]) -> Step:
    config = Config(
        model=ModelConfig(name=case.model), train=TrainConfig(batch_size=case.batch, precision=case.precision)
    )
    params, batch_stats = net.init(jax.random.key(0))
    optimizer = make_optimizer(config.optimizer, 1_000_000, params)
    state = initial_state(params, batch_stats, optimizer.init(params), ema=False)
    mesh = sharding.make_mesh()
    split, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    state = sharding.put(state, everywhere)
    step = jax.jit(
        make_train_step(net, optimizer, config, classes=2, mesh=mesh),
        donate_argnums=0,
        out_shardings=everywhere,
        compiler_options=options,
    )
    feed = itertools.cycle(batches(case))

    def run(steps: int) -> None:
        nonlocal state
        figures = {}
        for _ in range(steps):
            images, labels = next(feed)
            state, figures = step(state, *sharding.put((images, labels), split))
        jax.block_until_ready((state, figures))

    return run, lambda: step.lower(state, *sharding.put(next(feed), split)).compile()


def _predict(case: Case, net: Net, options: dict[str, str]) -> Step:
    mesh = sharding.make_mesh()
    split, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    weights = sharding.put(net.init(jax.random.key(0)), everywhere)
    apart = shares.apart(mesh, make_eval_step(net, "unit"), ("whole", "whole", "share"), "share")
    step = jax.jit(apart, out_shardings=everywhere, compiler_options=options)
    feed = itertools.cycle(batches(case))

    def run(steps: int) -> None:
        pending = None
        for _ in range(steps):
            images, _ = next(feed)
            logits = step(*weights, sharding.put(images, split))
            if pending is not None:
                np.asarray(jax.nn.sigmoid(pending))
            pending = logits
        np.asarray(jax.nn.sigmoid(pending))

    return run, lambda: step.lower(*weights, sharding.put(next(feed)[0], split)).compile()


def _flops(case: Case) -> float:
    """Operations per image of the task in XLA's count of the definition, before any optimisation."""
    net = build_model(case.model, image_shape=(case.side, case.side, 3), outputs=1)
    params, batch_stats = jax.eval_shape(net.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((8, case.side, case.side, 3), jnp.float32)

    def loss(params: Any, batch_stats: Any, x: Any) -> Any:
        return net.apply(params, batch_stats, x, train=True, key=jax.random.key(0))[0].sum()

    task = jax.grad(loss) if case.task == "train" else lambda p, s, x: net.apply(p, s, x)[0]
    with portable_formulations():
        return jax.jit(task).lower(params, batch_stats, x).cost_analysis()["flops"] / 8


def matmul(precision: str) -> Any:
    a = jnp.ones((MATMUL_SIDE, MATMUL_SIDE), jnp.dtype(precision))
    product = jax.jit(
        lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32),
        compiler_options=accelerator.compiler_options(),
    )
    return lambda: jax.block_until_ready(product(a, a))
