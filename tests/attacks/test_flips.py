"""Flips: rectangles are turned over at the radius that is asked, planted signs are found, and the cost is what is said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robustbox.attacks import flips
from robustbox.attacks.flips import AREA, FLIPS, LARGEST, START, flip
from robustbox.attacks.nearer import NARROWER
from robustbox.distances import distance
from tests.attacks.analytic import drive, task

FAR = 0.2


@pytest.mark.parametrize(("end_at", "rows"), [(50.0, 500), (FLIPS, 1000)])
def test_planted_signs_are_found(end_at: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plane whose normal is turned over in 0.45 of the image: the corner of all signs is at a tenth of the distance."""
    image, normal = torch.full((3, 96, 96), 0.5), torch.ones(3, 96, 96)
    normal[..., 53:] = -1
    of = task(image, "linf", budget=2000)
    monkeypatch.setattr(flips, "FLIPS", end_at)

    def label(rows: Tensor) -> Tensor:
        return ((rows - image).mul(normal).mean((1, 2, 3)) > 0.103 * FAR).long()

    row = (image + FAR)[None]
    end, asked = drive(flip(of, row), of, label)
    assert int(label(row)) == int(label(end)) == 1
    assert float(distance(end - image, "linf")) < 0.25 * FAR
    assert min(float(distance(q.rows - image, "linf")) for q in asked[:350] if label(q.rows)) < 0.25 * FAR
    assert len(asked) < rows


def test_what_is_turned_over_is_a_rectangle_of_one_channel_or_of_all() -> None:
    image, channels = torch.full((3, 40, 56), 0.5), set()
    for seed in range(5):
        of = task(image, "linf", seed)
        _, asked = drive(flip(of, (image + FAR)[None]), of, lambda rows: torch.zeros(len(rows), dtype=torch.long))
        for query in asked:
            change = query.rows[0] - image
            radius, turned = change.abs().max(), change < 0
            assert torch.allclose(change.abs(), radius.expand_as(change))
            places, own = turned.any(0), turned.any(2).any(1)
            assert places.sum() == places.any(1).sum() * places.any(0).sum()  # a rectangle: its rows times its columns
            assert torch.equal(turned, own[:, None, None] & places)
            channels.add(int(own.sum()))
            low, high = (min(share * (1 - float(radius) / FAR), LARGEST) for share in AREA)
            if low * places.numel() >= 8:
                assert 0.7 * low < float(places.double().mean()) < 1.3 * high
            tall, wide = int(places.any(1).sum()), int(places.any(0).sum())  # whole pixels: off by less than one
            assert (tall + 1) * (wide + 1) > low * places.numel()
            assert (tall - 1) * (wide - 1) < high * places.numel()
    assert channels == {1, 3}


def test_rounded_rows_get_nearer_by_less_than_a_level() -> None:
    """A boundary at 2.4 grey levels for the right signs, whose change at the start is of 24, all upwards."""
    image, normal, ends = torch.full((3, 32, 32), 128 / 255), torch.ones(3, 32, 32), 0
    normal[..., 18:] = -1

    def label(rows: Tensor) -> Tensor:
        return ((rows - image).mul(normal).mean((1, 2, 3)) > 2.4 / 255).long()

    for seed in range(5):
        of = task(image, "linf", seed, levels=256)
        end, asked = drive(flip(of, (image + 24 / 255)[None]), of, label)
        for query in asked:
            moved = (query.rows - image) * 255
            assert torch.allclose(moved, moved.round(), atol=1e-3)
        ends += round(255 * float(distance(end - image, "linf")))
    assert ends < 5 * 6  # steps of whole levels end at 6 to 8


@pytest.mark.parametrize("side", [2, 4, 18, 32])
def test_a_climb_that_finds_nothing_asks_what_it_says(side: int) -> None:
    image = torch.full((3, side, side), 0.5)
    of, row = task(image, "linf"), (image + FAR)[None]
    end, asked = drive(flip(of, row), of, lambda rows: torch.zeros(len(rows), dtype=torch.long))
    assert torch.equal(end, row)
    least = FLIPS / image.numel()
    assert len(asked) == (math.ceil(math.log(least / START) / math.log(NARROWER)) if least <= START else 0)


def test_what_the_box_cut_off_can_be_turned_over() -> None:
    """Half of a black image was to be made darker: turned over, it is made brighter."""
    image = torch.zeros(3, 32, 32)
    row = image[None].clone()
    row[..., :16] = FAR
    of = task(image, "linf", budget=500)
    end, _ = drive(flip(of, row), of, lambda rows: (rows.mean((1, 2, 3)) > FAR / 2 - 1e-4).long())
    assert float(distance(end, "linf")) < 0.8 * FAR
    assert float(end[..., 16:].max()) > 0.5 * FAR
