"""Randomized smoothing: votes, abstentions, streams, and that no attack flips what is certified."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

import robustbox as rb
from robustbox.boxes import as_black_box
from robustbox.certificates import Certifier
from robustbox.defenses.blacklight import Blacklight
from robustbox.defenses.smoothing import Smoothing, tie
from robustbox.errors import InputError
from robustbox.oracle import Oracle
from robustbox.protocol import ANSWERED, REJECTED, Answer, BlackBox
from tests.toys import Flaky


class Plane(BlackBox):
    """Class 1 where the first value exceeds 1/2; counts its rows."""

    name, classes = "plane", 2

    def __init__(self) -> None:
        self.rows = 0

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.rows += len(rows)
        labels = (rows[:, 0, 0, 0] > 0.5).long()
        return Answer.of(labels, torch.stack([1 - labels, labels], dim=1).float())


def rows(*first: float) -> Tensor:
    return torch.tensor(first).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


ACCOUNTS = torch.tensor([3, 4, 3])


def test_ties_are_those_of_the_binomial_test() -> None:
    first, second = torch.tensor([10, 7, 5, 100, 0, 3]), torch.tensor([0, 3, 5, 60, 0, 2])
    expected = [
        1.0 if not a else binomtest(a, a + b, 0.5).pvalue for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert tie(first, second).tolist() == pytest.approx(expected)


def test_votes_abstentions_and_rows() -> None:
    inner = Plane()
    box = Smoothing(sigma=0.1, n=64, batch=50).wrap(inner, 0)
    answer = box.answer(rows(0.9, 0.5, 0.45), ACCOUNTS)
    assert inner.rows == 3 * 64
    assert answer.labels.tolist()[:2] == [1, -1]
    assert answer.status.tolist()[:2] == [ANSWERED, REJECTED]
    assert answer.scores is not None
    assert answer.scores[0].tolist() == [0, 1]
    assert answer.scores[1].isnan().all()
    always = Smoothing(sigma=0.1, n=64, alpha=None).wrap(Plane(), 0).answer(rows(0.9, 0.5, 0.45), ACCOUNTS)
    assert always.status.tolist() == [ANSWERED] * 3
    assert always.scores is not None
    share = always.scores[2, 1].item()
    assert share == pytest.approx(0.309, abs=0.18)  # P[N(0, 1) > 1/2]
    assert share * 64 == int(share * 64)


def test_an_account_draws_from_its_own_stream_whatever_else_is_asked() -> None:
    together = Smoothing(sigma=0.3, n=20, alpha=None).wrap(Plane(), 1).answer(rows(0.4, 0.6, 0.4), ACCOUNTS)
    box = Smoothing(sigma=0.3, n=20, alpha=None).wrap(Plane(), 1)
    alone = [box.answer(rows(value), torch.tensor([3])).scores for value in (0.4, 0.4)]
    assert together.scores is not None
    assert alone[0] is not None
    assert alone[1] is not None
    assert torch.equal(together.scores[[0, 2]], torch.cat([alone[0], alone[1]]))
    assert not torch.equal(alone[0], alone[1])  # fresh for every query


def test_copies_travel_on_the_grid_of_the_model_behind() -> None:
    class Eight(Plane):
        levels = 3

        def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
            assert set(rows.unique().tolist()) <= {0, 0.5, 1}
            return super().answer(rows, accounts)

    Smoothing(sigma=1.0, n=40).wrap(Eight(), 0).answer(rows(0.5), torch.tensor([0]))


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"n": 0}, {"batch": 0}, {"alpha": 1.0}, {"sigma": float("nan")}])
def test_numbers_that_mean_nothing(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="smoothing"):
        Smoothing(**wrong)


def test_no_attack_flips_a_certified_image_within_its_radius() -> None:
    """An attack on the smoothed model within R finds nothing that holds; nor do directions in which f itself breaks, put to
    a fresh vote R away. Far beyond R the vote does change: it is not blind.
    """
    model = rb.load_model("digits-cnn")
    images, labels = (part[:3] for part in rb.load_data("digits")[:2])
    certifier, oracle = Certifier(sigma=0.25, n0=50, n=1000), Oracle(as_black_box(model))
    found = [certifier.certify(oracle, image) for image in images]
    assert [c.predicted for c in found] == labels.tolist()
    least = min(c.radius for c in found)
    ball = {"norm": "l2", "epsilon": least, "budget": 40, "seed": 1, "max_rows": 8}
    smoothed = rb.run_attack(
        model, images, labels, attack="square", defense=Smoothing(sigma=0.25, n=25, alpha=None), **ball
    )
    assert not smoothed.success_fresh.any()
    broken = rb.run_attack(model, images, labels, attack="cgba", budget=150, seed=1)
    assert broken.success.all()
    revote = Smoothing(sigma=0.25, n=1500, alpha=None).wrap(as_black_box(model), seed=77)
    account = torch.tensor([0])
    for image, label, certificate, adversarial in zip(images, labels, found, broken.adversarials, strict=True):
        direction = (adversarial - image) / (adversarial - image).norm()
        for sign in (1, -1):
            inside = image + sign * 0.999 * certificate.radius * direction
            assert revote.answer(inside[None], account).labels == label
        assert revote.answer((image + 6 * direction)[None], account).labels != label


class FlakyPlane(Flaky, Plane):
    """A plane that fails."""


@pytest.mark.parametrize("failing", [{1}, {2}, {3}, {4}, {6}, {9}, {2, 3, 5, 6}])
def test_a_gate_behind_sees_each_copy_of_a_row_that_is_sent_again_once(failing: set[int]) -> None:
    """Three rows of two accounts, six copies each in passes of two; the pass is sent again until it is answered."""
    sent = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    told = []
    for passes in (set(), failing):
        inner = FlakyPlane(passes)
        gate = Blacklight(action="ban").wrap(inner, 0)
        box, found = Smoothing(sigma=0.5, n=6, batch=2, alpha=None).wrap(gate, 0), []
        for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):  # in one pass, and others in two
            for part in parts:
                for _ in range(1 + len(passes)):
                    try:
                        found.append(box.answer(sent[part] * (0.9 if len(parts) > 1 else 1), ACCOUNTS[part]).scores)
                        break
                    except rb.ModelError:
                        pass
        told.append((torch.cat([scores for scores in found if scores is not None]), inner.rows))
        assert gate.statistics()["hits"] == 0
    assert torch.equal(told[0][0], told[1][0])
    assert told[0][1] == told[1][1] == 6 * 6


def test_another_row_than_the_one_that_failed_is_voted_on_anew() -> None:
    box = Smoothing(sigma=0.5, n=6, batch=2, alpha=None).wrap(FlakyPlane({2}), 0)
    with pytest.raises(rb.ModelError):
        box.answer(rows(0.1), ACCOUNTS[:1])
    calm = Smoothing(sigma=0.5, n=6, batch=2, alpha=None).wrap(Plane(), 0)
    for value in (0.9, 0.1):
        found, wanted = (each.answer(rows(value), ACCOUNTS[:1]).scores for each in (box, calm))
        assert found is not None
        assert wanted is not None
        assert torch.equal(found, wanted)
