"""CGBA and CGBA-H: geometry, distance over the known optimum at fixed queries, and what tells the two apart."""

from __future__ import annotations

import math
from collections.abc import Generator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks import cgba
from robustbox.attacks.cgba import CGBA, CGBAH, semicircle
from robustbox.attacks.subspaces import Subspace
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, BlackBox, Query
from robustbox.results import AttackResult
from tests.attacks.analytic import Flat, check_box, drive, task, unit

BOTH = [CGBA, CGBAH]


def ratios(result: AttackResult, optimum: float, *queries: int) -> NDArray[np.float64]:
    return np.array([np.median(result.distance_at(q)) / optimum for q in queries])


# Geometry


@pytest.mark.parametrize("seed", range(5))
def test_semicircle_is_the_papers(seed: int) -> None:
    """The paper writes its points with m(a) = sin(theta) cot(a) - cos(theta), zeta = unit(eta + m v)."""
    shape = (3, 5, 7)
    image = torch.full(shape, 0.5)
    v, eta, radius = unit(shape, seed).double(), unit(shape, seed + 50).double(), 0.3
    point = (image + radius * v)[None].float()
    arc = semicircle(image, point, 7.0 * eta[None].float())
    theta = math.acos(float((v * eta).sum()))
    for a in np.linspace(0.05, math.pi / 2 - 0.01, 12):
        zeta = eta + (math.sin(theta) / math.tan(a) - math.cos(theta)) * v
        zeta /= zeta.norm()
        expected = image + radius * (v * zeta).sum() * zeta
        assert torch.allclose(arc(a)[0].double(), expected, atol=1e-6)
        assert torch.dist(arc(a), image).item() == pytest.approx(radius * math.cos(a), abs=1e-6)
        centre = (image + point) / 2
        assert torch.dist(arc(a), centre).item() == pytest.approx(radius / 2, abs=1e-6)
    assert torch.allclose(arc(0.0), point, atol=1e-7)
    assert torch.allclose(arc(math.pi / 2)[0], image, atol=1e-7)


@pytest.mark.parametrize("normal", ["zero", "parallel", "opposite"])
def test_degenerate_normals_leave_the_straight_segment(normal: str) -> None:
    image = torch.full((1, 3, 3), 0.5)
    ray = 0.3 * unit((1, 1, 3, 3), 1)
    arc = semicircle(image, image + ray, {"zero": 0.0, "parallel": 2.0, "opposite": -1.0}[normal] * ray)
    assert torch.isfinite(arc(0.7)).all()
    assert torch.dist(arc(0.7), image) <= 0.3 * math.cos(0.7) + 1e-6


def test_clipped_points_are_no_further_than_the_sphere() -> None:
    image, point = torch.full((1, 4, 4), 0.9), torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    arc = semicircle(image, point, unit((1, 1, 4, 4), 3))
    for a in np.linspace(0, math.pi / 2, 9):
        check_box(arc(a))
        assert torch.dist(arc(a), image) <= torch.dist(point, image) * math.cos(a) + 1e-6


# Half-spaces: with the exact normal the first step is known, with estimates the figures of an independent computation.


def exact(monkeypatch: pytest.MonkeyPatch, normal: Tensor) -> list[Tensor]:
    """Inject the exact normal for a price of no rows; the boundary points at which it was asked."""
    points: list[Tensor] = []

    def estimate(of: Any, point: Tensor, *_: Any) -> Generator[Query, Answer, tuple[Tensor, float]]:
        points.append(point)
        yield from ()
        return normal[None], 0.5

    monkeypatch.setattr(cgba, "estimate_normal", estimate)
    return points


def test_cgba_with_the_exact_normal_lands_on_the_optimum_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Flat((3, 8, 8), 0.2)
    points = exact(monkeypatch, flat.normal)
    of = task(flat.images(1)[0], budget=80)
    drive(CGBA(tolerance=1e-3).search(of), of, flat)
    first, second = (torch.dist(point, of.image).item() for point in points[:2])
    assert first > 0.5
    assert second == pytest.approx(0.2, abs=1e-3 * first)


def test_cgba_h_with_the_exact_normal_halves_the_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Flat((3, 8, 8), 0.2)
    points = exact(monkeypatch, flat.normal)
    of = task(flat.images(1)[0], budget=100)
    drive(CGBAH(tolerance=1e-5).search(of), of, flat)
    angles = [math.acos(0.2 / torch.dist(point, of.image).item()) for point in points[:4]]
    assert angles[0] > 1
    for wide, narrow in pairwise(angles):
        assert narrow / wide == pytest.approx(0.5, abs=0.01)


