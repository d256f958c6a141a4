from __future__ import annotations

import numpy as np
import pytest

from pcam_jax.runtime import distributed
from pcam_jax.runtime.errors import UserError

NAMES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
)


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> object:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return distributed._environment()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        # a Slurm allocation without srun, and an indexed Kubernetes job whose pods need not know of each other
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"},
    ],
)
def test_a_process_on_its_own_stays_so(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    assert environment(monkeypatch, **values) is None


def test_three_variables_make_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    arguments = {"coordinator_address": "node1:1234", "num_processes": 4, "process_id": 3}
    alone = {**arguments, "cluster_detection_method": "deactivate"}
    assert environment(monkeypatch, **given) == alone
    assert environment(monkeypatch, **given, KUBERNETES_SERVICE_HOST="10.0.0.1") == alone
    # within a step of Slurm's jax still finds out which GPU of its host is this process's
    assert environment(monkeypatch, **given, SLURM_STEP_NUM_TASKS="4") == arguments


@pytest.mark.parametrize("launcher", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_launchers_are_left_to_jax(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    assert environment(monkeypatch, **{launcher: "2"}) == {}
    assert environment(monkeypatch, **{launcher: "2", "JAX_COORDINATOR_ADDRESS": "node1:1234"}) == {}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"JAX_PROCESS_ID": "0"},
            "JAX_PROCESS_ID is set but JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are not",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "node1:1", "JAX_NUM_PROCESSES": "2"},
            "are set but JAX_PROCESS_ID is not: set all three",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "node1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS is 'node1': it must be host:port",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID is 2 of JAX_NUM_PROCESSES 2",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES two",
        ),
    ],
)
def test_contradictions_are_said(monkeypatch: pytest.MonkeyPatch, values: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        environment(monkeypatch, **values)


def test_one_process_shares_with_itself() -> None:
    value = {"a": [1, None, "x"]}
    assert distributed.share(value) is value
    arrays = {"a": np.arange(3)}
    assert distributed.share_arrays(arrays) is arrays
    assert distributed.share_arrays(None) is None
    rows = np.ones((3, 2))
    assert distributed.gather_rows(rows, [3]) is rows
    assert distributed.on_first(lambda: 7) == 7
    assert distributed.is_first()


def test_a_refusal_passes_through() -> None:
    def refuse() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        distributed.on_first(refuse)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), True),
        (ValueError("shapes do not match"), False),
        (KeyError("Gloo"), False),
    ],
)
def test_the_loss_of_another_is_told_from_a_bug(error: Exception, lost: bool) -> None:
    assert distributed._is_loss_of_another(error) is lost
