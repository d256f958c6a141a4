"""The steps: pure functions of a state and a batch, without files, clocks or devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pcam_jax.augment.policy import make_augment
from pcam_jax.config.schema import Config
from pcam_jax.models import shares
from pcam_jax.models.preprocess import Scheme, normalize, standardize
from pcam_jax.models.registry import Net
from pcam_jax.training.loss import make_loss, predicted_class
from pcam_jax.training.optimizer import Optimizer
from pcam_jax.training.state import TrainState

StepFigures = dict[str, jax.Array]
"""Of one step: ``loss``, the batch's mean, and ``skipped_in_row``, both ``[]``."""
TrainStep = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, StepFigures]]


def make_train_step(
    net: Net,
    optimizer: Optimizer,
    config: Config,
    *,
    classes: int,
    class_weights: tuple[float, ...] | None = None,
    lr_factors: Any = None,
    train_body: bool = True,
    mesh: Mesh | None = None,
) -> TrainStep:
    """Build the training step.

    All randomness comes from ``fold_in(key(train.seed), step)``. A step whose loss, gradient or result is not
    finite changes nothing but the counters: the run goes on from the same weights with the next batch.

    Args:
        net: the network.
        optimizer: the update rule.
        config: augmentation, loss and training settings.
        classes: number of classes K.
        class_weights: factor of each class in the loss, or None.
        lr_factors: tree like params of floats that multiply each array's learning rate; None is all ones.
        train_body: without it only the head learns; the body keeps its weights and batch statistics.
        mesh: devices that share each batch evenly.

    Returns:
        A function of (state, images ``[B, H, W, 3] uint8``, labels ``[B] int32``) to the next state and
        figures that outlive it when its buffers are donated.
    """
    augment = make_augment(config.augment, classes)
    loss_of = make_loss(config.loss, classes, class_weights)
    gradients = _make_gradients(net, loss_of, config.optimizer.accumulate_steps, train_body, mesh)
    scheme = config.model.normalization
    averaged = functools.partial(_averaged, decay=config.optimizer.ema_decay)

    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, StepFigures]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        augment_key, dropout_key = jax.random.split(key)
        pixels, targets = augment(augment_key, normalize(images), labels)
        pixels = standardize(pixels, scheme)
        grads, stats, loss_sum, logits = gradients(state, pixels, targets, dropout_key)
        learning_rate = optimizer.schedule(state.step) * state.lr_scale
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, learning_rate, lr_factors)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss_sum) & jnp.isfinite(optax.tree.norm(grads)) & _all_finite((params, stats))
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
        params, stats = keep(params, state.params), keep(stats, state.batch_stats)
        batch = labels.shape[0]
        good = finite.astype(jnp.float32)
        # a mixed batch has no single right label; the nearer one counts, as in training accuracy elsewhere
        hard = targets if targets.ndim == 1 else jnp.argmax(targets, axis=-1)
        correct = jnp.sum(predicted_class(logits) == hard).astype(jnp.float32)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=stats,
            opt_state=keep(opt_state, state.opt_state),
            ema_params=keep(averaged(state.ema_params, params, state.step), state.ema_params),
            ema_batch_stats=keep(averaged(state.ema_batch_stats, stats, state.step), state.ema_batch_stats),
            loss_sum=state.loss_sum + jnp.where(finite, loss_sum, 0.0),
            correct_sum=state.correct_sum + good * correct,
            example_count=state.example_count + good * batch,
            skipped=state.skipped + (~finite).astype(jnp.int32),
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        return new_state, {"loss": loss_sum / batch, "skipped_in_row": new_state.skipped_in_row + 0}

    return step


