"""Blacklight: the authors' algorithm to the match, its law in both hash modes, and its known weaknesses."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import registry
from robustbox.defenses.blacklight import Blacklight, Secret, window_hashes
from robustbox.defenses.blacklight_keyed import BlacklightKeyed
from robustbox.defenses.index import Tokens
from robustbox.errors import InputError
from robustbox.protocol import Answer, BlackBox

SHAPE = (3, 32, 32)


class Grey(BlackBox):
    """Answers every row with class 0."""

    name, classes, scores = "grey", 2, "none"

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        return Answer.of(torch.zeros(len(rows), dtype=torch.long))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes(n: int, side: int = 32, seed: int = 0) -> Tensor:
    """Images [n,3,side,side] with smooth regions, edges and texture: the statistics that a window of pixels sees."""
    stream = generator(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=stream)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    texture = 0.04 * torch.randn(n, 3, side, side, generator=stream)
    return ((smooth + texture).clamp(0, 1) * 255).round() / 255


def sketches(gate: Blacklight | BlacklightKeyed, rows: Tensor, seed: int = 0) -> list[Tokens]:
    shape = (rows.shape[1], rows.shape[2], rows.shape[3])
    return list(gate.prints(rows, [gate.secret(shape, generator(seed))] * len(rows)))  # type: ignore[arg-type]


def matches(first: list[Tokens], second: list[Tokens]) -> list[int]:
    return [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(first, second, strict=True)]


def noisy(rows: Tensor, sigma: float, seed: int = 1) -> Tensor:
    return (rows + sigma * torch.randn(rows.shape, generator=generator(seed))).clamp(0, 1)


def refused(gate: str, rows: Tensor, **options: Any) -> list[bool]:
    box = registry.load("defenses", gate)(**options).wrap(Grey(), 0)
    return [bool(status) for status in box.answer(rows, torch.zeros(len(rows), dtype=torch.long)).status]


def published(row: Tensor, salt: Tensor, width: int, step: int, layout: str, modulus: int) -> set[str]:
    """The authors' fingerprint, as their paper and code have it, one window at a time."""
    values = (row.permute(1, 2, 0) if layout == "hwc" else row).flatten().numpy() * np.float32(255)
    salted = (values + salt.numpy()) % modulus if len(salt) else values % modulus
    symbols = (np.around(salted / 50) * 50).astype(np.int16)
    hashes = {
        hashlib.sha256(symbols[i * step : i * step + width]).hexdigest()[::-1]
        for i in range(int((len(symbols) - width + 1) / step))
    }
    return set(sorted(hashes, reverse=True)[:50])


@pytest.mark.parametrize("salt", ["float", "integer", "none"])
@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("modulus", [255, 256])
def test_sha_mode_matches_as_the_published_algorithm(salt: Any, layout: Any, modulus: Any) -> None:
    """P1: equal match counts on fixed rows, for every option that changes the fingerprint."""
    gate = Blacklight(hash="sha256", salt=salt, layout=layout, modulus=modulus, step=3)
    secret = gate.secret(SHAPE, generator(3))
    rows = scenes(3)
    others = [noisy(rows, 0.004), noisy(rows, 0.012), rows.roll(3, -1)]
    ours = [gate.prints(batch, [secret] * 3) for batch in (rows, *others)]
    truth = [[published(row, secret.salt, 20, 3, layout, modulus) for row in batch] for batch in (rows, *others)]
    for mine, theirs in zip(ours, truth, strict=True):
        assert [len(tokens) for tokens in mine] == [len(hashes) for hashes in theirs]
        assert matches(ours[0], mine) == [len(a & b) for a, b in zip(truth[0], theirs, strict=True)]


@pytest.mark.parametrize("sigma", [0.003, 0.0084])
def test_both_hashes_make_sketches_of_one_law(sigma: float) -> None:
    """P1: their mean matches over 100 pairs agree within 3."""
    rows = scenes(100)
    means = []
    for hash in ("keyed", "sha256"):
        gate = Blacklight(hash=hash, step=2)  # type: ignore[arg-type]
        means.append(np.mean(matches(sketches(gate, rows), sketches(gate, noisy(rows, sigma)))))
    assert abs(means[0] - means[1]) < 3


