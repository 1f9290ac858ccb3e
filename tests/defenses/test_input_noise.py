"""Input noise: its law, its streams, and that it is the only thing between an attack and the model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import robustbox as rb
from robustbox import registry
from robustbox.defenses.input_noise import InputNoise, NoisyInputs
from robustbox.errors import InputError
from robustbox.identity import stream
from robustbox.protocol import Answer, BlackBox

SHAPE = (3, 8, 8)
FAR = 2**62  # accounts are 63-bit numbers


class Echo(BlackBox):
    """Keeps the rows that reach the model, and answers with their first values."""

    name, classes, scores, input_shape = "echo", 4, "logit", SHAPE

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.rows.extend(rows.clone())
        scores = rows.flatten(1)[:, :4]
        return Answer.of(scores.argmax(dim=1), scores)


def through(noise: InputNoise, passes: list[list[int]], seed: int = 0) -> dict[int, Tensor]:
    """What the model sees of grey rows that the accounts of each pass send, account by account."""
    inner = Echo()
    box = noise.wrap(inner, seed)
    for accounts in passes:
        box.answer(torch.full((len(accounts), *SHAPE), 0.5), torch.tensor(accounts))
    order = [account for accounts in passes for account in accounts]
    return {a: torch.stack([row for row, b in zip(inner.rows, order, strict=True) if a == b]) for a in order}


def test_noise_is_gaussian_of_the_stated_size_around_the_row() -> None:
    noise = through(InputNoise(0.02), [[FAR] * 500])[FAR] - 0.5
    n = noise.numel()
    assert abs(noise.mean()) < 4 * 0.02 / math.sqrt(n)
    assert abs(noise.std() / 0.02 - 1) < 4 / math.sqrt(2 * n)
    kurtosis = (noise / noise.std()).pow(4).mean()
    assert abs(kurtosis - 3) < 4 * math.sqrt(24 / n)
    neighbours = (noise[1:] * noise[:-1]).mean() / 0.02**2  # two queries of one row are independent
    assert abs(neighbours) < 4 / math.sqrt(n)


def test_an_account_is_answered_alike_alone_in_company_and_in_passes_of_any_size() -> None:
    alone = through(InputNoise(0.1), [[FAR]] * 6)[FAR]
    others = list(range(FAR + 1, FAR + 8))
    company = through(InputNoise(0.1), [[*others[:k], FAR, *others[k:]] for k in range(6)])
    fused = through(InputNoise(0.1), [[FAR, FAR, 3, FAR], [FAR], [3, FAR, FAR]])
    assert torch.equal(alone, company[FAR])
    assert torch.equal(alone, fused[FAR])
    assert not torch.equal(alone, company[others[0]])
    assert not torch.equal(alone, through(InputNoise(0.1), [[FAR]] * 6, seed=1)[FAR])


@given(
    st.lists(st.tuples(st.lists(st.integers(-3, 6), min_size=1, max_size=6), st.booleans()), max_size=12),
    st.sampled_from([(3, 8, 8), (1, 3, 7), (3, 1, 2)]),
)
def test_the_nth_row_of_an_account_takes_the_nth_draw_of_its_stream(
    passes: list[tuple[list[int], bool]], shape: tuple[int, int, int]
) -> None:
    """Whatever is kept of accounts, in passes of rows with channels first or last in memory."""
    inner, streams = Echo(), dict[int, torch.Generator]()
    box = InputNoise(1.0).wrap(inner, 5)
    for accounts, last in passes:
        order = torch.channels_last if last else torch.contiguous_format
        rows = torch.zeros(len(accounts), *shape).contiguous(memory_format=order)
        inner.rows.clear()
        box.answer(rows, torch.tensor(accounts))
        for row, account, seen in zip(torch.empty_like(rows), accounts, inner.rows, strict=True):
            generator = streams.setdefault(account, stream(rows.device, 5, "input-noise", account))
            assert torch.equal(seen, row.normal_(generator=generator))


def test_an_account_of_one_row_keeps_no_generator() -> None:
    box = InputNoise().wrap(Echo(), 0)
    for first in range(0, 4000, 500):
        box.answer(torch.zeros(500, *SHAPE), torch.arange(first, first + 500))
    box.answer(torch.zeros(4, *SHAPE), torch.tensor([3, 5, 3, 4000]))
    assert isinstance(box, NoisyInputs)
    assert [account for account, kept in box._streams.items() if isinstance(kept, torch.Generator)] == [3, 5]


def test_rows_leave_the_box_unless_clipped() -> None:
    free, kept = (through(InputNoise(0.5, clip=clip), [[1] * 50])[1] for clip in (False, True))
    assert free.min() < 0
    assert free.max() > 1
    assert torch.equal(kept, free.clamp(0, 1))


def test_sigma_zero_is_the_model_itself() -> None:
    assert torch.equal(through(InputNoise(0.0), [[1, 2]])[1], torch.full((1, *SHAPE), 0.5))


def test_the_box_passes_on_what_is_known_of_the_model() -> None:
    inner = Echo()
    inner.classes = inner.scores = None  # as a callable before its first answer
    box = InputNoise(0.3).wrap(inner, 0)
    assert (box.stochastic, box.inner, box.input_shape, box.classes) == (True, inner, SHAPE, None)
    inner.classes, inner.scores = 4, "logit"
    box.answer(torch.zeros(1, *SHAPE), torch.tensor([1]))
    assert (box.classes, box.scores) == (4, "logit")
    assert box.describe()["options"] == {"sigma": 0.3, "clip": False}


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf])
def test_bad_sigma(sigma: float) -> None:
    with pytest.raises(InputError, match="sigma"):
        InputNoise(sigma)


class Threshold(Echo):
    """Class 1 where the first value exceeds 0.5; counts rows."""

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.rows.extend(rows.clone())
        return Answer.of((rows.flatten(1)[:, 0] > 0.5).long())


def test_a_run_counts_every_row_and_does_not_depend_on_fusion_or_company() -> None:
    """By name through `run_attack`: 1 image alone and among 8, in passes of 1 and of 64 rows."""
    x = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0)) * 0.3
    x[:, 0, 0, 0] = 0.3
    results = []
    for few, fused in ((slice(3, 4), 64), (slice(0, 8), 64), (slice(0, 8), 1)):
        model = Threshold()
        result = rb.run_attack(
            model,
            x[few],
            [0] * len(x[few]),
            budget=60,
            defense="input-noise",
            defense_options={"sigma": 0.05},
            max_rows=fused,
        )
        assert len(model.rows) == sum(result.ledger.values())
        results.append((result.traces[3 % len(x[few])], result.adversarials[3 % len(x[few])]))
    assert results[0][0]
    assert results[0][0] == results[1][0] == results[2][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1], results[2][1])


def test_it_is_registered() -> None:
    assert registry.load("defenses", "input-noise") is InputNoise
