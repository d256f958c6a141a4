from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from pcam_jax.augment.policy import make_augment, mixes_labels
from pcam_jax.config.schema import AugmentConfig
from pcam_jax.runtime.errors import UserError

EVERYTHING = AugmentConfig(
    d4=True, rotation_degrees=15, zoom=0.1, shear_degrees=2, shift=0.05, brightness=0.1, contrast=0.2,
    saturation=0.2, hed_jitter=0.05, blur_sigma=1.0, noise_sigma=0.05, erase_probability=0.5, strong_class=1,
)  # fmt: skip
LABELS = jnp.array([0, 1, 0, 1, 1, 0], jnp.int32)
everything = jax.jit(make_augment(EVERYTHING))


def test_off_means_absent(images: jax.Array, key: jax.Array) -> None:
    out, targets = make_augment(AugmentConfig())(key, images, LABELS)
    assert out is images
    assert targets is LABELS
    program = jax.make_jaxpr(make_augment(AugmentConfig(strong_class=1, erase_probability=0.0)))(
        key, images, LABELS
    )
    assert program.jaxpr.outvars == program.jaxpr.invars[1:]
    flips = str(jax.make_jaxpr(make_augment(AugmentConfig(horizontal_flip=True)))(key, images, LABELS))
    assert "gather" not in flips
    assert " log " not in flips


def test_everything_at_once_is_in_range_and_deterministic(images: jax.Array, key: jax.Array) -> None:
    out, targets = everything(key, images, LABELS)
    assert out.shape == images.shape
    assert out.dtype == jnp.float32
    assert np.asarray(out).min() >= 0
    assert np.asarray(out).max() <= 1
    np.testing.assert_array_equal(targets, LABELS)
    np.testing.assert_array_equal(out, everything(key, images, LABELS)[0])
    assert (np.asarray(out) != np.asarray(everything(random.key(8), images, LABELS)[0])).mean() > 0.9


def test_jit_and_eager_agree(images: jax.Array, key: jax.Array) -> None:
    augment = make_augment(AugmentConfig(d4=True, brightness=0.1))
    eager, _ = augment(key, images, LABELS)
    jitted, _ = jax.jit(augment)(key, images, LABELS)
    np.testing.assert_allclose(eager, jitted, atol=1e-6)


def test_an_image_depends_on_nothing_but_itself_its_place_and_the_key(
    images: jax.Array, key: jax.Array
) -> None:
    out = np.asarray(everything(key, images, LABELS)[0])
    others = np.random.default_rng(9).random(images.shape).astype(np.float32)
    others[3] = images[3]
    labels = np.array([1, 0, 1, LABELS[3], 0, 1], np.int32)
    np.testing.assert_array_equal(everything(key, jnp.asarray(others), jnp.asarray(labels))[0][3], out[3])


def test_an_image_does_not_depend_on_the_size_of_its_batch(images: jax.Array, key: jax.Array) -> None:
    augment = jax.jit(make_augment(AugmentConfig(d4=True, noise_sigma=0.05)))
    full, _ = augment(key, images, LABELS)
    part, _ = augment(key, images[:2], LABELS[:2])
    np.testing.assert_allclose(part, np.asarray(full)[:2], atol=1e-6)


def test_operations_draw_apart(images: jax.Array, key: jax.Array) -> None:
    """Turning colour on must not change which symmetries are drawn."""
    plain, _ = jax.jit(make_augment(AugmentConfig(d4=True)))(key, images, LABELS)
    tinted, _ = jax.jit(make_augment(AugmentConfig(d4=True, brightness=1e-6)))(key, images, LABELS)
    np.testing.assert_allclose(tinted, plain, atol=1e-5)


def test_one_class_can_be_changed_more_strongly(key: jax.Array) -> None:
    images = jnp.asarray(np.full((400, 2, 2, 3), 0.5, np.float32))
    labels = jnp.asarray(np.arange(400) % 2)
    config = AugmentConfig(brightness=0.1, strong_class=1, strong_factor=3)
    change = np.asarray(jax.jit(make_augment(config))(key, images, labels)[0])[:, 0, 0, 0] - 0.5
    assert 0.09 < np.abs(change[::2]).max() <= 0.1 + 1e-6
    assert 0.27 < np.abs(change[1::2]).max() <= 0.3 + 1e-6
    even, _ = jax.jit(make_augment(dataclasses.replace(config, strong_class=-1)))(key, images, labels)
    np.testing.assert_allclose(np.asarray(even)[::2, 0, 0, 0], change[::2] + 0.5, atol=1e-6)


