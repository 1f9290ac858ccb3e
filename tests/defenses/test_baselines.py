"""The baselines: JPEG, bit depth, median, noise on scores, and misleading scores (AAA), each held to its law."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import median_filter
from torch import Tensor

import robustbox as rb
from robustbox import registry
from robustbox.boxes import CallableBox
from robustbox.defenses.aaa import AAA, margin
from robustbox.defenses.bit_depth import BitDepth
from robustbox.defenses.blacklight import Blacklight
from robustbox.defenses.input_noise import InputNoise
from robustbox.defenses.jpeg import JPEG
from robustbox.defenses.logit_noise import LogitNoise
from robustbox.defenses.median import Median
from robustbox.defenses.smoothing import Smoothing
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, BlackBox, Defense


class Echo(BlackBox):
    """Keeps the rows that reach the model, and answers with planted scores [n,K] or with their own first values."""

    name, classes, scores = "echo", 10, "logit"

    def __init__(self, planted: Tensor | None = None, kind: Any = "logit", shape: Any = None) -> None:
        self.planted, self.scores, self.input_shape = planted, kind, shape
        self.seen: list[Tensor] = []

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.seen.append(rows.clone())
        scores = rows.flatten(1)[:, :10] if self.planted is None else self.planted[: len(rows)]
        return Answer.of(scores.argmax(dim=1), scores.clone())


def rows(n: int = 3, shape: tuple[int, ...] = (3, 12, 10)) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def seen(defense: Defense, x: Tensor) -> Tensor:
    """What the model is shown of rows."""
    inner = Echo()
    box = defense.wrap(inner, 0)
    kept = x.clone()
    box.answer(x, torch.arange(len(x)))
    assert torch.equal(x, kept)  # the caller's rows are the caller's
    assert not box.stochastic
    return inner.seen[0]


@pytest.mark.parametrize(
    "defense", [InputNoise(sigma=0.5), BitDepth(bits=3), BitDepth(bits=5), Median(), JPEG(), Smoothing(n=4)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_a_model_on_a_grid_sees_rows_of_its_grid(defense: Defense, gated: bool) -> None:
    inner = Echo(shape=(3, 12, 10))
    inner.levels = 16
    box = Blacklight(action="silent").wrap(inner, 0) if gated else inner
    defense.wrap(box, 0).answer(rows().mul(15).round_().div_(15), torch.arange(3))
    shown = torch.cat(inner.seen)
    assert torch.equal(shown, shown.clamp(0, 1).mul(15).round().div(15))


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_bit_depth_rounds_to_the_nearest_of_its_levels(bits: int) -> None:
    x, levels = rows(), torch.linspace(0, 1, 2**bits)
    nearest = levels[(x[..., None] - levels).abs().argmin(dim=-1)]
    torch.testing.assert_close(seen(BitDepth(bits), x), nearest, rtol=0, atol=1e-6)
    assert torch.equal(seen(BitDepth(bits), seen(BitDepth(bits), x)), seen(BitDepth(bits), x))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_median_is_scipys(size: int) -> None:
    x = rows()
    expected = median_filter(x.numpy(), size=(1, 1, size, size))
    assert np.array_equal(seen(Median(size), x).numpy(), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [10, 75])
def test_jpeg_is_what_a_file_keeps(channels: int, quality: int) -> None:
    x = rows(2, (channels, 16, 24))
    shown = seen(JPEG(quality), x)
    for row, back in zip(x, shown, strict=True):
        pixels = (row * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(file, format="JPEG", quality=quality)
        kept = torch.tensor(np.array(Image.open(file))).reshape(16, 24, channels).permute(2, 0, 1) / 255
        torch.testing.assert_close(back, kept, rtol=0, atol=1e-7)
    flat = torch.full((1, channels, 16, 24), 77 / 255)
    torch.testing.assert_close(
        seen(JPEG(quality), flat), flat, rtol=0, atol=1.01 * 12 / 255 if quality == 10 else 0.005
    )


# Noise on scores.


def test_logit_noise_has_its_law_and_its_streams() -> None:
    inner = Echo(torch.zeros(20_000, 10))
    box = LogitNoise(0.7).wrap(inner, 0)
    x = torch.zeros(20_000, 1, 1, 10)
    answer = box.answer(x, torch.full((20_000,), 2**62))
    drawn = answer.scores
    assert drawn is not None
    assert box.stochastic
    assert abs(drawn.mean()) < 4 * 0.7 / math.sqrt(drawn.numel())
    assert abs(drawn.std() / 0.7 - 1) < 0.01
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 4 * 0.49 / math.sqrt(drawn.numel())
    assert torch.equal(answer.labels, drawn.argmax(dim=1))
    again = LogitNoise(0.7).wrap(Echo(torch.zeros(20_000, 10)), 0)
    parts = [again.answer(x[:k], torch.tensor([2**62] * k)).scores for k in (1, 5, 14)]
    assert torch.equal(torch.cat(parts), drawn[:20])  # type: ignore[arg-type]
    other = LogitNoise(0.7).wrap(Echo(torch.zeros(20_000, 10)), 1)
    assert not torch.equal(other.answer(x[:2], torch.tensor([2**62] * 2)).scores, drawn[:2])  # type: ignore[arg-type]


def test_a_label_flips_by_the_margin_over_the_noise() -> None:
    """P(flip) = Phi(-m / (sqrt(2) sigma)) for two classes at margin m."""
    inner = Echo(torch.tensor([[0.5, 0.0]]).expand(20_000, -1))
    answer = LogitNoise(0.5).wrap(inner, 0).answer(torch.zeros(20_000, 1, 1, 2), torch.zeros(20_000, dtype=torch.long))
    expected = 0.5 * math.erfc(0.5 / (math.sqrt(2) * 0.5) / math.sqrt(2))
    assert abs(float(answer.labels.float().mean()) - expected) < 0.012


def test_noise_on_probabilities_is_noise_on_their_logarithms() -> None:
    z = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    x, accounts = torch.zeros(50, 1, 1, 10), torch.arange(50)
    logits = LogitNoise(0.5).wrap(Echo(z), 0).answer(x, accounts).scores
    shares = LogitNoise(0.5).wrap(Echo(z.softmax(dim=1), "probability"), 0).answer(x, accounts).scores
    assert logits is not None
    assert shares is not None
    torch.testing.assert_close(shares, logits.softmax(dim=1), rtol=1e-4, atol=1e-6)


# AAA.


def scores(n: int = 400, k: int = 10, spread: float = 4.0) -> Tensor:
    return spread * torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def misled(z: Tensor, aaa: AAA | None = None, kind: str = "logit") -> tuple[Tensor, Answer]:
    box = (aaa or AAA()).wrap(Echo(z, kind), 0)
    answer = box.answer(torch.zeros(len(z), 1, 1, 10), torch.arange(len(z)))
    assert answer.scores is not None
    assert not box.stochastic
    return answer.scores, answer


def test_aaa_mirrors_the_margin_within_its_interval_and_keeps_label_and_confidence() -> None:
    """A toy that adds noise, or flattens the scores, has no such margins."""
    z = scores()
    y = z.argmax(dim=1, keepdim=True)
    u, answer = misled(z)
    m = margin(z, y)
    mirrored = 2 * (torch.floor(m / 6) + 0.5) * 6 - m
    p, q = z.softmax(dim=1).gather(1, y)[:, 0], u.softmax(dim=1).gather(1, y)[:, 0]
    # Where a margin of m* leaves the other classes room for the old confidence, Adam gets there; elsewhere it trades.
    odds = (1 - p) / p
    free = (torch.exp(-mirrored) * 1.2 < odds) & (odds < 0.8 * 9 * torch.exp(-mirrored))
    assert free.sum() > 50
    assert (margin(u, y) - mirrored).abs()[free].quantile(0.9) < 0.15
    assert (p - q).abs()[free].quantile(0.9) < 0.03
    assert torch.equal(u.argmax(dim=1), y[:, 0])
    assert torch.equal(answer.labels, y[:, 0])


def test_aaa_turns_the_slope_that_an_attack_follows() -> None:
    z = torch.zeros(60, 10)
    z[:, 3] = torch.linspace(6.5, 11.5, 60)  # margins within (6, 12)
    u, _ = misled(z)
    margins = margin(u, torch.full((60, 1), 3))
    assert torch.corrcoef(torch.stack((z[:, 3], margins)))[0, 1] < -0.99
    straight, _ = misled(z, AAA(reverse=0.0))  # the attractor itself: no slope at all
    torch.testing.assert_close(margin(straight, torch.full((60, 1), 3)), torch.full((60,), 9.0), rtol=0, atol=0.3)


def test_aaa_answers_each_row_by_itself() -> None:
    z = scores(40)
    together, _ = misled(z)
    alone = torch.cat([misled(row[None])[0] for row in z[:6]])
    torch.testing.assert_close(alone, together[:6], rtol=1e-5, atol=1e-5)


def test_aaa_gives_probabilities_where_it_is_given_them() -> None:
    z = scores(20)
    u, _ = misled(z)
    p, _ = misled(z.softmax(dim=1), kind="probability")
    torch.testing.assert_close(p.sum(dim=1), torch.ones(20))
    torch.testing.assert_close(p, u.softmax(dim=1), rtol=0, atol=0.05)
    certain = torch.eye(10)[:4]
    assert misled(certain, kind="probability")[0].isfinite().all()


@pytest.mark.parametrize("kind", ["logit", "probability"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_other_precision_are_those_of_float32(dtype: torch.dtype, kind: str) -> None:
    """Adam in half precision divides by a zero; an answer rounded to it ties classes that were told apart."""
    given = scores(50) if kind == "logit" else scores(50).softmax(dim=1)
    given = given.to(dtype)
    x, accounts = torch.zeros(50, 1, 1, 10), torch.arange(50)
    for defense in (AAA(), LogitNoise(0.5)):
        found = defense.wrap(Echo(given, kind), 0).answer(x, accounts)
        plain = defense.wrap(Echo(given.float(), kind), 0).answer(x, accounts).scores
        assert found.scores is not None
        assert plain is not None
        torch.testing.assert_close(found.scores.float(), plain, rtol=0, atol=0 if dtype != torch.float64 else 1e-2)
        assert torch.equal(found.labels, found.scores.argmax(dim=1))


def test_aaa_leaves_what_was_refused() -> None:
    class Refusing(Echo):
        def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
            answer = super().answer(rows, accounts)
            assert answer.scores is not None
            answer.labels[1], answer.status[1], answer.scores[1] = -1, REJECTED, torch.nan
            return answer

    for defense in (AAA(), LogitNoise(0.1)):
        answer = defense.wrap(Refusing(scores(3)), 0).answer(torch.zeros(3, 1, 1, 10), torch.arange(3))
        assert answer.labels[1] == -1
        assert answer.status.tolist() == [0, REJECTED, 0]
        assert answer.scores is not None
        assert answer.scores[[0, 2]].isfinite().all()


def test_a_score_attack_is_misled_and_a_label_attack_is_not() -> None:
    """The direction of the paper's claim, on digits: NES all but fails; RayS sees labels, and the same ones."""
    images, labels = (part[:12] for part in rb.load_data("digits")[:2])
    found = {
        (attack, defense): rb.run_attack(
            "digits-cnn", images, labels, attack, "linf", 0.2, budget=100, defense=defense, max_rows=64
        )
        for attack in ("nes", "rays")
        for defense in (None, "aaa")
    }
    assert found["nes", None].success.sum() >= 7
    assert found["nes", "aaa"].success.sum() <= 2
    assert (found["rays", None].success == found["rays", "aaa"].success).all()
    assert (found["rays", None].queries == found["rays", "aaa"].queries).all()


