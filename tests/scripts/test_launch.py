"""Launchers: processes on this machine for real; Slurm and Kubernetes by the variables that they would set."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from pcam_jax.data.store import open_store
from pcam_jax.run.folder import open_run

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts/launch"
# a net of the package's own, since a launcher starts the package's own verbs
SMALL = {
    "model__name": "pcam_model4",
    "data__validation_fraction": 0.3,
    "train__epochs": 10_000,
}
# what `srun` does for a step of two tasks on one host, by its manual
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & other=$!
code=0
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" || code=$?
wait $other || code=$?
exit $code
"""
JOINED = (
    "from pcam_jax.runtime import distributed; distributed.join(); import jax, sys; "
    "sys.stderr.write(str(jax.process_index()) + ' of ' + str(jax.process_count()) + chr(10))"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_tiny_store(tmp_path_factory.mktemp("launch") / "store")


def environment(**more: Any) -> dict[str, str]:
    values = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return {**os.environ, **values, **{name: str(value) for name, value in more.items()}}


def run(*command: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], env=environment(**more), capture_output=True, text=True, timeout=200, cwd=ROOT
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_shell_accepts_it(path: Path) -> None:
    done = run("bash", "-n", path)
    assert (done.returncode, done.stderr) == (0, "")


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_two_local_processes_train_as_one_and_stop_together(store: Path, tmp_path: Path) -> None:
    command = [LAUNCH / "local.sh", 2, "train", "--workdir", tmp_path / "run"]
    command += tiny.as_options(tiny.settings(store, **SMALL))
    process = subprocess.Popen(
        [*map(str, command)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if "epoch   1" in line:
            break
    assert "2 x CPU" in said
    assert "in 2 processes" in said
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    step = open_run(tmp_path / "run").checkpoints.steps()[-1]
    assert errors.count(f"Stopped at step {step} of ") == 2


def test_a_slurm_step_becomes_one_group(tmp_path: Path) -> None:
    executable(tmp_path / "srun", SRUN)
    # in the place of Python, so that the training command only joins
    joining = executable(tmp_path / "python", f'#!/bin/sh\necho "$@"\nexec {sys.executable} -c "{JOINED}"\n')
    job = 4096 * 7 + free_port() % 4096  # jax takes the coordinator's port from the number of the job
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": job, "PYTHON": joining}
    done = run("bash", LAUNCH / "slurm.sbatch", "a.toml", "--workdir", "a run", **more)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "-m pcam_jax.train a.toml --workdir a run --resume\n" * 2
    assert sorted(line for line in done.stderr.splitlines() if " of " in line) == ["0 of 2", "1 of 2"]


def test_a_stopped_slurm_job_queues_itself_again(tmp_path: Path) -> None:
    for name, text in (("srun", "exit 143"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        executable(tmp_path / name, f"#!/bin/sh\n{text}\n")
    done = run("bash", LAUNCH / "slurm.sbatch", PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID=77)
    assert done.returncode == 143
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


def test_an_array_prepares_in_parts(tmp_path: Path) -> None:
    from pcam_jax.data.sample_sources import write_idc_tree

    write_idc_tree(tmp_path / "raw", tiles=8)
    parts = ["bash", LAUNCH / "slurm-parts.sbatch", "prepare", tmp_path / "raw", tmp_path / "store"]
    options = ["--images-per-shard", 5]
    assert run(*parts, *options, SLURM_ARRAY_TASK_ID=1, SLURM_ARRAY_TASK_COUNT=2).returncode == 0
    assert not (tmp_path / "store").exists()
    # sent again alone, an array of one
    done = run(*parts, *options, SLURM_ARRAY_TASK_ID=0, SLURM_ARRAY_TASK_COUNT=1, PARTS=2)
    assert done.returncode == 0, done.stderr
    whole = run(sys.executable, "-m", "pcam_jax.prepare", tmp_path / "raw", tmp_path / "whole", *options)
    assert whole.returncode == 0
    assert open_store(tmp_path / "store").digest == open_store(tmp_path / "whole").digest


def test_slurm_directives_are_options_of_sbatch() -> None:
    known = {"job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"}
    known |= {"signal", "requeue", "open-mode", "output", "array"}
    for path in LAUNCH.glob("*.sbatch"):
        lines = path.read_text().splitlines()
        directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        names = [re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", lines[number])[1] for number in directives]  # type: ignore[index]
        assert set(names) <= known
        # sbatch reads none after the first command
        assert max(directives) < min(
            number for number, line in enumerate(lines) if line and not line.startswith("#")
        )


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((LAUNCH / name).read_text())
    return document


def check_pod(pod: dict[str, Any]) -> dict[str, Any]:
    """A pod of one container, whose volumes and names fit together."""
    assert set(pod) <= {"restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes"}
    (container,) = pod["containers"]
    fields = {"name", "image", "command", "args", "env", "ports", "resources", "volumeMounts"}
    assert set(container) <= fields
    assert all(isinstance(word, str) for word in (*container["command"], *container["args"]))
    assert all(isinstance(item.get("value", ""), str) for item in container.get("env", []))
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    return dict(container)


def test_the_indexed_job_covers_its_parts() -> None:
    job = load("job-parts.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    container = check_pod(spec["template"]["spec"])
    assert f"$JOB_COMPLETION_INDEX/{spec['completions']}" in container["command"][2]
    assert spec["parallelism"] == spec["completions"]


def test_the_job_set_makes_one_group_of_its_pods() -> None:
    document = load("jobset.yaml")
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(document["spec"]) <= {"network", "failurePolicy", "replicatedJobs"}
    (replicated,) = document["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    container = check_pod(job["template"]["spec"])
    from pcam_jax.train import parse_command

    assert container["command"] == ["python", "-m", "pcam_jax.train"]
    assert parse_command(container["args"]).resume
    variables = {item["name"]: item for item in container["env"]}
    host, port = variables["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    name = document["metadata"]["name"]
    assert (
        host == f"{name}-{replicated['name']}-0-0.{name}"
    )  # JobSet's name for the first pod of the first job
    assert int(port) == container["ports"][0]["containerPort"]
    count = int(variables["JAX_NUM_PROCESSES"]["value"])
    assert count == job["completions"] == job["parallelism"]
    index = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"

    # and processes that get these variables find each other, inside a cluster that jax cannot ask
    address = f"127.0.0.1:{free_port()}"
    pods = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED],
            env=environment(
                KUBERNETES_SERVICE_HOST="10.0.0.1",
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES=count,
                JAX_PROCESS_ID=number,
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    deadline = time.monotonic() + 60
    for number, pod in enumerate(pods):
        _, said = pod.communicate(timeout=max(1.0, deadline - time.monotonic()))
        assert pod.returncode == 0, said
        assert f"{number} of {count}" in said
