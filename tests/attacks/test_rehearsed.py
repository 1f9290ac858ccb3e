"""Rehearsal: nothing that a gate without a secret would refuse is sent, and nothing is asked to find that out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from robustbox import registry, run_attack
from robustbox.attacks.rehearsed import Copy, Rehearsed
from robustbox.attacks.subspaces import enlarge
from robustbox.attacks.wrapper import relayed, wrapped
from robustbox.defenses.gate import StatefulDefense
from robustbox.defenses.memory import Memory, Verdict
from robustbox.defenses.piha import PIHA
from robustbox.errors import InputError
from robustbox.inputs import resolve_attack
from robustbox.protocol import Answer, Query
from tests.attacks.analytic import drive, task
from tests.attacks.gates import Prober
from tests.attacks.table import AWAY, Plane, images
from tests.toys import HalfSpace


@dataclass(frozen=True, kw_only=True)
class Apart(StatefulDefense):
    """A gate without a secret: refuses rows within `spacing` (l2) of an earlier one, forgets what it refused."""

    name: ClassVar[str] = "apart"

    store_rejected: bool = False
    spacing: float = 0.3

    def secret(self, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        """None."""

    def prints(self, rows: Tensor, secrets: Sequence[None]) -> list[Tensor]:
        return [*rows.clone()]

    def memory(self, secret: None) -> Memory:
        return Rows(self.spacing)


@dataclass(frozen=True, kw_only=True)
class Never(Apart):
    """Takes all rows for one another."""

    spacing: float = 100.0


class Turns(Apart):
    """Takes a row for the one before it only."""

    def memory(self, secret: None) -> Memory:
        return Newest(self.spacing)


class Rows(Memory):
    """All rows, for their distances."""

    nbytes = 0

    def __init__(self, spacing: float) -> None:
        self._spacing, self.rows = spacing, list[Tensor]()

    def judge(self, print: Tensor) -> Verdict:
        return Verdict(any(float(torch.dist(print, other)) < self._spacing for other in self.rows), -1)

    def store(self, print: Tensor, verdict: Verdict) -> int:
        self.rows.append(print)
        return len(self.rows) - 1

    def forget(self, before: int) -> None:
        raise NotImplementedError

    @property
    def stored(self) -> int:
        return len(self.rows)


class Newest(Rows):
    """All rows, for the distance of the last one."""

    def judge(self, print: Tensor) -> Verdict:
        return Verdict(any(float(torch.dist(print, other)) < self._spacing for other in self.rows[-1:]), -1)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gates above and `Prober` by name."""
    load = registry.load

    def found(kind: str, name: str) -> Any:
        known = {"apart": Apart, "never": Never, "turns": Turns, "prober": Prober}
        return known[name] if name in known else load(kind, name)

    monkeypatch.setattr(registry, "load", found)


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("name", ["hop-skip-jump", "cgba"])
def test_a_gate_without_a_secret_refuses_nothing(name: str, levels: int | None) -> None:
    plain = run_attack(Apart().wrap(Plane(), 0), images(2), [0, 0], name, budget=400, levels=levels)
    assert plain.rejected.min() > 100
    options = {"gate": "apart"}
    found = run_attack(
        Apart().wrap(Plane(), 0),
        images(2),
        [0, 0],
        f"rehearsed:{name}",
        budget=400,
        levels=levels,
        attack_options=options,
    )
    assert not found.rejected.any()
    assert (found.queries == 400).all()
    assert (found.distance < 2 * AWAY).all()  # as OARS behind a gate of this kind, test_oars.py
    assert (found.distance < plain.distance).all()


def test_nor_does_piha() -> None:
    """Flat fields of colour, whose hues noise hardly moves, l2 1.66 from the half-space."""
    fields = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(3)) / 2
    image = enlarge(fields - fields.mean() + 0.5, (32, 32))
    refused = {}
    for name in ("cgba", "rehearsed:cgba"):
        found = run_attack(PIHA().wrap(HalfSpace(0.53), 5), image, [0], name, budget=150)
        refused[name] = int(found.rejected[0])
    assert refused["cgba"] > 50
    assert refused["rehearsed:cgba"] == 0


