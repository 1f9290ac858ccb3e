"""QPA: families, their evidence by hand, and probes that each pair threshold would let through."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import gamma

from robustbox import registry
from robustbox.defenses.memory import Verdict
from robustbox.defenses.qpa import QPA, UNRELATED, FamilyMemory, unrelated
from robustbox.errors import InputError
from tests.toys import HalfSpace


def tokens(*parts: range) -> np.ndarray:
    return np.concatenate([np.array(part, dtype=np.int64) for part in parts])


def test_unrelated_falls_on_beyond_what_was_measured() -> None:
    assert unrelated(0) == 1
    values = [unrelated(m) for m in range(51)]
    assert all(a > b > 0 for a, b in itertools.pairwise(values))
    assert unrelated(len(UNRELATED)) == pytest.approx(UNRELATED[-1] * 0.6)


def test_the_evidence_of_a_family_is_fishers() -> None:
    """Ten strangers, then a chain of relatives that share 4 hashes each with the one before: alert when Fisher says so."""
    memory = FamilyMemory(link=0.01, alpha=0.01, smallest=3)
    hits, expected = [], []
    for k in range(10):
        print = tokens(range(1000 * k, 1000 * k + 50))
        verdict = memory.judge(print)
        assert verdict == Verdict(False, -1, 0)
        memory.store(print, verdict)
    evidence = 0.0
    for k in range(1, 8):
        print = (
            tokens(range(4 * k - 4, 4 * k), range(-100 * k - 46, -100 * k))
            if k == 1
            else tokens(range(-100 * (k - 1) - 46, -100 * (k - 1) - 42), range(-100 * k - 46, -100 * k))
        )
        verdict = memory.judge(print)
        assert verdict.likeness == 4
        rows = 9 + k
        evidence -= math.log(rows * unrelated(4))
        hits.append(verdict.hit)
        expected.append(k >= 2 and gamma.sf(evidence, k) <= 0.01 / rows)
        memory.store(print, verdict)
    expected = [any(expected[: k + 1]) for k in range(len(expected))]  # an alert stays
    assert hits == expected
    assert 0 < sum(hits) < len(hits)
    # Another family is not concerned, nor one who resembles nobody.
    assert not memory.judge(tokens(range(9000, 9050))).hit
    assert not memory.judge(tokens(range(50_000, 50_050))).hit


def test_everybody_may_send_a_picture_twice_but_not_all_day() -> None:
    box = QPA().wrap(HalfSpace(), 0)
    rows = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows[10], rows[15], rows[19] = rows[3], rows[3], rows[5]
    status = box.answer(rows, torch.zeros(20, dtype=torch.long)).status.tolist()
    assert [k for k, refused in enumerate(status) if refused] == [15]


def test_probes_far_below_every_pair_threshold_are_refused(real_data: Path) -> None:
    """Noise of 0.02 a pixel: Blacklight refuses none of them, QPA nearly all; of natural images almost none."""
    photos = torch.from_numpy(np.load(real_data / "cifar10_test_dev.npz")["images"][:1500])
    rows = photos.permute(0, 3, 1, 2).float() / 255
    refused = {}
    for name in ("blacklight", "qpa"):
        shares = []
        for k in range(4):
            noise = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(k))
            box = registry.load("defenses", name)().wrap(HalfSpace(), k)
            answer = box.answer((rows[k] + 0.02 * noise).clamp(0, 1), torch.zeros(60, dtype=torch.long))
            shares.append(float(answer.status.float().mean()))
        refused[name] = np.mean(shares)
    assert refused["blacklight"] == 0
    assert refused["qpa"] > 0.8
    benign = QPA().wrap(HalfSpace(), 0).answer(rows, torch.zeros(1500, dtype=torch.long))
    assert int(benign.status.sum()) <= 8


@pytest.mark.parametrize("options", [{"link": 0.0}, {"alpha": 1.0}, {"smallest": 1}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        QPA(**options)  # type: ignore[arg-type]
    assert registry.load("defenses", "qpa") is QPA
