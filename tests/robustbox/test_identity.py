from __future__ import annotations

import hashlib

import torch

from robustbox.distances import distance
from robustbox.identity import derive_seed, sha256, stream


def test_an_image_is_known_by_its_shape_and_values_not_by_its_layout() -> None:
    image = torch.rand(3, 4, 5)
    strided = image.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert sha256(image) == sha256(strided) == sha256(image.clone())
    assert sha256(image) != sha256(image.view(3, 5, 4))
    assert sha256(image) != sha256(torch.nextafter(image, torch.ones(())))
    expected = hashlib.sha256(b"(1, 1, 2)" + b"\0\0\0\0\0\0\x80\x3f").hexdigest()
    assert sha256(torch.tensor([[[0.0, 1.0]]])) == expected


def test_seeds_depend_on_every_part_and_are_the_same_everywhere() -> None:
    assert derive_seed(0, "a", "b") == 8552555634793587672
    seeds = {
        derive_seed(*parts) for parts in [(0, "a", "b"), (1, "a", "b"), (0, "b", "a"), (0, "ab"), (0, "a", "b", 0)]
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_repeat_and_differ() -> None:
    cpu = torch.device("cpu")
    draws = [torch.rand(4, generator=stream(cpu, *parts)) for parts in [(0, "x"), (0, "x"), (0, "y")]]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_distances_on_known_differences() -> None:
    deltas = torch.zeros(2, 3, 2, 2)
    deltas[0, :, 0, 0] = 0.5
    deltas[0, 1, 1, 1] = -0.25
    assert distance(deltas, "l0").tolist() == [2, 0]
    assert distance(deltas, "linf").tolist() == [0.5, 0]
    torch.testing.assert_close(distance(deltas, "l2")[0].item(), (3 * 0.25 + 0.0625) ** 0.5)
    assert distance(deltas, "l2").dtype == torch.float64
