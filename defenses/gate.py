"""The stateful gate: remembers what was asked, and refuses what resembles it.

All stateful defenses are one black box, `StatefulGate`, that decides about queries one by one in the order in which they
came, around a plug-in that says what a query's fingerprint is and when one resembles those before it (`StatefulDefense`).
A query costs one row whether it is answered or refused; what is refused never reaches the model.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, BANNED, REJECTED, Answer, BlackBox, Defense
from robustbox.records import Noticed, together

from .archive import Archive
from .histories import Cell, Histories, History
from .memory import Memory
from .standing import Books, Decision, Standing, among_refusals, exchange_decoys

if TYPE_CHECKING:
    from robustbox.state import State

Action = Literal["reject", "ban", "silent", "decoy"]
Scope = Literal["account", "global"]
Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class StatefulDefense(Defense):
    """What all stateful gates have in common; a subclass adds its fingerprint (`secret`, `prints`) and its `memory`.

    Args:
        action: what happens to a hit: reject (the attacker sees that it was refused), ban (refused; after `strikes` hits
            the account gets no more answers), silent (answered and counted), decoy (answered as the earlier query that it
            resembles was).
        scope: whose queries are compared: those of one account, or of all (global).
        strikes: hits after which an account is banned.
        window: stored rows that are remembered, the oldest being forgotten first; null: all.
        store_rejected: whether hits are stored like other queries.
        reset_on_hit: forget everything after a hit, as a new account would start; counts how many accounts an attack needs.
        warm: name of a data set from which each history starts with `warm_rows` images: other users' queries.
        warm_rows: how many.
    """

    action: Action = "reject"
    scope: Scope = "account"
    strikes: int = 1
    window: int | None = None
    store_rejected: bool = True
    reset_on_hit: bool = False
    warm: str | None = None
    warm_rows: int = 1000

    def __post_init__(self) -> None:
        self.require(self.strikes >= 1, f"strikes must be at least 1, not {self.strikes}")
        self.require(self.window is None or self.window >= 1, f"window must be at least 1, not {self.window}")
        self.require(self.warm_rows >= 1, f"warm_rows must be at least 1, not {self.warm_rows}")

    def require(self, fine: bool, complaint: str) -> None:
        """Raise InputError unless an option is as it must be."""
        if not fine:
            raise InputError(f"{self.name}: {complaint}")

    def check_shape(self, shape: Shape) -> None:
        """Refuse rows (C, H, W) that this gate cannot tell apart.

        Raises:
            InputError: what is wrong with them.
        """

    @abstractmethod
    def secret(self, shape: Shape, generator: torch.Generator) -> Any:
        """What the gate keeps from its clients, drawn once for each scope: keys, salts, thresholds."""

    @abstractmethod
    def prints(self, rows: Tensor, secrets: Sequence[Any]) -> Iterable[Any]:
        """The fingerprints of rows [n,C,H,W] in [0, 1] under n secrets.

        Each is a function of its own row and secret alone, to the last bit: never of the batch.
        """

    @abstractmethod
    def memory(self, secret: Any) -> Memory:
        """An empty memory."""

    def histories(self, seed: int, device: torch.device, shape: Shape | None) -> Histories:
        """What a gate of this kind remembers, without a model behind it: for a gate, or for who rehearses with a copy."""
        return Histories(self, seed, device, shape)

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The black box behind this gate. Its answers depend on its history.

        Raises:
            InputError: the rows of `box` are not for this gate, or the data set of `warm` cannot be had.
        """
        return StatefulGate(box, self, seed)


