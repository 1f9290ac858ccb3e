"""Two views: the model sees each row as it is and moved, as an example of a defense of your own."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import Answer, BlackBox, Defense


@dataclass(frozen=True)
class TwoViews(Defense):
    """Answers with the mean of the scores of a row and of the row moved to the side; what leaves comes in on the other side.

    Args:
        pixels: how far.
    """

    name: ClassVar[str] = "two-views"

    pixels: int = 1

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The defended black box; nothing here is random, so that the seed is not used."""
        if box.scores == "none":
            raise InputError("two-views takes the mean of scores, and this black box answers labels only")
        return TwoViewsBox(box, self.pixels)


class TwoViewsBox(BlackBox):
    """A black box around a black box. It passes on what the inner one says of itself."""

    def __init__(self, inner: BlackBox, pixels: int) -> None:
        self.inner, self.pixels = inner, pixels
        self.name, self.device = f"{inner.name} behind two-views", inner.device
        self.input_shape, self.classes, self.scores = inner.input_shape, inner.classes, inner.scores
        self.stochastic, self.stateful = inner.stochastic, inner.stateful

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """Two passes of the model for each row [n,C,H,W]; a row that the inner box refuses stays refused."""
        both = torch.cat((rows, rows.roll(self.pixels, dims=-1)))
        answer = self.inner.answer(both, torch.cat((accounts, accounts)))
        assert answer.scores is not None
        scores = (answer.scores[: len(rows)] + answer.scores[len(rows) :]) / 2
        status = torch.maximum(answer.status[: len(rows)], answer.status[len(rows) :])
        return Answer(scores.argmax(dim=1).masked_fill(status.to(scores.device) != 0, -1), scores, status)
