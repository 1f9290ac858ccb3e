"""foolbox's attacks through our oracle, on a model whose adversarials are known: just outside a ball of radius R."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import foolbox.attacks
import numpy as np
import pytest
import torch
from foolbox.attacks.base import Attack as FoolboxAttack
from torch import Tensor

import robustbox as rb
from robustbox import registry
from robustbox.attacks.foreign import NUMPY_ATTACKS, QUERY_ATTACKS
from robustbox.attacks.foreign_model import ForeignModel
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, BlackBox, Task

R = 0.5
BUDGETS, WHOLE = (1, 2, 7, 100), 600


class Balls(BlackBox):
    """Class 0 within R (l2) of an image, class 1 outside, class 2 never; remembers what every account asked."""

    classes = 3
    scores = "probability"

    def __init__(self, images: Tensor, every_other_rejected: bool = False) -> None:
        self.images, self.every_other_rejected = images.double(), every_other_rejected
        self.input_shape = tuple(images.shape[1:])
        self.transcripts: dict[int, list[Tensor]] = {}

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        margin = 8 * (torch.cdist(rows.double().flatten(1), self.images.flatten(1)).amin(dim=1) - R)
        answer = Answer.of((margin > 0).long(), torch.stack((-margin, margin, margin - 20), dim=1).softmax(dim=1))
        for k, account in enumerate(accounts.tolist()):
            asked = self.transcripts.setdefault(account, [])
            asked.append(rows[k].clone())
            if self.every_other_rejected and len(asked) % 2 == 0:
                answer.labels[k], answer.status[k] = -1, REJECTED
        return answer

    @property
    def seen(self) -> int:
        return sum(map(len, self.transcripts.values()))


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(7)) * 0.6 + 0.2


@dataclass
class Case:
    """One foolbox class; `factor` bounds its distance over the optimum R, or over R in l2 whatever the norm."""

    name: str
    norm: str = "l2"
    options: dict[str, Any] = field(default_factory=dict)
    epsilon: float | None = None
    target: int | None = None
    factor: float = np.inf

    def run(self, box: Balls, x: Tensor, budget: int, **more: Any) -> rb.AttackResult:
        return rb.run_attack(
            box,
            x,
            [0] * len(x),
            f"foolbox:{self.name}",
            self.norm,
            self.epsilon,
            self.target,
            budget,
            attack_options=self.options,
            **more,
        )


REPEATS = {"repeats": 20}
CASES = [
    Case("HopSkipJumpAttack", "l2", {"steps": 3, "initial_gradient_eval_steps": 20}, factor=1.01),
    Case("HopSkipJumpAttack", "linf", {"steps": 1, "initial_gradient_eval_steps": 9, "stepsize_search": "grid_search"}),
    Case("BoundaryAttack", "l2", {"steps": 80}, factor=1.3),
    Case("BoundaryAttack", "l2", {"init_attack": "BinarySearchContrastReductionAttack"}, epsilon=R * 1.01, factor=1.01),
    Case("PointwiseAttack", "l0", {"init_attack": "LinearSearchBlendedUniformNoiseAttack", "l2_binary_search": False}),
    Case("PointwiseAttack", "l2", {"init_attack": "LinearSearchBlendedUniformNoiseAttack"}, epsilon=1.0, factor=2),
    Case("SaltAndPepperNoiseAttack", "l2", {"steps": 60}, factor=2.5),
    Case("LinearSearchBlendedUniformNoiseAttack", "l2", {"steps": 50}, factor=1.2),
    Case("LinearSearchContrastReductionAttack", "linf", {"steps": 200, "target": 0.0}),
    Case("BinarySearchContrastReductionAttack", "l2", {"target": 0.0}, factor=1.001),
    Case("GaussianBlurAttack", "l2", {"steps": 100}, factor=1.1),
    Case("SpatialAttack", "l2", {"grid_search": False, "random_steps": 5}),
    Case("InversionAttack", "linf"),
    Case("L2ContrastReductionAttack", "l2", {"target": 0.0}, epsilon=R + 0.01, factor=1.03),
    Case("L2AdditiveGaussianNoiseAttack", "l2", epsilon=R + 0.1, factor=1.21),
    Case("L2AdditiveUniformNoiseAttack", "l2", epsilon=R + 0.1, factor=1.21),
    Case("L2ClippingAwareAdditiveGaussianNoiseAttack", "l2", epsilon=R + 0.01, factor=1.03),
    Case("L2ClippingAwareAdditiveUniformNoiseAttack", "l2", epsilon=R + 0.01, factor=1.03),
    Case("LinfAdditiveUniformNoiseAttack", "linf", epsilon=0.4),
    Case("L2RepeatedAdditiveGaussianNoiseAttack", "l2", REPEATS, epsilon=R + 0.1, factor=1.21),
    Case("L2RepeatedAdditiveUniformNoiseAttack", "l2", REPEATS, epsilon=R + 0.1, factor=1.21),
    Case("L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack", "l2", REPEATS, epsilon=R + 0.01, factor=1.03),
    Case("L2ClippingAwareRepeatedAdditiveUniformNoiseAttack", "l2", REPEATS, epsilon=R + 0.01, factor=1.03),
    Case("LinfRepeatedAdditiveUniformNoiseAttack", "linf", REPEATS, epsilon=0.4),
    Case("GenAttack", "linf", {"population": 4, "steps": 30}, epsilon=0.2, target=1),
]


def asked(box: Balls, n: int) -> list[list[Tensor]]:
    """What each image's attacker asked: accounts appear in image order, after those of the clean check."""
    return list(box.transcripts.values())[n : 2 * n]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture(autouse=True)
