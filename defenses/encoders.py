"""The learned fingerprints: small networks that map near images to near points, and the gates' memory of such points.

Their weights were made by scripts/train_encoders.py and stand under `weights`; docs/stateful.md says on what they were
trained and how well they tell images apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from robustbox.errors import InputError

from .gate import Shape, StatefulDefense
from .memory import IndexedMemory, Memory, Verdict
from .neighbours import DenseIndex

WEIGHTS = Path(__file__).resolve().parent / "weights"
DIGITS = 4
"""Decimal digits of an embedding that are kept: whatever rounds differently shall not show."""


class OSDEncoder(nn.Module):
    """The encoder of Chen, Carlini and Wagner 2019 for colour images of 32x32 pixels: [n,3,32,32] -> [n,256]."""

    dimensions = 256

    def __init__(self) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3)
        self.features = nn.Sequential(
            *(conv(3, 32, padding=1), nn.ReLU(), conv(32, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv(32, 64, padding=1), nn.ReLU(), conv(64, 64), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64 * 6 * 6, 512), nn.ReLU(), nn.Linear(512, 256))

    def forward(self, rows: Tensor) -> Tensor:
        embedded: Tensor = self.head(self.features(rows))
        return embedded


class IoTEncoder(nn.Module):
    """The encoder of the IIoT gate for grey images of 224x224 pixels: [n,1,224,224] -> [n,128]."""

    dimensions = 128

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 8), (8, 4), (4, 2), (2, 2), (2, 2)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(7 * 7 * 2, 128))

    def forward(self, rows: Tensor) -> Tensor:
        embedded: Tensor = self.head(self.features(rows))
        return embedded


def grey(rows: Tensor, side: int) -> Tensor:
    """Rows [n,C,H,W] as grey images [n,1,side,side]: ITU-R 601 luma of three channels, bilinear resizing."""
    if rows.shape[1] == 3:
        red, green, blue = rows.unbind(1)
        rows = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]
    return rows if rows.shape[2:] == (side, side) else F.interpolate(rows, (side, side), mode="bilinear")


@cache
def encoder(kind: Callable[[], nn.Module], file: str, device: torch.device) -> nn.Module:
    """A trained encoder, frozen and on its device.

    Raises:
        InputError: its weights are not there.
    """
    path = WEIGHTS / file
    if not path.is_file():
        raise InputError(
            f"the weights {path.name} are missing: install robustbox again, or run scripts/train_encoders.py"
        )
    module = kind()
    module.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return module.eval().requires_grad_(False).to(device)


def rows_at_once(device: torch.device) -> int:
    """How many rows every pass of an encoder has, blank ones included: kernels differ with the shape, and round differently.

    Attacks ask many rows alone, and on a CPU blank ones cost what rows cost; elsewhere a pass costs as much whatever its size.
    """
    return 1 if device.type == "cpu" else 16


def embed(module: nn.Module, rows: Tensor) -> Tensor:
    """Embeddings of rows, [n,D]: in passes of a fixed size and rounded, so that no row's depends on its batch."""
    found, size = [], rows_at_once(rows.device)
    for part in rows.clamp(0, 1).split(size):
        blank = part.new_zeros(size - len(part), *part.shape[1:])
        found.append(module(torch.cat((part, blank)))[: len(part)])
    return torch.cat(found).mul_(10**DIGITS).round_().div_(10**DIGITS)


class KnnMemory(IndexedMemory):
    """Embeddings; a hit is a query whose mean distance to the k nearest stored ones is at most `threshold`."""

    def __init__(self, dimensions: int, device: torch.device, k: int, threshold: float) -> None:
        self._k, self._threshold = k, threshold
        self._index: DenseIndex = DenseIndex(dimensions, device)

    def judge(self, print: Tensor) -> Verdict:
        distance, row = self._index.mean_distance(print, self._k, within=self._threshold)
        return Verdict(distance <= self._threshold, row)


@dataclass(frozen=True, kw_only=True)
class EmbeddingGate(StatefulDefense):
    """What the gates by embeddings have in common: a query is a hit whose k nearest earlier ones are too near on average.

    Args:
        threshold: mean distance to the k nearest up to which a query is a hit.
        k: how many of the nearest.
    """

    dimensions: ClassVar[int]

    threshold: float
    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.threshold >= 0, f"threshold must be at least 0, not {self.threshold}")
        self.require(self.k >= 1, f"k must be at least 1, not {self.k}")

    def secret(self, shape: Shape, generator: torch.Generator) -> torch.device:
        """Nothing but where its memory stands: everybody can compute this fingerprint."""
        return generator.device

    def memory(self, secret: torch.device) -> Memory:
        return KnnMemory(self.dimensions, secret, self.k, self.threshold)
