from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcam_jax.training.lr_range import has_diverged, longest_descent, smoothed, suggest, sweep


def test_a_sweep_multiplies_by_the_same_factor() -> None:
    rates = sweep(1e-6, 1.0, 7)
    np.testing.assert_allclose(rates, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1], rtol=1e-12)


@given(st.floats(0.1, 10), st.integers(1, 30))
def test_smoothing_leaves_a_constant_as_it_is(value: float, count: int) -> None:
    np.testing.assert_allclose(smoothed([value] * count), value, rtol=1e-12)


def test_smoothing_weighs_the_past_exponentially() -> None:
    losses = [3.0, 1.0, 2.0, 5.0]
    weights = 0.95 ** np.arange(len(losses))[::-1]
    expected = np.sum(weights * losses) / weights.sum()
    np.testing.assert_allclose(smoothed(losses)[-1], expected, rtol=1e-12)


@given(st.lists(st.integers(-5, 5), max_size=9))
def test_the_longest_descent_is_one_and_none_is_longer(values: list[int]) -> None:
    found = longest_descent(values)
    assert found == sorted(set(found))
    assert all(values[b] < values[a] for a, b in itertools.pairwise(found))
    longest = max(
        (
            size
            for size in range(len(values) + 1)
            for chosen in itertools.combinations(values, size)
            if all(b < a for a, b in itertools.pairwise(chosen))
        ),
        default=0,
    )
    assert len(found) == longest


def valley(rates: np.ndarray) -> np.ndarray:
    """Flat at 0.7 up to 1e-4, falling by 0.2 each decade to 1e-2, rising sharply from 1e-1."""
    place = np.log10(rates)
    return 0.7 - 0.2 * np.clip(place + 4, 0, 2) + 2.0 * np.clip(place + 1, 0, None) ** 2


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_valley_is_found_where_it_is(noise: float) -> None:
    rates = sweep(1e-7, 10, 400)
    losses = valley(rates) + noise * np.random.default_rng(0).normal(size=len(rates))
    found = suggest(rates, losses.tolist())
    assert found is not None
    assert 3e-4 < found.valley < 1e-2
    assert 1e-4 < found.steepest < 3e-2
    assert 1e-2 < found.lowest < 1
    # a last loss that is no number changes nothing
    assert suggest(rates, [*losses[:-1].tolist(), math.nan]) is not None


@pytest.mark.parametrize("losses", [[0.7] * 100, np.linspace(0.7, 2, 100).tolist(), [0.7] * 5, [math.nan]])
def test_nothing_is_suggested_where_the_loss_never_fell(losses: list[float]) -> None:
    assert suggest(sweep(1e-7, 1, len(losses)), losses) is None


def test_divergence_is_no_number_or_four_times_the_lowest_mean() -> None:
    assert not has_diverged([1.0, 0.5, 0.6])
    assert has_diverged([1.0, math.nan])
    assert has_diverged([1.0, math.inf])
    assert has_diverged([0.1] * 10 + [100.0])
    assert not has_diverged([0.1] * 100 + [0.5])
