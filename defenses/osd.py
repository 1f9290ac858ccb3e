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

from .encoders import EmbeddingGate, OSDEncoder, embed, encoder
from .gate import Action, Shape


@dataclass(frozen=True, kw_only=True)
class OSD(EmbeddingGate):
    """OSD (Chen et al. 2019): counts a hit where a query's nearest earlier ones are too near in an embedding, and starts anew.

    Args: those of all gates by embeddings.
    """

    name: ClassVar[str] = "osd"
    dimensions: ClassVar[int] = OSDEncoder.dimensions

    action: Action = "silent"
    reset_on_hit: bool = True
    threshold: float = 0.744
    k: int = 50

    def check_shape(self, shape: Shape) -> None:
        self.require(
            shape == (3, 32, 32), f"the encoder takes images of [3, 32, 32], not {[*shape]}: take another gate"
        )

    def prints(self, rows: Tensor, secrets: Sequence[torch.device]) -> Iterable[Tensor]:
        """An embedding [256] of each row."""
        return embed(encoder(OSDEncoder, "osd.safetensors", rows.device), rows)