@pytest.mark.usefixtures("public")
def test_rows_are_drawn_again_with_their_pair_and_told_as_they_were_sent() -> None:
    """Prober checks that both of a pair are drawn; what it was told of must be what was sent."""
    told: list[tuple[Tensor, Answer]] = []
    attack = wrapped(Rehearsed, "rehearsed", "prober")(gate="apart", pairs=True, told=told, size=20)
    of, sent, gate = task(images(1)[0], budget=201), list[Tensor](), Apart().wrap(Plane(), 0)

    def answers(rows: Tensor) -> Tensor:
        answer = gate.answer(rows, torch.zeros(len(rows), dtype=torch.long))
        assert not answer.status.any()
        sent.append(rows)
        return answer.labels

    drive(attack.search(of), of, answers)
    assert len(told) >= 9
    for (rows, _), got in zip(told, sent[1:], strict=False):
        assert torch.equal(rows, got)
        assert torch.allclose(got[::2] + got[1::2], 2 * of.image.expand_as(got[::2]), atol=1e-6)
    lengths = [float(torch.linalg.vector_norm(rows - of.image, dim=(1, 2, 3)).mean()) for rows in sent[2:]]
    assert all(0.2 < length < 0.5 for length in lengths), lengths  # neither the attack's own 0.02 nor far too long


@pytest.mark.usefixtures("public")
def test_where_nothing_is_refused_it_is_the_attack() -> None:
    rows = []
    for radius, scheme in ((0.9, "prober"), (0.9, "rehearsed:prober")):
        options: dict[str, Any] = {"radius": radius, "size": 10}
        attack = Prober(**options) if scheme == "prober" else wrapped(Rehearsed, "rehearsed", "prober")(**options)
        if isinstance(attack, Rehearsed):
            object.__setattr__(attack, "gate", "apart")
        of, box = task(images(1)[0], budget=100), Plane()
        drive(attack.search(of), of, lambda sent, box=box: box.answer(sent, torch.zeros(len(sent))).labels)
        rows.append(box.rows)
    assert torch.equal(rows[0], rows[1])


@pytest.mark.usefixtures("public")
def test_company_changes_nothing() -> None:
    many, alone = (
        run_attack(
            Apart().wrap(Plane(), 0),
            part,
            [0] * len(part),
            "rehearsed:cgba",
            budget=150,
            max_rows=16,
            attack_options={"gate": "apart"},
        )
        for part in (images(3), images(3)[2:])
    )
    assert many.traces[2] == alone.traces[0]


def test_the_copy_of_a_silent_gate_tells() -> None:
    """`osd` answers what it notes and then forgets; the copy refuses it, and does not."""
    attack = resolve_attack("rehearsed:random", {"gate": "osd"})
    assert isinstance(attack, Rehearsed)
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    copy = Copy(attack, task(image))
    same = image.expand(60, -1, -1, -1)
    assert copy.refused(same, [(i,) for i in range(60)]) == [(i,) for i in range(50, 60)]


@pytest.mark.usefixtures("public")
def test_what_the_copy_never_lets_pass_is_sent_as_it_is() -> None:
    """A gate that takes all rows for one another ends no search: they are paid, and refused."""
    options = {"gate": "never", "attempts": 3}
    box = Never().wrap(Plane(), 0)
    found = run_attack(box, images(1), [0], "rehearsed:random", budget=60, attack_options=options)
    assert found.queries[0] == 60
    assert found.rejected[0] >= 58


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("attempts", [1, 60])
@pytest.mark.parametrize("pairs", [False, True])
def test_the_copy_remembers_what_was_sent_and_nothing_else(pairs: bool, attempts: int) -> None:
    """Also what is sent though the copy refuses it."""
    attack = wrapped(Rehearsed, "rehearsed", "prober")(gate="apart", pairs=pairs, size=20, attempts=attempts)
    of, sent, hits = task(images(1)[0], budget=101), list[Tensor](), list[bool]()
    copy = Copy(attack, of)

    def answers(rows: Tensor) -> Tensor:
        for row in rows:
            hits.append(any(float(torch.dist(row, other)) < 0.3 for other in sent))
            sent.append(row)
        return torch.zeros(len(rows), dtype=torch.long)

    drive(relayed(attack.inner().search(of), copy.ask), of, answers)
    memory = copy.history.memory
    assert isinstance(memory, Rows)
    kept = memory.rows[: len(sent)]  # then the query that was cut
    assert len(sent) == 101
    assert {row.numpy().tobytes() for row in kept} == {row.numpy().tobytes() for row in sent}
    assert any(hits) == (attempts == 1)


