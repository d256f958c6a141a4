"""Where one operation ends and the next begins, for XLA's CPU backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax, random


def materialize(key: jax.Array, images: jax.Array) -> jax.Array:
    """The same images, computed once on a CPU instead of again wherever they are read.

    XLA's CPU backend fuses chains of operations into one loop and recomputes a pixel for each of its readers:
    three channels times seven taps of a blur and so on, which made all operations together ten times slower
    than their sum. It removes `lax.optimization_barrier` before it fuses, but keeps a conditional whose
    predicate it cannot know. Other backends weigh recomputation themselves.

    Args:
        key: any random key; it only makes the predicate unknown.
        images: any array.
    """
    if jax.default_backend() != "cpu":
        return images
    word = random.key_data(key).ravel()[0]
    always = (word >> 1) <= jnp.uint32(0x7FFFFFFF)
    return lax.cond(always, lambda x: x, jnp.negative, images)
