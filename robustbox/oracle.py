"""The oracle: the only door to the black box, and the owner of every count.

For each row, in this order: refuse what no client could send (an error, not a clamp); round it to the grey levels of the
threat model; charge it to a ledger; ask the black box; check the answer; hide what the attacker was not granted.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from robustbox.distances import rounded
from robustbox.errors import InputError, ModelError, StorageError
from robustbox.protocol import ANSWERED, Answer, BlackBox, Knowledge

if TYPE_CHECKING:
    from robustbox.journal import Journal

Phase = Literal["attack", "calibrate", "verify", "train", "certify", "extract"]
ATTACKER: tuple[Phase, ...] = ("attack", "calibrate")
"""The phases that are charged to the attacker; the others are the evaluator's and the defender's."""


def check_knowledge_name(knowledge: str) -> None:
    """Refuse a knowledge level that does not exist."""
    if knowledge not in ("label", "score", "logit") and not re.fullmatch(r"top-[1-9]\d*", str(knowledge)):
        raise InputError(f"unknown knowledge level '{knowledge}': use label, top-K (as top-5), score or logit")


def check_knowledge(knowledge: Knowledge, needed: str, box: BlackBox) -> None:
    """Refuse a knowledge level that does not exist, that the attack cannot live on, or that the black box cannot give.

    Raises:
        InputError: with what to do instead.
    """
    check_knowledge_name(knowledge)
    if needed == "score" and knowledge == "label":
        raise InputError(
            "this attack needs scores, but the oracle grants labels only: use knowledge=score, or a label attack"
        )
    if box.scores == "none" and knowledge != "label":
        raise InputError(
            f"the black box answers labels only and cannot grant knowledge '{knowledge}': use a label attack"
        )
    if box.scores == "probability" and knowledge == "logit":
        raise InputError("the black box answers probabilities, it cannot grant logits: use knowledge=score")


class Oracle:
    """Asks a black box on somebody's account, and counts.

    Args:
        box: the black box, defended or not.
        knowledge: what the attacker sees: `label`, `top-K` (probabilities of the K likeliest classes, 0 elsewhere),
            `score` (probabilities) or `logit`. The evaluator's phases see everything.
        levels: grey levels L of the threat model: rows are rounded to multiples of 1/(L-1) before the model sees them.
        total_budget: rows that all images together may be charged, or None.
    """

    def __init__(
        self, box: BlackBox, knowledge: Knowledge = "label", levels: int | None = None, total_budget: int | None = None
    ) -> None:
        self.box = box
        self.knowledge = knowledge
        self.levels = levels
        self.total_budget = total_budget
        self.ledger: Counter[str] = Counter()
        self.scores = box.scores
        self.journal: Journal | None = None
        """What remembers the answers, and with them the run's time (`robustbox.journaled`)."""

    def clock(self) -> float:
        """Seconds, of which differences make sense; in a run that goes on, those that it took before count."""
        return time.perf_counter() if self.journal is None else self.journal.now()

    @property
    def charged(self) -> int:
        """Rows charged to the attacker so far, all images together."""
        return sum(self.ledger[phase] for phase in ATTACKER)

    def inadmissible(self, rows: Tensor) -> list[int]:
        """Positions of the rows [n,C,H,W] that hold NaN or leave the box [0, 1]; exact, without any tolerance."""
        low, high = torch.aminmax(rows)  # NaN goes through, and fails both comparisons
        if bool((low >= 0) & (high <= 1)):
            return []
        fine = ((rows >= 0) & (rows <= 1)).flatten(1).all(dim=1)
        positions: list[int] = (~fine).nonzero().flatten().tolist()
        return positions

    def round(self, rows: Tensor) -> Tensor:
        """Rows as the threat model transmits them; the same tensor where it does not round."""
        return rounded(rows, self.levels)

    def ask(self, rows: Tensor, accounts: Tensor, phases: dict[Phase, int]) -> Answer:
        """Charge the rows to their phases and answer them: labels and status on the host, scores on the device.

        Args:
            rows: float32 [n,C,H,W], admissible and rounded.
            accounts: int64 [n], who sends each row.
            phases: how many of the rows belong to each phase; the sum is n.

        Raises:
            ModelError: the black box raised, answered another number of rows, or answered NaN. The rows stay charged.
        """
        self.ledger.update(phases)
        try:
            answer = self.box.answer(rows.clone(), accounts)  # its own copy: a model may write into its input
        except (InputError, ModelError, StorageError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ModelError(f"the model failed on {len(rows)} rows: {type(error).__name__}: {error}") from error
        return self._checked(answer, len(rows))

    def visible(self, answer: Answer) -> Answer:
        """The answer as the attacker sees it."""
        if self.knowledge == "label" or answer.scores is None:
            return Answer(answer.labels, None, answer.status)
        scores = answer.scores
        if self.knowledge != "logit" and self.scores == "logit":
            scores = scores.softmax(dim=1)
        if self.knowledge.startswith("top-"):
            best = scores.topk(min(int(self.knowledge[4:]), scores.shape[1]), dim=1)
            scores = torch.zeros_like(scores).scatter_(1, best.indices, best.values)
        return Answer(answer.labels, scores, answer.status)

    def _checked(self, answer: Answer, n: int) -> Answer:
        counts = {len(answer.labels), len(answer.status), n if answer.scores is None else len(answer.scores)}
        if counts != {n}:
            raise ModelError(
                f"the model was asked {n} rows and answered {max(counts - {n})}: it must answer each row once"
            )
        self.scores = self.box.scores  # a callable shows what it answers only with its first answer
        host = torch.stack((answer.labels.long(), answer.status.long(), unusable(answer))).cpu()  # one transfer
        if host[2].any():
            raise ModelError(f"the model answered NaN or infinite scores for {int(host[2].sum())} of {n} rows")
        labels = host[0][host[1] == ANSWERED]
        if len(labels) and (int(labels.min()) < 0 or (self.box.classes or 2**63) <= int(labels.max())):
            raise ModelError(
                f"the model answered classes from {int(labels.min())} to {int(labels.max())}, and has "
                f"{self.box.classes or 'none below 0'}: labels count from 0"
            )
        return Answer(host[0], answer.scores, host[1].to(torch.uint8))


def unusable(answer: Answer) -> Tensor:
    """1 for the rows whose scores are NaN or +inf though they were answered, as int64 [n]."""
    if answer.scores is None:
        return torch.zeros_like(answer.labels, dtype=torch.long)
    usable = (answer.scores < torch.inf).all(dim=1)
    return (~usable & (answer.status == ANSWERED)).long()
