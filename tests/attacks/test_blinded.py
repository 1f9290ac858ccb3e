"""Blinding and abort: what is sent, what is told, what is booked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.abort import Abort
from robustbox.attacks.blinded import Blinded
from robustbox.attacks.wrapper import wrapped
from robustbox.errors import InputError
from robustbox.inputs import resolve_attack
from robustbox.protocol import REJECTED, Answer
from tests.attacks.analytic import drive, task
from tests.attacks.gates import Prober
from tests.attacks.table import Plane
from tests.toys import HalfSpace
from tests.toys import images as half_space_images


def ways(row: Tensor, shift: int, flip: bool) -> list[Tensor]:
    """All shifted and mirrored copies of a row [C,H,W], itself left out."""
    steps = range(-shift, shift + 1)
    mirrored = [row, row.flip(2)] if flip else [row]
    copies = [torch.roll(one, (dy, dx), (1, 2)) for one in mirrored for dy in steps for dx in steps]
    return [copy for copy in copies if not torch.equal(copy, row)]


@pytest.mark.parametrize(("shift", "flip"), [(1, False), (1, True), (2, True)])
def test_every_row_is_sent_shifted_and_told_as_its_own(shift: int, flip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Tensor, Answer]] = []
    monkeypatch.setattr("robustbox.registry.load", lambda kind, name: Prober)
    attack = wrapped(Blinded, "blinded", "prober")(shift=shift, flip=flip, told=told, size=40)
    of = task(torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0)) / 2 + 0.25, budget=400)
    sent: list[Tensor] = []

    def answers(rows: Tensor) -> Tensor:
        sent.append(rows)
        return torch.zeros(len(rows)).long()

    drive(attack.search(of), of, answers)
    used = set()
    for (rows, _), got in zip(told, sent[1:], strict=False):
        for row, shifted in zip(rows, got, strict=True):
            matches = [k for k, copy in enumerate(ways(row, shift, flip)) if torch.equal(copy, shifted)]
            assert len(matches) == 1
            used.add(matches[0])
    assert len(used) == (2 * shift + 1) ** 2 * (1 + flip) - 1  # every way was used


def test_what_counts_is_the_row_itself() -> None:
    """A half-space by the mean does not see shifts: the attack comes as near as without, by rows that were confirmed."""
    found = run_attack(HalfSpace(), half_space_images(2), [0, 0], "blinded:cgba", budget=1000)
    plain = run_attack(HalfSpace(), half_space_images(2), [0, 0], "cgba", budget=1000)
    assert (found.distance < 1.3 * plain.distance).all()
    inside = run_attack(HalfSpace(), half_space_images(2), [0, 0], "blinded:cgba", budget=1000, epsilon=3.5)
    assert inside.success.all()


@pytest.mark.parametrize("refused", [False, True])
def test_where_the_row_itself_was_answered_that_is_told(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All shifted rows reach the goal; of the rows themselves only the third that is asked does, unless it is refused."""
    told: list[tuple[Tensor, Answer]] = []
    monkeypatch.setattr("robustbox.registry.load", lambda kind, name: Prober)
    of, sent = task(torch.full((3, 6, 7), 0.5), budget=100), list[Tensor]()

    def answers(rows: Tensor) -> Answer:
        sent.append(rows)
        asked = len(sent) - 4  # after the first row, shifted and itself, and five rows shifted
        labels, status = torch.tensor([int(len(rows) > 1 or asked in (-3, 2))] * len(rows)), torch.zeros(len(rows))
        if refused and asked == 2:
            status[0] = REJECTED
        return Answer(labels, None, status.to(torch.uint8))

    search = wrapped(Blinded, "blinded", "prober")(told=told, size=5).search(of)
    drive(search, of, answers)
    rows, answer = told[0]
    assert [len(part) for part in sent[:6]] == [1, 1, 5, 1, 1, 1]
    near = (rows - of.image).flatten(1).norm(dim=1).argsort()
    assert torch.equal(torch.cat(sent[3:6]), rows[near[:3]])
    assert answer.labels[near].tolist() == [0, 0, 1, 1, 1]
    assert not answer.status.any()


@pytest.mark.parametrize("name", ["one-pixel-fast", "pixel-exhaustive", "random-pixels"])
def test_no_search_ends_with_a_success_of_a_shifted_row_alone(name: str) -> None:
    """A dark pixel decides, and every shift brings a bright one to its place: what holds is found as without shifts."""
    image = torch.full((1, 1, 8, 8), 0.8)
    image[..., 3, 5] = 0.0

    def model(rows: Tensor) -> Tensor:
        return torch.stack((-rows[:, 0, 3, 5], rows[:, 0, 3, 5] - 0.8), dim=1)

    found = run_attack(model, image, [0], f"blinded:{name}", norm="l0", epsilon=1, budget=400)
    assert found.success.all()


def test_a_refused_row_is_drawn_again_with_another_shift() -> None:
    attack = resolve_attack("blinded:random", {"batch": 5})
    of = task(torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0)), budget=100)
    query = next(attack.search(of))
    assert query.redraw is not None
    first, again = query.rows[[1, 3]], query.redraw([1, 3])
    assert not torch.equal(first, again)
    for old, new in zip(first, again, strict=True):
        assert torch.allclose(old.flatten().sort().values, new.flatten().sort().values)


@pytest.mark.parametrize(("number", "size"), [(1, 5), (7, 5), (12, 30)])
def test_abort_sends_nothing_after_the_first_refusal(number: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustbox.registry.load", lambda kind, name: Prober)
    attack = wrapped(Abort, "abort", "prober")(size=size)
    sent: list[Tensor] = []

    def answers(rows: Tensor) -> Answer:
        sent.extend(rows)
        status = torch.full((len(rows),), REJECTED if len(sent) == number else 0, dtype=torch.uint8)
        return Answer(torch.zeros(len(rows)).long(), None, status)

    of = task(torch.full((1, 6, 6), 0.5), budget=500)
    drive(attack.search(of), of, answers)
    assert len(sent) == number


def test_abort_without_refusals_is_the_attack() -> None:
    rows = []
    for name in ("cgba", "abort:cgba"):
        attack, box = resolve_attack(name, {}), Plane()
        of = task(torch.full((3, 8, 8), 0.5), budget=200)
        drive(attack.search(of), of, lambda sent, box=box: box.answer(sent, torch.zeros(len(sent))).labels)
        rows.append(box.rows)
    n = min(map(len, rows))
    assert n > 120
    assert torch.equal(rows[0][:n], rows[1][:n])


def test_bad_options_are_refused_in_one_line() -> None:
    for options, message in [({"shift": 0}, "shift must be at least 1, got 0"), ({"gain": 1.0}, "gain must be")]:
        with pytest.raises(InputError, match=message):
            resolve_attack("blinded:cgba", options)
