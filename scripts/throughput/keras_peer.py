"""The same nets in Keras 3 on TensorFlow or JAX, by Keras's own train and predict functions."""

from __future__ import annotations

import itertools
import os
from typing import Any

from throughput.case import MATMUL_SIDE, Case, Contender, NotAvailableError, batches


def make(case: Case) -> Contender:
    backend = case.system.removeprefix("keras-")
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import keras
    except ImportError as error:
        raise NotAvailableError(
            f"keras or {backend} is not installed: pip install 'pcam-jax[peers]'"
        ) from error
    if case.precision != "float32":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = build(keras, case.model, case.side)
    # XLA's convolutions are slower than TensorFlow's own on CPU; on JAX there is no choice
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        jit_compile=backend == "jax",
    )
    feed = batches(case)
    run = _train(model, feed, backend) if case.task == "train" else _predict(model, feed, backend)
    facts = {
        "versions": {"keras": keras.__version__, backend: __import__(backend).__version__},
        "device": "keras",
        "params": model.count_params(),
    }
    return Contender(run, lambda: _matmul(case.precision, backend), facts)


def _train(model: Any, feed: list[Any], backend: str) -> Any:
    if backend == "tensorflow":
        import tensorflow as tf

        model.make_train_function()
        tensors = [(tf.constant(images), tf.constant(labels)) for images, labels in feed]
        endless = itertools.cycle(tensors)
        last: list[Any] = []

        def run(steps: int) -> None:
            for _ in range(steps):
                images, labels = next(endless)
                last[:] = [model.train_function(iter([(images, labels)]))]
            _values(last[0])

        return run
    endless_numpy = itertools.cycle(feed)

    def run_generic(steps: int) -> None:
        for _ in range(steps):
            images, labels = next(endless_numpy)
            model.train_on_batch(images, labels)

    return run_generic


def _values(logs: Any) -> None:
    for value in logs.values() if isinstance(logs, dict) else [logs]:
        if hasattr(value, "numpy"):
            value.numpy()


def _predict(model: Any, feed: list[Any], backend: str) -> Any:
    endless = itertools.cycle(images for images, _ in feed)
    if backend == "tensorflow":
        import tensorflow as tf

        forward = tf.function(lambda x: tf.sigmoid(tf.cast(model(x, training=False), tf.float32)))

        def run(steps: int) -> None:
            for _ in range(steps):
                forward(tf.constant(next(endless))).numpy()

        return run

    def run_generic(steps: int) -> None:
        for _ in range(steps):
            model.predict_on_batch(next(endless))

    return run_generic


def _matmul(precision: str, backend: str) -> Any:
    if backend == "tensorflow":
        import tensorflow as tf

        a = tf.ones((MATMUL_SIDE, MATMUL_SIDE), getattr(tf, precision))
        return lambda: tf.matmul(a, a).numpy()[0, 0]
    import jax
    import jax.numpy as jnp

    b = jnp.ones((MATMUL_SIDE, MATMUL_SIDE), jnp.dtype(precision))
    product = jax.jit(lambda b: b @ b)
    return lambda: jax.block_until_ready(product(b))


def build(keras: Any, name: str, side: int) -> Any:
    """The net by our name, from uint8 images to one logit.

    Raises:
        NotAvailableError: there is no Keras version of it here.
    """
    layers = keras.layers

    def conv(features: int, kernel: int, **settings: Any) -> Any:
        return layers.Conv2D(features, kernel, activation="relu", **settings)

    def dense(features: int) -> Any:
        return layers.Dense(features, activation="relu")

    def pool() -> Any:
        return layers.MaxPooling2D()

    def strided() -> list[Any]:
        return [conv(features, 6, strides=3, padding="same") for features in (32, 64, 64)]

    flatten, dropout = layers.Flatten, layers.Dropout
    nets = {
        "pcam_model1": lambda: [conv(32, 3), pool(), conv(64, 3), pool(), conv(64, 3), flatten(), dense(64)],
        "pcam_model2": lambda: [
            conv(32, 5, strides=2, padding="same"),
            conv(64, 5, padding="same"),
            pool(),
            conv(64, 5, padding="same"),
            flatten(),
            dense(64),
        ],
        "pcam_model3": lambda: [*strided(), flatten(), dense(32)],
        "pcam_model4": lambda: [*strided(), flatten(), dropout(0.2), dense(32)],
        "pcam_cnn3": lambda: [
            *(layer for features in (32, 64, 128) for layer in (conv(features, 3), pool())),
            flatten(),
            dense(128),
            dropout(0.5),
        ],
        # Keras's own ResNet-50 strides on the 1x1 convolution (v1), about 6 % less work than v1.5
        "resnet50": lambda: [
            keras.applications.ResNet50(
                include_top=False, weights=None, input_shape=(side, side, 3), pooling="avg"
            )
        ],
    }
    if name not in nets:
        raise NotAvailableError(f"no Keras version of {name} here")
    scale = layers.Rescaling(1 / 255)
    last = layers.Dense(1, dtype="float32")
    return keras.Sequential([keras.Input((side, side, 3), dtype="uint8"), scale, *nets[name](), last])
