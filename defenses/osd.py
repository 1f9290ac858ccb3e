"""OSD, the original stateful detection: a query whose k nearest earlier ones lie too near is a hit.

Chen, Carlini and Wagner 2019, "Stateful Detection of Black-Box Adversarial Attacks": embeddings of a contrastively trained
encoder; a query is a hit where the mean l2 distance to its k = 50 nearest predecessors is at most a threshold that only one
benign query in a thousand falls short of. Modelled as they do: the query is answered (`silent`), the account counts as banned
and the history is forgotten (`reset_on_hit`), so that hits count the accounts that an attack needs. No hit before query k + 1.

Deviations: the encoder is our own (scripts/train_encoders.py; theirs is not published with a licence), and so is the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .encoders import KnnMemory, OSDEncoder, embed, encoder
from .gate import Action, Memory, Shape, StatefulDefense


@dataclass(frozen=True, kw_only=True)
class OSD(StatefulDefense):
    """OSD (Chen et al. 2019): counts a hit where a query's nearest earlier ones are too near in an embedding, and starts anew.

    Args:
        threshold: mean distance to the k nearest up to which a query is a hit.
        k: how many of the nearest.
    """

    name: ClassVar[str] = "osd"

    action: Action = "silent"
    reset_on_hit: bool = True
    threshold: float = 0.744
    k: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.threshold >= 0, f"threshold must be at least 0, not {self.threshold}")
        self.require(self.k >= 1, f"k must be at least 1, not {self.k}")

    def check_shape(self, shape: Shape) -> None:
        self.require(
            shape == (3, 32, 32), f"the encoder takes images of [3, 32, 32], not {[*shape]}: take another gate"
        )

    def secret(self, shape: Shape, generator: torch.Generator) -> torch.device:
        """Nothing but where its memory stands: everybody can compute this fingerprint."""
        return generator.device

    def prints(self, rows: Tensor, secrets: Sequence[torch.device]) -> Iterable[Tensor]:
        """An embedding [256] of each row."""
        return embed(encoder(OSDEncoder, "osd.safetensors", rows.device), rows)

    def memory(self, secret: torch.device) -> Memory:
        return KnnMemory(OSDEncoder.dimensions, secret, self.k, self.threshold)
