"""What a stateful gate keeps in a file beyond the end of its process: fingerprints of answered rows, and standings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

import torch

from .histories import Cell, Histories
from .standing import Books, Decision, Standing

if TYPE_CHECKING:
    from robustbox.state import Shelf


class Archive:
    """A gate's histories and books on a shelf: what stands there is taken up, and what is answered from now on is added.

    A scope has as many fingerprints there as its memory remembers. They are judged and stored again in their order, so that
    a memory comes back as it was; one that has forgotten rows (`window`) may judge by less than it knew of those.

    Args:
        shelf: the place in the file.
        histories, books: the gate's, as they are at its start.
        device: where its rows are.

    Raises:
        InputError: what stands there is not for this gate.
    """

    def __init__(self, shelf: Shelf, histories: Histories, books: Books, device: torch.device) -> None:
        self._shelf, self._histories, self._books = shelf, histories, books
        with shelf.reading():
            self._take_up(device)

    def _take_up(self, device: torch.device) -> None:
        histories, books, totals = self._histories, self._books, self._shelf.totals()
        if not totals:
            return
        books.judged, books.seconds = totals["judged"], totals["seconds"]
        for account, standing in self._shelf.standings():
            books.take_over(account, Standing(*standing))
        blank = torch.empty(1, *totals["shape"], device=device)
        for scope, fingerprint, answer in self._shelf.prints(device):
            history = histories.of(histories.sender(scope), blank)
            cell = None if answer is None else Cell(answer)
            histories.store(history, fingerprint, history.memory.judge(fingerprint), cell)

    def add(self, shape: torch.Size, senders: Sequence[int], decisions: Sequence[Decision]) -> None:
        """Write down rows (C, H, W) that were answered or refused, the evaluator's left out.

        Raises:
            StorageError: the file cannot be written.
        """
        own = [(account, decision) for account, decision in zip(senders, decisions, strict=True) if account >= 0]
        if not own:
            return
        with self._shelf.writing():
            for account, decision in own:
                scope = self._histories.scope(account)
                if decision.fingerprint is not None:
                    answer = None if decision.cell is None else decision.cell.answer
                    self._shelf.store(str(scope), decision.fingerprint, answer, self._histories.stored(scope))
                if decision.reset:
                    self._shelf.clear(str(scope))
            for account in {account for account, _ in own}:
                self._shelf.hold(account, [*astuple(self._books.standing(account))])
                if not self._histories.stored(scope := self._histories.scope(account)):
                    self._shelf.clear(str(scope))  # it was banned
            self._shelf.note({"judged": self._books.judged, "seconds": self._books.seconds, "shape": [*shape]})
