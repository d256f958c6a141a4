"""Ask torchvision's nets what they answer for weights and images made from numbers, and keep it for the tests.

    pip install torch==2.13.0 torchvision==0.28.0 timm==1.0.31
    python scripts/make_torchvision_reference.py            # writes tests/models/torchvision_reference.npz
    python scripts/make_torchvision_reference.py --check    # our weights, written and read back by torch

The file holds, for each net, its logits and the names and shapes of its tensors; timm's EfficientNet, whose
names differ, is there too. With --check our own files
are read by torch instead: the same weights go through our net, `to_torchvision` and safetensors into
torchvision's net, strictly, and both nets must agree to 1e-4.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/models"))
import torchvision_case as case

# shape rules of detection operators; missing where the wheels of torch and torchvision differ, and not used here
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
import torch  # noqa: E402
import torchvision  # noqa: E402


def reference_net(name: str) -> torch.nn.Module:
    """A net of torchvision, or of timm, with few outputs, in evaluation mode."""
    if name.startswith("timm/"):
        import timm

        return timm.create_model(name.removeprefix("timm/"), num_classes=case.OUTPUTS).eval()
    return getattr(torchvision.models, name)(num_classes=case.OUTPUTS).eval()


def case_weights(net: torch.nn.Module) -> dict[str, np.ndarray]:
    """The case's weights under the net's names."""
    return {
        key: case.weight(key, tensor.shape) if tensor.is_floating_point() else tensor.numpy()
        for key, tensor in net.state_dict().items()
    }


@torch.no_grad()
def answer(net: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Logits of images [B, H, W, 3]."""
    return net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def make() -> None:
    """Write the reference file."""
    stored = {}
    for name in (*case.SIZES, "timm/efficientnet_b0"):
        net = reference_net(name)
        state = net.state_dict()
        net.load_state_dict({key: torch.from_numpy(array) for key, array in case_weights(net).items()})
        stored[f"{name}.logits"] = answer(net, case.images(name.removeprefix("timm/")))
        shapes = ["x".join(map(str, tensor.shape)) for tensor in state.values()]
        stored[f"{name}.tensors"] = np.array(
            [f"{key} {shape}".strip() for key, shape in zip(state, shapes, strict=True)]
        )
        print(name, stored[f"{name}.logits"].std())
    np.savez_compressed(case.REFERENCE, **stored)
    print(f"{case.REFERENCE}: {case.REFERENCE.stat().st_size:,} bytes")


def check() -> None:
    """Let torch read what we write."""
    import jax
    from safetensors.torch import load_file

    from pcam_jax.models.pretrained import fit_tensors, to_torchvision, write_safetensors
    from pcam_jax.models.registry import build_model

    for name, size in case.SIZES.items():
        ours = build_model(name, image_shape=(*size, 3), outputs=case.OUTPUTS)
        theirs = reference_net(name)
        fitted = fit_tensors(ours, *ours.init(jax.random.key(0)), case_weights(theirs), "the case")
        weights = fitted.params, fitted.batch_stats
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            write_safetensors(path, to_torchvision(ours, *weights))
            theirs.load_state_dict(load_file(path), strict=True)
        images = case.images(name)
        logits, _ = jax.jit(ours.apply)(*weights, images)
        difference = np.abs(np.asarray(logits) - answer(theirs, images)).max()
        print(f"{name}: largest difference {difference:.1e}")
        if not difference < 1e-4:
            sys.exit(f"{name} differs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="let torch read our files instead")
    check() if parser.parse_args().check else make()
