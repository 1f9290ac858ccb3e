"""The pre-flight: a look at a defended model before it is attacked. Every row is counted, on the evaluator's ledger.

Query cost: 4 n rows (n images and n blends of two, asked twice), 1 + copies, up to 4 n where few images are right, and the
benign images where the black box is stateful or refused something.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbox.comparisons import mcnemar
from robustbox.errors import InputError, ModelError
from robustbox.identity import derive_seed, stream
from robustbox.oracle import Oracle
from robustbox.protocol import ANSWERED, Answer, BlackBox
from robustbox.results import share_of
from robustbox.statistics import clopper_pearson

from .answers import decimals, differ
from .flags import Flag, flag
from .spec import PreflightEntry

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BATCH = 64


@dataclass(frozen=True)
class Subject:
    """A defended model to look at.

    Args:
        build: makes it anew, with no history.
        model: the undefended black box inside.
        images, labels: what it will be attacked on.
        benign: natural images that are not attacked, or None.
        levels: grey levels that it takes.
        seed: of accounts and noise.
    """

    build: Callable[[], BlackBox]
    model: BlackBox
    images: Tensor
    labels: Tensor
    benign: Tensor | None
    levels: int | None
    seed: int

    @property
    def natural(self) -> Tensor:
        """Natural images that show false positives: those that are attacked, where there are no others."""
        return self.images if self.benign is None else self.benign


def look(subject: Subject, entry: PreflightEntry, ledger: Counter[str] | None = None) -> dict[str, Any]:
    """What the pre-flight sees, as docs/audit.md describes it (`systems[].preflight`); `ledger` counts its rows as they go."""
    try:
        looking = _Look(subject, entry, Counter() if ledger is None else ledger)
    except InputError as error:  # the defense cannot be put on it
        why = " ".join(str(error).split())
        found = {"error": why, "name": subject.model.name, "stateful": False, "rows": {}}
        return {**_Look.nothing(), **found, "flags": [flag("fails", why).plain()]}
    return looking.report()


def most(subject: Subject, entry: PreflightEntry) -> int:
    """The rows that a look takes at most."""
    n = min(entry.images, len(subject.images))
    return 8 * n + 1 + entry.copies + len(subject.natural[: entry.benign])


class _Look:
    def __init__(self, subject: Subject, entry: PreflightEntry, ledger: Counter[str]) -> None:
        self.subject, self.entry = subject, entry
        self.oracle = Oracle(subject.build(), "logit", subject.levels)
        self.oracle.ledger = ledger
        self.flags: list[Flag] = []
        self.inside = 0
        self.seconds: list[float] = []
        n = min(entry.images, len(subject.images))
        self.images = subject.images[:n].to(self.oracle.box.device, torch.float32)
        self.labels = np.asarray(subject.labels[:n].cpu())

    def report(self) -> dict[str, Any]:
        """Look, and say what was seen."""
        box, found = self.oracle.box, self.nothing()
        inner = self.subject.model
        answer = inner.answer
        inner.answer = self._counting(answer)  # type: ignore[assignment, method-assign]  # what a row costs inside
        try:
            self._look(found)
        except (ModelError, InputError) as error:
            found["error"] = " ".join(str(error).split())
            self.flags = [flag("fails", found["error"])]
        finally:
            inner.answer = answer  # type: ignore[method-assign]
        found |= {"name": box.name, "stateful": box.stateful, "rows": dict(self.oracle.ledger)}
        found["flags"] = [each.plain() for each in self.flags]
        return found

    @staticmethod
    def nothing() -> dict[str, Any]:
        return {
            "error": None,
            "scores": None,
            "decimals": None,
            "stochastic": None,
            "clean": None,
            "copies": None,
            "benign": None,
            "forwards_per_row": None,
            "milliseconds_per_row": None,
        }

    def _look(self, found: dict[str, Any]) -> None:
        blends = (self.images + self.images.roll(1, 0)) / 2  # near the borders between classes, where noise shows
        rows = torch.cat([self.images, blends])
        first, second = (self._ask(rows, self._strangers(len(rows), k)) for k in range(2))
        box, n = self.oracle.box, len(self.images)
        found["scores"] = self.oracle.scores
        found["forwards_per_row"] = self.inside / (2 * len(rows))
        found["milliseconds_per_row"] = 1e3 * min(self.seconds) / len(rows)
        right = (first.labels.numpy()[:n] == self.labels) & (first.status.numpy()[:n] == ANSWERED)
        found["clean"] = share_of(int(right.sum()), n)
        self._preparation(right, box.classes or int(max(self.labels.max(), first.labels.max())) + 1)
        noisy = differ(first, second)
        found["stochastic"] = box.stochastic or noisy
        if found["stochastic"]:
            self.flags.append(flag("stochastic", "seen" if noisy else "declared"))
            if not box.stochastic:
                self.flags.append(flag("undeclared-noise"))
        if first.scores is None:
            self.flags.append(flag("label-only"))
        else:
            found["decimals"] = decimals(first.scores[first.status.to(first.scores.device) == ANSWERED])
            if found["decimals"] is not None:
                self.flags.append(flag("rounded-scores", f"{found['decimals']} decimals"))
        self._copies(found)
        if box.stateful or found["copies"]["refused"]:
            self._benign(found)

    # Each look by itself.

    def _preparation(self, right: NDArray[np.bool_], classes: int) -> None:
        """Is it right about the images, and more often if they are prepared in another way?"""
        from scipy.stats import binomtest

        hits, n = int(right.sum()), len(right)
        if binomtest(hits, n, 1 / max(classes, 2), alternative="greater").pvalue > 0.05:
            self.flags.append(flag("chance", f"{hits} of {n} right, {classes} classes"))
        if hits >= n / 2:
            return
        for how, rows in _prepared(self.images):
            self.oracle.ledger.update({"verify": n})
            try:  # not by the oracle, which sends nothing that lies outside the box
                labels = self.oracle.box.answer(rows, self._strangers(n, how)).labels.cpu().numpy()
            except Exception:  # such rows may well be refused
                continue
            better = mcnemar(labels == self.labels, right)
            if better.first > better.second and better.p < 0.05:
                seen = int((labels == self.labels).sum())
                self.flags.append(flag("box", f"{seen} of {n} right if images are {how}, else {hits}"))

    def _copies(self, found: dict[str, Any]) -> None:
        """One image and near copies of it, all from one account."""
        base, n = self.images[:1], self.entry.copies
        noise = torch.randn(
            n, *base.shape[1:], generator=stream(base.device, self.subject.seed, "copies"), device=base.device
        )
        rows = torch.cat([base, (base + 0.002 * noise).clamp(0, 1)])
        refused = self._refused(self.oracle, rows, "copies")
        first = int(refused.argmax()) + 1 if refused.any() else 0
        found["copies"] = {"sent": n + 1, "refused": int(refused.sum()), "first_refused": first}
        if first:
            seen = f"{int(refused.sum())} of {n + 1}, first query {first}"
            self.flags.append(flag("refuses-near-duplicates", seen))
        elif self.oracle.box.stateful:
            self.flags.append(flag("silent-history", f"0 of {n + 1}"))

    def _benign(self, found: dict[str, Any]) -> None:
        """Natural images, each once, from one account of a black box without a history."""
        rows = self.subject.natural[: self.entry.benign].to(self.oracle.box.device, torch.float32)
        if not len(rows):
            return
        oracle = Oracle(self.subject.build(), "logit", self.subject.levels)
        oracle.ledger = self.oracle.ledger
        refused = self._refused(oracle, rows, "benign")
        low, high = clopper_pearson(int(refused.sum()), len(rows))
        found["benign"] = {"refused": int(refused.sum()), "of": len(rows), "low": low, "high": high}
        if refused.any():
            seen = f"{int(refused.sum())} of {len(rows)}, 95 % interval {low:.2%} to {high:.2%}"
            self.flags.append(flag("refuses-benign", seen))

    # Asking.

    def _ask(self, rows: Tensor, accounts: Tensor) -> Answer:
        start = time.perf_counter()
        answer = self.oracle.ask(self.oracle.round(rows), accounts, {"verify": len(rows)})
        self.seconds.append(time.perf_counter() - start)
        return answer

    def _refused(self, oracle: Oracle, rows: Tensor, what: str) -> NDArray[np.bool_]:
        """Which rows are refused when one account sends all of them, in order."""
        account = derive_seed(self.subject.seed, "preflight", what)
        status = []
        for part in rows.split(_BATCH):
            senders = torch.full((len(part),), account)
            status.append(oracle.ask(oracle.round(part), senders, {"verify": len(part)}).status.numpy())
        refused: NDArray[np.bool_] = np.concatenate(status) != ANSWERED
        return refused

    def _strangers(self, n: int, what: object) -> Tensor:
        """An account of its own for each of n rows."""
        return torch.tensor([derive_seed(self.subject.seed, "preflight", what, k) for k in range(n)])

    def _counting(self, answer: Callable[[Tensor, Tensor], Answer]) -> Callable[[Tensor, Tensor], Answer]:
        def counted(rows: Tensor, accounts: Tensor) -> Answer:
            self.inside += len(rows)
            return answer(rows, accounts)

        return counted


def _prepared(images: Tensor) -> list[tuple[str, Tensor]]:
    """The images as a model might want them instead."""
    ways = [("from 0 to 255", images * 255)]
    if images.shape[1] == 3:
        mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (_MEAN, _STD))
        ways += [("BGR", images.flip(1)), ("freed of a second normalisation", (images * std + mean).clamp(0, 1))]
        ways += [("normalised", (images - mean) / std)]
    return ways