def leaves_no_trace() -> Any:
    """No thread outlives a run, and the user's random state is untouched, down to numpy's cached second Gaussian."""
    torch.manual_seed(5), np.random.seed(5), np.random.randn(1)
    threads, of_torch, of_numpy = threading.active_count(), torch.get_rng_state(), np.random.get_state()
    yield
    assert threading.active_count() == threads
    assert torch.equal(torch.get_rng_state(), of_torch)
    assert all(np.array_equal(now, before) for now, before in zip(np.random.get_state(), of_numpy, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.norm}")
def test_budget_count_success_and_independence(case: Case) -> None:
    x = images()
    full = Balls(x)
    result = case.run(full, x, WHOLE)
    transcripts = asked(full, len(x))
    assert result.errors == [None] * len(x)
    assert result.success.all()
    far = torch.linalg.vector_norm((result.adversarials - x).flatten(1).double(), dim=1)
    assert (far > R).all()
    assert (far <= case.factor * R).all()
    assert result.queries.tolist() == [len(rows) for rows in transcripts]
    assert full.seen == sum(result.ledger.values())

    for budget in BUDGETS:  # the same attack, cut off exactly there
        box = Balls(x)
        cut = case.run(box, x, budget)
        assert cut.queries.tolist() == [min(budget, len(rows)) for rows in transcripts]
        assert cut.ledger["attack"] == cut.queries.sum()
        assert box.seen == sum(cut.ledger.values())
        assert all(same(rows, whole[:budget]) for rows, whole in zip(asked(box, len(x)), transcripts, strict=True))

    alone = Balls(x)
    case.run(alone, x[2:3], WHOLE, max_rows=3)
    assert same(asked(alone, 1)[0], transcripts[2])


def concrete() -> dict[str, type[FoolboxAttack]]:
    classes = inspect.getmembers(foolbox.attacks, inspect.isclass)
    return {
        name: found for name, found in classes if issubclass(found, FoolboxAttack) and not inspect.isabstract(found)
    }


def sources(found: type[FoolboxAttack]) -> str:
    modules = {inspect.getmodule(base) for base in found.__mro__ if base.__module__.startswith("foolbox.")}
    return "".join(inspect.getsource(module) for module in modules if module)


def test_every_gradient_free_class_is_served() -> None:
    """foolbox's attacks are ours, or DatasetAttack, or take gradients; those that draw from numpy are known."""
    classes = concrete()
    assert set(QUERY_ATTACKS) <= set(classes)
    assert {case.name for case in CASES} | {"BinarizationRefinementAttack"} == set(QUERY_ATTACKS)
    for name in classes.keys() - QUERY_ATTACKS.keys() - {"DatasetAttack"}:
        assert "and_grad" in sources(classes[name])
    for name in QUERY_ATTACKS:
        assert "and_grad" not in sources(classes[name])
        assert ("np.random." in sources(classes[name])) == (name in NUMPY_ATTACKS)


class Binary(Balls):
    """Sees pixels above one half only: class 0 where they are the image's own, else class 1."""

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        answer = super().answer(rows, accounts)
        own = (rows >= 0.5).flatten(1)[:, None].eq((self.images >= 0.5).flatten(1)).all(dim=2).any(dim=1)
        return Answer.of((~own).long(), answer.scores)


def test_binarization_refinement_moves_no_pixel_further_than_the_threshold() -> None:
    x = images(2)
    result = Case("BinarizationRefinementAttack", "linf").run(Binary(x), x, 100)
    assert result.success.all()
    moved = result.adversarials != x
    assert (result.adversarials[moved] - 0.5).abs().max() < 1e-6
    assert result.errors == [None, None]


def targeted(x: Tensor, n: int = 3) -> tuple[Tensor, list[int]]:
    return torch.cat([1 - x[:1], torch.zeros(n, *x.shape[1:])]), [1, *[0] * n]


@pytest.mark.parametrize("name", ["HopSkipJumpAttack", "BoundaryAttack"])
def test_targeted_starts_come_from_the_pool(name: str) -> None:
    x = images(2)
    box = Balls(x)
    result = Case(name, "l2", {"steps": 3}, target=1).run(box, x, 300, pool=targeted(x))
    assert result.success.all()
    assert torch.equal(asked(box, 2)[1][0], 1 - x[0])
    unreachable = Case(name, "l2", {"steps": 3}, target=2).run(Balls(x), x, 300, pool=targeted(x))
    assert not unreachable.success.any()
    assert (unreachable.queries < 300).all()  # no start of class 2: nothing more to ask


def test_a_rejected_row_reads_as_a_failure() -> None:
    """With every second row rejected, a linear search in steps of 1/50 finds its first success among the even steps."""
    x = images(2)
    result = Case("LinearSearchContrastReductionAttack", "l2", {"steps": 50, "target": 0.0}).run(
        Balls(x, every_other_rejected=True), x, 100
    )
    size = torch.linalg.vector_norm(x.flatten(1), dim=1).double()
    steps = 2 * (25 * R / size).ceil()
    np.testing.assert_allclose(result.distance, steps / 50 * size, rtol=1e-5)
    assert result.queries.tolist() == (steps + 2).tolist()  # steps from 0 on, and foolbox's last check


def test_genattack_reads_probabilities_and_logits_alike() -> None:
    """Probabilities reach foolbox as logarithms; a row that was not answered, as surely of the image's own class."""
    task = Task(images(1)[0], 0, 2, "linf", 0.1, torch.Generator(), 9)
    probabilities, logits = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[3.0, -1.0, 0.5]])
    seen = [
        ForeignModel(lambda rows, s=s: Answer.of(s.argmax(1), s), task, "score")(images(1))
        for s in (probabilities, logits)
    ]
    torch.testing.assert_close(seen[0], probabilities.log())
    assert torch.equal(seen[1], logits)
    for scores in (None, torch.full((1, 4), torch.nan)):
        lost = Answer(torch.tensor([-1]), scores, torch.tensor([REJECTED], dtype=torch.uint8))
        shown = ForeignModel(lambda rows, a=lost: a, task, "score")(images(1))
        assert shown.shape[1] == (3 if scores is None else 4)
        assert shown.argmax() == 0
        assert shown.isfinite().all()