@pytest.mark.usefixtures("public")
def test_the_copy_remembers_no_half_of_a_pair_that_is_drawn_again() -> None:
    """In the first pair the second row is refused for the first one, in the second for what was sent before."""
    attack = resolve_attack("rehearsed:random", {"gate": "apart"})
    assert isinstance(attack, Rehearsed)
    image = images(1)[0]
    copy, levels = Copy(attack, task(image)), iter(torch.linspace(0.6, 1, 8))
    assert not copy.refused(image[None], [(0,)])

    def redraw(positions: list[int]) -> Tensor:
        return torch.stack([torch.full_like(image, float(next(levels))) for _ in positions])

    black = torch.zeros_like(image)
    rows = torch.stack([black, black + 0.01, black + 0.1, image + 0.001])
    sent = next(copy.ask(Query(rows, "probe", redraw, groups=(0, 0, 1, 1)))).rows
    memory = copy.history.memory
    assert isinstance(memory, Rows)
    assert torch.equal(torch.stack(memory.rows), torch.cat([image[None], sent]))


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("pairs", [False, True])
def test_rows_are_sent_in_the_order_in_which_the_copy_took_them(pairs: bool) -> None:
    """A gate that judges a row by the one before it refuses none of what the copy let pass; answers go where they belong."""
    attack = resolve_attack("rehearsed:random", {"gate": "turns"})
    assert isinstance(attack, Rehearsed)
    image = torch.zeros(3, 8, 8)
    copy, box = Copy(attack, task(image)), Turns().wrap(Plane(), 0)
    levels = [0.1, 0.1, 0.9, 0.5] if pairs else [0.1, 0.1, 0.9]  # pairs: the middle two, together
    fresh = iter([0.1, 0.2, 0.7] if pairs else [0.1, 0.3])
    drawn = list[list[int]]()

    def redraw(positions: list[int]) -> Tensor:
        drawn.append(positions)
        return torch.stack([torch.full_like(image, next(fresh)) for _ in positions])

    rows = torch.stack([torch.full_like(image, level) for level in levels])
    query = Query(rows, "probe", redraw, groups=(0, 1, 1, 2) if pairs else None)
    asking = copy.ask(query)
    sent = next(asking)
    assert sent.rows[:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.5, 0.1, 0.2] if pairs else [0.1, 0.9, 0.1])
    assert sent.groups == ((0, 2, 1, 1) if pairs else None)
    assert not box.answer(sent.rows, torch.zeros(len(rows))).status.any()
    assert sent.redraw is not None
    again = sent.redraw([1])
    assert float(again[0, 0, 0, 0]) == pytest.approx(0.7 if pairs else 0.3)
    assert drawn[-1] == ([3] if pairs else [2])  # where the attack knows the row that was sent second
    with pytest.raises(StopIteration) as told:
        asking.send(Answer.of(torch.arange(len(rows))))
    assert told.value.value.labels.tolist() == ([0, 2, 3, 1] if pairs else [0, 2, 1])


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("name", ["one-pixel-fast", "pixel-exhaustive"])
def test_in_l0_rows_are_sent_as_they_are(name: str) -> None:
    """The copy refuses them all; noise would change every pixel, so that none would lie in the ball."""
    rows = []
    for attack, options in ((name, {}), (f"rehearsed:{name}", {"gate": "never"})):
        box = Plane()
        run_attack(box, images(1), [0], attack, norm="l0", epsilon=2, budget=150, attack_options=options)
        rows.append(box.rows)
    assert len(rows[0]) > 100
    assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "pihaa"}, "piha"),
        ({"gate": "jpeg"}, "jpeg is no stateful gate"),
        ({"accept": 1.0}, "accept must be between 0 and 1, got 1.0"),
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_before_a_query(options: dict[str, object], message: str) -> None:
    box = Plane()
    with pytest.raises(InputError, match=message):
        run_attack(box, images(1), [0], "rehearsed:cgba", budget=50, attack_options=options)
    assert not box.seen


def test_images_that_the_gate_does_not_take_are_refused_before_a_query() -> None:
    box = HalfSpace()
    with pytest.raises(InputError, match="images of 1 channels have no hue"):
        run_attack(box, torch.full((1, 1, 32, 32), 0.5), [0], "rehearsed:cgba", budget=50)
    assert not box.seen
