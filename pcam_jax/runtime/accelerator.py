"""The one home of platform flags: allocator, compilation cache, compiler options.

Nets and the training loop never ask which platform they run on; they call these functions.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax._src.xla_bridge import backends_are_initialized  # no public name yet (jax 0.10 to 0.12)

from pcam_jax.runtime import distributed
from pcam_jax.runtime.compilation_cache import ignore_its_warnings, remove_broken_entries
from pcam_jax.runtime.errors import UserError

PREDICTING_DEVICES = 2
"""Devices that a CPU counts as for work on many images without training."""

# glibc malloc parameters (malloc.h); XLA's CPU buffers are large and short-lived, and by default each one is
# mapped from the kernel, zeroed and unmapped again
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

# Eigen's convolutions beat the YNN ones in jaxlib 0.10-0.12 on CPU; fusions limited to dots and reductions
# keep convolutions on Eigen. LLVM takes vectors of half the width by default; the fused loops of the first
# layers run 1.5 times as fast at 512 bits. Experimental, so `compiler_options` falls back where it is refused.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_prefer_vector_width": "512",
}


def configure(deterministic: bool = False, cpu_devices: int = 1) -> None:
    """Prepare this process for running networks; call once, before the first use of a device.

    Sets the allocator (glibc only), the persistent compilation cache (unless ``JAX_COMPILATION_CACHE_DIR``
    chooses another) and, if asked, deterministic accelerator kernels.

    Args:
        deterministic: ask XLA's GPU backend for deterministic operations.
        cpu_devices: let the CPU count as so many devices, unless a number is chosen already, by JAX's own settings or
            by use. One runs one operation after another, of which many use one core only; two predict up to 1.5 times
            as fast (docs/benchmarks.md).

    Raises:
        UserError: they are asked for too late.
    """
    tune_allocator()
    distributed.join()
    if cpu_devices > 1 and not _number_of_cpu_devices_is_chosen():
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if deterministic:
        _ask_for_deterministic_kernels()
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder() / "xla" / _machine_name())
    jax.config.update("jax_compilation_cache_dir", programs)
    ignore_its_warnings()
    remove_broken_entries(Path(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _number_of_cpu_devices_is_chosen() -> bool:
    number, flags = jax.config.values["jax_num_cpu_devices"], os.environ.get("XLA_FLAGS", "")
    return number != -1 or "device_count" in flags or backends_are_initialized()


def _ask_for_deterministic_kernels() -> None:
    """Set the flag that leaves out operations which add in any order and chooses kernels without timing them.

    So there is no choice of kernels that would have to be kept with a run. XLA reads its flags once.

    Raises:
        UserError: a GPU is in use already, without the flag.
    """
    flag, flags = "--xla_gpu_deterministic_ops=true", os.environ.get("XLA_FLAGS", "")
    if flag in flags.split():
        return
    if backends_are_initialized() and jax.default_backend() == "gpu":
        raise UserError(
            "train.deterministic comes too late, since this process has used the GPU without it: train in a new "
            f'process, or set XLA_FLAGS="{flag}" before the first use of JAX.'
        )
    os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def cache_folder() -> Path:
    """Where caches of this package live: ``$XDG_CACHE_HOME/pcam_jax`` or ``~/.cache/pcam_jax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pcam_jax"


def tune_allocator() -> bool:
    """Make glibc keep and reuse large blocks instead of mapping each anew (docs/benchmarks.md has the ratios).

    Returns:
        Whether the C library took all settings; elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    taken = [mallopt(name, value) == 1 for name, value in settings]  # a list: each call has its effect
    return all(taken)


@functools.cache
def compiler_options() -> dict[str, str]:
    """Options for ``jax.jit(compiler_options=...)`` on this backend; empty where they are not known."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x + 1, compiler_options=_CPU_OPTIONS)(jnp.zeros(1)).block_until_ready()
    except Exception:  # any refusal by another XLA version means: go on without
        return {}
    return dict(_CPU_OPTIONS)


def device_memory_free() -> int | None:
    """Bytes free on the first local device, or None where the backend does not say (CPU)."""
    statistics: dict[str, int] | None = None
    with contextlib.suppress(Exception):
        statistics = jax.local_devices()[0].memory_stats()
    if not statistics or "bytes_limit" not in statistics:
        return None
    return statistics["bytes_limit"] - statistics["bytes_in_use"]


def device_summary() -> str:
    """The devices in words, for the head of a run."""
    devices = jax.devices()
    kind = devices[0].device_kind if devices[0].platform != "cpu" else f"CPU ({os.cpu_count()} cores)"
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {kind}{processes}"


def _machine_name() -> str:
    """Names the processor, since compiled code must not travel to another kind of it."""
    description = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "flags", "Features")):
                description += line
    return f"{platform.machine()}-{hashlib.sha256(description.encode()).hexdigest()[:12]}"