# What they refuse, and that they can be named.


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (BitDepth, {"bits": 0}),
        (BitDepth, {"bits": 2.5}),
        (Median, {"size": 0}),
        (JPEG, {"quality": 96}),
        (LogitNoise, {"sigma": math.nan}),
        (AAA, {"interval": 0}),
        (AAA, {"reverse": 1.5}),
        (AAA, {"steps": 0}),
    ],
)
def test_bad_options(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        kind(**wrong)


def test_black_boxes_that_they_cannot_defend() -> None:
    with pytest.raises(InputError, match="at least that size"):
        Median(9).wrap(Echo(shape=(1, 8, 8)), 0)
    with pytest.raises(InputError, match="channels"):
        JPEG().wrap(Echo(shape=(4, 8, 8)), 0)
    for defense in (AAA(), LogitNoise()):
        with pytest.raises(InputError, match="answers labels only"):
            defense.wrap(Echo(kind="none"), 0)
        unknown = CallableBox(lambda x: x.flatten(1).argmax(dim=1))
        with pytest.raises(InputError, match="answers labels only"):
            defense.wrap(unknown, 0).answer(rows(2), torch.arange(2))


@pytest.mark.parametrize("kind", [AAA, BitDepth, JPEG, LogitNoise, Median])
def test_they_are_registered_and_recorded(kind: Any) -> None:
    assert registry.load("defenses", kind.name) is kind
    inner = Echo()
    box = kind().wrap(inner, 0)
    assert (box.inner, box.classes, box.scores, box.stateful) == (inner, 10, "logit", False)
    assert box.describe()["options"] == kind().options()