FIGURES = [
    (CGBA, 8, (1.41, 1.17, 1.09, 1.03)),
    (CGBAH, 8, (1.50, 1.19, 1.10, 1.04)),
    (CGBA, 16, (2.18, 1.61, 1.30)),
    (CGBAH, 16, (2.26, 1.66, 1.33)),
    (CGBA, 32, (3.71, 2.63)),
    (CGBAH, 32, (3.95, 2.77)),
]


@pytest.mark.parametrize(("attack", "side", "figures"), FIGURES)
def test_distance_over_the_optimum_of_a_half_space(attack: type[CGBA], side: int, figures: tuple[float, ...]) -> None:
    flat, queries = Flat((3, side, side), 0.2), (500, 1000, 2000, 5000)[: len(figures)]
    images = flat.images(6)
    result = run_attack(flat, images, [0] * 6, attack=attack(), budget=queries[-1])
    assert (ratios(result, 0.2, *queries) <= 1.1 * np.array(figures)).all()
    assert (result.distance >= 0.2).all()
    # Every row is on the books, and what is reported is what was found.
    assert flat.rows == sum(result.ledger.values())
    assert (result.queries == queries[-1]).all()
    assert flat(result.adversarials).all()
    assert torch.linalg.vector_norm((result.adversarials - images).flatten(1), dim=1).numpy() == pytest.approx(
        result.distance, abs=1e-5
    )


@pytest.mark.parametrize("attack", BOTH)
def test_rounding_to_8_bits_costs_little(attack: type[CGBA]) -> None:
    flat = Flat((3, 16, 16), 0.3)
    images = (flat.images(4) * 255).round() / 255
    centre = torch.full_like(images, 0.5)
    optimum = 0.3 - ((images - centre) * flat.normal).sum(dim=(1, 2, 3)).numpy()
    result = run_attack(flat, images, [0] * 4, attack=attack(), budget=3000, levels=256)
    assert np.median(result.distance / optimum) <= 1.3
    drowned = run_attack(flat, images, [0] * 4, attack=attack(sigma=4.5e-5), budget=1000, levels=256)
    assert np.median(drowned.distance / optimum) > 2


@pytest.mark.parametrize("subspace", ["dct", "fft", "grid", "tiles"])
def test_a_subspace_that_holds_the_normal_needs_far_fewer_queries(subspace: Subspace) -> None:
    flat = Flat((3, 16, 16), 0.2)
    inside = cgba.sampler(subspace, (3, 16, 16), 4, torch.Generator().manual_seed(3))(1)[0]
    flat.normal = inside / inside.norm()
    images = torch.full((6, 3, 16, 16), 0.5) + 1e-4 * torch.arange(6).view(6, 1, 1, 1)
    reduced, full = (
        run_attack(flat, images, [0] * 6, attack=CGBA(subspace=name), budget=500).distance_at(500)
        for name in (subspace, "full")
    )
    assert np.median(reduced) / 0.2 < 1.35
    assert np.median(full) / 0.2 > 1.6


# Curvature: each variant is the better one where its paper says so.


def test_cgba_is_better_where_the_clean_region_is_a_ball() -> None:
    images = torch.stack([0.5 + 0.15 * unit((3, 8, 8), 100 + i) for i in range(6)])

    def outside(rows: Tensor) -> Tensor:
        return ((rows - 0.5).flatten(1).double().norm(dim=1) > 0.45).long()

    queries = (1000, 2000, 3000)
    plain, halving = (
        ratios(run_attack(outside, images, [0] * 6, attack=attack(), budget=3000), 0.3, *queries) for attack in BOTH
    )
    assert (plain + 0.01 < halving).all()
    assert (plain <= 1.05 * np.array([1.31, 1.27, 1.22])).all()


def test_cgba_h_is_better_where_the_adversarial_region_is_a_ball() -> None:
    shape = (3, 8, 8)
    images = torch.stack([0.5 + 1e-3 * unit(shape, 100 + i) for i in range(8)])
    centre = 0.5 + 0.36 * unit(shape, 9)
    start = centre + 0.054 * unit(shape, 300)
    optimum = torch.linalg.vector_norm((images - centre).flatten(1), dim=1).numpy() - 0.06

    def inside(rows: Tensor) -> Tensor:
        return ((rows - centre).flatten(1).double().norm(dim=1) < 0.06).long()

    plain, halving = (
        run_attack(
            inside,
            images,
            [0] * 8,
            attack=attack(sigma=1e-4, tolerance=1e-4),
            targets=1,
            pool=(start[None], [1]),
            budget=1000,
        )
        for attack in BOTH
    )
    for queries in (500, 1000):
        better, worse = (np.median(run.distance_at(queries) / optimum) for run in (halving, plain))
        assert better + 0.01 < worse
    assert 1 < np.median(halving.distance / optimum) < 1.045


