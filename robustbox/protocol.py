"""The five nouns of robustbox: BlackBox, Answer, Query, Task and Attack. Start reading here.

A model that can only be queried is a black box; a defense is a black box around a black box; an attack is a generator of
queries; one oracle (`robustbox.oracle`) stands between them and owns every count, and one loop (`robustbox.loop`) drives
many attacks at once:

    attack.search(task)  --Query-->  QueryLoop  --rows-->  Oracle  --rows-->  BlackBox
                         <--Answer--            <--Answer--        <--Answer--

Shapes: n rows, K classes, images C x H x W. Images and distances are in [0, 1] units throughout; normalisation belongs to
the black box.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from robustbox.state import State

Norm = Literal["l0", "l2", "linf"]
"""l0 counts changed pixels (all channels of a position are one pixel)."""
Kind = Literal["init", "probe", "step", "line", "calibrate"]
"""What a query is for: a start, an estimate, a candidate iterate, a line search, or getting to know a defense."""
Knowledge = str
"""What an attacker sees of an answer: `label`, `top-K` (K a number), `score` (probabilities) or `logit`."""
Scores = Literal["none", "probability", "logit"]

NORMS: tuple[Norm, ...] = get_args(Norm)
ANSWERED, REJECTED, BANNED = 0, 1, 2
"""The status of a row: the model answered; a gate refused the row; a gate no longer serves the account."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for n rows.

    Args:
        labels: int64 [n], the top-1 class; -1 where the row was not answered.
        scores: float [n,K], or None where none are given. Under `top-K` the hidden classes hold 0.
        status: uint8 [n], one of ANSWERED, REJECTED, BANNED.

    An attack receives `labels` and `status` on the host (moved once a round for all images together, because attacks
    branch on them) and `scores` on the black box's device.
    """

    labels: Tensor
    scores: Tensor | None
    status: Tensor

    @classmethod
    def of(cls, labels: Tensor, scores: Tensor | None = None) -> Answer:
        """An answer in which every row was answered."""
        return cls(labels, scores, torch.zeros(len(labels), dtype=torch.uint8, device=labels.device))

    def __len__(self) -> int:
        return len(self.labels)


class BlackBox(ABC):
    """Answers rows. A torch module, an HTTP service and a defended model are all black boxes.

    Attributes:
        name: how reports call it.
        device: where rows are expected and scores come back.
        input_shape: (C, H, W), or None where any size is taken.
        classes: number of classes K, or None where not known before the first answer.
        scores: what `Answer.scores` holds; None where not known before the first answer.
        levels: grey levels of the rows that it takes (256 where they travel as 8 bits), or None: any.
        stochastic: the same row may be answered differently when it is asked again.
        stateful: an answer depends on what was asked before; a defense around such a black box is stateful too.
        paid: a row costs money; what is written of its answer then outlives the loss of power too.
        replayed: its last answer came from a journal, and it was not asked itself.
        inner: the black box that this one defends, or None where it stands for itself.
    """

    name: str = "black box"
    device: torch.device = torch.device("cpu")
    input_shape: tuple[int, int, int] | None = None
    classes: int | None = None
    scores: Scores | None = None
    levels: int | None = None
    stochastic: bool = False
    stateful: bool = False
    paid: bool = False
    replayed: bool = False
    inner: BlackBox | None = None

    @abstractmethod
    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """Answer rows float32 [n,C,H,W] in [0, 1], sent by accounts int64 [n] (on the host).

        Accounts below 0 are the evaluator's: a defense that learns from queries judges them and does not remember them.
        """

    def resume(self, key: str) -> None:  # noqa: B027  (most need no name)
        """Take note that a run begins or goes on, under a key that is its own and stays where a journal keeps it, else "".

        A model that is asked over a network names its requests by it, so that what was in flight is not bought again, and
        counts what the run costs.
        """

    def skip(self, rows: Tensor, accounts: Tensor, answered: bool) -> None:  # noqa: B027  (most keep nothing in mind)
        """Take note of rows that were sent in an earlier session of this run, and are not asked now.

        A journal calls it on models that stand for themselves: one that draws from a stream of its own moves it on, one that
        counts what it costs counts them. Where they were not `answered` they were in flight, and are asked again afterwards.
        """

    def noticed(self, account: int) -> tuple[int, int] | None:
        """Rows of an account that looked like an attack, refused or not, and which of its own was the first (from 1; 0: none).

        None where nothing here watches accounts.
        """
        return None if self.inner is None else self.inner.noticed(account)

    def persist(self, state: State) -> None:
        """Take up what a file keeps, and keep there what shall outlive the process: a stateful defense its histories.

        Raises:
            InputError: what stands there belongs to others.
        """
        if self.inner is not None:
            self.inner.persist(state)

    def describe(self) -> dict[str, object]:
        """What a result must record of this black box, as plain JSON values."""
        return {"name": self.name, "stochastic": self.stochastic}


class Defense(ABC):
    """A recipe that puts a black box around a black box; a frozen dataclass of its hyper-parameters."""

    name: ClassVar[str]

    def options(self) -> dict[str, object]:
        """The hyper-parameters, for the record."""
        return dict(vars(self))

    def tensors(self) -> dict[str, Tensor]:
        """What the defense learnt, by name, for its file; a defense that is all hyper-parameters has none."""
        return {}

    @classmethod
    def from_tensors(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The defense whose `options` and `tensors` these are."""
        if tensors:
            raise TypeError(f"{cls.__name__} has no tensors")
        return cls(**options)

    @abstractmethod
    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The defended black box. Its randomness comes from `seed` and the rows' accounts alone."""


