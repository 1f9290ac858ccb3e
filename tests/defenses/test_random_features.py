"""Random features: the law of the noise, its streams, that the module stays the user's, and what the noise does (spec B8)."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustbox as rb
from robustbox import registry
from robustbox.boxes import CallableBox, ModuleBox
from robustbox.defenses.input_noise import InputNoise
from robustbox.defenses.layers import find, intercepted
from robustbox.defenses.random_features import RandomFeatures
from robustbox.errors import InputError
from robustbox.models.networks import seeded
from tests.defenses.test_layers import NETWORKS, built

FAR = 2**62  # accounts are 63-bit numbers
WIDE = 600


def wide() -> nn.Sequential:
    """Noise goes in after layer 1 and is seen before layer 2."""
    with seeded():
        return nn.Sequential(nn.Flatten(), nn.Linear(48, WIDE), nn.Tanh(), nn.Linear(WIDE, 4)).eval()


def noise(features: RandomFeatures, rows: Tensor, passes: list[list[int]], seed: int = 0) -> Tensor:
    """Noisy minus clean activation for each row of each pass (which sends the first rows), [all rows, WIDE]."""
    network, found = wide(), list[Tensor]()
    clean = network[1](network[0](rows)).detach()
    box = features.wrap(ModuleBox(network), seed)
    with intercepted(find(network, ["pre:2"]), lambda _, h: found.append(h.clone())):
        for accounts in passes:
            box.answer(rows[: len(accounts)], torch.tensor(accounts))
    return torch.cat([h - clean[: len(h)] for h in found])


def rows(n: int, shape: tuple[int, ...] = (3, 4, 4)) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def at_layer(**options: Any) -> RandomFeatures:
    return RandomFeatures(at="1", scale="abs", **options)


@pytest.mark.parametrize(("distribution", "kurtosis"), [("gauss", 3.0), ("laplace", 6.0)])
def test_noise_has_the_stated_law_and_is_independent_from_row_to_row(distribution: Any, kurtosis: float) -> None:
    drawn = noise(at_layer(nu=0.3, distribution=distribution), rows(500), [[FAR] * 500]).double() / 0.3
    n = drawn.numel()
    assert abs(drawn.mean()) < 4 / math.sqrt(n)
    assert abs(drawn.std() - 1) < 0.02
    assert abs(drawn.pow(4).mean() - kurtosis) < 0.05 * kurtosis
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 4 / math.sqrt(n)
    assert abs((drawn[:, 1:] * drawn[:, :-1]).mean()) < 4 / math.sqrt(n)


def test_two_equal_rows_of_a_pass_two_passes_and_two_boxes_differ_and_a_seed_repeats() -> None:
    """A toy that draws its noise once for the model fails here."""
    same = rows(1).expand(2, -1, -1, -1)
    drawn = noise(at_layer(), same, [[1, 1], [1, 2]])
    for a in range(4):
        for b in range(a):
            assert (drawn[a] - drawn[b]).abs().mean() > 0.1
    assert torch.equal(drawn, noise(at_layer(), same, [[1, 1], [1, 2]]))
    assert not torch.equal(drawn, noise(at_layer(), same, [[1, 1], [1, 2]], seed=1))


def test_an_account_is_answered_alike_alone_in_company_and_in_passes_of_any_size() -> None:
    row = rows(1).expand(9, -1, -1, -1)
    alone = noise(at_layer(), row, [[FAR]] * 6)
    others = list(range(FAR + 1, FAR + 8))
    company = noise(at_layer(), row, [[*others[:k], FAR, *others[k:]] for k in range(6)])
    fused = noise(at_layer(), row, [[FAR, FAR, 3, FAR], [FAR], [3, FAR, FAR]])
    close = {"rtol": 0, "atol": 1e-5}  # a batch of another size rounds the clean activation differently
    torch.testing.assert_close(company[[8 * k + k for k in range(6)]], alone, **close)
    torch.testing.assert_close(fused[[0, 1, 3, 4, 6, 7]], alone, **close)


@pytest.mark.parametrize("mode", ["fresh", "hash"])
def test_a_pass_that_the_device_cannot_hold_has_the_noise_that_it_would_have(mode: Any) -> None:
    class Small(nn.Sequential):
        holds = 9

        def forward(self, h: Tensor) -> Tensor:
            for k, layer in enumerate(self):
                h = layer(h)
                if k == 2 and len(h) > self.holds:  # after some of the noise was drawn
                    raise torch.OutOfMemoryError("planted")
            return h

    def answers(holds: int) -> Tensor:
        network = Small(*wide())
        network.holds = holds
        box = at_layer(nu=0.3, mode=mode).wrap(ModuleBox(network), 0)
        found = [box.answer(rows(n), torch.arange(n) % 3).scores for n in (7, 9, 2)]
        return torch.cat([scores for scores in found if scores is not None])

    torch.testing.assert_close(answers(2), answers(9))


def test_modes() -> None:
    x = rows(3)
    frozen = noise(at_layer(mode="frozen"), x, [[1, 2, 3], [1]])
    torch.testing.assert_close(frozen, frozen[:1].expand(4, -1), rtol=0, atol=1e-5)
    near = x.clone()
    near[1] = x[0]
    near[1, 0, 0, 0] += 1 / 255
    near[2] = x[0] * 0.999999
    hashed = noise(at_layer(mode="hash"), near, [[1, 2, 3], [4]])
    torch.testing.assert_close(hashed[3], hashed[0], rtol=0, atol=1e-5)  # whoever asks it, and when
    assert (hashed[0] - hashed[1]).abs().mean() > 0.1  # a neighbour is another row
    torch.testing.assert_close(hashed[2], hashed[0], rtol=0, atol=1e-4)  # and what no picture tells from it is not
    assert not torch.equal(hashed, noise(at_layer(mode="hash"), near, [[1, 2, 3], [4]], seed=1))
    stochastic = {
        mode: at_layer(mode=mode).wrap(ModuleBox(wide()), 0).stochastic for mode in ("fresh", "frozen", "hash")
    }
    assert stochastic == {"fresh": True, "frozen": False, "hash": False}


def test_std_measures_noise_by_the_rows_own_spread() -> None:
    x = rows(200)
    spread = wide()[1](x.flatten(1)).std(dim=1, correction=0, keepdim=True)
    own = noise(RandomFeatures(nu=0.5, at="1"), x, [[1] * 200])
    plain = noise(at_layer(nu=0.5), x, [[1] * 200])
    torch.testing.assert_close(own, plain * spread, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_on_every_architecture_noise_reaches_the_answer_and_leaves_the_module_alone(name: str) -> None:
    network, x = built(name)
    inner = ModuleBox(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    accounts = torch.arange(4)
    clean = inner.answer(x, accounts).scores
    roles = ["stem", "stage:1", "stage:-1", "penultimate"]
    boxes = {role: RandomFeatures(at=role).wrap(inner, 0) for role in roles}
    boxes["all"] = RandomFeatures(at=roles).wrap(inner, 0)
    assert clean is not None
    for role, box in boxes.items():
        answer = box.answer(x, accounts).scores
        assert answer is not None
        assert ((answer - clean).abs().amax(dim=1) > 1e-7).all(), role
    quiet = RandomFeatures(nu=0.0, at=roles).wrap(inner, 0)
    assert torch.equal(quiet.answer(x, accounts).scores, clean)  # type: ignore[arg-type]
    assert not quiet.stochastic
    assert torch.equal(inner.answer(x, accounts).scores, clean)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_what_lies_before_the_noise_does_not_change() -> None:
    network, x = built("cifar-resnet20")
    box, inner = RandomFeatures(at="stage:2").wrap(ModuleBox(network), 0), ModuleBox(network)
    seen: list[Tensor] = []
    with intercepted(find(network, ["stage:1", "pre:layer3"]), lambda _, h: seen.append(h.clone())):
        inner.answer(x, torch.arange(4))
        box.answer(x, torch.arange(4))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[1], seen[3])


def test_answers_scatter_around_the_clean_one() -> None:
    """For small noise the mean of many answers is the clean answer, up to its error."""
    inner, x = ModuleBox(wide()), rows(1)
    clean = inner.answer(x, torch.tensor([0])).scores
    box = RandomFeatures(nu=0.02, at="1").wrap(inner, 0)
    drawn = box.answer(x[:1].expand(2000, -1, -1, -1), torch.zeros(2000, dtype=torch.long)).scores
    assert clean is not None
    assert drawn is not None
    error = drawn.std(dim=0) / math.sqrt(len(drawn))
    assert ((drawn.mean(dim=0) - clean[0]).abs() < 4.5 * error).all()


def test_another_thread_sees_the_bare_module() -> None:
    network, x = wide(), rows(8)
    inner = ModuleBox(network)
    box = RandomFeatures().wrap(inner, 0)
    clean = inner.answer(x, torch.zeros(8, dtype=torch.long)).scores
    clean_elsewhere: list[bool] = []

    def ask() -> None:
        for _ in range(200):
            clean_elsewhere.append(torch.equal(inner.answer(x, torch.zeros(8, dtype=torch.long)).scores, clean))  # type: ignore[arg-type]

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not torch.equal(box.answer(x, torch.zeros(8, dtype=torch.long)).scores, clean)  # type: ignore[arg-type]
    assert all(clean_elsewhere)
    assert len(clean_elsewhere) == 400


def test_it_needs_a_module_that_passes_there() -> None:
    for stranger in (CallableBox(lambda x: x.flatten(1)[:, :4]), InputNoise().wrap(ModuleBox(wide()), 0)):
        with pytest.raises(InputError, match="needs a torch module in this process"):
            RandomFeatures().wrap(stranger, 0)
    with pytest.raises(InputError, match="innermost"):
        rb.run_attack("digits-cnn", torch.rand(1, 1, 8, 8), [0], defense=["random-features", "input-noise"])
    network = wide()
    network.add_module("aside", nn.Identity())
    network.forward = lambda x: network[3](network[2](network[1](x.flatten(1))))  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"does not pass through post:aside"):
        RandomFeatures(at="aside").wrap(ModuleBox(network), 0).answer(rows(2), torch.arange(2))
    with pytest.raises(InputError, match="no layer 'stage:9'"):
        RandomFeatures(at="stage:9").wrap(ModuleBox(network), 0)
    program = torch.jit.trace(wide(), rows(1))  # type: ignore[no-untyped-call]
    with pytest.raises(InputError):
        RandomFeatures(at="1").wrap(ModuleBox(program), 0).answer(rows(2), torch.arange(2))


def test_an_answer_that_was_known_already_takes_its_noise_from_the_stream_all_the_same() -> None:
    """A journal that puts itself before the module's own answers: what comes after is as if the module had been asked."""
    x, accounts = rows(3), torch.zeros(3, dtype=torch.long)
    inner, again = ModuleBox(wide()), ModuleBox(wide())
    box = RandomFeatures(at="1").wrap(inner, 0)
    first, second = box.answer(x, accounts), box.answer(x, accounts)
    resumed = RandomFeatures(at="1").wrap(again, 0)
    vars(again)["answer"] = lambda *_: first
    assert resumed.answer(x, accounts) is first
    del vars(again)["answer"]
    assert torch.equal(resumed.answer(x, accounts).scores, second.scores)  # type: ignore[arg-type]


