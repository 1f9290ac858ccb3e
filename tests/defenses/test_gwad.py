"""GWAD-style detection: its cosines by definition, what it takes for benign, and when it speaks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_1samp

from robustbox import registry
from robustbox.defenses.gate import StatefulGate
from robustbox.defenses.gwad import BENIGN, GWAD, StepMemory, from_benign
from robustbox.errors import InputError
from tests.toys import HalfSpace

Probes = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def test_the_distance_is_that_of_kolmogorov_and_smirnov() -> None:
    cosines = np.random.default_rng(0).uniform(-1, 0.5, 256)
    levels = np.linspace(0, 1, len(BENIGN))
    expected = ks_1samp(cosines, lambda c: np.interp(c, BENIGN, levels)).statistic
    assert from_benign(cosines) == pytest.approx(expected, abs=1e-12)
    assert from_benign(np.quantile(BENIGN, np.linspace(0, 1, 999))) < 0.01


def test_cosines_of_steps_of_mean_free_rows() -> None:
    rows = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows[4] = rows[3]  # a step of none
    memory = StepMemory(length=10, threshold=0.5)
    for print in GWAD().prints(rows, [None] * 6):
        memory.store(print, memory.judge(print))
    flat = rows.flatten(1).double()
    steps = (flat - flat.mean(dim=1, keepdim=True)).diff(dim=0)
    expected = [
        0.0 if not (a.any() and b.any()) else float(a @ b / a.norm() / b.norm()) for a, b in itertools.pairwise(steps)
    ]
    assert list(memory._cosines) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "probes",
    [
        lambda image, noise: image + 0.05 * noise,  # far beyond what pairs of fingerprints show
        lambda image, noise: image + 0.05 * torch.stack((noise, -noise), 1).flatten(0, 1)[: len(noise)],
        lambda image, noise: image + 0.002 * noise.cumsum(0),
    ],
    ids=["independent", "antithetic", "walk"],
)
def test_it_speaks_at_the_first_full_window_and_not_before(probes: Probes) -> None:
    noise = torch.randn(80, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = probes(torch.full((3, 32, 32), 0.5), noise).clamp(0, 1)
    box = GWAD(length=64).wrap(HalfSpace(), 0)
    assert isinstance(box, StatefulGate)
    box.answer(rows, torch.zeros(80, dtype=torch.long))
    assert box.standing(0).first_hit == 66
    assert box.standing(0).hits == 15


def test_natural_streams_are_not_refused(real_data: Path) -> None:
    photos = torch.from_numpy(np.load(real_data / "cifar10_test_dev.npz")["images"][:2000])
    rows = photos.permute(0, 3, 1, 2).float() / 255
    digits = torch.from_numpy(np.load(real_data / "mnist_test_dev.npz")["images"][:1000])[:, None].float() / 255
    for batch in (rows, digits):
        answer = GWAD().wrap(HalfSpace(), 0).answer(batch, torch.zeros(len(batch), dtype=torch.long))
        assert not answer.status.any()


def test_options() -> None:
    with pytest.raises(InputError, match="length"):
        GWAD(length=0)
    with pytest.raises(InputError, match="threshold"):
        GWAD(threshold=1.0)
    assert registry.load("defenses", "gwad") is GWAD
