"""The same nets in PyTorch: channels_last, Adam (fused), eager or torch.compile."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

from throughput.case import MATMUL_SIDE, Case, Contender, NotAvailableError, batches

try:
    import torch
    from torch import nn
except ImportError as error:
    raise NotAvailableError("torch is not installed: pip install 'pcam-jax[peers]'") from error


def make(case: Case) -> Contender:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = build(case.model, case.side).to(device).to(memory_format=torch.channels_last)
    feed = itertools.cycle(batches(case))
    run = _train(case, model, feed, device) if case.task == "train" else _predict(case, model, feed, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    facts = {
        "versions": {"torch": torch.__version__},
        "device": f"{name}, {torch.get_num_threads()} threads",
        "params": sum(p.numel() for p in model.parameters()),
    }
    return Contender(run, lambda: _matmul(case.precision, device), facts)


def _maybe_compile(case: Case, function: Any) -> Any:
    return torch.compile(function) if case.system == "torch-compile" else function


def _autocast(case: Case, device: Any) -> Any:
    if case.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def _wait(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _train(case: Case, model: Any, feed: Any, device: Any) -> Any:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    loss_of = nn.BCEWithLogitsLoss()

    def forward(images: Any, labels: Any) -> Any:
        with _autocast(case, device):
            logits = model(images.permute(0, 3, 1, 2).float() / 255)[:, 0]
        return loss_of(logits.float(), labels)

    forward = _maybe_compile(case, forward)

    def run(steps: int) -> None:
        for _ in range(steps):
            images, labels = next(feed)
            images = torch.from_numpy(images).to(device, non_blocking=True)
            labels = torch.from_numpy(labels).to(device, non_blocking=True).float()
            optimizer.zero_grad(set_to_none=True)
            forward(images, labels).backward()
            optimizer.step()
        _wait(device)

    return run


def _predict(case: Case, model: Any, feed: Any, device: Any) -> Any:
    model.eval()
    dtype = getattr(torch, case.precision)
    model = model.to(dtype)

    def forward(images: Any) -> Any:
        return model((images.permute(0, 3, 1, 2).float() / 255).to(dtype))[:, 0].float().sigmoid()

    forward = _maybe_compile(case, forward)

    def run(steps: int) -> None:
        with torch.inference_mode():
            for _ in range(steps):
                images, _ = next(feed)
                forward(torch.from_numpy(images).to(device, non_blocking=True)).cpu()
        _wait(device)

    return run


def _matmul(precision: str, device: Any) -> Any:
    a = torch.ones((MATMUL_SIDE, MATMUL_SIDE), dtype=getattr(torch, precision), device=device)

    def run() -> None:
        torch.mm(a, a)
        _wait(device)

    return run


class SamePad(nn.Module):
    """Keras's "same" padding for the strided convolutions of models 2 to 4."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Any) -> Any:
        totals = [max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0) for n in x.shape[2:]]
        (rows, columns) = totals
        return nn.functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def _block(
    features: int, kernel: int, *, stride: int = 1, same: bool = False, pool: bool = False
) -> list[Any]:
    layers: list[Any] = [SamePad(kernel, stride)] if same else []
    layers += [nn.LazyConv2d(features, kernel, stride), nn.ReLU()]
    return layers + ([nn.MaxPool2d(2)] if pool else [])


def build(name: str, side: int) -> Any:
    """The net by our name.

    Raises:
        NotAvailableError: there is no PyTorch version of it here.
    """
    strided = [layer for f in (32, 64, 64) for layer in _block(f, 6, stride=3, same=True)]
    bodies = {
        "pcam_model1": [*_block(32, 3, pool=True), *_block(64, 3, pool=True), *_block(64, 3)],
        "pcam_model2": [
            *_block(32, 5, stride=2, same=True),
            *_block(64, 5, same=True, pool=True),
            *_block(64, 5, same=True),
        ],
        "pcam_model3": strided,
        "pcam_model4": strided,
        "pcam_cnn3": [layer for f in (32, 64, 128) for layer in _block(f, 3, pool=True)],
    }
    heads: dict[str, list[Any]] = {
        "pcam_model1": [nn.LazyLinear(64), nn.ReLU()],
        "pcam_model2": [nn.LazyLinear(64), nn.ReLU()],
        "pcam_model3": [nn.LazyLinear(32), nn.ReLU()],
        "pcam_model4": [nn.Dropout(0.2), nn.LazyLinear(32), nn.ReLU()],
        "pcam_cnn3": [nn.LazyLinear(128), nn.ReLU(), nn.Dropout(0.5)],
    }
    if name == "resnet50":
        return ResNet50()
    if name not in bodies:
        raise NotAvailableError(f"no PyTorch version of {name} here")
    model = nn.Sequential(*bodies[name], nn.Flatten(), *heads[name], nn.LazyLinear(1))
    with torch.no_grad():
        model(torch.zeros(2, 3, side, side))
    return model


class Bottleneck(nn.Module):
    """ResNet v1.5 bottleneck."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.main = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: Any = nn.Identity()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Any) -> Any:
        return torch.relu(self.main(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """torchvision's ResNet-50 with one output, written here so that the benchmark needs torch alone."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[Any] = [
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]
        inputs = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for number in range(blocks):
                layers.append(Bottleneck(inputs, 64 * 2**stage, 2 if stage and not number else 1))
                inputs = 256 * 2**stage
        self.body, self.fc = nn.Sequential(*layers), nn.Linear(inputs, 1)

    def forward(self, x: Any) -> Any:
        return self.fc(self.body(x).mean((2, 3)))
