"""Bayesian search: exact radii, exact counts, and as much use of the answers as the objective allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox import run_attack
from robustbox.attacks.bayes_subspace import Acquisition, BayesSubspace, Objective
from robustbox.attacks.decoders import DecoderName, decoder
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, Norm

from ..toys import Gate
from .analytic import check_box, drive, task

SHAPE = (1, 8, 8)


def grey(n: int = 1, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    noise = torch.rand(n, *shape, generator=torch.Generator().manual_seed(3)) - 0.5
    return 0.5 + 0.02 * noise


@dataclass(eq=False)
class Planted:
    """Probabilities that rise along one latent basis vector; class 1 wins from `share` of epsilon on along it in l2.

    Counts its rows and keeps them; `shape` and `size` are those of the dct subspace.
    """

    image: Tensor
    epsilon: float
    share: float = 0.9
    size: int = 3
    steepness: float = 4.0
    seen: list[Tensor] = field(default_factory=list)
    direction: Tensor = field(init=False)

    def __post_init__(self) -> None:
        decode = decoder("dct", tuple(self.image.shape), self.size)  # type: ignore[arg-type]
        basis = torch.zeros(1, decode.dim)
        basis[0, 4] = 1
        self.direction = decode(basis)[0]

    def __call__(self, rows: Tensor) -> Tensor:
        check_box(rows)
        self.seen.append(rows.clone())
        along = torch.stack([((row - self.image).double() * self.direction).sum() for row in rows]) / self.epsilon
        rise = self.steepness * (along - self.share)
        return torch.stack([-rise / 2, rise / 2], dim=1).softmax(dim=1).float()

    def answers(self, rows: Tensor) -> Answer:
        """As the oracle hands them to an attack that was granted scores."""
        scores = self(rows)
        return Answer.of(scores.argmax(1), scores)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.seen)


def never(rows: Tensor) -> Answer:
    return Answer.of(torch.zeros(len(rows), dtype=torch.long))


def asked(attack: BayesSubspace, answers: Any, norm: Norm = "l2", budget: int = 40, **fields: Any) -> Tensor:
    """The rows that a search asks of a model that never yields, [n,C,H,W]."""
    settings: dict[str, Any] = {"epsilon": 0.5 if norm == "l2" else 0.05} | fields
    of = task(grey()[0], norm, budget=budget, **settings)
    queries = drive(attack.search(of), of, answers)[1]
    return torch.cat([query.rows for query in queries])


# 1. Radii.


@pytest.mark.parametrize("name", ["dct", "nni", "fft"])
@pytest.mark.parametrize("objective", ["label", "margin"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_queries_lie_on_the_sphere_and_in_the_box(name: DecoderName, objective: Objective, norm: Norm) -> None:
    epsilon = 0.5 if norm == "l2" else 0.05

    def answers(rows: Tensor) -> Answer:
        share = rows.flatten(1).mean(1, keepdim=True).float() * 0.8
        return Answer.of(torch.zeros(len(rows), dtype=torch.long), torch.cat([1 - share, share], dim=1))

    rows = asked(BayesSubspace(decoder=name, size=3, objective=objective), answers, norm, budget=14)
    assert len(rows) == 14
    deltas = (rows - grey()).double().flatten(1)  # far from the box's faces: nothing is clipped
    if norm == "l2":
        torch.testing.assert_close(deltas.norm(dim=1), torch.full((14,), epsilon).double(), atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(deltas.abs(), torch.full_like(deltas, epsilon), atol=1e-6, rtol=0)


def test_without_signs_linf_rows_use_sizes_between_too() -> None:
    sizes = (asked(BayesSubspace(decoder="dct", size=3, signs=False), never, "linf", 10) - grey()).abs()
    torch.testing.assert_close(sizes.flatten(1).amax(1), torch.full((10,), 0.05), atol=1e-6, rtol=0)
    assert 0.2 < float((sizes < 0.049).float().mean()) < 0.9


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("levels", [None, 256])
def test_successes_lie_in_the_ball_and_the_box(norm: Norm, levels: int | None) -> None:
    epsilon = 1.0 if norm == "l2" else 0.047
    images = (grey(3) * 2 - 0.97).clamp(0, 1)  # almost black: the box cuts

    def model(rows: Tensor) -> Tensor:
        return (rows.flatten(1).mean(1) > images.mean() + 0.012).long()

    attack = BayesSubspace(size=3, objective="distance")
    result = run_attack(model, images, [0] * 3, attack, norm=norm, epsilon=epsilon, budget=150, levels=levels)
    assert result.success.all()
    clean = (images * 255).round() / 255 if levels else images
    far = (result.adversarials - clean).double().flatten(1)
    size = far.norm(dim=1) if norm == "l2" else far.abs().amax(1)
    assert (size <= epsilon * (1 + 1e-6)).all()
    check_box(result.adversarials)


# 3. What the answers change.


@pytest.mark.parametrize("acquisition", ["ei", "poi", "pm", "ucb"])
def test_the_papers_objective_asks_the_same_whatever_the_model(acquisition: Acquisition) -> None:
    attack = BayesSubspace(size=3, objective="label", acquisition=acquisition)

    def other(rows: Tensor) -> Answer:
        scores = rows.flatten(1).softmax(1)[:, :2]
        return Answer.of(torch.zeros(len(rows), dtype=torch.long), scores / scores.sum(1, keepdim=True))

    torch.testing.assert_close(asked(attack, never), asked(attack, other), atol=0, rtol=0)


def test_the_papers_objective_spreads_its_points() -> None:
    """Where nothing is learnt, expected improvement is a space-filling design: further apart than blind points."""

    def nearest(acquisition: Acquisition) -> float:
        rows = asked(BayesSubspace(size=2, objective="label", acquisition=acquisition), never, budget=40).flatten(1)
        distances = torch.cdist(rows, rows) + 9 * torch.eye(len(rows))
        return float(distances.amin(1).mean())

    assert nearest("ei") > 1.2 * nearest("random")


@pytest.mark.parametrize("objective", ["margin", "distance"])
def test_the_other_objectives_listen(objective: Objective) -> None:
    attack = BayesSubspace(size=3, objective=objective)
    image = grey()[0]

    def leaning(sign: float) -> Any:
        def answers(rows: Tensor) -> Answer:
            rise = sign * (rows - image).flatten(1).sum(1)
            scores = torch.stack([torch.full_like(rise, 2.0), rise], dim=1).softmax(1)
            return Answer.of((rise > 5).long(), scores)

        return answers

    up, down = (asked(attack, leaning(sign), budget=40) for sign in (1.0, -1.0))
    n = min(len(up), len(down), 12)
    torch.testing.assert_close(up[:10], down[:10], atol=0, rtol=0)  # the initial design is blind
    more = min(len(up), len(down))
    assert more > n
    assert not torch.equal(up[:more], down[:more])


def test_scores_are_used_where_granted_and_labels_suffice() -> None:
    assert BayesSubspace().knowledge == "label"
    assert BayesSubspace(objective="margin").knowledge == "score"
    assert BayesSubspace(objective="margin", acquisition="sobol").knowledge == "label"
    image = grey()[0]
    informed = asked(BayesSubspace(size=3), Planted(image, 0.5, share=2).answers, budget=30)
    chosen = asked(BayesSubspace(size=3, objective="margin"), Planted(image, 0.5, share=2).answers, budget=30)
    torch.testing.assert_close(informed, chosen, atol=0, rtol=0)
    radii = (asked(BayesSubspace(size=3), never, budget=30) - image).flatten(1).norm(dim=1)
    torch.testing.assert_close(radii[:10], torch.full((10,), 0.5), atol=1e-5, rtol=0)
    assert radii[10:].min() > 0.6  # distance: learns beyond epsilon


# 6. Planted directions.


@pytest.mark.parametrize("objective", ["margin", "distance"])
def test_a_planted_direction_is_found_in_fewer_queries_than_at_random(objective: Objective) -> None:
    image, budget = grey(shape=(1, 12, 12))[0], 150
    firsts: dict[Acquisition, list[float]] = {}
    for acquisition in get_args(Acquisition):
        found = firsts[acquisition] = []
        for seed in range(5):
            model = Planted(image, 0.5, share=0.9)
            attack = BayesSubspace(size=3, objective=objective, acquisition=acquisition)
            result = run_attack(model, image[None], [0], attack, epsilon=0.5, budget=budget, seed=seed)
            found.append(float(result.first_success[0]) or np.inf)
            radius = (model.rows - image).double().flatten(1).norm(dim=1)
            wins = (radius <= 0.5 * (1 + 1e-6)) & (((model.rows - image) * model.direction).flatten(1).sum(1) > 0.45)
            assert bool(wins.any()) == bool(result.success[0])
    medians = {acquisition: float(np.median(found)) for acquisition, found in firsts.items()}
    for acquisition in ("ei", "poi", "pm", "ucb"):
        assert medians[acquisition] < min(100, medians["random"], medians["sobol"]), medians


@pytest.mark.parametrize("acquisition", ["ei", "poi", "pm", "ucb"])
def test_a_planted_corner_is_found(acquisition: Acquisition) -> None:
    """Sixteen cells up or down, and a goal that three cells out of place, 697 of the 65,536 corners, still reach."""
    image = torch.full((1, 8, 8), 0.5)
    corner = torch.where(torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(5)) < 0.5, -1.0, 1.0)
    corner = corner.repeat_interleave(2, 1).repeat_interleave(2, 2)

    def model(rows: Tensor) -> Tensor:
        rise = 3 * (((rows - image) * corner).flatten(1).mean(1) / 0.1 - 9.5 / 16)
        return torch.stack([-rise, rise], dim=1).softmax(1)

    def wins(acquisition: Acquisition) -> int:
        attack = BayesSubspace(decoder="nni", size=4, objective="margin", acquisition=acquisition)
        images = image.expand(8, -1, -1, -1) + torch.linspace(0, 1e-3, 8).view(-1, 1, 1, 1)
        return int(run_attack(model, images, [0] * 8, attack, norm="linf", epsilon=0.1, budget=40).success.sum())

    assert wins(acquisition) >= 7
    assert wins("random") <= 5


@pytest.mark.parametrize("acquisition", ["ei", "poi", "pm", "ucb"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("objective", ["label", "margin", "distance"])
@pytest.mark.parametrize("refusing", [False, True])
def test_no_direction_is_asked_twice(
    acquisition: Acquisition, norm: Norm, objective: Objective, refusing: bool
) -> None:
    """Exploitation is drawn to the best point that it knows, whose row answers nothing new; and so it is by a gate."""
    image = grey()[0]

    def answers(rows: Tensor) -> Answer:
        along = (rows - image).flatten(1).sum(1, keepdim=True)
        scores = torch.cat([1 - along, along], dim=1).softmax(1)
        status = torch.full((len(rows),), REJECTED if refusing and len(rows) == 1 else 0).byte()
        return Answer(torch.full((len(rows),), -1 if bool(status.any()) else 0), scores, status)

    attack = BayesSubspace(size=4, objective=objective, acquisition=acquisition)
    deltas = F.normalize((asked(attack, answers, norm, budget=45) - image).double().flatten(1), dim=1)
    assert len(deltas) == 45
    cosines = deltas @ deltas.T - 2 * torch.eye(45)
    assert float(cosines.max()) < 1 - 1e-6


@pytest.mark.parametrize("acquisition", ["ei", "pm"])
def test_bits_are_asked_for_at_a_distance_from_each_other(acquisition: Acquisition) -> None:
    """Next to a point that was asked a bit is about what is known: exploitation would learn nothing of other directions."""
    image = grey()[0]

    def answers(rows: Tensor) -> Answer:
        deltas = (rows - image).flatten(1)
        return Answer.of((deltas[:, :20].sum(1) > 2.5).long())

    attack = BayesSubspace(size=6, objective="distance", acquisition=acquisition)
    deltas = F.normalize((asked(attack, answers, "l2", budget=80) - image).double().flatten(1), dim=1)
    assert len(deltas) > 40
    for n in range(25, len(deltas)):  # after the initial design and the staircase
        assert float((deltas[:n] @ deltas[n]).max()) < 1 - min(4 / n, 0.1) + 1e-6


def test_a_targeted_search_reaches_its_target() -> None:
    image = grey(shape=(1, 12, 12))[0]
    planted = Planted(image, 0.5, share=0.7)

    def model(rows: Tensor) -> Tensor:
        """Class 2 along the planted direction; class 1 is nearer, opposite to it."""
        rise = planted(rows)[:, 1:].log()
        back = -((rows - image) * planted.direction).flatten(1).sum(1, keepdim=True) * 8 - 1
        return torch.cat([torch.full_like(rise, -0.7), back, rise], dim=1).softmax(1)

    for knowledge in ("label", "score"):
        attack = BayesSubspace(size=3)
        result = run_attack(
            model, image[None], [0], attack, epsilon=0.5, budget=250, targets=2, knowledge=knowledge, seed=1
        )
        assert result.success.all()
        assert model(result.adversarials).argmax(1).tolist() == [2]


# 7. Counts, refusals, determinism.


@pytest.mark.parametrize("acquisition", ["ei", "random", "sobol"])
@pytest.mark.parametrize("objective", [None, "label", "margin"])
def test_rows_are_counted_exactly_and_a_failure_is_a_failure(
    acquisition: Acquisition, objective: Objective | None
) -> None:
    image = grey()[0]
    model = Planted(image, 0.5, share=3.0)
    attack = BayesSubspace(size=2, objective=objective, acquisition=acquisition)
    result = run_attack(model, image[None], [0], attack, epsilon=0.5, budget=37)
    assert len(model.rows) == 1 + 37
    assert result.queries.tolist() == [37]
    assert result.first_success.tolist() == [0]
    assert not result.success.any()
    assert result.adversarials.isnan().all()
    assert result.errors == [None]


@pytest.mark.parametrize("acquisition", ["ei", "random"])
def test_a_success_in_the_initial_design_ends_the_search_there(acquisition: Acquisition) -> None:
    image, rows = grey()[0], 0

    def seventh(batch: Tensor) -> Tensor:
        """Row 0 is the clean check; row 7 and what follows is adversarial."""
        nonlocal rows
        labels = (torch.arange(rows, rows + len(batch)) >= 7).long()
        rows += len(batch)
        return labels

    attack = BayesSubspace(size=2, acquisition=acquisition)
    result = run_attack(seventh, image[None], [0], attack, norm="linf", epsilon=0.1, budget=100)
    assert result.first_success.tolist() == [7]
    assert result.queries.tolist() == [10]
    assert result.stop_reasons == ["success"]


@pytest.mark.parametrize("acquisition", ["ei", "random", "sobol"])
@pytest.mark.parametrize("objective", ["label", "margin", "distance"])
@pytest.mark.parametrize("when", [3, 12, 26])
def test_one_success_of_a_stochastic_box_does_not_end_the_search(
    acquisition: Acquisition, objective: Objective, when: int
) -> None:
    """In the initial design, on the staircase of bits, and later."""
    attack = BayesSubspace(size=2, objective=objective, acquisition=acquisition)

    def rows(lucky: int) -> Tensor:
        number = 0

        def answers(rows: Tensor) -> Answer:
            nonlocal number
            labels = (torch.arange(number, number + len(rows)) == lucky).long()
            number += len(rows)
            return Answer.of(labels, F.one_hot(labels, 2) * 0.8 + 0.1)

        return asked(attack, answers, stochastic=True, budget=40)

    found, unlucky = rows(when), rows(1000)
    assert len(found) == len(unlucky) == 40
    if acquisition == "ei" and objective != "distance":
        assert not torch.equal(found, unlucky)  # the process was told


def test_a_success_beyond_the_ball_does_not_end_the_search() -> None:
    image = grey()[0]
    model = Planted(image, 0.5, share=1.3)
    result = run_attack(model, image[None], [0], BayesSubspace(size=3), epsilon=0.5, budget=60)
    assert result.queries.tolist() == [60]
    assert not result.success.any()
    far = (model.rows - image).flatten(1).norm(dim=1)
    assert (model(model.rows).argmax(1)[far > 0.5]).any()  # it saw the other side, from beyond


@pytest.mark.parametrize("objective", ["label", "margin", "distance"])
def test_unanswered_rows_teach_nothing_and_break_nothing(objective: Objective) -> None:
    def refused(rows: Tensor) -> Answer:
        labels = torch.full((len(rows),), -1)
        return Answer(labels, torch.full((len(rows), 2), torch.nan), torch.full((len(rows),), REJECTED).byte())

    assert len(asked(BayesSubspace(size=2, objective=objective), refused, budget=35)) == 35
    result = run_attack(Gate(3), grey(2) - 0.2, [0, 0], BayesSubspace(size=2), epsilon=0.5, budget=40)
    assert result.errors == [None, None]
    assert result.queries.tolist() == [40, 40]


@pytest.mark.parametrize("objective", ["margin", "distance"])
def test_an_image_s_result_does_not_depend_on_its_company(objective: Objective) -> None:
    images = grey(3)

    def model(rows: Tensor) -> Tensor:
        rise = torch.stack([row.double().flatten()[::3].sum() for row in rows]) - 11.2
        return torch.stack([-rise, rise], dim=1).float().softmax(1)

    def run(which: list[int]) -> Any:
        state = torch.get_rng_state()
        attack = BayesSubspace(size=3, objective=objective)
        result = run_attack(model, images[which], [0] * len(which), attack, epsilon=0.3, budget=45)
        assert torch.equal(torch.get_rng_state(), state)  # no draw from the global stream
        return result

    together, alone = run([0, 1, 2]), run([1])
    assert together.traces[1] == alone.traces[0]
    assert together.queries[1] == alone.queries[0]
    torch.testing.assert_close(together.adversarials[1:2], alone.adversarials, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(
        run([2, 1, 0]).adversarials.flip(0), together.adversarials, atol=0, rtol=0, equal_nan=True
    )


def test_sobol_and_random_designs_come_from_the_image_s_own_stream() -> None:
    image = grey()[0]
    for acquisition in ("random", "sobol"):
        attack = BayesSubspace(size=2, acquisition=acquisition)  # type: ignore[arg-type]
        first, again, other = (attack.space(task(image, seed=seed, epsilon=0.5)).design(8) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        torch.testing.assert_close(first.norm(dim=1), torch.ones(8).double())


@pytest.mark.parametrize("objective", ["label", "margin", "distance"])
def test_an_image_of_one_value_has_two_directions(objective: Objective) -> None:
    """Beside the best direction lies, at its own length, no direction at all."""

    def answers(rows: Tensor) -> Answer:
        share = rows.flatten(1) * 0.4
        return Answer.of(torch.zeros(len(rows), dtype=torch.long), torch.cat([1 - share, share], dim=1))

    of = task(torch.full((1, 1, 1), 0.5), epsilon=0.2, budget=40)
    queries = drive(BayesSubspace(objective=objective).search(of), of, answers)[1]
    rows = torch.cat([query.rows.flatten() for query in queries])
    assert len(rows) == 40
    assert ((rows - 0.5).abs() > 0.19).all()


# Bad input.


def test_epsilon_is_asked_for_before_a_query() -> None:
    model = Planted(grey()[0], 0.5)
    with pytest.raises(InputError, match="bayes-subspace searches at a fixed radius: give epsilon"):
        run_attack(model, grey(), [0], "bayes-subspace", norm="l2")
    assert not model.seen


def test_a_decoder_too_fine_for_the_image_is_refused_before_a_query() -> None:
    model = Planted(grey()[0], 0.5)
    with pytest.raises(InputError, match="fft takes at most size 4 for images of 8 x 8, got 5"):
        run_attack(model, grey(), [0], BayesSubspace(decoder="fft", size=5), norm="l2", epsilon=0.5)
    assert not model.seen
    BayesSubspace(decoder="fft", size=4).check(task(grey()[0], epsilon=0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "dtc"}, "unknown decoder 'dtc': did you mean dct"),
        ({"objective": "margins"}, "unknown objective 'margins': did you mean margin"),
        ({"acquisition": "eii"}, "unknown acquisition 'eii': did you mean ei"),
        ({"size": 0}, "size must be at least 1"),
        ({"initial": 0}, "initial must be at least 1"),
        ({"beta": -1.0}, "beta must not be negative"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BayesSubspace(**options)


def test_margin_needs_scores() -> None:
    with pytest.raises(InputError, match="needs scores"):
        run_attack(
            Planted(grey()[0], 0.5),
            grey(),
            [0],
            "bayes-subspace",
            epsilon=0.5,
            knowledge="label",
            attack_options={"objective": "margin"},
        )
