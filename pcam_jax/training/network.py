"""The network that a configuration asks for, on given data."""

from __future__ import annotations

import jax.numpy as jnp

from pcam_jax.config.schema import Config
from pcam_jax.models.registry import Net, build_model
from pcam_jax.runtime.errors import UserError


def build_network(config: Config, image_shape: tuple[int, int, int], classes: int) -> Net:
    """Describe the configured network; nothing is computed.

    Args:
        config: its ``model`` table and ``train.precision``.
        image_shape: (H, W, 3) of the images.
        classes: number of classes.

    Raises:
        UserError: unknown network or option, images too small for it, or one sigmoid unit for other than two
            classes.
    """
    if config.model.head == "sigmoid" and classes != 2:
        raise UserError(f'model.head is "sigmoid" but the data has {classes} classes: set it to "softmax".')
    return build_model(
        config.model.name,
        image_shape=image_shape,
        outputs=1 if config.model.head == "sigmoid" else classes,
        dtype=jnp.dtype(config.train.precision),
        **config.model.options,
    )