# Hard cases


@pytest.mark.parametrize("attack", BOTH)
def test_traces_only_fall_and_every_row_is_in_the_box(attack: type[CGBA]) -> None:
    """Black images, on which noise is clipped from one side; grey, non-square."""
    weights = unit((1, 9, 14), 4).abs()
    threshold = 0.25 * float(weights.sum())

    def model(rows: Tensor) -> Tensor:
        check_box(rows)
        return (torch.einsum("nchw,chw->n", rows, weights) > threshold).long()

    black = torch.zeros(1, 9, 14)
    result = run_attack(model, torch.stack([black, black + 0.01]), [0, 0], attack=attack(), budget=800)
    for trace in result.traces:
        assert all(a[1] > b[1] for a, b in pairwise(trace))
    assert model(result.adversarials).all()
    assert threshold <= result.distance[0] < 1.3 * threshold


@pytest.mark.parametrize("attack", BOTH)
@pytest.mark.parametrize("targets", [None, 1])
def test_a_model_that_never_changes_its_label(attack: type[CGBA], targets: int | None) -> None:
    pool = (torch.rand(40, 1, 5, 8, generator=torch.Generator().manual_seed(0)), [1] * 40)
    result = run_attack(
        lambda rows: torch.zeros(len(rows)).long(),
        torch.rand(2, 1, 5, 8, generator=torch.Generator().manual_seed(1)),
        [0, 0],
        attack=attack(),
        targets=targets,
        pool=pool,
        budget=1000,
    )
    assert not result.success.any()
    assert result.stop_reasons == ["finished"] * 2
    assert result.errors == [None] * 2
    assert (result.queries <= 83).all()


@pytest.mark.parametrize("attack", BOTH)
@pytest.mark.parametrize("budget", [1, 2, 3, 7, 13, 29, 100])
def test_tiny_budgets_are_spent_to_the_row(attack: type[CGBA], budget: int) -> None:
    flat = Flat((3, 8, 8), 0.05)
    result = run_attack(flat, flat.images(3), [0] * 3, attack=attack(), budget=budget)
    assert result.errors == [None] * 3
    assert (result.queries == budget).all()
    assert result.ledger["attack"] == 3 * budget
    assert flat.rows == sum(result.ledger.values())


@pytest.mark.parametrize("attack", BOTH)
def test_the_last_estimate_leaves_room_for_its_search(attack: type[CGBA]) -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], budget=137)
    _, asked = drive(attack().search(of), of, flat)
    assert of.remaining == 0 or len(asked[-1].rows) == 1
    assert sum(len(query.rows) for query in asked) >= 136
    assert all(len(query.rows) == 1 for query in asked[-8:])


@pytest.mark.parametrize("attack", BOTH)
def test_an_image_that_is_adversarial_already(attack: type[CGBA]) -> None:
    """Contradicts what the search assumes (a stochastic model can): it goes down to the image and neither fails nor hangs."""
    of = task(torch.full((1, 4, 4), 0.5), budget=500)
    _, asked = drive(attack().search(of), of, lambda rows: torch.ones(len(rows)).long())
    assert min(torch.dist(query.rows[:1], of.image[None]) for query in asked) < 1e-3


@pytest.mark.parametrize("attack", BOTH)
def test_random_answers_neither_fail_nor_hang(attack: type[CGBA]) -> None:
    coin = torch.Generator().manual_seed(0)
    of = task(torch.rand(3, 6, 6, generator=coin), budget=2000)
    _, asked = drive(attack().search(of), of, lambda rows: torch.randint(2, (len(rows),), generator=coin))
    # It goes on until the budget is spent, or until the coin has led it to the image itself.
    assert of.remaining < 50 or torch.dist(asked[-1].rows, of.image[None]) < 1e-3


class Gate(BlackBox):
    """A plane before which a gate refuses every so-manieth row, never the first; what it says of them is garbage."""

    classes = 2

    def __init__(self, flat: Flat, period: int, garbage: int) -> None:
        self.flat, self.period, self.garbage, self.asked = flat, period, garbage, 0

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        position = torch.arange(self.asked, self.asked + len(rows))
        self.asked += len(rows)
        refused = (position > 0) & (position % self.period == 0)
        labels = torch.where(refused, self.garbage, self.flat(rows))
        return Answer(labels, None, refused.to(torch.uint8) * REJECTED)