@dataclass(slots=True, eq=False)
class Knob:
    """A scale of an attack's proposals that a wrapper may set while the attack runs, as OARS does against stateful gates.

    Args:
        name: what it scales; as in the attack's `knobs`.
        low, high: the range in which it makes sense. Larger means less similar to earlier rows, and refused less often.
        draw: `draw(value, n)` gives n rows [n,C,H,W] proposed at a scale: from the attack's own distribution (its subspace,
            its clipping), where it stands now, out of the task's generator.
        integer: whether only whole numbers make sense.
        value: the scale in force; None leaves it to the attack's own schedule. Set by the wrapper, read by the attack.
        stretch: by which the scale of rows that are drawn next is multiplied, the attack's own too; 1 but for a moment. Read
            by probes that are drawn independently (`scale`); others ignore it.
    """

    name: str
    low: float
    high: float
    draw: Callable[[float, int], Tensor]
    integer: bool = False
    value: float | None = None
    stretch: float = 1.0

    def scale(self, own: float) -> float:
        """The scale to draw at, in place of the attack's own."""
        return (own if self.value is None else self.value) * self.stretch


@dataclass(frozen=True, slots=True)
class Query:
    """One request of an attack for one image, each row of which costs one query.

    What an attack makes of rows that were refused depends on the kind: of probes it uses those that were answered; after
    a refused step it stays where it was and goes further next time, not less far; a line search stops at the best point
    that it has; a start is drawn again.

    Args:
        rows: float32 [n,C,H,W] in [0, 1].
        kind: what it is for.
        redraw: `redraw(positions)` draws these rows again from the current proposal: fresh rows [k,C,H,W], which the attack
            takes from then on for what it asked at these positions. None where rows are not random (a line search).
        knobs: the scales from which the rows were drawn.
        groups: n numbers, equal for rows that are of use only together (antithetic pairs); None where each stands alone.
        account: which of the attacker's accounts sends the rows: 0 the one in use, from 1 on others kept beside it (scouts).
    """

    rows: Tensor
    kind: Kind = "probe"
    redraw: Callable[[list[int]], Tensor] | None = None
    knobs: tuple[Knob, ...] = ()
    groups: tuple[int, ...] | None = None
    account: int = 0


class BudgetExhausted(Exception):  # noqa: N818  (a signal, not a fault)
    """Thrown into an attack when its budget is spent: the row after the last one is never sent.

    The rows of the last query that the budget still covered were sent, charged and recorded. The attack may clean up but
    not ask again.
    """


