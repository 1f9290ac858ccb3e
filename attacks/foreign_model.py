"""The black box as foolbox's attacks see it (`foreign.py`): a model, and a criterion of success."""

from __future__ import annotations

from typing import Any

import torch
from eagerpy.astensor import astensor, astensor_
from foolbox.criteria import Criterion
from foolbox.models.base import Model
from foolbox.types import Bounds
from torch import Tensor

from robustbox.protocol import ANSWERED, Answer, Task
from robustbox.scores import maybe_truncated

from .guest import Ask


class ForeignModel(Model):
    """The model that foolbox sees: each row of each call is a query."""

    data_format = "channels_first"

    def __init__(self, ask: Ask, task: Task, knowledge: str) -> None:
        self._ask, self._task, self._knowledge = ask, task, knowledge

    @property
    def bounds(self) -> Bounds:
        return Bounds(0.0, 1.0)

    def __call__(self, inputs: Any) -> Any:
        x, restore = astensor_(inputs)
        rows = x.raw.float().clamp(0, 1)
        if rows.isnan().any():
            raise ArithmeticError("foolbox asked a row with NaN: it divides 0 by 0 where its iterate meets the image")
        answer = self._ask(rows)
        output = self._logits(answer) if self._knowledge == "score" else self._task.reached(answer)
        return restore(astensor(output.to(rows.device)))

    def _logits(self, answer: Answer) -> Tensor:
        """Logits [n,K]. The logarithm of probabilities is that but for a constant.

        A row that was not answered reads as surely of the image's own class.
        """
        label, target = self._task.label, self._task.target or 0
        scores = answer.scores if answer.scores is not None else torch.zeros(len(answer), 1 + max(label, target))
        surely = torch.zeros_like(scores)
        surely[:, label] = 1
        scores = torch.where((answer.status == ANSWERED).to(scores.device)[:, None], scores, surely)
        return torch.where(
            maybe_truncated(scores)[:, None], scores.clamp_min(torch.finfo(scores.dtype).tiny).log(), scores
        )


class Reached(Criterion):
    """The criterion of label attacks, for whom `ForeignModel` answers with the goal itself."""

    def __repr__(self) -> str:
        return "Reached()"

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        return outputs
