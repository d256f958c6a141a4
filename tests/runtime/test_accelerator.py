from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from pcam_jax.runtime import accelerator
from pcam_jax.runtime.errors import UserError


def run(script: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


def test_compiler_options_are_accepted_by_this_jax() -> None:
    options = accelerator.compiler_options()
    assert jax.jit(lambda x: x * 2, compiler_options=options)(np.float32(2)) == 4


def test_glibc_takes_the_allocator_settings() -> None:
    script = "from pcam_jax.runtime.accelerator import tune_allocator; print(tune_allocator())"
    libc = os.confstr("CS_GNU_LIBC_VERSION") if sys.platform.startswith("linux") else None
    assert run(script).strip() == str(libc is not None)


def test_the_compilation_cache_lies_in_the_users_cache_unless_named(tmp_path: Path) -> None:
    script = (
        "import jax; from pcam_jax.runtime import accelerator; accelerator.configure();"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    ours = run(script, JAX_COMPILATION_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path))
    assert ours.startswith(str(tmp_path / "pcam_jax/xla"))
    named = run(script, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "other"))
    assert named.strip() == str(tmp_path / "other")


def test_deterministic_kernels_are_asked_for() -> None:
    script = (
        "import os; from pcam_jax.runtime import accelerator; accelerator.configure(deterministic=True);"
        "print(os.environ['XLA_FLAGS'])"
    )
    assert run(script, XLA_FLAGS="").strip() == "--xla_gpu_deterministic_ops=true"
    # once, and beside other flags
    other = "--xla_force_host_platform_device_count=2"
    again = script.replace("print", "accelerator.configure(deterministic=True); print")
    assert run(again, XLA_FLAGS=other).strip() == f"{other} --xla_gpu_deterministic_ops=true"


def test_deterministic_kernels_cannot_come_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    jax.devices()
    accelerator.configure(deterministic=True)  # a CPU's kernels are
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # where there is none to use up
    with pytest.raises(UserError, match=r"train.deterministic comes too late.*in a new process"):
        accelerator.configure(deterministic=True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    accelerator.configure(deterministic=True)


@pytest.mark.parametrize(
    ("chosen", "devices"), [({}, 2), ({"JAX_NUM_CPU_DEVICES": "1"}, 1), ({"JAX_NUM_CPU_DEVICES": "3"}, 3)]
)
def test_the_cpu_is_split_where_nothing_else_was_chosen(chosen, devices):
    script = (
        "import jax; from pcam_jax.runtime import accelerator; accelerator.configure(cpu_devices=2);"
        "accelerator.configure(); print(jax.device_count())"
    )
    assert run(script, **chosen).strip() == str(devices)
