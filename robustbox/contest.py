"""One attack against one black box on N images: clean check, attack, verification, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.evaluator import Verdicts, clerk, draws, judge, quiet, share_reached, undefended
from robustbox.goals import goal
from robustbox.identity import derive_seed, sha256, stream
from robustbox.inputs import check_labels
from robustbox.loop import Progress, QueryLoop
from robustbox.oracle import Oracle
from robustbox.protocol import Attack, Defense, Task
from robustbox.provenance import Rules, config_of, identity_of, meta_of
from robustbox.records import Record, inside, together
from robustbox.results import AttackResult

_FUSED = 32
"""Rows a pass of the clean check, before the loop has learnt a better size."""


class Contest:
    """An attack on images [N,C,H,W], through an oracle, by the rules.

    Args:
        oracle: the door to the black box.
        attack: the attack.
        defenses: what stands around the model, outermost first; for the record.
        images: float32 [N,C,H,W] on the black box's device, rounded as the threat model transmits them.
        labels: N true classes.
        targets: N classes to reach, or N times None.
        pool: the attacker's own images and labels, or None.
        starts: N rows [C,H,W] to begin from, rounded too, or None where there is none.
        rules: the threat model.
    """

    def __init__(
        self,
        oracle: Oracle,
        attack: Attack,
        defenses: list[Defense],
        images: Tensor,
        labels: list[int],
        targets: list[int] | list[None],
        pool: tuple[Tensor, Tensor] | None,
        starts: list[Tensor | None],
        rules: Rules,
    ) -> None:
        self.oracle, self.attack, self.defenses, self.rules = oracle, attack, defenses, rules
        self.images, self.labels, self.targets, self.pool, self.starts = images, labels, targets, pool, starts
        self._classes = oracle.box.classes
        self._hashes = [sha256(image) for image in images]
        self._records: list[Record] = []
        self._clean_clerks: list[int] = []  # the evaluator's accounts, fresh for each of its rows
        self._clerks: list[int] = []
        nth: Counter[str] = Counter()  # an image that comes twice has two accounts
        for name in self._hashes:
            account = derive_seed(rules.seed, name, attack.name, "account", nth[name])
            self._records.append(Record(account, rules.budget, rules.accounts))
            self._clean_clerks.append(clerk(rules.seed, name, "clean", nth[name]))
            self._clerks.append(clerk(rules.seed, name, "verify", nth[name]))
            nth[name] += 1
        self._clean = np.zeros(len(labels), dtype=bool)
        self._verdicts = Verdicts.of(len(labels))
        self._still = quiet(oracle, defenses, rules.seed)
        self._fused = _FUSED if rules.max_rows == "auto" else rules.max_rows
        self._seconds = dict.fromkeys(("clean", "attack", "verify"), 0.0)
        self._clock = 0.0

    def worst_case(self) -> dict[str, int]:
        """The rows that the contest may cost at most, by ledger."""
        n, bare = len(self.labels), undefended(self.oracle)
        attack = min(n * self.rules.budget, self.rules.total_budget or n * self.rules.budget)
        twice = 0 if bare.box is self.oracle.box else draws(bare)
        thrice = 0 if self._still.box in (bare.box, self.oracle.box) else draws(self._still)
        return {"attack": attack, "verify": n * (2 * draws(self.oracle) + twice + thrice)}

    def keep_books(self, ledger: Counter[str]) -> None:
        """Count every row on this ledger, from the first one on."""
        self.oracle.ledger = self._still.ledger = ledger

    def check_task(self) -> None:
        """Ask the attack whether it can work on these images at all; no query is spent.

        Raises:
            InputError: it cannot.
        """
        begun = (i for i, start in enumerate(self.starts) if start is not None)
        self.attack.check(self._task(next(begun, 0)))  # in all else the tasks are alike

    def check_clean(self, need_one: bool = True) -> None:
        """Find the images that are classified correctly; the others are not attacked.

        Raises:
            InputError: there is none, and one is needed.
        """
        self._clock = self.oracle.clock()
        self._clean = share_reached(self.oracle, self.images, self.labels, self._clean_clerks, self._fused) > 0.5
        if self._classes is None:  # a callable's first answer shows how many there are
            classes = self.oracle.box.classes
            check_labels(self.labels, len(self.labels), classes)
            if self.targets[0] is not None:
                check_labels(self.targets, len(self.targets), classes, "targets")
            if self.pool is not None:
                check_labels(self.pool[1], len(self.pool[1]), classes, "pool labels")
        if need_one and not self._clean.any():
            raise InputError(
                "no image is classified correctly, so there is nothing to attack: "
                "check the labels, and that the model takes images in [0, 1]"
            )
        for record, right in zip(self._records, self._clean, strict=True):
            record.stop = "" if right else "misclassified"
        self._lap("clean")

    def fight(self, progress: Callable[[Progress], None] | None) -> None:
        """Attack the images that are classified correctly.

        Raises:
            ModelError: the black box failed; what was found until then is kept.
        """
        attacked = np.flatnonzero(self._clean).tolist()
        if not attacked:
            return
        loop = QueryLoop(
            self.oracle,
            self.attack,
            [self._task(i) for i in attacked],
            [self._records[i] for i in attacked],
            self.rules.keep_going,
            self.rules.max_rows,
            progress,
            self.rules.eot,
        )
        try:
            loop.run()
        finally:
            self._fused = loop.batch.size
            self._lap("attack")

    def _task(self, i: int) -> Task:
        return Task(
            image=self.images[i],
            label=self.labels[i],
            target=self.targets[i],
            norm=self.rules.norm,
            epsilon=self.rules.epsilon,
            generator=stream(self.images.device, self.rules.seed, self._hashes[i], self.attack.name),
            remaining=self.rules.budget,
            levels=self.oracle.levels,
            pool=self.pool,
            stochastic=self.oracle.box.stochastic,
            accounts=self._records[i].unopened,
            start=self.starts[i],
        )

    def verify(self) -> None:
        """Ask for every adversarial again: on the full pipeline, without its noise, and on the undefended model."""
        found = [i for i, record in enumerate(self._records) if inside(record.distance, self.rules.epsilon)]
        if found:
            goals = [goal(self.labels[i], self.targets[i]) for i in found]
            clerks = [self._clerks[i] for i in found]
            rows = self._adversarials()[found]
            judge(self._verdicts, found, self.oracle, self._still, rows, goals, clerks, self._fused)
        self._lap("verify")

    def result(self) -> AttackResult:
        """What was found so far."""
        records, epsilon = self._records, self.rules.epsilon
        reached = np.array([inside(record.distance, epsilon) for record in records])
        first = [next((query for query, far in record.trace if inside(far, epsilon)), 0) for record in records]
        noticed = [together(map(self.oracle.box.noticed, record.senders)) or (None, None) for record in records]
        return AttackResult(
            success=self._verdicts.fresh if self.oracle.box.stochastic else reached,
            distance=np.where(reached, [record.distance for record in records], np.nan),
            queries=np.array([record.spent for record in records], dtype=np.int64),
            first_success=np.array(first, dtype=np.int64),
            adversarials=self._adversarials(),
            ledger=dict(self.oracle.ledger),
            clean_correct=self._clean,
            success_any=np.array([inside(record.lucky, epsilon) for record in records]),
            success_fresh=self._verdicts.fresh,
            success_clean=self._verdicts.clean,
            success_undefended=self._verdicts.undefended,
            fresh_draws=self._verdicts.draws,
            fresh_fooled=self._verdicts.fooled,
            refusals=[record.refusals for record in records],
            accounts_burnt=np.array([record.burnt for record in records], dtype=np.int64),
            hits=[hits for hits, _ in noticed],
            first_hits=[first for _, first in noticed],
            stop_reasons=[record.stop or "stopped" for record in records],  # nothing yet: the clean check failed
            errors=[record.error for record in records],
            traces=[record.trace for record in records],
            epsilon=epsilon,
            meta=self.meta(),
        )

    def meta(self) -> dict[str, Any]:
        """What was run on what, by whom and with which versions: plain JSON values."""
        subjects = [
            {"sha256": name, "label": label, "target": target}
            for name, label, target in zip(self._hashes, self.labels, self.targets, strict=True)
        ]
        given = sum(start is not None for start in self.starts)
        return meta_of(self.oracle, self.attack, self.defenses, self.rules, subjects, given, self._fused, self._seconds)

    def config(self) -> dict[str, Any]:
        """The contest under the names of the command line's options, as far as names can tell."""
        return config_of(self.meta(), self.rules)

    def identity(self) -> dict[str, Any]:
        """What the queries depend on: runs that differ in it are different runs."""
        return identity_of(self.meta(), self.rules, self.pool, self.starts)

    def _adversarials(self) -> Tensor:
        """The best row of each image that has one inside the ball, [N,C,H,W]; NaN for the others."""
        found = torch.full_like(self.images, torch.nan)
        for row, record in zip(found, self._records, strict=True):
            if record.best is not None and inside(record.distance, self.rules.epsilon):
                row.copy_(record.best)
        return found

    def _lap(self, phase: str) -> None:
        now = self.oracle.clock()
        self._seconds[phase] += now - self._clock
        self._clock = now
