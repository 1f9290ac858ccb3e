"""OSD and IIoT-SDM: their rules about k neighbours, and encoders that map near to near whatever the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robustbox import registry
from robustbox.defenses import encoders
from robustbox.defenses.encoders import IoTEncoder, KnnMemory, OSDEncoder, embed, encoder, grey
from robustbox.defenses.gate import StatefulGate
from robustbox.defenses.iot_sdm import IoTSDM
from robustbox.defenses.memory import Verdict
from robustbox.defenses.osd import OSD
from robustbox.errors import InputError
from tests.toys import HalfSpace

GATES = [OSD(), IoTSDM()]


def images(n: int, seed: int = 0) -> torch.Tensor:
    """Smooth images [n,3,32,32]."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)


def copies(image: torch.Tensor, n: int, sigma: float) -> torch.Tensor:
    noise = torch.randn(n, *image.shape, generator=torch.Generator().manual_seed(1))
    return (image + sigma * noise).clamp(0, 1)


def test_a_hit_is_a_mean_distance_to_the_k_nearest() -> None:
    memory = KnnMemory(1, torch.device("cpu"), k=3, threshold=2.0)
    for value in (0.0, 2.0, 4.0, 50.0):
        assert not memory.judge(torch.tensor([value])).hit or value == 4.0
        memory.store(torch.tensor([value]), Verdict(False, -1))
    assert memory.judge(torch.tensor([2.0])) == Verdict(True, 1)  # (0 + 2 + 2) / 3
    assert memory.judge(torch.tensor([-0.1])).hit is False  # (0.1 + 2.1 + 4.1) / 3
    assert memory.judge(torch.tensor([0.0])).hit is True  # 2 exactly


def test_threshold_0_refuses_repeats_however_old() -> None:
    points = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0)).mul_(1e4).round_().div_(1e4)
    memory = KnnMemory(256, torch.device("cpu"), k=2, threshold=0.0)
    for point in torch.cat((points, points)):
        verdict = memory.judge(point)
        assert not verdict.hit
        memory.store(point, verdict)
    for number in (0, 700, 1999):
        assert memory.judge(points[number]) == Verdict(True, number)
        assert not memory.judge(points[number] + 1e-4).hit


@pytest.mark.parametrize("gate", GATES)
def test_no_hit_before_k_stored_queries(gate: OSD | IoTSDM) -> None:
    """P17: near-identical queries; OSD then forgets everything, so that hits count accounts."""
    rows = copies(images(1)[0], 3 * gate.k + 5, 0.001)
    inner = HalfSpace()
    box = gate.wrap(inner, 0)
    assert isinstance(box, StatefulGate)
    answer = box.answer(rows, torch.zeros(len(rows), dtype=torch.long))
    statistics = box.statistics()
    assert box.standing(0).first_hit == gate.k + 1
    if gate.reset_on_hit:
        assert statistics["hits"] == len(rows) // (gate.k + 1)
        assert inner.rows == len(rows)  # silent: all were answered
        assert answer.status.sum() == 0
    else:
        assert statistics["hits"] == len(rows) - gate.k == int(answer.status.sum())
        assert inner.rows == gate.k


@pytest.mark.parametrize("gate", GATES)
def test_embeddings_do_not_depend_on_the_batch(gate: OSD | IoTSDM) -> None:
    rows = images(37)
    here = torch.device("cpu")
    together = torch.stack(list(gate.prints(rows, [here] * 37)))
    for part in (slice(0, 1), slice(15, 18), slice(36, 37), slice(3, 36)):
        n = len(rows[part])
        assert torch.equal(torch.stack(list(gate.prints(rows[part], [here] * n))), together[part])
    order = torch.randperm(37, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.stack(list(gate.prints(rows[order], [here] * 37))), together[order])


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [1] * 18), ("meta", [16, 16])])
def test_passes_of_one_size_and_without_blanks_on_a_cpu(device: str, sizes: list[int]) -> None:
    """A blank row costs a CPU what a row costs; another device is better off with full passes (`meta` stands for it)."""
    module, seen = OSDEncoder().to(device), list[int]()
    module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    assert embed(module, images(18).to(device)).shape == (18, 256)
    assert seen == sizes


def test_near_images_lie_nearer_than_others(real_data: Path) -> None:
    """The committed encoders on images that neither was trained on: copies against strangers."""
    photos = np.load(real_data / "cifar10_test_dev.npz")["images"][8000:8100]
    rows = torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255
    for gate in GATES:
        memory = gate.memory(torch.device("cpu"))
        points = list(gate.prints(rows, [torch.device("cpu")] * len(rows)))
        hits = 0
        for point in points:
            verdict = memory.judge(point)
            hits += verdict.hit
            memory.store(point, verdict)
        assert hits <= 2
        near = 0
        for row in rows[:5]:
            probes = copies(row, gate.k + 1, 0.01)
            box = gate.wrap(HalfSpace(), 0)
            assert isinstance(box, StatefulGate)
            box.answer(probes, torch.zeros(len(probes), dtype=torch.long))
            near += box.standing(0).hits
        assert near >= 4


def test_networks_are_the_published_ones() -> None:
    assert OSDEncoder()(torch.zeros(2, 3, 32, 32)).shape == (2, 256)
    assert IoTEncoder()(torch.zeros(2, 1, 224, 224)).shape == (2, 128)
    assert sum(p.numel() for p in OSDEncoder().parameters()) == 896 + 9248 + 18496 + 36928 + 2304 * 512 + 512 + 131328
    assert sum(p.numel() for p in IoTEncoder().parameters()) == 80 + 292 + 74 + 38 + 38 + 99 * 128


def test_greying_and_resizing() -> None:
    rows = torch.zeros(1, 3, 2, 2)
    rows[:, 0], rows[:, 1] = 1.0, 0.5
    assert grey(rows, 2).flatten().tolist() == pytest.approx([0.299 + 0.2935] * 4)
    assert grey(rows, 6).shape == (1, 1, 6, 6)
    assert torch.equal(grey(rows[:, :1], 2), rows[:, :1])


def test_values_outside_the_box_are_clamped() -> None:
    module = encoder(OSDEncoder, "osd.safetensors", torch.device("cpu"))
    rows = images(1)
    assert torch.equal(embed(module, rows * 3 - 1), embed(module, (rows * 3 - 1).clamp(0, 1)))


def test_weights_are_small_and_plain() -> None:
    for file in ("osd.safetensors", "iot-sdm.safetensors"):
        assert (encoders.WEIGHTS / file).stat().st_size < 5e6
        assert all(torch.isfinite(value).all() for value in load_file(encoders.WEIGHTS / file).values())
    with pytest.raises(InputError, match=r"nothing\.safetensors are missing"):
        encoder(OSDEncoder, "nothing.safetensors", torch.device("cpu"))


def test_wrong_images_and_options() -> None:
    with pytest.raises(InputError, match=r"takes images of \[3, 32, 32\]"):
        OSD().wrap(HalfSpace(), 0).answer(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))
    with pytest.raises(InputError, match="neither grey nor colour"):
        IoTSDM().wrap(HalfSpace(), 0).answer(torch.zeros(1, 2, 8, 8), torch.zeros(1, dtype=torch.long))
    with pytest.raises(InputError, match="k must be"):
        OSD(k=0)
    assert registry.load("defenses", "osd") is OSD
    assert registry.load("defenses", "iot-sdm") is IoTSDM