def test_windows_of_one_word_never_collide_and_others_hardly() -> None:
    """Equal hashes where windows are equal, and only there: against the windows themselves."""
    symbols = torch.randint(0, 6, (2, 400), generator=generator(), dtype=torch.int32)
    symbols[:, 200:] = symbols[:, :200]
    for width, step in ((20, 1), (7, 2), (50, 3), (24, 25)):
        hashes = window_hashes(symbols, torch.tensor([5, 5]), width, step, bits=3)
        count = (400 - width + 1) // step
        windows = [tuple(row[i * step : i * step + width].tolist()) for row in symbols for i in range(count)]
        assert hashes.shape == (2, count)
        names = dict(zip(windows, hashes.flatten().tolist(), strict=True))
        assert [names[window] for window in windows] == hashes.flatten().tolist()
        assert len(set(names.values())) == len(names)
    other = window_hashes(symbols, torch.tensor([5, 6]), 20, 1, bits=3)
    assert not set(other[1].tolist()) & set(window_hashes(symbols, torch.tensor([5, 5]), 20, 1, bits=3)[1].tolist())


def test_the_sketch_is_the_largest_different_hashes_in_order() -> None:
    flat = torch.full((1, *SHAPE), 0.4)
    assert len(sketches(Blacklight(salt="none"), flat)[0]) == 1  # one window, three thousand times
    flat[:, :, :8] = scenes(1)[:, :, :8]
    gate = Blacklight(salt="none")
    secret = gate.secret(SHAPE, generator())
    symbols = gate.symbols(flat, [secret.salt])
    every = window_hashes(symbols, torch.tensor([secret.key]), 20, 1, bits=3)[0]
    expected = sorted(set(every.tolist()), reverse=True)[:50]
    assert gate.prints(flat, [secret])[0].tolist() == expected


def test_fingerprints_do_not_depend_on_the_batch() -> None:
    rows = scenes(40)
    for gate in (Blacklight(), Blacklight(levels=256), BlacklightKeyed()):
        secrets: list[Any] = [gate.secret(SHAPE, generator(k)) for k in range(40)]
        together = list(gate.prints(rows, secrets))
        for k in (0, 7, 39):
            alone = next(iter(gate.prints(rows[k : k + 1], secrets[k : k + 1])))
            assert alone.tolist() == together[k].tolist()


def test_response_curve() -> None:
    """P2, with the law that predicts it: a symbol changes with p = 255 E|noise| / q, a window survives with (1 - p)^W."""
    rows = scenes(60)
    gate = Blacklight()
    clean = sketches(gate, rows)
    caught = {}
    for sigma in (0.003, 0.0055, 0.008, 0.012):
        found = matches(clean, sketches(gate, noisy(rows, sigma)))
        p = 255 * sigma * np.sqrt(2 / np.pi) / 50
        assert np.mean(found) == pytest.approx(50 * (1 - p) ** 20, abs=5)
        caught[sigma] = np.mean(np.array(found) > 25)
    assert caught[0.003] >= 0.95
    assert caught[0.0055] > 0.5 > caught[0.008]  # where the curve crosses one half
    assert caught[0.012] <= 0.05


def test_response_curve_at_224_pixels() -> None:
    rows = scenes(12, side=224)
    clean = sketches(Blacklight(), rows)
    caught = {
        s: np.mean(np.array(matches(clean, sketches(Blacklight(), noisy(rows, s)))) > 25) for s in (0.0022, 0.0034)
    }
    assert caught[0.0022] > 0.5 > caught[0.0034]
    assert Blacklight().windows((3, 224, 224)) == (50, 25)


def test_repeats_are_hits_and_strangers_are_not() -> None:
    """P4."""
    rows = scenes(3)
    assert matches(sketches(Blacklight(), rows), sketches(Blacklight(), rows)) == [50] * 3
    queries = torch.stack([rows[0], 1 - rows[0], rows[1], rows[0], noisy(rows, 0.002)[1], rows[2], rows[2]])
    for gate in ("blacklight", "blacklight-keyed"):
        assert refused(gate, queries) == [False, False, False, True, True, False, True]


