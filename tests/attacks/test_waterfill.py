"""Waterfill: the basis is orthonormal, water-filling is the optimum, planted spectra are learnt, images share where allowed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import load_data, load_model, run_attack
from robustbox.attacks import approach
from robustbox.attacks.apart import Asked
from robustbox.attacks.blocks import Blocks
from robustbox.attacks.hop_skip_jump import Lift
from robustbox.attacks.race import Start
from robustbox.attacks.spectrum import SHUFFLES, Evidence, K, Spectrum, filtered_like, water_filling
from robustbox.attacks.waterfill import Waterfill
from robustbox.attacks.wrapper import relayed
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import Answer, Norm, Query, Task
from robustbox.statistics import median
from tests.attacks.analytic import Flat, drive, task, unit
from tests.attacks.table import AWAY, Plane, beyond, images


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 96, 64), (2, 30, 17), (1, 1, 1), (3, 5, 211)])
def test_the_basis_is_orthonormal(shape: tuple[int, int, int]) -> None:
    basis, x = Blocks(shape, torch.device("cpu")), torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    coefficients = basis.analyse(x)
    assert torch.allclose(basis.compose(coefficients), x, atol=1e-5)
    assert torch.allclose(coefficients.square().sum((1, 2, 3)), x.square().sum((1, 2, 3)), rtol=1e-5)
    assert int(basis.cell.max()) < 16


def test_a_coefficient_has_a_colour_a_frequency_and_a_place() -> None:
    basis = Blocks((3, 32, 32), torch.device("cpu"))
    flat = torch.zeros(1, 3, 32, 32)
    flat[:, :, 8:12, 20:24] = 1.0  # grey, without waves, in one block
    coefficients = basis.analyse(flat)[0]
    at = coefficients.abs().amax(0) > 1e-5
    assert at.sum() == 1
    assert basis.cycles[at] == 0
    assert basis.cell[at] == 4 * 1 + 2
    assert coefficients[1:].abs().max() < 1e-5


@pytest.mark.parametrize("queries", [0.5, 10.0, 1000.0])
def test_water_filling_learns_most_for_its_queries(queries: float) -> None:
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(50, generator=generator).pow(3) + 1e-3
    c /= c.sum()

    def known(noise: Tensor) -> float:
        told = queries * noise / (noise * c).sum()
        return float((c * c * told / (1 + c * told)).sum())

    best = water_filling(c, queries)
    assert float(best.mean()) == pytest.approx(1, rel=1e-5)
    for _ in range(50):
        other = best * torch.exp(0.3 * torch.randn(50, generator=generator)) + 0.02 * torch.rand(
            50, generator=generator
        )
        assert known(other) <= known(best) + 1e-6
    assert known(best) > known(torch.ones(50))


def test_few_queries_see_few_coefficients_and_many_see_all() -> None:
    c = torch.linspace(1, 10, 100).square()
    seen = [int((water_filling(c / c.sum(), q) > 0).sum()) for q in (1, 10, 100, 1000)]
    assert seen == sorted(seen)
    assert seen[0] < 40
    assert seen[-1] == 100


def planted(spectrum: Spectrum, keep: Tensor, n: int, signs: int, sent: float | Tensor = 1.0) -> None:
    """Let n images with unit normals of deviations `keep` [C,H,W] tell `signs` signs each under white noise, `sent` in part."""
    generator = torch.Generator().manual_seed(0)
    white = torch.ones(keep.shape)
    for number in [spectrum.enter() for _ in range(n)]:
        normal = torch.randn(keep.shape, generator=generator) * keep
        normal /= normal.norm()
        u = torch.randn(signs, *keep.shape, generator=generator) * sent
        s = (u.flatten(1) @ normal.flatten()).sign()
        evidence = Evidence(keep)
        orders = [s, *(s[torch.randperm(signs, generator=generator)] for _ in range(SHUFFLES))]
        evidence.add((torch.stack(orders) @ u.flatten(1)).view(-1, *keep.shape), signs, white, torch.tensor(1.0))
        if isinstance(sent, float):
            estimate = evidence.mean(torch.full(keep.shape, 1 / keep.numel()))
            cosine = float((estimate * normal).sum() / estimate.norm())
            expected = (K * K * signs / (K * K * signs + keep.numel())) ** 0.5
            assert cosine == pytest.approx(expected, abs=0.1)  # the density law
        spectrum.learn(number, evidence, spectrum.variances())


def test_a_planted_colour_is_learnt() -> None:
    keep = torch.zeros(3, 16, 16)
    keep[1] = 1  # first minus last channel, of which the prior expects little
    spectrum = Spectrum(torch.zeros(3, 16, 16))
    before = spectrum.variances().sum((1, 2))
    planted(spectrum, keep, 15, 300)
    after = spectrum.variances().sum((1, 2))
    assert before[1] / before[0] < 0.35
    assert after[1] / after[0] > 2
    assert after[1] / after[2] > 4
    assert float(after.sum()) == pytest.approx(1, rel=1e-4)


def test_a_planted_place_is_learnt() -> None:
    spectrum = Spectrum(torch.zeros(1, 16, 16))
    corner = (spectrum.basis.cell == 0).float()[None]
    before = float((spectrum.variances() * corner).sum())
    planted(spectrum, corner, 15, 300)
    assert float((spectrum.variances() * corner).sum()) > 5 * before


def test_noise_that_was_clipped_is_not_taken_for_a_normal_that_does_not_vary() -> None:
    spectrum = Spectrum(torch.zeros(1, 16, 16))
    before = spectrum.variances()
    cell = (spectrum.basis.cell == 5)[None]
    planted(spectrum, before.sqrt(), 40, 100, torch.where(cell, 0.7, 1.0))
    after = spectrum.variances()
    assert 0.6 < float(after[cell].sum() / before[cell].sum()) < 1.4


def test_a_perturbation_as_expected_hints_nothing() -> None:
    spectrum = Spectrum(torch.zeros(3, 16, 16))
    usual = spectrum.basis.compose(spectrum.variances().sqrt()[None])
    for size in (1e-3, 1.0, 30.0):
        assert torch.allclose(spectrum.hint(size * usual), torch.ones(3, 16, 16), atol=1e-3)


def test_a_perturbation_hints_at_its_coefficients_its_bands_and_its_cells() -> None:
    spectrum = Spectrum(torch.zeros(3, 16, 16))
    wave = torch.zeros(1, 3, 16, 16)
    wave[0, 0, 5, 6] = 2.0
    hint = spectrum.hint(spectrum.basis.compose(wave))
    same_band, same_cell = ((group == group.view(3, 16, 16)[0, 5, 6]).view(3, 16, 16) for group, _ in spectrum.groups)
    neither = hint[~same_band & ~same_cell]
    assert float(hint[0, 5, 6]) > 10 * float(hint[same_band & same_cell].median())
    assert (
        float(hint[same_band & same_cell].median())
        > float(hint[same_band ^ same_cell].median())
        > float(neither.median())
    )
    assert torch.allclose(neither, torch.full_like(neither, (0.5 / 1.5) ** 3))
    assert torch.equal(spectrum.variances(hint) > 0, spectrum.variances() > 0)
    assert float(spectrum.variances(hint).sum()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 17, 40)])
def test_an_estimate_is_nearer_the_normal_where_it_is_filtered_by_its_texture(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shift = torch.arange(shape[2]) * 2 * np.pi * 0.3

    def texture() -> Tensor:  # waves of one frequency, in every row of any size and phase
        size, phase = torch.randn(2, *shape[:2], 1, generator=generator)
        return one((size * torch.sin(shift + phase))[None])

    def one(image: Tensor) -> Tensor:
        return image / image.norm()

    def white() -> Tensor:
        return one(torch.randn(1, *shape, generator=generator))

    normal = texture()
    estimate, perturbation = normal + 2 * white(), texture() + white()
    filtered = filtered_like(estimate, perturbation)
    assert filtered.shape == estimate.shape
    assert float((one(filtered) * normal).sum()) > 1.1 * float((one(estimate) * normal).sum())
    assert torch.allclose(filtered_like(estimate, 1e-3 * perturbation), filtered, atol=1e-5)


def test_a_perturbation_of_one_pixel_filters_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    estimate, point = torch.randn(1, 3, 16, 16, generator=generator), torch.zeros(1, 3, 16, 16)
    point[0, 1, 5, 9] = 0.5  # all frequencies alike
    filtered = filtered_like(estimate, point)
    assert torch.allclose(filtered / filtered.norm(), estimate / estimate.norm(), atol=1e-5)


def test_a_chord_is_ruled_out() -> None:
    evidence, prior = Evidence(torch.zeros(3, 4, 4)), torch.full((3, 4, 4), 1 / 48)
    noise = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    evidence.add(5 * unit((3, 4, 4), 3).expand(1 + SHUFFLES, 3, 4, 4), 40, noise, torch.tensor(1.0))
    chord = unit((3, 4, 4), 4)
    assert abs(float((evidence.mean(prior) * chord).sum())) > 1e-3
    evidence.rule_out(chord, prior)
    assert abs(float((evidence.mean(prior) * chord).sum())) < 1e-6


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_what_a_chord_rules_out_lies_along_the_boundary_also_at_the_border_of_the_box(
    norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Black images and a plane: what is clipped away turns an arc's tangent out of the boundary, but not its chord.

    In linf without the race: RayS ends in the plane's nearest corner, and leaves nothing to estimate.
    """
    normal, along = unit((3, 8, 8), seed=1), []
    kept = Evidence.rule_out

    def rule_out(evidence: Evidence, chord: Tensor, prior: Tensor) -> None:
        image = Spectrum(torch.zeros(3, 8, 8)).basis.compose(chord[None])
        along.append(float((image * normal).sum().abs() / image.norm()))
        kept(evidence, chord, prior)

    def plane(rows: Tensor) -> Tensor:
        beyond = (rows.flatten(1) @ normal.flatten() > 0.5).float()
        return torch.stack([1 - beyond, beyond], 1)

    def unraced(task: Task, starts: Sequence[Start]) -> Generator[Query, Answer, tuple[int, Tensor] | None]:
        point = yield from starts[0]
        return None if point is None else (0, point)

    monkeypatch.setattr(Evidence, "rule_out", rule_out)
    monkeypatch.setattr(approach, "race", unraced)
    result = run_attack(plane, torch.zeros(4, 3, 8, 8), [0] * 4, "waterfill", norm, budget=400)
    assert not any(result.errors), result.errors
    assert len(along) > 20
    assert float(np.median(along)) < 0.01


