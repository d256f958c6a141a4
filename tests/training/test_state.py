from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pcam_jax.runtime.errors import UserError
from pcam_jax.training.state import TrainState, from_named_arrays, initial_state, snapshot, to_named_arrays


def make_state(*, ema: bool = True) -> TrainState:
    params = {"conv": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    stats = {"norm": {"mean": jnp.zeros(3)}}
    return initial_state(params, stats, optax.adam(1e-3).init(params), ema=ema)


def test_names_are_dotted_paths_and_arrays_come_back_bit_for_bit() -> None:
    state = jax.tree.map(lambda leaf: leaf + 1, make_state())
    arrays = to_named_arrays(state)
    assert {"step", "params.conv.kernel", "ema_params.conv.bias", "batch_stats.norm.mean"} <= set(arrays)
    back = from_named_arrays(make_state(), arrays)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert found.dtype == expected.dtype
        assert found.tobytes() == np.asarray(expected).tobytes()


def test_no_average_is_kept_where_none_is_wanted() -> None:
    assert not jax.tree.leaves(make_state(ema=False).ema_params)
    assert len(jax.tree.leaves(make_state().ema_params)) == 2


def test_a_fresh_state_may_be_donated() -> None:
    # no leaf is the buffer of another, which donation forbids
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    jax.block_until_ready(step(make_state()))


def test_a_snapshot_outlives_the_donated_state() -> None:
    state = jax.tree.map(jnp.copy, make_state())
    expected = to_named_arrays(state)
    copies = snapshot(state)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 7, state), donate_argnums=0)
    for _ in range(3):
        state = step(state)
    assert set(copies) == set(expected)
    for name, leaf in copies.items():
        assert np.asarray(leaf).tobytes() == expected[name].tobytes()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda arrays: arrays.pop("params.conv.bias"), "params.conv.bias is missing"),
        (lambda arrays: arrays.update(extra=np.zeros(1)), "extra is not part of this network"),
        (
            lambda arrays: arrays.update({"params.conv.bias": np.zeros(4, np.float32)}),
            r"params.conv.bias is float32\(4,\) where float32\(3,\) is expected",
        ),
        (
            lambda arrays: arrays.update({"params.conv.bias": np.zeros(3, np.float64)}),
            "params.conv.bias is float64",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(change: object, complaint: str) -> None:
    arrays = to_named_arrays(make_state())
    change(arrays)  # type: ignore[operator]
    with pytest.raises(UserError, match=complaint):
        from_named_arrays(make_state(), arrays)