def test_mixing_gives_probabilities_that_match_the_pixels(key: jax.Array) -> None:
    labels = np.arange(64, dtype=np.int32) % 3
    images = np.broadcast_to(
        np.eye(3, dtype=np.float32)[labels][:, None, None], (64, 8, 8, 3)
    )  # colour = class
    augment = jax.jit(make_augment(AugmentConfig(mixup_alpha=1, cutmix_alpha=1), classes=3))
    out, targets = (np.asarray(x) for x in augment(key, jnp.asarray(images), jnp.asarray(labels)))
    assert targets.shape == (64, 3)
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(out.mean((1, 2)), targets, atol=1e-5)
    mixed = (targets > 0).sum(1) == 2
    pasted = np.isin(out, [0, 1]).all((1, 2, 3)) & mixed
    assert 0.2 < pasted.sum() / mixed.sum() < 0.8  # each example is either blended or pasted into


@pytest.mark.parametrize("name", ["mixup_alpha", "cutmix_alpha"])
def test_either_way_of_mixing_works_alone(name: str, images: jax.Array, key: jax.Array) -> None:
    config = AugmentConfig(**{name: 0.4})
    assert mixes_labels(config)
    out, targets = jax.eval_shape(make_augment(config, classes=5), key, images, LABELS)
    assert out.shape == images.shape
    assert (targets.shape, targets.dtype) == ((6, 5), jnp.float32)


def test_labels_stay_labels_without_mixing() -> None:
    assert not mixes_labels(EVERYTHING)


def test_mistakes_are_named(key: jax.Array) -> None:
    with pytest.raises(UserError, match=r"augment\.zoom times augment\.strong_factor is 1\.2"):
        make_augment(AugmentConfig(zoom=0.6, strong_class=1, strong_factor=2))
    make_augment(AugmentConfig(zoom=0.6, strong_class=-1, strong_factor=2))
    with pytest.raises(UserError, match=r"augment\.strong_class is 2, and the classes are 0 to 1"):
        make_augment(AugmentConfig(strong_class=2))
    make_augment(AugmentConfig(strong_class=2), classes=3)
    oblong = jnp.zeros((1, 4, 6, 3))
    with pytest.raises(UserError, match=r"augment\.d4 needs square images and these are 4x6"):
        make_augment(AugmentConfig(d4=True))(key, oblong, LABELS[:1])
    flipped, _ = make_augment(AugmentConfig(horizontal_flip=True))(key, oblong, LABELS[:1])
    assert flipped.shape == oblong.shape


def test_two_devices_give_what_one_gives() -> None:
    """And without moving images between devices."""
    code = textwrap.dedent("""
        import jax, jax.numpy as jnp, numpy as np
        jax.config.update("jax_num_cpu_devices", 2)
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from pcam_jax.augment.policy import make_augment
        from pcam_jax.config.schema import AugmentConfig
        images = np.random.default_rng(0).random((4, 16, 16, 3)).astype(np.float32)
        labels, key = np.array([0, 1, 1, 0], np.int32), jax.random.key(0)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        split = NamedSharding(mesh, PartitionSpec("data"))
        augment = jax.jit(make_augment(AugmentConfig(d4=True, rotation_degrees=15, contrast=0.2, strong_class=1)))
        one, _ = augment(key, images, labels)
        spread = jax.device_put(images, split), jax.device_put(labels, split)
        compiled = augment.lower(key, *spread).compile()
        two, two_labels = compiled(key, *spread)
        assert len(two.sharding.device_set) == 2
        np.testing.assert_allclose(one, two, atol=1e-6)
        np.testing.assert_array_equal(two_labels, labels)
        moved = [line for line in compiled.as_text().splitlines() if "all-gather(" in line]
        assert not any("16,16" in line for line in moved), moved
        print("same")
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