class Waves(Plane):
    """A plane whose normal the prior expects: grey and in the middle."""

    def __init__(self) -> None:
        super().__init__()
        spectrum = Spectrum(torch.zeros(3, 8, 8))
        c = spectrum.variances()
        normal = torch.randn(c.shape, generator=torch.Generator().manual_seed(5)) * (c > c.median()) * c.sqrt()
        self.normal = spectrum.basis.compose(normal[None])[0]
        self.normal /= self.normal.norm()


def level(n: int, normal: Tensor) -> Tensor:
    """Images [n,3,8,8] that differ along the plane alone."""
    along = torch.stack([unit((3, 8, 8), seed=2 + i) for i in range(n)])
    along -= (along * normal).sum((1, 2, 3), keepdim=True) * normal
    return 0.5 + 0.1 * along


def far(attack: str, box: Plane, of: Tensor, queries: int, **setting: Any) -> float:
    result = run_attack(box, of, [0] * len(of), attack=attack, budget=queries, **setting)
    assert not any(result.errors), result.errors
    return float(np.median(result.distance_at(queries))) / AWAY


def test_where_the_prior_is_right_half_of_the_queries_are_enough() -> None:
    of = level(12, Waves().normal)
    assert far("waterfill", Waves(), of, 150) < far("cgba", Waves(), of, 300)


