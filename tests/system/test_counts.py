"""The promise of the project on a real network: a forward hook sees exactly the rows that the ledgers report."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from robustbox import AttackResult, load_data, load_model, run_attack
from robustbox.protocol import Answer, BlackBox
from tests.toys import HalfSpace

ATTACKS = {
    "cgba": {},
    "cgba-h": {},
    "random": {},
    "foolbox:HopSkipJumpAttack": {},
    "foolbox:BoundaryAttack": {},
    "foolbox:LinearSearchBlendedUniformNoiseAttack": {},
}


class Hooked:
    """A model and the number of rows that went through it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.rows = model, 0
        self.handle = model.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.rows += len(inputs[0])


@pytest.fixture(scope="module")
def digits() -> Iterator[Hooked]:
    hooked = Hooked(load_model("digits-cnn"))
    yield hooked
    hooked.handle.remove()


def some_digits(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Eight digits that are classified correctly, and one that is said to be another."""
    images, labels = load_data("digits")[:2]
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    images, labels = images[right][:9], labels[right][:9].clone()
    labels[4] = (labels[4] + 1) % 10
    return images, labels


@pytest.mark.parametrize("budget", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_model_sees_exactly_the_rows_of_the_ledgers(digits: Hooked, attack: str, budget: int) -> None:
    images, labels = some_digits(digits.model)
    for epsilon in (None, 2.5):  # with an epsilon some images succeed at once, and some never
        before = digits.rows
        result = run_attack(digits.model, images, labels, attack, epsilon=epsilon, budget=budget)
        assert digits.rows - before == sum(result.ledger.values())
        assert result.ledger["verify"] == 9 + result.success_any.sum()
        assert result.queries.sum() == result.ledger["attack"]
        assert (result.queries <= budget).all()
        assert result.queries[4] == 0
        assert result.stop_reasons[4] == "misclassified"
        assert result.errors == [None] * 9
        _consistent(result, epsilon)


def _consistent(result: AttackResult, epsilon: float | None) -> None:
    for i, trace in enumerate(result.traces):
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(trace))
        assert not trace or trace[-1][0] <= result.queries[i]
        assert bool(result.success[i]) == (not result.adversarials[i].isnan().any())
        assert (result.first_success[i] > 0) == result.success_any[i]
    if epsilon is None:
        assert (result.success_fresh == result.success_any).all()


class RowWise(BlackBox):
    """A network that answers each row by itself: no rounding depends on the batch."""

    name, classes, scores, input_shape = "row-wise", 10, "logit", (1, 8, 8)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        logits = torch.cat([self.model(row[None]) for row in rows])
        return Answer.of(logits.argmax(1), logits)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_real_attack_is_independent_of_its_company(digits: Hooked, attack: str) -> None:
    images, labels = load_data("digits")[:2]
    chosen = {"attack": attack, "budget": 150}
    alone = {i: run_attack(RowWise(digits.model), images[i : i + 1], labels[i : i + 1], **chosen) for i in (0, 5, 7)}
    for n, fused in ((8, "auto"), (64 if attack.startswith("cgba") else 8, 13)):
        result = run_attack(RowWise(digits.model), images[:n], labels[:n], max_rows=fused, **chosen)
        for i, single in alone.items():
            assert result.traces[i] == single.traces[0]
            assert result.queries[i] == single.queries[0]
            assert torch.equal(result.adversarials[i].nan_to_num(), single.adversarials[0].nan_to_num())


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("image", ["black", "white", "grey"])
def test_flat_images_and_a_model_that_never_changes_end_without_a_hang(attack: str, image: str) -> None:
    class Never(HalfSpace):
        def of(self, rows: Tensor) -> Answer:
            assert not rows.isnan().any()
            return Answer.of(torch.zeros(len(rows), dtype=torch.int64), torch.tensor([[1.0, 0.0]]).repeat(len(rows), 1))

    flat = torch.full((1, 1, 8, 8), {"black": 0.0, "white": 1.0, "grey": 0.5}[image])
    result = run_attack(Never(), flat, [0], attack, budget=300)
    assert not result.success.any()
    assert result.queries[0] <= 300
    if attack.startswith("cgba") and image != "white":  # the half-space calls bright images class 1 already
        assert run_attack(HalfSpace(), flat, [0], attack, budget=300).success.all()