def _make_gradients(
    net: Net,
    loss_of: Callable[[jax.Array, jax.Array], jax.Array],
    parts: int,
    train_body: bool,
    mesh: Mesh | None,
) -> Callable[..., tuple[Any, Any, jax.Array, jax.Array]]:
    """The function of (state, pixels, targets, key) to gradients, batch statistics, sum of losses and logits."""

    def batch_loss(params: Any, stats: Any, images: jax.Array, targets: jax.Array, key: jax.Array) -> Any:
        logits, stats = net.apply(params, stats, images, train=True, train_body=train_body, key=key)
        losses = loss_of(logits, targets)
        return jnp.mean(losses), (stats, jnp.sum(losses), logits)

    def share_gradients(
        params: Any, stats: Any, images: jax.Array, targets: jax.Array, key: jax.Array
    ) -> Any:
        (_, (stats, loss_sum, logits)), grads = jax.value_and_grad(batch_loss, has_aux=True)(
            params, stats, images, targets, key
        )
        return shares.mean(grads), stats, shares.total(loss_sum), logits

    part_gradients = share_gradients
    if mesh is not None:
        part_gradients = shares.apart(
            mesh,
            share_gradients,
            ("whole", "whole", "share", "share", "whole"),
            ("whole", "whole", "whole", "share"),
        )

    def gradients(state: TrainState, images: jax.Array, targets: jax.Array, key: jax.Array) -> Any:
        """Mean gradient over the parts of the batch; a Python loop, since XLA's CPU convolutions crawl in scan."""
        stats, total, loss_sum, logits = state.batch_stats, None, jnp.zeros(()), []
        # every parts-th example, so that each part stays spread over all devices
        dealt = lambda array: array.reshape(-1, parts, *array.shape[1:])  # noqa: E731
        images, targets = dealt(images), dealt(targets)
        for part in range(parts):
            part_key = jax.random.fold_in(key, part)
            grads, stats, part_sum, part_logits = part_gradients(
                state.params, stats, images[:, part], targets[:, part], part_key
            )
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            loss_sum = loss_sum + part_sum
            logits.append(part_logits)
        mean = total if parts == 1 else jax.tree.map(lambda leaf: leaf / parts, total)
        return mean, stats, loss_sum, jnp.stack(logits, axis=1).reshape(-1, logits[0].shape[-1])

    return gradients


def make_resident_step(step: TrainStep) -> Callable[..., tuple[TrainState, StepFigures]]:
    """The same step on images that already live on the device: only indices travel.

    Args:
        step: from `make_train_step`.

    Returns:
        A function of (state, all images ``[N, H, W, 3] uint8``, all labels ``[N] int32``, indices
        ``[B] int32``) that gathers, then steps; batches equal those of the host placement bit for bit.
    """

    def resident(
        state: TrainState, all_images: jax.Array, all_labels: jax.Array, indices: jax.Array
    ) -> tuple[TrainState, StepFigures]:
        images = jnp.take(all_images, indices, axis=0, mode="clip")
        return step(state, images, jnp.take(all_labels, indices, axis=0, mode="clip"))

    return resident


def make_eval_step(net: Net, normalization: Scheme) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """The function of (params, batch_stats, images ``[B, H, W, 3] uint8``) to logits ``[B, outputs] float32``."""

    def eval_step(params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        logits, _ = net.apply(params, batch_stats, normalize(images, normalization))
        return logits

    return eval_step


def begin_epoch(state: TrainState, lr_scale: jax.Array) -> TrainState:
    """The state at the start of an epoch: sums at zero, and the plateau's factor ``[] float32`` of now."""
    zero = jnp.zeros((), jnp.float32)
    return dataclasses.replace(
        state,
        loss_sum=zero,
        correct_sum=zero,
        example_count=zero,
        lr_scale=jnp.asarray(lr_scale, jnp.float32),
    )


def begin_stage(state: TrainState, optimizer: Optimizer) -> TrainState:
    """The state with a fresh optimizer, for when frozen layers begin to learn.

    Adam's moments of a frozen array are zero while its count of updates is not, so that its first steps would
    be several times too long.
    """
    params = optimizer.eval_params(state.opt_state, state.params)
    return dataclasses.replace(state, params=params, opt_state=optimizer.init(params))


def evaluation_weights(state: TrainState, optimizer: Optimizer) -> tuple[Any, Any]:
    """The (params, batch_stats) to evaluate and predict with: averaged where averaging is on.

    An average made at the ends of epochs comes first, once there is one.
    """
    if state.average and int(state.average["count"]):
        return state.average["params"], state.average["batch_stats"]
    if jax.tree.leaves(state.ema_params):
        return state.ema_params, state.ema_batch_stats
    return optimizer.eval_params(state.opt_state, state.params), state.batch_stats


def _all_finite(tree: Any) -> jax.Array:
    """Whether every number is finite; a huge update or statistics of huge activations may be the first not."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _averaged(average: Any, value: Any, step: jax.Array, decay: float) -> Any:
    """Exponential moving average, its decay raised slowly so that early weights do not linger."""
    if not jax.tree.leaves(average):
        return average
    share = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    # in this form frozen weights, whose difference is zero, stay as they are bit for bit
    return jax.tree.map(lambda mean, new: mean + share * (new - mean), average, value)
