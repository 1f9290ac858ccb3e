"""What the defenses share that stand outside a model and touch rows or scores only, not layers."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from robustbox.distances import rounded
from robustbox.errors import InputError
from robustbox.protocol import Answer, BlackBox, Defense


class Outer(BlackBox):
    """A black box around another one, as random and as stateful as that, that passes on what is known of it."""

    def __init__(self, inner: BlackBox, recipe: Defense) -> None:
        self.inner: BlackBox = inner
        self.name = f"{inner.name} behind {recipe.name}"
        self.device, self.input_shape, self.levels = inner.device, inner.input_shape, inner.levels
        self.classes, self.scores = inner.classes, inner.scores
        self.stochastic, self.stateful = inner.stochastic, inner.stateful
        self._recipe = recipe

    def _inner_answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """What the black box behind answers; a callable shows its kind of scores with the first of them."""
        answer = self.inner.answer(rows, accounts)
        self.classes, self.scores = self.inner.classes, self.inner.scores
        return answer

    def _show(self, rows: Tensor, accounts: Tensor) -> Answer:
        """What the black box behind answers to rows other than those that were sent, put on its grid where it has one."""
        levels = self.inner.levels
        return self._inner_answer(rows if levels is None else rounded(rows.clamp(0, 1), levels), accounts)

    def _needs_scores(self) -> None:
        if self.scores == "none":
            raise InputError(f"{self._recipe.name} works on scores, and {self.inner.name} answers labels only")

    def describe(self) -> dict[str, object]:
        """What a result must record: the model behind, and the options."""
        return {**super().describe(), "options": self._recipe.options(), "inner": self.inner.describe()}


def wide(scores: Tensor) -> Tensor:
    """Scores in float32 where they are of fewer bits: half precision cannot hold what defenses reckon and answer."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class Transformed(Outer):
    """A black box that is shown rows other than those that were sent.

    Any rows are taken; what becomes of them is put on the grid of a black box behind that knows only so many levels.
    """

    def __init__(self, inner: BlackBox, recipe: Defense) -> None:
        super().__init__(inner, recipe)
        self.levels = None

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """Answer rows float32 [n,C,H,W] in [0, 1] as the black box behind answers what becomes of them."""
        return self._show(self.transform(rows), accounts)

    @abstractmethod
    def transform(self, rows: Tensor) -> Tensor:
        """What becomes of rows [n,C,H,W], each by itself."""
