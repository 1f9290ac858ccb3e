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

from .encoders import EmbeddingGate, IoTEncoder, embed, encoder, grey
from .gate import Shape


@dataclass(frozen=True, kw_only=True)
class IoTSDM(EmbeddingGate):
    """IIoT-SDM (Esmaeili et al. 2022): refuses a query whose nearest earlier ones are too near in a small embedding.

    Args: those of all gates by embeddings.
    """

    name: ClassVar[str] = "iot-sdm"
    dimensions: ClassVar[int] = IoTEncoder.dimensions

    threshold: float = 0.277
    k: int = 11

    def check_shape(self, shape: Shape) -> None:
        self.require(
            shape[0] in (1, 3), f"images of {shape[0]} channels are neither grey nor colour: take another gate"
        )

    def prints(self, rows: Tensor, secrets: Sequence[torch.device]) -> Iterable[Tensor]:
        """An embedding [128] of each row."""
        return embed(encoder(IoTEncoder, "iot-sdm.safetensors", rows.device), grey(rows, 224))
