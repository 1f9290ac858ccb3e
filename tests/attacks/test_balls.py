"""Rows inside the ball: nothing outside after rounding, nothing given away that need not be."""

from __future__ import annotations

import pytest
import torch

from robustbox.attacks.balls import check_visible, fill, fit, shorten, whole
from robustbox.attacks.levels import dither
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import Norm

from .analytic import task

IMAGE = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255
DELTAS = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 0, 6).view(
    -1, 1, 1, 1
)


@pytest.mark.parametrize(
    ("norm", "epsilon"), [("linf", 0.03), ("linf", 8 / 255), ("l2", 0.3), ("l2", 0.05), ("l2", 2.0)]
)
@pytest.mark.parametrize("levels", [None, 256, 16])
def test_rows_are_in_box_and_ball_also_after_rounding(norm: Norm, epsilon: float, levels: int | None) -> None:
    image = IMAGE if levels != 16 else (IMAGE * 15).round() / 15
    rows = fit(task(image, norm, epsilon=epsilon, levels=levels), DELTAS)
    assert rows.min() >= 0
    assert rows.max() <= 1
    if levels:
        rows = (rows * (levels - 1)).round() / (levels - 1)
    far = distance(rows - image, norm)
    assert (far <= epsilon * (1 + 1e-5)).all()


def test_what_fits_is_left_as_it_is() -> None:
    image = torch.full((1, 4, 4), 0.5)
    deltas = torch.full((1, 1, 4, 4), 0.01)
    for norm, epsilon in (("linf", 0.01), ("l2", 0.041), ("l2", None)):
        rows = fit(task(image, norm, epsilon=epsilon), deltas)  # type: ignore[arg-type]
        assert torch.allclose(rows, image + 0.01)


def test_rounding_in_l2_costs_little_of_a_large_ball() -> None:
    image = (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(2)) * 128 + 64).round() / 255
    for epsilon in (0.5, 1.0):
        rows = fit(task(image, epsilon=epsilon, levels=256), DELTAS[-1:])
        assert distance(rows - image, "l2") >= 0.97 * epsilon
        assert torch.allclose(rows * 255, (rows * 255).round(), atol=1e-3)


@pytest.mark.parametrize("levels", [256, 16])
@pytest.mark.parametrize("epsilon", [0.07, 0.2, 1.5])
@pytest.mark.parametrize("kind", ["noise", "signs", "long"])
def test_whole_levels_fill_a_ball_however_small_their_share_of_one(kind: str, epsilon: float, levels: int) -> None:
    """A tenth of a grey level a value and more: noise, values of one size, and noise that is much too long."""
    of = task(IMAGE, epsilon=epsilon, levels=levels)
    deltas = DELTAS[-1:].repeat(3, 1, 1, 1) * (100 if kind == "long" else 1)
    deltas = deltas.sign() if kind == "signs" else deltas
    thresholds = dither(of)
    assert thresholds is not None
    lengths = torch.tensor([epsilon, epsilon / 2, 0.0])
    filled = fill(of, deltas, lengths, thresholds)
    torch.testing.assert_close(filled * (levels - 1), (filled * (levels - 1)).round(), atol=1e-3, rtol=0)
    far = distance(filled, "l2")
    level = 1 / (levels - 1)
    for length, found in zip(lengths.tolist(), far.tolist(), strict=True):
        assert found <= length * (1 + 1e-5)
        assert found**2 >= 0.95 * length**2 - level**2
    assert (filled * deltas >= 0).all()


def test_what_is_of_whole_levels_already_stays_as_it_is() -> None:
    deltas = torch.tensor([3.0, -2.0, 0.0, 1.0]).view(1, 1, 2, 2) / 255
    of = task(torch.full((1, 2, 2), 0.6), levels=256)
    thresholds = dither(of)
    assert thresholds is not None
    torch.testing.assert_close(fill(of, deltas, distance(deltas, "l2"), thresholds), deltas)
    none = torch.zeros_like(deltas)
    assert fill(of, none, torch.tensor([1.0]), thresholds).equal(none)


def test_values_are_cut_off_in_linf_and_scaled_in_l2() -> None:
    image = torch.full((1, 1, 2), 0.5)
    deltas = torch.tensor([0.3, 0.4]).view(1, 1, 1, 2)
    assert shorten(task(image, "linf", epsilon=0.35), deltas).flatten().tolist() == pytest.approx([0.3, 0.35])
    assert shorten(task(image, "l2", epsilon=0.25), deltas).flatten().tolist() == pytest.approx([0.15, 0.2])
    assert shorten(task(image, "l2"), deltas).equal(deltas)


def test_sizes_are_rounded_down_to_whole_levels() -> None:
    of = task(torch.zeros(1, 2, 2), levels=256)
    assert whole(of, 0.03) == 7 / 255
    assert whole(of, 8 / 255) == pytest.approx(8 / 255)
    assert whole(of, float(torch.tensor(8 / 255) - 1e-9)) == 8 / 255  # stored a little short
    assert whole(of, 0.0549) == 13 / 255  # 14 levels would be outside
    assert whole(of, 0.001) == 0
    assert whole(task(torch.zeros(1, 2, 2)), 0.03) == 0.03


def test_changes_that_rounding_hides_are_refused() -> None:
    of = task(torch.zeros(1, 2, 2), levels=256)
    check_visible(of, 1 / 255, "step")
    check_visible(task(torch.zeros(1, 2, 2)), 1e-6, "step")
    with pytest.raises(
        InputError, match=r"^step=0\.003 changes a value by 0\.003, which rounding to 256 grey levels hides: "
    ):
        check_visible(of, 0.003, "step=0.003")
