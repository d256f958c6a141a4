from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from pcam_jax.runtime import sharding
from pcam_jax.runtime.errors import UserError

MANY_DEVICES = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from pcam_jax.runtime import accelerator, sharding
mesh = sharding.make_mesh()
assert mesh.size == 8 and mesh.axis_names == ("data",)
assert [device.id for device in mesh.devices] == sorted(device.id for device in jax.devices())
rows = np.arange(16, dtype=np.int32)
split = sharding.put(rows, sharding.batch_sharding(mesh))
assert [shard.data.tolist() for shard in split.addressable_shards] == [[2 * i, 2 * i + 1] for i in range(8)]
whole = sharding.put({"a": rows}, sharding.replicated(mesh))["a"]
assert all(shard.data.tolist() == rows.tolist() for shard in whole.addressable_shards)
print(accelerator.device_summary())
"""


def test_a_mesh_keeps_the_order_of_devices_and_splits_rows_evenly() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MANY_DEVICES],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.startswith("8 x CPU")


def test_put_gives_equal_arrays_of_the_same_dtype() -> None:
    mesh = sharding.make_mesh()
    for value in (np.float32(3), np.arange(6, dtype=np.uint8).reshape(2, 3), np.zeros((0, 4), np.int32)):
        placed = sharding.put(value, sharding.replicated(mesh))
        assert placed.dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(placed, value)


def test_a_batch_that_devices_cannot_share_is_refused() -> None:
    mesh = sharding.make_mesh()
    sharding.check_shares(12, 3, mesh)
    with pytest.raises(UserError, match=r"train.batch_size is 10.*accumulate_steps.*multiple of 4"):
        sharding.check_shares(10, 4, mesh)
