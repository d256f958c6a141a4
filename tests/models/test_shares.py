import subprocess
import sys
import textwrap

import jax
import pytest

from pcam_jax.models import shares

SCRIPT = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from pcam_jax.models import shares
from pcam_jax.models.registry import build_model
from pcam_jax.runtime import sharding

net = build_model(sys.argv[1], image_shape=(32, 32, 3), outputs=1)
weights = net.init(jax.random.key(0))
x = jax.random.uniform(jax.random.key(1), (8, 32, 32, 3))

def step(weights, x, key):
    def loss(params):
        logits, stats = net.apply(params, weights[1], x, train=True, key=key)
        return jnp.mean(jnp.square(logits - 1)), (stats, logits)

    (value, (stats, logits)), grads = jax.value_and_grad(loss, has_aux=True)(weights[0])
    return shares.mean((value, grads)), stats, shares.total(logits.sum()), logits

mesh = sharding.make_mesh()
apart = shares.apart(mesh, step, ("whole", "share", "whole"), ("whole", "whole", "whole", "share"))
key = jax.random.key(2)
one = jax.jit(step)(weights, x, key)
split = jax.device_put(x, sharding.batch_sharding(mesh))
several = jax.jit(apart)(jax.device_put(weights, sharding.replicated(mesh)), split, key)
for name, a, b in zip(("gradients", "statistics", "sum", "logits"), one, several, strict=True):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)] + [[0.0]]) for tree in (a, b))
    error = np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-6)
    assert error < float(sys.argv[2]), (name, error)

def draw(x):
    return shares.bernoulli(key, 0.3, (x.shape[0], 5)), jnp.full(len(x), shares.count())

drawn, number = jax.jit(shares.apart(mesh, draw, ("share",), ("share", "share")))(split)
assert (drawn == jax.random.bernoulli(key, 0.3, (8, 5))).all()
assert (number == 4).all()
"""


@pytest.mark.parametrize(("name", "tolerance"), [("pcam_model4", 1e-5), ("resnet_small", 1e-3)])
def test_a_step_by_shares_equals_that_of_the_whole_batch(name, tolerance):
    # dropout and batch normalisation are not of one image alone
    script = textwrap.dedent(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-c", script, name, str(tolerance)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_outside_of_shares_all_is_as_it_is():
    assert shares.count() == 1
    assert shares.mean(3.0) == 3.0
    assert shares.total(4.0) == 4.0
    key = jax.random.key(0)
    assert (shares.bernoulli(key, 0.5, (7, 3)) == jax.random.bernoulli(key, 0.5, (7, 3))).all()
