"""Files of named weights: safetensors, PyTorch's own, and those of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from pcam_jax.runtime.errors import UserError, require
from pcam_jax.runtime.files import atomic_write

Tensors = dict[str, np.ndarray]

HUB = "hf:"
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)
# where training scripts put the weights beside optimizer state and the like
_NESTS = ("state_dict", "model_state_dict", "model", "net", "weights")
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_HUB_NAME = re.compile(
    r"hf:(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<file>[^:]+))?"
)


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights held."""

    name: str
    """As the user named it."""
    tensors: Tensors
    """Arrays by name, in the layout and dtype of the file."""
    digest: str
    """SHA-256 of the file, hex."""
    revision: str = ""
    """Commit of the hub's repository; empty for local files."""


def read_weight_file(name: str) -> WeightFile:
    """Read a local file or one of the hub.

    Args:
        name: a path ending in .safetensors, .pth or .pt (also .bin, .ckpt and .tar, as PyTorch's), or
            ``hf:<owner>/<repository>[@revision][:file]``.

    Raises:
        UserError: there is no such file or repository, it is damaged or holds other things than named tensors,
            or a package it needs is not installed.
    """
    path, revision = download(name) if name.startswith(HUB) else (Path(name), "")
    if path.is_dir():
        raise UserError(
            f"{name} is a folder but no run: name a run, or a file ending in .safetensors or .pth."
        )
    if not path.is_file():
        raise UserError(f"There is no file {name} to take weights from: check model.init_from.")
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path, name)
    elif path.suffix in _TORCH_SUFFIXES:
        tensors = _read_torch(path, name)
    else:
        raise UserError(
            f"{name} ends in {path.suffix or 'nothing'}: weights are read from .safetensors, .pth and .pt files."
        )
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return WeightFile(name, tensors, digest, revision)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named arrays as safetensors, completely or not at all.

    Args:
        path: the file.
        tensors: by name.
        metadata: texts to keep beside them; ``format`` is ``pt`` unless said otherwise, which loaders of
            PyTorch models ask for.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    # as an array of no axes: ascontiguousarray gives scalars one
    contiguous = {name: array.reshape(tensors[name].shape) for name, array in contiguous.items()}
    content = safetensors.numpy.save(contiguous, metadata={"format": "pt", **(metadata or {})})
    with atomic_write(path, "wb") as file:
        file.write(content)


def download(name: str) -> tuple[Path, str]:
    """Fetch a file of weights from the hub into its cache; `HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` are honoured.

    Args:
        name: ``hf:<owner>/<repository>[@revision][:file]``. Without a file, ``model.safetensors`` is taken, else
            ``pytorch_model.bin``, else the only file of weights.

    Returns:
        The local path and the commit.

    Raises:
        UserError: the name is malformed, the repository, revision or file does not exist or is not open to this
            user, the choice of a file is not clear, or the hub cannot be reached.
    """
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"model.init_from is {name!r}: write hf:<owner>/<repository>, then @revision and :file where wanted."
        )
    hub, errors = require("huggingface_hub", extra="hub"), require("huggingface_hub.errors", extra="hub")
    repository, revision = match["repository"], match["revision"]
    with _explained(name, errors):
        if match["file"]:
            path = Path(hub.hf_hub_download(repository, match["file"], revision=revision))
        else:
            path = _download_default(hub, errors, repository, revision)
    # the cache keeps each commit in <repository>/snapshots/<commit>/
    parts = path.parts
    return path, parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


def _download_default(hub: Any, errors: Any, repository: str, revision: str | None) -> Path:
    for file in ("model.safetensors", "pytorch_model.bin"):
        # asking for a name before the list lets the cache answer without a network
        try:
            return Path(hub.hf_hub_download(repository, file, revision=revision))
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            continue
    files = [
        file for file in hub.list_repo_files(repository, revision=revision) if Path(file).suffix in _SUFFIXES
    ]
    if len(files) != 1:
        found = f"one of {', '.join(sorted(files))}" if files else "none: it holds no file of weights"
        raise UserError(f"hf:{repository} has no model.safetensors; name a file after a colon, {found}.")
    return Path(hub.hf_hub_download(repository, files[0], revision=revision))


@contextlib.contextmanager
def _explained(name: str, errors: Any) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is open only to those who accept its terms: accept them on its page, then set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: the hub has no such repository, or it is private: check the name, or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: the repository has no such revision: check what follows the @.") from error
    except errors.HFValidationError as error:
        raise UserError(f"{name} is not a name of the hub ({_first_line(error)}).") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(
            f"{name} is not in the cache and the hub cannot be reached: check the network, or download the file "
            "elsewhere and name its path."
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{name}: the repository has no such file: check what follows the colon.") from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"{name} could not be fetched ({_first_line(error)}).") from error


def _read_safetensors(path: Path, name: str) -> Tensors:
    try:
        entries = safetensors.deserialize(path.read_bytes())
        return {
            key: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for key, entry in entries
        }
    except KeyError as error:
        raise UserError(f"{name} holds tensors of dtype {error.args[0]}, which are not weights.") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{name} is not a readable safetensors file ({_first_line(error)}).") from None


def _read_torch(path: Path, name: str) -> Tensors:
    torch = require("torch", extra="torch")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and runtime errors share no base class
        raise UserError(
            f"{name} cannot be read as tensors alone ({_first_line(error)}): save the state_dict() of its model "
            "and name that file."
        ) from None
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    found = {
        str(key): value.detach().cpu()
        for key, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, torch.Tensor)
    }
    if not found:
        raise UserError(f"{name} holds no named tensors: save the state_dict() of its model.")
    # numpy has no bfloat16 that torch knows of
    return {
        key: (value.float() if value.is_floating_point() else value).numpy() for key, value in found.items()
    }


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")
