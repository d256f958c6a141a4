"""Milliseconds of one convolution in each form it can be written in for XLA on CPU, forward alone and with gradients.

    python scripts/bench_convolution.py --side 32 --inputs 32 --outputs 64 --kernel 6 --stride 3

The forms take turns; medians are reported. A form that cannot compute the layer is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from throughput import record
from throughput.case import measure_peak
from throughput.ours import matmul

from pcam_jax.models import convolution, winograd
from pcam_jax.models.convolution import Pads
from pcam_jax.runtime import accelerator

Form = Callable[[jax.Array, jax.Array, int, Pads], jax.Array]
_NO_PADS: Pads = ((0, 0), (0, 0))


def main() -> None:
    """Measure, print a table, and write it with its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("batch", 32),
        ("side", 32),
        ("inputs", 32),
        ("outputs", 64),
        ("kernel", 6),
        ("stride", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    accelerator.configure()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(options.batch, options.side, options.side, options.inputs)), jnp.float32)
    shape = (options.kernel, options.kernel, options.inputs, options.outputs)
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    pads = convolution.resolve_padding(
        "same", (options.side, options.side), (options.kernel, options.kernel), options.stride
    )
    exact = convolution.conv_plain(x, kernel, options.stride, pads)
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, form in forms(x.shape, shape, options.stride, pads).items():
        for task, run in _tasks(form, x, kernel, options.stride, pads).items():
            found = run()[0] if task == "gradients" else run()
            assert np.allclose(found, exact, rtol=1e-3, atol=1e-2), name
            runs[name, task] = run
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(options.rounds):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            taken[key].append(1e3 * (time.perf_counter() - start))
    flops = 2 * exact.size * kernel[..., 0].size
    peak = measure_peak(matmul("float32"))
    results = [
        {
            "form": name,
            "task": task,
            "ms": statistics.median(times),
            "lowest": min(times),
            "highest": max(times),
        }
        for (name, task), times in taken.items()
    ]
    facts = {"gflop_forward": flops / 1e9, "peak_gflops": peak, "results": results}
    table = (
        f"{markdown(results)}\n\nforward {flops / 1e9:.2f} GFLOP, {1e-6 * flops / peak:.1f} ms at the peak"
    )
    print(table)
    record.write(options.output, {name: version(name) for name in ("pcam-jax", "jax")}, facts, table)


def forms(image: tuple[int, ...], kernel: tuple[int, ...], stride: int, pads: Pads) -> dict[str, Form]:
    """The forms that can compute this layer, by what they are."""
    found: dict[str, Form] = {"XLA's own": convolution.conv_plain, "ours": convolution.conv2d_on_cpu}
    if stride > 1:
        found["XLA's own, the image's gradient by phases"] = convolution.conv_strided
    if stride > 1 and kernel[0] % stride == 0:
        found["over blocks of pixels, XLA's convolution"] = _plain_over_blocks
        found["over blocks of pixels, Winograd's tiles"] = convolution.over_blocks
        found["over blocks of pixels, one product and shifted sums"] = _one_product
    if stride == 1 and 2 <= kernel[0] <= 6:
        tile = winograd.best_tile(image, kernel, pads) or 2
        found["Winograd's tiles"] = lambda x, kernel, _, pads: winograd.conv_winograd(x, kernel, pads, tile)
    return found


def _blocks(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    size = tuple(
        convolution.output_size(x.shape[axis + 1], kernel.shape[axis], stride, pads[axis]) for axis in (0, 1)
    )
    wanted = [length + side // stride - 1 for length, side in zip(size, kernel.shape[:2], strict=True)]
    return convolution.image_blocks(x, stride, wanted, pads), convolution.kernel_blocks(kernel, stride), size


def _plain_over_blocks(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    x, kernel, _ = _blocks(x, kernel, stride, pads)
    return convolution.conv_plain(x, kernel, 1, _NO_PADS)


def _one_product(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    x, kernel, (rows, columns) = _blocks(x, kernel, stride, pads)
    down, across, inputs, outputs = kernel.shape
    wide = kernel.transpose(2, 0, 1, 3).reshape(inputs, -1)
    product = lax.dot(x.reshape(-1, inputs), wide).reshape(*x.shape[:3], down, across, outputs)
    parts = [product[:, i : i + rows, j : j + columns, i, j] for i in range(down) for j in range(across)]
    return jnp.sum(jnp.stack(parts), axis=0)


def _tasks(
    form: Form, x: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> dict[str, Callable[[], Any]]:
    def with_gradients(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple[jax.Array, Any]:
        y, pull_back = jax.vjp(lambda x, kernel: form(x, kernel, stride, pads), x, kernel)
        return y, pull_back(grad)

    options = accelerator.compiler_options()
    forward = jax.jit(lambda x, kernel: form(x, kernel, stride, pads), compiler_options=options)
    both = jax.jit(with_gradients, compiler_options=options)
    grad = jnp.ones_like(forward(x, kernel))
    return {
        "forward": lambda: jax.block_until_ready(forward(x, kernel)),
        "gradients": lambda: jax.block_until_ready(both(x, kernel, grad)),
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """The results as a table."""
    lines = ["| form | forward, ms | with all gradients, ms |", "|---|---|---|"]
    cells = {(row["form"], row["task"]): f"{row['ms']:.1f}" for row in results}
    for name in dict.fromkeys(row["form"] for row in results):
        lines.append(f"| {name} | {cells[name, 'forward']} | {cells[name, 'gradients']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