@pytest.mark.parametrize("attack", BOTH)
def test_rejected_rows_carry_no_information(attack: type[CGBA]) -> None:
    flat = Flat((3, 8, 8), 0.2)
    traces = []
    for garbage in (-1, 0, 1):
        result = run_attack(Gate(flat, 11, garbage), flat.images(1), [0], attack=attack(), budget=2000)
        traces.append(result.traces)
        assert result.distance[0] < 1.6 * 0.2
    assert traces[0] == traces[1] == traces[2]


@pytest.mark.parametrize("attack", BOTH)
def test_a_gate_that_refuses_everything_but_the_clean_image(attack: type[CGBA]) -> None:
    flat = Flat((3, 8, 8), 0.2)
    result = run_attack(Gate(flat, 1, 0), flat.images(1), [0], attack=attack(), budget=100)
    assert not result.success.any()
    assert result.errors == [None]


@pytest.mark.parametrize(
    ("script", "angles"),
    [
        ("rr01", [0.25, 0.375, 0.5625, 0.28125]),
        ("0r01", [0.25, 0.125, 0.1875, 0.09375]),
        ("rrrrr", [0.25, 0.375, 0.5625, 0.84375, 1.265625]),
        ("0r0r0r0r0r", [0.25, 0.125, 0.1875, 0.09375, 0.140625, 0.0703, 0.1055, 0.0527, 0.0791, 0.0396]),
    ],
)
def test_a_refused_step_of_cgba_h_goes_further_and_a_failed_one_halves_the_angle(
    script: str, angles: list[float]
) -> None:
    """In radians; the normal is half a radian off the way out. What is refused to the end is not taken."""
    image, out, side = torch.full((3, 8, 8), 0.5), unit((3, 8, 8), 1), unit((3, 8, 8), 2)
    side -= (side * out).sum() * out
    normal = math.cos(0.5) * out + math.sin(0.5) * side / side.norm()
    of, point, rest = task(image), (image + 0.3 * out)[None], iter(script)

    def answers(rows: Tensor) -> Answer:
        said = next(rest, "0")
        return Answer(torch.tensor([int(said == "1")]), None, torch.tensor([REJECTED * (said == "r")]).byte())

    end, queries = drive(CGBAH()._approach(of, point, normal[None], 0.3, 1e-3), of, answers)
    steps = [query.rows for query in queries if query.kind == "step"]
    asked = [math.asin(float(torch.dist(row, point)) / 0.3) for row in steps]
    assert asked == pytest.approx(angles, rel=1e-2)
    assert end is not None
    assert torch.equal(end, steps[-1] if "1" in script else point)


def test_a_one_sided_estimate_is_repeated_with_other_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas: list[float] = []

    def estimate(of: Any, point: Tensor, sigma: float, *_: Any) -> Generator[Query, Answer, tuple[Tensor, float]]:
        sigmas.append(sigma)
        yield Query(point)
        return torch.ones_like(point), [1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.5][len(sigmas) - 1]

    monkeypatch.setattr(cgba, "estimate_normal", estimate)
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], budget=1000)
    search = CGBA(sigma=0.01).search(of)
    with pytest.raises(IndexError):
        drive(search, of, flat)
    assert sigmas[:6] == [0.01, 0.02, 0.04, 0.01, 0.005, 0.0025]


def test_memory_keeps_a_share_of_earlier_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    normals: list[Tensor] = []

    def arc(image: Tensor, point: Tensor, normal: Tensor) -> Any:
        normals.append(normal.clone())
        return lambda angle: point

    def estimate(of: Any, point: Tensor, *_: Any) -> Generator[Query, Answer, tuple[Tensor, float]]:
        yield Query(point)
        return torch.full_like(point, 10.0 ** len(normals)), 0.5

    monkeypatch.setattr(cgba, "estimate_normal", estimate)
    monkeypatch.setattr(cgba, "semicircle", arc)
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], budget=100)
    drive(CGBA(memory=0.5).search(of), of, flat)
    assert [normal.mean().item() for normal in normals[:3]] == pytest.approx([1, 10.5, 105.25])


@pytest.mark.parametrize(
    ("option", "value"),
    [("n0", 0), ("sigma", 0.0), ("sigma", float("nan")), ("tolerance", 1.0), ("factor", 0.5), ("memory", 1.0)],
)
def test_bad_options_are_refused_in_one_line(option: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{option} must be .*, got {value}$"):
        CGBAH(**{option: value})


def test_images_at_once_do_not_change_results() -> None:
    flat = Flat((3, 8, 8), 0.2)
    images = flat.images(4)
    together = run_attack(flat, images, [0] * 4, budget=300)
    alone = [run_attack(flat, image[None], [0], budget=300) for image in images]
    assert together.traces == [run.traces[0] for run in alone]
