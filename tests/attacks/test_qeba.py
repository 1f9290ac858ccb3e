"""QEBA: its subspaces, and that it is HopSkipJump with other noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks import qeba
from robustbox.attacks.hop_skip_jump import HopSkipJump
from robustbox.attacks.qeba import QEBA, Basis, bilinear, principal_components
from robustbox.errors import InputError
from robustbox.protocol import Answer, Query
from tests.attacks.analytic import Flat, drive, task, unit

SHAPE = (3, 8, 8)


def spread(rank: int, n: int = 40, shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    """A pool of images that differ in `rank` directions, and these [rank,d], orthonormal, by falling variance."""
    d = int(np.prod(shape))
    g = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(d, rank, generator=g)).Q.T
    weights = torch.randn(n, rank, generator=g) * torch.linspace(0.3, 0.1, rank)
    return (0.5 + 0.3 * weights @ basis).view(n, *shape), basis


def first_estimate(attack: HopSkipJump, **fields: Any) -> Query:
    flat = Flat(SHAPE, 0.2)
    of = task(flat.images(1)[0], budget=10_000, **fields)
    attack.check(of)
    search = attack.search(of)
    query = next(search)
    while query.kind != "probe":
        query = search.send(Answer.of(flat(query.rows)))
    return query


def rank(rows: Tensor) -> int:
    noise = (rows - rows.mean(dim=0)).flatten(1).double()
    values = torch.linalg.svdvals(noise)
    return int((values > 1e-3 * values[0]).sum())


@pytest.mark.parametrize(("subspace", "dims"), [("dct", 3 * 4 * 4), ("resize", 3 * 4 * 4), ("pca", 10)])
def test_noise_knob_and_redraw_stay_in_the_subspace(subspace: Basis, dims: int) -> None:
    pool, basis = spread(10)
    query = first_estimate(QEBA(subspace=subspace, n0=200), pool=(pool, torch.zeros(len(pool)).long()))
    (knob,) = query.knobs
    assert query.redraw is not None
    for rows in (query.rows, knob.draw(0.3, 200), query.redraw(list(range(200)))):
        assert rank(rows) == dims
    drawn = knob.draw(0.3, 400)
    noise = (drawn - drawn.mean(dim=0)).flatten(1)
    assert noise.norm(dim=1).square().mean().sqrt() == pytest.approx(0.3, rel=0.05)
    if subspace == "pca":
        assert torch.allclose(noise @ basis.T @ basis, noise, atol=1e-4)


def test_the_enlargement_is_linear_between_cells() -> None:
    ramp = bilinear(4, 8) @ torch.arange(4.0)
    steps = ramp.diff()[1:-1]  # the ends are held
    assert torch.allclose(steps, steps[0].expand_as(steps), rtol=1e-5)
    assert bilinear(4, 8).square().sum(dim=1).mean() == pytest.approx(1)


def test_components_are_orthonormal_and_by_falling_variance() -> None:
    pool, basis = spread(6, n=200)
    found = principal_components(pool)
    assert found.shape == (6, 192)
    assert torch.allclose(found @ found.T, torch.eye(6), atol=1e-4)
    assert torch.allclose(found @ basis.T @ basis, found, atol=1e-4)
    variance = ((pool.flatten(1) - pool.flatten(1).mean(dim=0)) @ found.T).var(dim=0)
    assert (variance.diff() < 0).all()
    few = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert len(principal_components(few)) == 4


def test_components_are_computed_once_a_run_and_anew_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = qeba.principal_components

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return real(images)

    monkeypatch.setattr(qeba, "principal_components", counted)
    flat, (pool, _), attack = Flat(SHAPE, 0.2), spread(10), QEBA(subspace="pca")
    for run in (1, 2):
        result = run_attack(flat, flat.images(3), [0] * 3, attack=attack, pool=(pool, [0] * len(pool)), budget=60)
        assert result.errors == [None] * 3
        assert len(calls) == run


def test_components_are_forgotten_with_the_pool() -> None:
    pool, _ = spread(4)
    of = task(torch.full(SHAPE, 0.5), pool=(pool, torch.zeros(len(pool)).long()))
    before = len(qeba._COMPONENTS)
    QEBA(subspace="pca").check(of)
    assert len(qeba._COMPONENTS) == before + 1
    del pool, of
    assert len(qeba._COMPONENTS) == before


@pytest.mark.parametrize("pool", [None, 1, "alike"])
def test_pca_without_images_is_refused_before_a_query(pool: int | str | None) -> None:
    flat = Flat(SHAPE, 0.2)
    images = {None: None, 1: spread(2)[0][:1], "alike": torch.full((5, *SHAPE), 0.3)}[pool]
    given = None if images is None else (images, [0] * len(images))
    with pytest.raises(InputError, match="subspace pca needs"):
        run_attack(flat, flat.images(1), [0], attack=QEBA(subspace="pca"), pool=given, budget=50)


@pytest.mark.parametrize("subspace", ["dct", "resize", "pca"])
def test_a_subspace_that_holds_the_normal_needs_far_fewer_queries(subspace: Basis) -> None:
    shape = (3, 16, 16)
    flat = Flat(shape, 0.2)
    pool, _ = spread(40, n=120, shape=shape)
    attack = QEBA(subspace=subspace, factor=4)
    of = task(torch.full(shape, 0.5), pool=(pool, torch.zeros(len(pool)).long()))
    attack.check(of)
    inside = attack._sampler(of)(1)[0]
    flat.normal = inside / inside.norm()
    images = torch.full((4, *shape), 0.5) + 1e-4 * torch.arange(4).view(4, 1, 1, 1)
    setting = {"pool": (pool, [0] * len(pool)), "budget": 700}
    reduced, full = (
        np.median(run_attack(flat, images, [0] * 4, attack=a, **setting).distance) / 0.2
        for a in (attack, HopSkipJump())
    )
    assert reduced < 1.3
    assert full > 1.15 * reduced


def test_with_a_whole_space_it_is_hop_skip_jump() -> None:
    flat = Flat(SHAPE, 0.2)
    transcripts = []
    for attack in (QEBA(factor=1), HopSkipJump()):
        of = task(flat.images(1)[0], "linf", budget=300)
        transcripts.append(torch.cat([query.rows for query in drive(attack.search(of), of, flat)[1]]))
    assert torch.equal(*transcripts)


def test_images_smaller_than_the_factor_work() -> None:
    normal = unit((1, 2, 3), 3)

    def model(rows: Tensor) -> Tensor:
        return (((rows - 0.5) * normal).sum(dim=(1, 2, 3)).abs() > 0.05).long()

    for subspace in ("dct", "resize"):
        image = torch.full((1, 1, 2, 3), 0.5)
        result = run_attack(model, image, [0], attack=QEBA(subspace=subspace, factor=8), budget=200)
        assert result.errors == [None]


def test_bad_options_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="unknown subspace 'resise': did you mean resize"):
        QEBA(subspace="resise")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^factor must be at least 1, got 0.5$"):
        QEBA(factor=0.5)
    with pytest.raises(InputError, match=r"^n0 must be at least 1, got 0$"):
        QEBA(n0=0)
