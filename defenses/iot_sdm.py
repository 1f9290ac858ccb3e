"""IIoT-SDM: nearest earlier queries in the embedding of a very small encoder of grey images.

Esmaeili et al. 2022 (SQA, for malware shown as images), as the OARS authors (Feng et al. 2023) implement it: five
convolutions, 128 numbers, mean l2 distance to the 11 nearest earlier queries; refuses hits.

Deviations: the images of malware that it was made for are not to be had, so its encoder was trained on grey MNIST digits and
CIFAR-10 images enlarged to 224 pixels (scripts/train_encoders.py), and the threshold is ours. Rows of any size are made grey
and resized to 224 pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .encoders import IoTEncoder, KnnMemory, embed, encoder, grey
from .gate import Memory, Shape, StatefulDefense


@dataclass(frozen=True, kw_only=True)
class IoTSDM(StatefulDefense):
    """IIoT-SDM (Esmaeili et al. 2022): refuses a query whose nearest earlier ones are too near in a small embedding.

    Args:
        threshold: mean distance to the k nearest up to which a query is a hit.
        k: how many of the nearest.
    """

    name: ClassVar[str] = "iot-sdm"

    threshold: float = 0.277
    k: int = 11

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.threshold >= 0, f"threshold must be at least 0, not {self.threshold}")
        self.require(self.k >= 1, f"k must be at least 1, not {self.k}")

    def check_shape(self, shape: Shape) -> None:
        self.require(
            shape[0] in (1, 3), f"images of {shape[0]} channels are neither grey nor colour: take another gate"
        )

    def secret(self, shape: Shape, generator: torch.Generator) -> torch.device:
        """Nothing but where its memory stands: everybody can compute this fingerprint."""
        return generator.device

    def prints(self, rows: Tensor, secrets: Sequence[torch.device]) -> Iterable[Tensor]:
        """An embedding [128] of each row."""
        return embed(encoder(IoTEncoder, "iot-sdm.safetensors", rows.device), grey(rows, 224))

    def memory(self, secret: torch.device) -> Memory:
        return KnnMemory(IoTEncoder.dimensions, secret, self.k, self.threshold)