class StatefulGate(BlackBox):
    """A black box behind a `StatefulDefense`.

    Fingerprints are taken in bulk; then each row is judged against the history as it stands, with the rows before it in
    the same pass, and stored. Only then the model answers the rows that were accepted. A refused row has label -1, scores
    NaN and status REJECTED. The hit that is an account's last strike is REJECTED, what it sends from then on, in the same
    pass too, is BANNED: neither judged nor stored.

    With scope `account` an account's answers depend on its own queries alone, whatever else is in the pass; with scope
    `global` on the order of all rows, which the query loop fixes. The evaluator's rows (accounts below 0) are judged, and
    neither stored nor counted. Secrets come from (seed, scope), and stay when a history is reset.

    Where the model fails, what was decided stands, though nobody has heard of it: an account that sends the same rows again
    hears it then, and is not judged by its own first attempt.
    """

    stateful = True

    def __init__(self, inner: BlackBox, defense: StatefulDefense, seed: int) -> None:
        self.inner: BlackBox = inner
        self.name = f"{inner.name} behind {defense.name}"
        self.device, self.input_shape, self.stochastic = inner.device, inner.input_shape, inner.stochastic
        self.classes, self.scores, self.levels = inner.classes, inner.scores, inner.levels
        self._defense, self._seed = defense, seed
        self._books = Books()
        if inner.input_shape is not None:
            defense.check_shape(inner.input_shape)
        self._histories = defense.histories(seed, self.device, self.input_shape)
        self._archive: Archive | None = None

    @torch.no_grad()
    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """Answer rows float32 [n,C,H,W] in [0, 1], refusing hits; one row of the model for each accepted one.

        Raises:
            InputError: the rows have a shape that the gate or its warm history does not take.
        """
        senders = accounts.tolist()
        decisions = self._decide(rows, senders)
        try:
            answer = self._ask(rows, accounts, decisions)
            exchange_decoys(answer, decisions)
            if self._archive is not None:
                self._archive.add(rows.shape[1:], senders, decisions)
        except BaseException:
            self._books.put_by(rows, senders, decisions)
            raise
        return answer

    def persist(self, state: State) -> None:
        """Take up histories, bans and counts that stand in a file, and keep them there from now on."""
        super().persist(state)
        self._archive = Archive(state.shelf(), self._histories, self._books, self.device)

    def describe(self) -> dict[str, object]:
        """What a result must record: the model behind, the gate's options, and what it saw so far."""
        return {
            **super().describe(),
            "options": self._defense.options(),
            "statistics": self.statistics(),
            "inner": self.inner.describe(),
        }

    def statistics(self) -> dict[str, object]:
        """What the gate saw so far, its time, and the memory that it takes (`Books.statistics`)."""
        memories = self._histories.memories()
        stored, size = sum(memory.stored for memory in memories), sum(memory.nbytes for memory in memories)
        return self._books.statistics(size / stored if stored else 0.0)

    def standing(self, account: int) -> Standing:
        """What the gate holds against an account; a fresh one if it was never heard of."""
        return self._books.standing(account)

    def noticed(self, account: int) -> Noticed | None:
        """The hits of an account and the first of them; those of a gate behind this one included."""
        return together([self._books.noticed(account), self.inner.noticed(account)])

    # The decision, one row after the other.

    def _decide(self, rows: Tensor, senders: list[int]) -> list[Decision]:
        start = time.perf_counter()
        standings = [self._books.standing(account) if account >= 0 else Standing() for account in senders]
        alive = [position for position, standing in enumerate(standings) if not standing.banned]
        histories = {position: self._histories.of(senders[position], rows) for position in alive}
        secrets = [history.secret for history in histories.values()]
        prints = self._defense.prints(rows if len(alive) == len(rows) else rows[alive], secrets) if alive else ()
        fingerprints = dict(zip(alive, prints, strict=True))
        decisions = []
        for position, standing in enumerate(standings):
            account = senders[position]
            decision = self._books.taken_up(account, rows, position)
            if decision is None:
                standing.rows += 1
                if standing.banned:  # perhaps by a row before it in this pass
                    decision = Decision(BANNED, asked=False)
                else:
                    self._books.judged += account >= 0
                    decision = self._judge(standing, histories[position], fingerprints[position], account >= 0)
            decisions.append(decision)
        if self._defense.scope == "account":
            for account in {senders[i] for i in alive if standings[i].banned or senders[i] < 0}:
                self._histories.drop(account)
        self._books.seconds += time.perf_counter() - start
        return decisions

    def _judge(self, standing: Standing, history: History, fingerprint: Any, remember: bool) -> Decision:
        defense = self._defense
        verdict = history.memory.judge(fingerprint)
        hit = verdict.hit
        refused = hit and defense.action in ("reject", "ban")
        cell = history.cells.get(verdict.match) if hit else None  # a decoy's; none is to be had of a warm row
        asked = not refused and cell is None
        if not remember:
            return Decision(REJECTED if refused else ANSWERED, asked, cell)
        if defense.action == "decoy" and asked:
            cell = Cell()
        decision = Decision(REJECTED if refused else ANSWERED, asked, cell)
        if not hit or defense.store_rejected:
            self._histories.store(history, fingerprint, verdict, cell)
            decision.fingerprint = fingerprint
        if hit:
            standing.hits += 1
            standing.first_hit = standing.first_hit or standing.rows
            standing.banned = defense.action == "ban" and standing.hits >= defense.strikes
            if defense.reset_on_hit:
                self._histories.restart(history)
                decision.reset = True
        return decision

    def _ask(self, rows: Tensor, accounts: Tensor, decisions: list[Decision]) -> Answer:
        """The model's answers to the rows that it is asked, among refusals for the others."""
        answer, asked = None, [decision.asked for decision in decisions]
        if any(asked):
            which = torch.tensor(asked)
            everything = all(asked)
            part = rows if everything else rows[which.to(rows.device)]
            answer = self.inner.answer(part, accounts if everything else accounts[which])
            self.classes, self.scores = self.inner.classes, self.inner.scores  # a callable shows them by now
            if everything:
                return answer
        scored = self.scores in ("probability", "logit")
        return among_refusals(answer, decisions, self.device, (self.classes or 0) if scored else 0)
