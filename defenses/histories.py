"""The histories of a stateful gate: one for each account, or one of all, each with its secret."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robustbox import registry
from robustbox.errors import InputError
from robustbox.identity import stream
from robustbox.protocol import Answer

from .memory import Memory, Verdict

if TYPE_CHECKING:
    from .gate import Shape, StatefulDefense

_WARMED_AT_ONCE = 64


@dataclass(slots=True)
class Cell:
    """The answer to a row, Answer of length 1, to be given again as a decoy; None until the model has answered."""

    answer: Answer | None = None

    def keep(self, answer: Answer, position: int) -> None:
        """Take over a row's share of an answer."""
        part = slice(position, position + 1)
        scores = None if answer.scores is None else answer.scores[part].clone()
        self.answer = Answer(answer.labels[part].clone(), scores, answer.status[part].clone())

    def give(self, answer: Answer, position: int) -> None:
        """Make it a row's share of another answer; nothing where there is none yet."""
        if self.answer is not None:
            answer.labels[position], answer.status[position] = self.answer.labels[0], self.answer.status[0]
            if answer.scores is not None and self.answer.scores is not None:
                answer.scores[position] = self.answer.scores[0]


@dataclass(slots=True)
class History:
    """What is remembered of a scope; `cells` by row number, under `decoy` only."""

    secret: Any
    memory: Memory
    cells: dict[int, Cell] = field(default_factory=dict)


class Histories:
    """Histories by scope, begun when they are first asked for.

    Args:
        defense: says whose queries are compared, what is remembered, and with what each history starts.
        seed: secrets come from it and the scope.
        device: where rows are.
        shape: the shape of rows, where it is known.

    Raises:
        InputError: the data set of `warm` cannot be had, or is not for this model.
    """

    def __init__(self, defense: StatefulDefense, seed: int, device: torch.device, shape: Shape | None) -> None:
        self._defense, self._seed = defense, seed
        self._all: dict[int | str, History] = {}
        self._warm = None if defense.warm is None else self._benign(defense.warm, device, shape)

    def of(self, account: int, rows: Tensor) -> History:
        """The history against which an account's rows [n,C,H,W] are judged.

        Raises:
            InputError: the rows have a shape that the gate or its warm history does not take.
        """
        scope = self.scope(account)
        if scope not in self._all:
            channels, height, width = shape = rows.shape[1], rows.shape[2], rows.shape[3]
            if self._warm is not None and self._warm.shape[1:] != (channels, height, width):
                raise InputError(
                    f"{self._defense.name}: the images of {self._defense.warm} are {[*self._warm.shape[1:]]}, "
                    f"the queries {[*shape]}: take another data set for warm"
                )
            self._defense.check_shape(shape)
            secret = self._defense.secret(shape, stream(rows.device, self._seed, "sdm", scope))
            self._all[scope] = History(secret, self._defense.memory(secret))
            self.restart(self._all[scope])
        return self._all[scope]

    def scope(self, account: int) -> int | str:
        """Whose queries an account's are compared with: its own, or those of all."""
        return account if self._defense.scope == "account" else "global"

    def sender(self, scope: str) -> int:
        """An account of a scope, by the scope's text."""
        return int(scope) if self._defense.scope == "account" else 0

    def stored(self, scope: int | str) -> int:
        """Rows that are remembered of a scope."""
        return self._all[scope].memory.stored if scope in self._all else 0

    def restart(self, history: History) -> None:
        """A history as it is at the start of an account."""
        history.memory = self._defense.memory(history.secret)
        history.cells.clear()
        if self._warm is not None:
            for rows in self._warm.split(_WARMED_AT_ONCE):
                for fingerprint in self._defense.prints(rows, [history.secret] * len(rows)):
                    self.store(history, fingerprint, history.memory.judge(fingerprint), None)

    def store(self, history: History, fingerprint: Any, verdict: Verdict, cell: Cell | None) -> None:
        """Remember a query, and forget the oldest where there is a window."""
        number = history.memory.store(fingerprint, verdict)
        if cell is not None:
            history.cells[number] = cell
        if self._defense.window is not None:
            history.memory.forget(number + 1 - self._defense.window)
            history.cells.pop(number - self._defense.window, None)

    def drop(self, account: int) -> None:
        """Forget an account altogether."""
        del self._all[account]

    def memories(self) -> list[Memory]:
        """What is remembered, of all scopes."""
        return [history.memory for history in self._all.values()]

    def _benign(self, name: str, device: torch.device, shape: Shape | None) -> Tensor:
        """A sample of a data set's images [warm_rows,C,H,W], the same for every history."""
        images: Tensor = registry.make("data", name).images
        count = self._defense.warm_rows
        if len(images) < count:
            raise InputError(
                f"{self._defense.name}: {name} holds {len(images)} images, warm_rows asks for {count}: ask for fewer"
            )
        if shape is not None and images.shape[1:] != shape:
            raise InputError(
                f"{self._defense.name}: the images of {name} are {[*images.shape[1:]]}, the model takes "
                f"{[*shape]}: take another data set for warm"
            )
        order = torch.randperm(len(images), generator=stream(torch.device("cpu"), self._seed, "sdm", "warm"))
        return images[order[:count]].to(device)
