"""What ``model.init_from`` names, as the weights that training begins with."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax

from pcam_jax.config.schema import Config
from pcam_jax.inference.predictor import build_run_net, load_weights
from pcam_jax.models.pretrained import fit_tensors, to_torchvision
from pcam_jax.models.registry import Net
from pcam_jax.models.weight_files import HUB, Tensors, WeightFile, read_weight_file
from pcam_jax.run.folder import CONFIG, Run, open_run
from pcam_jax.runtime.errors import UserError

_IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class StartingWeights:
    """Weights on the host, and what to say and keep of where they came from."""

    weights: tuple[Any, Any]
    """(params, batch_stats), nested dicts of float32 arrays."""
    sentences: list[str]
    """For a person."""
    record: dict[str, Any]
    """``name``, ``digest`` (SHA-256, hex), ``revision`` of the hub, and ``loaded``, for ``environment.json``."""


def load_starting_weights(config: Config, net: Net) -> StartingWeights:
    """Draw a net's weights and replace those that ``model.init_from`` holds.

    Args:
        config: its ``model.init_from`` names a run, a .safetensors or .pth file, or ``hf:<repository>``.
        net: the configured net.

    Raises:
        UserError: the source cannot be read or does not fit the net.
    """
    name = config.model.init_from
    params, batch_stats = jax.device_get(jax.jit(net.init)(jax.random.key(config.train.seed)))
    advice = []
    if not name.startswith(HUB) and (Path(name) / CONFIG).is_file():
        run = open_run(name)
        source, remarks = _run_weights(run, name)
        advice += [f"Warning: {remark}." for remark in remarks]
        if run.config.model.normalization != config.model.normalization:
            advice.append(_advice(f"{name} was trained", run.config.model.normalization, config))
    else:
        source = read_weight_file(name)
    fitted = fit_tensors(net, params, batch_stats, source.tensors, name)
    if config.model.normalization == "unit" and fitted.head_outputs == _IMAGENET_CLASSES:
        advice.append(_advice("Weights of ImageNet's classes were trained", "imagenet", config))
    elif config.model.normalization == "unit" and name.startswith(HUB):
        advice.append(_advice("Most models of the hub were trained", "imagenet", config))
    sentences = [*fitted.sentences, *advice]
    record = {
        "name": name,
        "digest": source.digest,
        "revision": source.revision,
        "loaded": " ".join(fitted.sentences),
    }
    return StartingWeights((fitted.params, fitted.batch_stats), sentences, record)


def check_same_start(run: Run, starting: StartingWeights) -> None:
    """Check that a run without a checkpoint yet would begin from the weights it began from.

    Raises:
        UserError: the file or run it began from holds other weights now.
    """
    before = run.environment.get("init_from", {}).get("digest")
    if before != starting.record["digest"]:
        raise UserError(
            f"{starting.record['name']} has changed since {run.path} began, which saved no checkpoint: choose "
            "another --workdir."
        )


def _run_weights(run: Run, name: str) -> tuple[WeightFile, list[str]]:
    """A run's weights to evaluate with, as if they came from a file, and remarks."""
    net = build_run_net(run)
    weights, _, remarks = load_weights(run, net)
    tensors: Tensors = to_torchvision(net, *weights)
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].tobytes())
    return WeightFile(name, tensors, digest.hexdigest()), remarks


def _advice(who: str, scheme: str, config: Config) -> str:
    return (
        f'{who} with normalization "{scheme}", and this run uses "{config.model.normalization}": consider '
        f'model.normalization = "{scheme}".'
    )