def test_a_tensor_that_mixes_rows_is_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Flatten(0, -1)

        def forward(self, x: Tensor) -> Tensor:
            return self.turn(x[:, 0, 0, :3].T.reshape(3, -1)[:, :1])[None].expand(len(x), -1)

    with pytest.raises(InputError, match="not row by row"):
        RandomFeatures(at="turn").wrap(ModuleBox(Mixed()), 0).answer(rows(4), torch.arange(4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"nu": -0.1},
        {"nu": math.nan},
        {"at": []},
        {"at": ""},
        {"scale": "rms"},
        {"distribution": "uniform"},
        {"mode": "stale"},
    ],
)
def test_bad_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        RandomFeatures(**wrong)


def test_it_is_registered_and_recorded() -> None:
    assert registry.load("defenses", "random-features") is RandomFeatures
    box = RandomFeatures(nu=0.5, at=["stem", "stage:*"]).wrap(ModuleBox(built("cifar-resnet20")[0]), 0)
    assert box.describe()["places"] == ["pre:layer1", "post:layer1", "post:layer2", "post:layer3"]
    assert box.describe()["options"]["nu"] == 0.5  # type: ignore[index]


# What the noise does (spec B2): a comparison of two queries goes wrong by the flip law, and EOT divides the noise.


class LinearHidden(nn.Module):
    """h = x (flattened), z = (-w h, w h): the gradients at the input and at the hidden layer are one, and known."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.hidden, self.w = nn.Flatten(), w

    def forward(self, x: Tensor) -> Tensor:
        m: Tensor = self.hidden(x) @ self.w
        return torch.stack((-m, m), dim=1)


@pytest.mark.parametrize(("nu", "mu", "eot"), [(0.05, 0.1, 1), (0.3, 0.1, 1), (0.3, 0.1, 9)])
def test_the_flip_law(nu: float, mu: float, eot: int) -> None:
    """P(an accept or reject decision is wrong) = arctan(sqrt(2) nu |dL/dh| / (mu |dL/dx|)) / pi; EOT-M: nu / sqrt(M)."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(48, generator=g)
    n = 20_000 if eot == 1 else 6000
    x = torch.full((1, 3, 4, 4), 0.5)
    probes = x + mu * torch.randn(n, 3, 4, 4, generator=g)
    box = RandomFeatures(nu=nu, at="hidden", scale="abs").wrap(ModuleBox(LinearHidden(w)), 0)

    def loss(asked: Tensor) -> Tensor:
        sent = asked.repeat_interleave(eot, dim=0)
        scores = box.answer(sent, torch.zeros(len(sent), dtype=torch.long)).scores
        assert scores is not None
        return scores[:, 1].view(-1, eot).mean(dim=1)

    believed = loss(probes) - loss(x.expand(n, -1, -1, -1)) > 0
    true = (probes - x).flatten(1) @ w > 0
    wrong = float((believed != true).float().mean())
    assert abs(wrong - math.atan(math.sqrt(2) * nu / math.sqrt(eot) / mu) / math.pi) < 0.01


def test_a_label_flips_by_the_margin_over_the_noise() -> None:
    """P(flip) = Phi(-m / (nu |dm/dh|))."""
    w = torch.ones(48)
    box = RandomFeatures(nu=0.02, at="hidden", scale="abs").wrap(ModuleBox(LinearHidden(w)), 0)
    sigma = 0.02 * math.sqrt(48)
    for margin in (0.05, 0.1, 0.2):
        x = torch.full((1, 3, 4, 4), margin / 48).expand(20_000, -1, -1, -1)
        flips = float((box.answer(x, torch.zeros(len(x), dtype=torch.long)).labels == 0).float().mean())
        assert abs(flips - 0.5 * math.erfc(margin / sigma / math.sqrt(2))) < 0.012
