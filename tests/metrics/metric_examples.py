"""Random labels and probabilities, with ties, for the property tests of this folder."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

# a few levels make ties common; the continuous ones have hardly any
TIED_LEVELS = np.array([0.0, 0.1, 0.2, 0.25, 0.5, 0.75, 0.9, 1.0])


@st.composite
def binary_examples(draw, both_classes=True, with_weights=False, dtype=np.float64):
    """Labels [N] of 0 and 1 with probabilities [N] (and whole or broken weights [N])."""
    count = draw(st.integers(2, 60))
    labels = draw(hnp.arrays(np.int64, count, elements=st.integers(0, 1)))
    if both_classes:
        labels[:2] = [0, 1]
    if draw(st.booleans()):
        probs = TIED_LEVELS[draw(hnp.arrays(np.int64, count, elements=st.integers(0, len(TIED_LEVELS) - 1)))]
    else:
        probs = np.random.default_rng(draw(st.integers(0, 2**32))).random(count)
    probs = probs.astype(dtype)
    if not with_weights:
        return labels, probs
    weights = draw(hnp.arrays(np.int64, count, elements=st.integers(1, 5))) * draw(
        st.sampled_from([1.0, 0.37])
    )
    return labels, probs, weights


@st.composite
def class_examples(draw):
    """Labels [N] of K = 3..5 classes that all occur, with probabilities [N, K]."""
    classes = draw(st.integers(3, 5))
    count = draw(st.integers(classes, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    if draw(st.booleans()):
        counts = rng.multinomial(8, np.ones(classes) / classes, size=count)  # eighths: exact, and often tied
        return labels, counts / 8
    return labels, rng.dirichlet(np.ones(classes), size=count)