@pytest.mark.parametrize("targeted", [False, True])
def test_it_lands_near_the_optimum_of_an_8_bit_plane(targeted: bool) -> None:
    aim: dict[str, Any] = {"targets": 1, "pool": (beyond(), torch.ones(4, dtype=torch.long))} if targeted else {}
    assert far("waterfill", Plane(), images(6), 1000, levels=256, **aim) < 1.25


def test_where_the_goal_bends_away_noise_is_centred_so_that_half_of_it_reaches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    middle = 0.5 + 1.5 * unit((3, 8, 8), seed=7).div(unit((3, 8, 8), seed=7).norm())
    hits: list[float] = []

    def ball(rows: Tensor) -> Tensor:
        inside = ((rows - middle).flatten(1).norm(dim=1) < 0.75).float()
        hits.append(float(inside.sum()))
        return torch.stack([1 - inside, inside], 1)

    of, pool = torch.full((4, 3, 8, 8), 0.5), (middle.repeat(4, 1, 1, 1), torch.ones(4, dtype=torch.long))

    def run() -> float:
        hits.clear()
        result = run_attack(ball, of, [0] * 4, "waterfill", "l2", budget=400, targets=1, pool=pool)
        assert not any(result.errors), result.errors
        assert float(np.median(result.distance_at(400))) < 1.05 * 0.75
        return sum(hits) / (4 * 400)

    assert 0.35 < run() < 0.65
    monkeypatch.setattr(Lift, "follow", lambda *_: None)
    assert run() < 0.2


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_perturbation_hints_at_normals_in_l2_alone(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def distances() -> Tensor:
        return torch.tensor(run_attack(Plane(), images(2), [0, 0], "waterfill", norm, budget=150).distance_at(150))

    hinted = distances()
    monkeypatch.setattr("robustbox.attacks.waterfill.HINT", (0.0, 0.0))
    assert torch.equal(hinted, distances()) == (norm == "linf")


@pytest.mark.parametrize(("norm", "targets"), [("l2", None), ("l2", [1]), ("linf", None)])
def test_estimates_are_filtered_in_l2_untargeted_alone(
    norm: Norm, targets: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distances() -> Tensor:
        run = run_attack(Plane(), images(1), [0], "waterfill", norm, targets=targets, budget=150)
        return torch.tensor(run.distance_at(150))

    filtered = distances()
    monkeypatch.setattr("robustbox.attacks.waterfill.filtered_like", lambda estimate, _: estimate)
    assert torch.equal(filtered, distances()) == (norm == "linf" or targets is not None)


def transcript(n: int, share: bool) -> Tensor:
    """The improvements of the first image's distance."""
    box = Flat((3, 8, 8), AWAY)
    result = run_attack(box, box.images(n), [0] * n, Waterfill(share_prior=share), budget=250, max_rows=1)
    assert not any(result.errors), result.errors
    return torch.tensor([far for _, far in result.traces[0]])


def test_images_share_what_they_learn_only_where_it_is_allowed() -> None:
    alone, company = (transcript(n, False) for n in (1, 4))
    assert torch.equal(alone, company)
    shared, again = (transcript(4, True) for _ in range(2))
    assert torch.equal(shared, again)
    assert not torch.equal(shared[: len(alone)], alone[: len(shared)])


def test_where_a_wrapper_sets_the_noise_at_least_half_of_it_is_white() -> None:
    of, basis = task(torch.full((3, 16, 16), 0.5), "l2", budget=200), Blocks((3, 16, 16), torch.device("cpu"))
    fine = (basis.cycles > 4).repeat(3, 1, 1)
    fine[0] = False  # the prior expects nothing of fine colours
    side = unit((3, 16, 16), seed=2)
    search, answer, shares = Waterfill().search(of), None, []
    while True:
        query = next(search) if answer is None else search.send(answer)
        if query.kind == "probe":
            break
        answer = Answer.of(((query.rows - of.image) * side).sum((1, 2, 3)).gt(0.02).long())
    (knob,) = query.knobs
    assert query.redraw is not None
    own = float(torch.linalg.vector_norm(query.rows - query.rows.mean(0), dim=(1, 2, 3)).mean())
    for times in (None, 0.5, 1.0, 2.0, 8.0):
        knob.value = times and times * own
        rows = query.redraw(list(range(len(query.rows))))
        noise = rows - rows.mean(0)
        length = float(torch.linalg.vector_norm(noise, dim=(1, 2, 3)).mean())
        assert length == pytest.approx(own if times is None else times * own, rel=0.2)
        energy = basis.analyse(noise).square().sum(0)
        shares.append(float(energy[fine].sum() / energy.sum()) / float(fine.float().mean()))
    assert shares[0] < 0.1
    assert shares[1:3] == [pytest.approx(0.5, rel=0.2)] * 2
    assert shares[2] < shares[3] < shares[4]
    assert shares[4] == pytest.approx(1.0, rel=0.1)


def test_it_comes_near_under_noise_that_is_mostly_white() -> None:
    of, blocky = task(torch.full((3, 16, 16), 0.5), "l2", budget=600), unit((3, 4, 4), seed=2)
    normal = blocky.repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2) / 4

    def ask(query: Query) -> Generator[Query, Answer, Answer]:
        for knob in query.knobs:
            knob.value = 0.75  # five times its own
        return (yield query)

    def answers(rows: Tensor) -> Tensor:
        return ((rows - of.image) * normal).sum((1, 2, 3)).gt(0.5).long()

    _, asked = drive(relayed(Waterfill().search(of), ask), of, answers)
    rows = torch.cat([query.rows for query in asked])
    assert float(distance(rows[answers(rows) == 1] - of.image, "l2").min()) < 1.3 * 0.5


def estimates(asked: Sequence[Query]) -> list[list[Query]]:
    """The queries of each estimate."""
    return [list(its) for kind, its in groupby(asked, lambda query: query.kind) if kind == "probe"]


@pytest.mark.parametrize(("targeted", "first"), [(False, 20), (True, 6)])
def test_estimates_grow_with_the_root_of_their_number_and_leave_rows_for_the_last_search(
    targeted: bool, first: int
) -> None:
    box = Flat((3, 8, 8), AWAY)
    aim: dict[str, Any] = {"target": 1, "pool": (beyond(), torch.ones(4, dtype=torch.long))} if targeted else {}
    _, asked = drive(Waterfill().search(of := task(box.images(1)[0], budget=400, **aim)), of, box)
    left, number, searches = 400, 0, []
    for kind, its in groupby(asked, lambda query: query.kind):
        size = sum(len(query.rows) for query in its)
        if kind == "probe":
            number += 1
            if left > 16:  # towards the end estimates of one row follow one another
                assert size == min(int(first * number**0.5), left - 8)
        elif number:
            searches.append(size)
        left -= size
    assert number > 5
    assert np.mean(searches[:-1]) <= 9


def test_noise_has_no_part_along_the_ray_nor_along_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, sample = [], Asked.sample

    def spy(self: Asked, n: int, variances: Tensor, across: Sequence[Tensor], *rest: Any, **more: Any) -> Tensor:
        drawn.append((across, u := sample(self, n, variances, across, *rest, **more)))
        return u

    monkeypatch.setattr(Asked, "sample", spy)
    box = Flat((3, 8, 8), AWAY)
    drive(Waterfill().search(of := task(box.images(1)[0], budget=300)), of, box)
    assert len(drawn) > 4
    for k, (across, u) in enumerate(drawn):
        ray, known = across
        for direction in (ray, known) if k else (ray,):  # nothing is known at first
            assert float(direction.norm()) > 0
            assert (u * direction).sum((1, 2, 3)).abs().max() < 1e-4 * float(u.norm() * direction.norm())
    cosines = []
    for (ray, known), _ in drawn[1:]:
        rest = box.normal - (box.normal * ray).sum() / ray.square().sum() * ray
        cosines.append(float((known * rest).sum() / known.norm() / rest.norm()))
    assert cosines[-1] > 0.12  # by chance 0.07


@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_evidence_fades_by_its_memory_once_an_iteration(memory: float, monkeypatch: pytest.MonkeyPatch) -> None:
    shares, fade = [], Evidence.fade

    def spy(self: Evidence, share: float) -> None:
        before = float(self.precision.sum())
        fade(self, share)
        shares.append(share)
        assert float(self.precision.sum()) == pytest.approx(share * before)

    monkeypatch.setattr(Evidence, "fade", spy)
    box = Flat((3, 8, 8), AWAY)
    _, asked = drive(Waterfill(memory=memory).search(of := task(box.images(1)[0], budget=300)), of, box)
    assert shares == [memory] * len(shares)
    assert len(shares) - len(estimates(asked)) in (0, 1)  # the last one may be beyond the budget


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_noise_is_not_lost_between_grey_levels(norm: Norm) -> None:
    box = Flat((3, 8, 8), 0.1, levels=256)
    image = (box.images(1)[0] * 255).round() / 255
    of = task(image, norm, budget=1500, levels=256)
    _, asked = drive(Waterfill().search(of), of, box)
    told = []
    for its in estimates(asked):
        rows = torch.cat([query.rows for query in its])
        if len(rows) >= 20:
            assert float((rows - rows.mean(0)).std()) > 0.6 / 255  # what the box leaves of 1.3 levels
            told.append(float(box(rows).float().mean()))
    assert len(told) > 4
    assert np.mean([share in (0, 1) for share in told]) < 0.5


@pytest.mark.parametrize("held", [2**20, 0])
def test_rows_that_stay_count_for_the_noise_that_they_had_when_a_wrapper_sets_its_length(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustbox.attacks.noise.HELD_BYTES", held)
    told, add = [], Evidence.add

    def spy(self: Evidence, sums: Tensor, *rest: Any) -> None:
        told.append(sums[0].clone())
        add(self, sums, *rest)

    monkeypatch.setattr(Evidence, "add", spy)
    box = Flat((3, 16, 16), 0.2)
    of = task(box.images(1)[0], budget=2000)
    search, answer = Waterfill().search(of), None
    while (query := next(search) if answer is None else search.send(answer)).kind != "probe":
        answer = Answer.of(box(query.rows))
    rows, half = query.rows.clone(), list(range(len(query.rows) // 2, len(query.rows)))
    (knob,) = query.knobs
    knob.value = float((rows - rows.mean(0)).flatten(1).norm(dim=1).mean())
    assert query.redraw is not None
    rows[half] = query.redraw(half)  # as a wrapper does with rows that were refused
    labels = box(rows)
    search.send(Answer.of(labels))
    signs = 2 * labels.float() - 1
    signs -= signs.mean()
    noise = rows - rows.mean(0)
    heard = Blocks((3, 16, 16), torch.device("cpu")).compose(told[0][None])[0]
    for part in (slice(None, half[0]), slice(half[0], None)):
        sent = torch.einsum("n,nchw->chw", signs[part], noise[part])
        assert float((heard * sent).sum() / heard.norm() / sent.norm()) > 0.5


@pytest.mark.parametrize("options", [{"n0": 0}, {"memory": -0.1}, {"memory": 1.5}])
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Waterfill(**options)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_boundary_through_a_black_image_is_come_as_near_to_as_numbers_tell(norm: Norm) -> None:
    """Nothing stops a search there but the smallest number, and squares are 0 long before."""

    def classes(rows: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((rows > 0).flatten(1).any(1).long(), 2).float()

    run = run_attack(classes, torch.zeros(1, 3, 8, 8), [0], "waterfill", norm, budget=400)
    assert run.errors == [None]
    assert 0 < run.distance_at(400)[0] < 1e-9


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_target_of_which_no_image_is_at_hand_is_come_near_to(norm: Norm) -> None:
    """Digits towards the next class, with no pool at all, beside an attack that starts from the same `find_start`."""
    model = load_model("digits-cnn")
    digits, labels = (part[:12] for part in load_data("digits")[:2])
    aim = {"targets": (labels + 1) % 10, "budget": 300}
    ours = run_attack(model, digits, labels, "waterfill", norm, **aim)
    other = run_attack(model, digits, labels, "hop-skip-jump", norm, **aim)
    assert not any(ours.errors), ours.errors
    assert np.isfinite(ours.distance_at(300)).sum() >= 10
    assert median(ours.distance_at(300)) < 0.9 * median(other.distance_at(300))


def test_in_linf_a_boundary_that_bends_is_followed() -> None:
    """Goals are ellipsoids around a target image, whose nearest points lie on the way there, cut off at a least radius.

    Of what the climb leaves to gain, normals are to gain nearly half: noise of the usual length leaves the ellipsoid.
    """
    radii, climbs, ends = torch.linspace(0, 1, 10_001)[:, None], [], []
    for size in (0.3, 0.5):
        for seed in range(3):
            draws = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
            image, centre, weights = (
                0.5 + 0.1 * (draws[0] - 0.5),
                (draws[1] > 0.5).float(),
                (2.4 * draws[2] - 1.2).exp(),
            )
            within = size * float(((image - centre) * weights).norm())

            def inside(
                rows: Tensor, centre: Tensor = centre, weights: Tensor = weights, within: float = within
            ) -> Tensor:
                near = (((rows - centre) * weights).flatten(1).norm(dim=1) < within).float()
                return torch.stack([1 - near, near], 1)

            way = (centre - image).flatten()
            left = (way - torch.minimum(torch.maximum(way, -radii), radii)) * weights.flatten()
            least = float(radii[left.norm(dim=1).lt(within).nonzero()[0, 0], 0])
            pool = centre[None], torch.ones(1, dtype=torch.long)
            result = run_attack(inside, image[None], [0], "waterfill", "linf", budget=1000, targets=[1], pool=pool)
            assert not any(result.errors), result.errors
            climbs.append(float(result.distance_at(50)[0]) / least - 1)
            ends.append(float(result.distance_at(1000)[0]) / least - 1)
    assert min(ends) > -0.001
    assert sum(ends) < 0.6 * sum(climbs)