class Fickle(Balls):
    """Takes back its clean answer for the first image: every later row within its ball is class 1."""

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        answer = super().answer(rows, accounts)
        near = (rows - self.images[0]).flatten(1).norm(dim=1) < R
        again = torch.tensor([len(self.transcripts) > len(self.images)] * len(rows))
        answer.labels[near & again] = 1
        return answer


def test_an_assertion_of_foolbox_that_noise_breaks_ends_the_image_and_keeps_what_was_found() -> None:
    x = images(4)
    case = Case("HopSkipJumpAttack", "l2", {"initial_gradient_eval_steps": 9})
    result = case.run(Balls(x), x, 500, defense="input-noise", defense_options={"sigma": 0.02})
    broken = [error is not None for error in result.errors]
    assert any(broken)
    assert all("asked a point again" in error or "init_attack failed" in error for error in result.errors if error)
    assert result.success_any.all()
    assert (result.queries[broken] < 500).all()


def test_a_row_with_nan_ends_its_own_image_with_a_clear_error() -> None:
    """BoundaryAttack divides 0 by 0 when the image itself is adversarial (foolbox issue 670)."""
    x = images(2)
    result = Case("BoundaryAttack", "l2", {"steps": 30}).run(Fickle(x), x, 200)
    assert "NaN" in (result.errors[0] or "")
    assert result.errors[1] is None
    assert result.success[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HopSkipJump", r"unknown attack 'foolbox:HopSkipJump': did you mean foolbox:HopSkipJumpAttack"),
        ("LinfPGD", "needs gradients"),
        ("L2CarliniWagnerAttack", "needs gradients"),
        ("L0BrendelBethgeAttack", "needs gradients"),
        ("DatasetAttack", "draws nothing"),
        ("Attack", "unknown attack"),
        ("os", "unknown attack"),
    ],
)
def test_refused_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        registry.load("attacks", f"foolbox:{name}")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("BoundaryAttack", "l2", {"step": 3}), "option .*'step': did you mean steps"),
        (Case("BoundaryAttack", "linf"), "works in l2, not in linf"),
        (Case("BoundaryAttack", "l2", {"tensorboard": "runs"}), "tensorboard"),
        (Case("BoundaryAttack", "l2", {"init_attack": "PGD"}), "needs gradients"),
        (Case("HopSkipJumpAttack", "l2", {"constraint": "linf"}), "constraint=linf"),
        (Case("HopSkipJumpAttack", "l2", {"constraint": "l7"}), "refuses its options"),
        (Case("HopSkipJumpAttack", "l2", {"init_attack": "L2AdditiveGaussianNoiseAttack"}), "refuses its options"),
        (Case("L2AdditiveUniformNoiseAttack", "l2"), "give epsilon"),
        (Case("GenAttack", "linf", epsilon=0.1), "give targets"),
    ],
)
def test_refused_tasks_cost_nothing(case: Case, message: str) -> None:
    x = images(2)
    box = Balls(x)
    with pytest.raises(InputError, match=message):
        case.run(box, x, 10)
    assert box.seen <= len(x)  # the clean check at most, never an attacker's query


def test_genattack_needs_scores() -> None:
    x = images(1)
    with pytest.raises(InputError, match="needs scores"):
        Case("GenAttack", "linf", epsilon=0.1, target=1).run(Balls(x), x, 10, knowledge="label")


def test_foolbox_objects_are_recorded_as_foolbox_writes_them() -> None:
    start = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(steps=7)
    attack = registry.load("attacks", "foolbox:HopSkipJumpAttack")(init_attack=start, steps=2)
    assert attack.options()["init_attack"] == repr(start)
    assert attack.options()["steps"] == 2
    x = images(1)
    assert rb.run_attack(Balls(x), x, [0], attack, budget=200).success.all()
