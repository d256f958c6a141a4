import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_jax.data.order import TrainOrder, permutation
from pcam_jax.runtime.errors import UserError

sizes = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
law = settings(max_examples=40)
seeds = st.integers(-5, 2**63)


def stream(order: TrainOrder, steps: int) -> np.ndarray:
    return np.concatenate([order.indices(step) for step in range(steps)])


@law
@given(sizes, seeds)
def test_each_epoch_is_a_permutation(size, seed):
    count, batch_size = size
    order = TrainOrder(count, batch_size, seed)
    epochs = 3
    read = stream(order, order.epoch_end_step(epochs))
    for epoch in range(epochs):
        part = read[epoch * count : (epoch + 1) * count]
        np.testing.assert_array_equal(np.sort(part), np.arange(count))


@law
@given(sizes, seeds, st.permutations(range(12)))
def test_indices_do_not_depend_on_the_order_of_calls(size, seed, calls):
    count, batch_size = size
    fresh = [TrainOrder(count, batch_size, seed).indices(step) for step in range(12)]
    order = TrainOrder(count, batch_size, seed)
    for step in calls:
        np.testing.assert_array_equal(order.indices(step), fresh[step])


@law
@given(sizes, st.integers(0, 6))
def test_epoch_end_step_counts_whole_epochs(size, epoch):
    count, batch_size = size
    order = TrainOrder(count, batch_size, 0)
    end = order.epoch_end_step(epoch)
    assert end * batch_size >= epoch * count > (end - 1) * batch_size
    # A batch is never larger than the set, so the last step of an epoch cannot finish the next one too,
    # unless both are the same length.
    assert order.epochs_read(end) in (epoch, epoch + 1)
    assert epoch == 0 or order.epochs_read(end - 1) < epoch


@st.composite
def class_sets(draw):
    labels = draw(st.lists(st.integers(0, 3), min_size=2, max_size=40).filter(lambda x: len(set(x)) > 1))
    return np.array(labels, np.int32), draw(st.integers(1, len(labels)))


@law
@given(class_sets(), seeds)
def test_balanced_batches_hold_equal_shares_of_each_class(case, seed):
    labels, batch_size = case
    order = TrainOrder(labels, batch_size, seed, "balanced")
    classes = np.unique(labels)
    for step in range(8):
        drawn = labels[order.indices(step)]
        counts = [(drawn == label).sum() for label in classes]
        assert max(counts) - min(counts) <= 1


@law
@given(class_sets(), seeds)
def test_balanced_class_streams_are_concatenated_permutations(case, seed):
    labels, batch_size = case
    order = TrainOrder(labels, batch_size, seed, "balanced")
    read = stream(order, 30)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn = read[labels[read] == label]
        whole = len(drawn) // len(members) * len(members)
        for part in drawn[:whole].reshape(-1, len(members)):
            np.testing.assert_array_equal(np.sort(part), members)


@law
@given(class_sets(), seeds, st.permutations(range(10)))
def test_balanced_indices_do_not_depend_on_the_order_of_calls(case, seed, calls):
    labels, batch_size = case
    fresh = [TrainOrder(labels, batch_size, seed, "balanced").indices(step) for step in range(10)]
    order = TrainOrder(labels, batch_size, seed, "balanced")
    for step in calls:
        np.testing.assert_array_equal(order.indices(step), fresh[step])


def test_epochs_and_seeds_and_classes_have_different_orders():
    orders = [permutation(50, *key) for key in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_the_same_for_ever():
    # A run resumed on another machine or numpy version must read on where it stopped.
    assert permutation(8, seed=42, epoch=3).tolist() == [1, 6, 3, 4, 5, 2, 0, 7]
    assert TrainOrder(8, 5, 42).indices(2).tolist() == permutation(8, 42, 1).tolist()[2:7]


def test_large_batch_is_named():
    with pytest.raises(UserError, match=r"train\.batch_size is 33, .* only 32 examples"):
        TrainOrder(32, 33, 0)


@pytest.mark.parametrize(
    ("examples", "batch_size", "sampling", "sentence"),
    [
        (0, 1, "natural", "training split is empty"),
        (4, 0, "natural", "must be at least 1"),
        (4, -3, "natural", "train.batch_size is -3"),
        ([0, 1], 1, "even", "data.sampling is 'even'"),
        ([0, -1, 1], 1, "balanced", "needs a label"),
        ([1, 1, 1], 1, "balanced", "two classes"),
    ],
)
def test_mistakes_are_sentences(examples, batch_size, sampling, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainOrder(examples, batch_size, 0, sampling)


def test_negative_step_is_a_programming_error():
    with pytest.raises(ValueError, match="step"):
        TrainOrder(4, 2, 0).indices(-1)
