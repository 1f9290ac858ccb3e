"""PIHA: each stage against its definition, the two modes, grey images, and the look-up against brute force."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustbox import registry
from robustbox.defenses.memory import Verdict
from robustbox.defenses.piha import PIHA, CodeMemory, blurred, hue, patterns
from robustbox.errors import InputError
from tests.toys import HalfSpace


def colours(n: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_the_blur_is_a_gaussian_with_reflected_border() -> None:
    rows = colours(1).double()
    kernel = np.exp(-0.5 * np.array([-1, 0, 1]) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(rows[0].numpy(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    expected = sum(kernel[i] * kernel[j] * padded[:, i : i + 32, j : j + 32] for i in range(3) for j in range(3))
    np.testing.assert_allclose(blurred(rows)[0].numpy(), expected, atol=1e-12)


def test_the_hue_is_that_of_hsv() -> None:
    rows = colours(1, side=8).double()
    rows[0, :, 0, 0] = 0.3  # grey
    expected = [360 * colorsys.rgb_to_hsv(*pixel)[0] for pixel in rows[0].flatten(1).T.tolist()]
    assert hue(rows).flatten().tolist() == pytest.approx(expected, abs=1e-3)
    assert hue(rows)[0, 0, 0] == 0


def test_the_patterns_are_local_binary_ones() -> None:
    """Against the textbook: neighbours on a circle of radius 1, bilinear, nothing outside."""
    sums = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = np.pad(sums[0].numpy(), 2)
    for y in range(5):
        for x in range(6):
            code = 0
            for p in range(8):
                down = round(-math.sin(2 * math.pi * p / 8), 5) + y + 2
                right = round(math.cos(2 * math.pi * p / 8), 5) + x + 2
                top, left = math.floor(down), math.floor(right)
                a, b = down - top, right - left
                corner = padded[top : top + 2, left : left + 2]
                value = (1 - a) * ((1 - b) * corner[0, 0] + b * corner[0, 1]) + a * (
                    (1 - b) * corner[1, 0] + b * corner[1, 1]
                )
                code |= int(value >= padded[y + 2, x + 2]) << p
            assert patterns(sums, torch.zeros(1))[0, y, x] == code


@pytest.mark.parametrize(
    ("side", "parity", "fixed"), [(32, 25, 25), (224, 33**2, 32**2), (256, 37**2, 37**2), (21, 16, 9)]
)
def test_the_spurious_block_stands_in_parity_mode_only(side: int, parity: int, fixed: int) -> None:
    """P16: 7 divides 224, and the published code adds a blank row and column of blocks there."""
    rows = colours(1, side)
    for mode, blocks in (("parity", parity), ("fixed", fixed)):
        (codes,) = PIHA(mode=mode).prints(rows, [None])  # type: ignore[arg-type]
        assert len(codes) == blocks


def test_flat_regions_do_not_hang_on_rounding_in_fixed_mode() -> None:
    flat = torch.full((1, 3, 32, 32), 0.2)
    flat[:, 0], flat[:, 1] = 0.7, 0.4
    shaken = flat + 1e-9 * torch.randn(flat.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (codes,), (other,) = (PIHA().prints(rows, [None]) for rows in (flat, shaken))
    assert codes.tolist() == other.tolist()


def test_grey_images_collide_and_are_refused_where_they_can_be_told() -> None:
    """P16."""
    grey = colours(2)[:, :1].expand(-1, 3, -1, -1)
    first, second = PIHA().prints(grey, [None, None])
    assert first.tolist() == second.tolist()
    with pytest.raises(InputError, match="have no hue"):
        PIHA().wrap(HalfSpace(), 0).answer(colours(1)[:, :1], torch.zeros(1, dtype=torch.long))


def test_repeats_and_near_copies_are_hits_and_strangers_are_not() -> None:
    """P4; and that no dummy row stands in the table: the hash of a black image does not hide a hit."""
    rows = colours(3)
    box = PIHA().wrap(HalfSpace(), 0)
    black = torch.zeros(1, 3, 32, 32)
    queries = torch.cat((black, rows, rows[:1], black, 0.98 * rows[1:2]))
    assert box.answer(queries, torch.zeros(7, dtype=torch.long)).status.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_fingerprints_do_not_depend_on_the_batch() -> None:
    rows = colours(20)
    together = list(PIHA().prints(rows, [None] * 20))
    for k in (0, 9, 19):
        assert next(iter(PIHA().prints(rows[k : k + 1], [None]))).tolist() == together[k].tolist()


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=21, max_size=21), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.05, 0.1, 0.2]),
    st.integers(0, 30),
)
def test_the_look_up_is_exact(strings: list[list[int]], threshold: float, gone: int) -> None:
    """Whether a stored string differs in at most so many symbols, as brute force has it."""
    memory = CodeMemory(threshold)
    codes = [np.array(string, dtype=np.uint8) for string in strings]
    for number, code in enumerate(codes[:-1]):
        assert memory.store(code, Verdict(False, -1)) == number
    gone = min(gone, len(codes) - 1)
    memory.forget(gone)
    allowed = math.floor(threshold * 21 + 1e-9)
    near = [k for k, code in enumerate(codes[:-1]) if k >= gone and (code != codes[-1]).sum() <= allowed]
    verdict = memory.judge(codes[-1])
    assert verdict.hit is bool(near)
    assert verdict.match in (near or [-1])


def test_allowed_differences_are_the_published_ones() -> None:
    for blocks, allowed in ((25, 1), (1089, 54), (1369, 68)):
        memory = CodeMemory(0.05)
        code = np.zeros(blocks, dtype=np.uint8)
        memory.store(code, Verdict(False, -1))
        for differing, hit in ((allowed, True), (allowed + 1, False)):
            other = code.copy()
            other[-differing:] = 9
            assert memory.judge(other).hit is hit


def test_it_is_registered() -> None:
    assert registry.load("defenses", "piha") is PIHA
    with pytest.raises(InputError, match="threshold"):
        PIHA(threshold=1.0)