@dataclass(slots=True)
class Task:
    """What the attacker knows about one image.

    Args:
        image: float32 [C,H,W] in [0, 1], on the black box's device.
        label: the true class.
        target: the class to reach, or None for any class but `label`.
        norm: the distance to keep small.
        epsilon: radius of the allowed ball, or None to minimise the distance.
        generator: the image's own random stream, on the black box's device.
        remaining: rows that may still be asked; kept up to date by the loop.
        levels: grey levels that rows are rounded to before the model sees them (256 for 8 bits), or None.
        pool: images [M,C,H,W] and labels [M] that the attacker owns, never the attacked ones, or None.
        stochastic: the same row may be answered differently when it is asked again: one answer is then no proof, and what an
            attack stands on must be asked again from time to time.
        accounts: accounts that the attacker may still open beside the one in use (the loop opens the next when a gate bans
            it), None for any number; kept up to date by the loop.
        start: a row [C,H,W] in [0, 1] that was found elsewhere and may reach the goal, to begin from; or None.
    """

    image: Tensor
    label: int
    target: int | None
    norm: Norm
    epsilon: float | None
    generator: torch.Generator
    remaining: int
    levels: int | None = None
    pool: tuple[Tensor, Tensor] | None = None
    stochastic: bool = False
    accounts: int | None = 0
    start: Tensor | None = None

    def reached(self, answer: Answer) -> Tensor:
        """Which rows reached the goal: bool [n] on the host. A row that was not answered never did."""
        labels = answer.labels
        goal = labels != self.label if self.target is None else labels == self.target
        return goal & (answer.status == ANSWERED)

    def reached_any(self, answer: Answer) -> bool:
        """Whether some row reached the goal; the quick form of `reached` for queries of few rows."""
        for label, status in zip(answer.labels.tolist(), answer.status.tolist(), strict=True):
            if status == ANSWERED and (label != self.label if self.target is None else label == self.target):
                return True
        return False

    def settled(self, answer: Answer) -> bool:
        """Whether a search that gains nothing after a success may end: some row reached the goal, and will again."""
        return not self.stochastic and self.reached_any(answer)


Search = Generator[Query, Answer, None]


class Attack(ABC):
    """A query attack on ONE image: a frozen dataclass of hyper-parameters with one method.

    An attack counts nothing (rows are counted where they pass), keeps no record of its best row (the loop does), prints
    nothing, draws random numbers from `task.generator` only, and never sees the model. It clips to the box where its
    geometry needs it; a row outside the box is an error.

    Class attributes state what it needs: `knowledge` the least it must see (`label` or `score`), `norms` the distances that
    it can keep small, `targeted` whether it can aim at a class, `needs_epsilon` whether it works at a given radius only,
    `knobs` the names of the scales that its queries offer (`Knob`), `takes_start` whether it begins from a point that reaches
    the goal, and so from `task.start` where that does. With an epsilon the loop ends the search at the first
    success inside the ball; a search that returns earlier gives the rest of its budget away.
    """

    name: ClassVar[str]
    knowledge: ClassVar[Literal["label", "score"]] = "label"
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    targeted: ClassVar[bool] = True
    needs_epsilon: ClassVar[bool] = False
    knobs: ClassVar[tuple[str, ...]] = ()
    takes_start: ClassVar[bool] = False

    def options(self) -> dict[str, object]:
        """The hyper-parameters, for the record."""
        return dict(vars(self))

    def check(self, task: Task) -> None:  # noqa: B027  (most attacks have nothing to refuse)
        """Refuse a task that this attack cannot work on; asked before the first query.

        Raises:
            InputError: what is wrong, and what to do.
        """

    @abstractmethod
    def search(self, task: Task) -> Search:
        """Ask queries until the goal is reached as well as it can be; `answer = yield Query(rows)`."""

    @property
    def shares(self) -> bool:
        """Whether the images of a run share what they learn: an image's result then depends on its neighbours."""
        return False

    def searches(self, tasks: Sequence[Task]) -> list[Search]:
        """The searches of one run, one for each task; images that share what they learn meet here."""
        return [self.search(task) for task in tasks]