def test_the_rule_decides_at_the_threshold_itself() -> None:
    gate = Blacklight(threshold=5, keep=10)
    tokens = np.arange(10)
    for shared, more, least in ((4, False, False), (5, False, True), (6, True, True)):
        query = np.concatenate((tokens[:shared], np.arange(100, 110 - shared)))
        for rule, hit in (("more", more), ("least", least)):
            memory = Blacklight(threshold=5, keep=10, rule=rule).memory(Secret(torch.empty(0), 0))  # type: ignore[arg-type]
            memory.store(tokens, memory.judge(tokens))
            assert memory.judge(query).hit is hit
    assert (gate.rule, gate.salt, gate.layout, gate.modulus) == ("more", "float", "hwc", 255)  # the authors'


def test_traps() -> None:
    """Traps 1, 2 and 5 of the published code, each behind its switch."""
    rows = scenes(20)
    tiny = noisy(rows, 0.0003)
    by_salt = [np.mean(matches(*(sketches(Blacklight(salt=s), x) for x in (rows, tiny)))) for s in ("float", "integer")]
    assert by_salt[0] > 46 > 42 > by_salt[1]  # whole salts put 8-bit values on rounding edges
    rounded = Blacklight(salt="integer", levels=256)
    assert matches(sketches(rounded, rows), sketches(rounded, tiny)) == [50] * 20
    blank = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)])
    for modulus, same in ((255, 50), (256, 0)):
        white, black = sketches(Blacklight(modulus=modulus), blank)  # type: ignore[arg-type]
        assert (len(set(white.tolist()) & set(black.tolist())) == 50) is (same == 50)
    outside = rows + 0.7
    assert matches(sketches(Blacklight(), outside), sketches(Blacklight(), outside.clamp(0, 1))) == [50] * 20


def test_a_shift_by_one_pixel_walks_through_the_salt_but_not_through_the_key() -> None:
    """P15: the published salt hangs on positions; our variant does not."""
    rows = scenes(30)
    moved = rows.roll(1, -1)
    assert np.mean(matches(sketches(Blacklight(), rows), sketches(Blacklight(), moved))) < 5
    assert np.mean(matches(sketches(Blacklight(salt="none"), rows), sketches(Blacklight(salt="none"), moved))) > 20
    pairs = torch.stack([rows, moved], dim=1).flatten(0, 1)
    assert sum(refused("blacklight", pairs)) == 0
    assert sum(refused("blacklight-keyed", pairs)) >= 28


def test_the_mean_of_the_best_catches_what_stays_below_the_pair_threshold() -> None:
    """Probes that Blacklight lets through, though each resembles all others, are refused once there are k of them."""
    image = scenes(1)
    probes = torch.cat([noisy(image, 0.0085, seed=k) for k in range(60)])
    assert sum(refused("blacklight", probes)) <= 3
    caught = refused("blacklight-keyed", probes, lowest=30.0, highest=30.0)
    assert sum(caught[:8]) <= 1
    assert np.mean(caught[20:]) > 0.5


def test_thresholds_of_the_keyed_gate_differ_by_account() -> None:
    gate = BlacklightKeyed()
    means = [gate.secret(SHAPE, generator(k)).mean for k in range(200)]
    assert min(means) >= gate.lowest
    assert max(means) <= gate.highest
    assert np.mean(means) == pytest.approx((gate.lowest + gate.highest) / 2, abs=0.6)
    assert np.std(means) == pytest.approx((gate.highest - gate.lowest) / 12**0.5, abs=0.4)


def test_natural_images_are_not_refused(real_data: Path) -> None:
    """P3, small: scripts/bench_gates.py puts all 9,000 into one table."""
    images = np.load(real_data / "cifar10_test_dev.npz")["images"][:1500]
    rows = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert sum(refused("blacklight", rows)) == 0
    assert sum(refused("blacklight-keyed", rows)) <= 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"width": 0}, "width"),
        ({"quantum": 0}, "quantum"),
        ({"threshold": 51}, "at most keep"),
        ({"levels": 1}, "levels"),
        ({"step": 0}, "step"),
    ],
)
def test_bad_options(options: dict[str, int], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Blacklight(**options)  # type: ignore[arg-type]


def test_images_without_a_window_are_refused() -> None:
    with pytest.raises(InputError, match="no window of 20"):
        Blacklight().wrap(Grey(), 0).answer(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.long))


def test_it_is_registered() -> None:
    assert registry.load("defenses", "blacklight") is Blacklight
    assert registry.load("defenses", "blacklight-keyed") is BlacklightKeyed
