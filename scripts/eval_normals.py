"""What `waterfill`'s choices rest on: where normals lie (white-box), and how far the boundary is along single patterns.

    python scripts/eval_normals.py                        CIFAR-10, MNIST and ImageNet: some minutes
    python scripts/eval_normals.py --only cifar10 --images 20

Images are those on which options were chosen. The normals are gradients of the margin at the boundary points that `waterfill`
reaches with 120 queries, their part along the ray left out; the cosine is the expected one of an estimate from so many signs,
asked with the noise that a prior shares out for them and weighed by it, with normals of the mean energy measured. `before` is
the prior that gave colours 0.3 of grey at every frequency, `oracle` that mean energy itself.
Distances along patterns are medians over images of the nearest of four, by bisection.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_waterfill import inputs

from robustbox import run_attack
from robustbox.attacks import patterns, spectrum
from robustbox.attacks.spectrum import K, Spectrum, water_filling
from robustbox.attacks.subspaces import sampler
from robustbox.protocol import Task
from robustbox.statistics import median

CHOSEN = {"cifar10": (100, 60), "mnist": (100, 60), "imagenet": (30, 12)}
"""Of each data set, the first image and how many."""
SIGNS = (100, 300, 1000)


@torch.no_grad()
def boundary(model: nn.Module, image: Tensor, label: int, end: Tensor, halvings: int = 12) -> tuple[Tensor, bool]:
    """The first point on the line to an end [C,H,W] that is not classified as the label, and whether the end is none."""
    near, far = 0.0, 1.0
    if int(model(end[None]).argmax()) == label:
        return end, False
    for _ in range(halvings):
        middle = (near + far) / 2
        if int(model(torch.lerp(image, end, middle)[None]).argmax()) == label:
            near = middle
        else:
            far = middle
    return torch.lerp(image, end, far), True


def normal(model: nn.Module, image: Tensor, label: int, point: Tensor) -> Tensor:
    """The gradient of the margin at a boundary point, its part along the ray left out, of length 1."""
    point = point.clone().requires_grad_()
    scores = model(point[None])[0]
    others = scores.detach().clone()
    others[label] = -math.inf
    (slope,) = torch.autograd.grad(scores[others.argmax()] - scores[label], point)
    ray = F.normalize((point.detach() - image).flatten(), dim=0).view_as(slope)
    return F.normalize((slope - (slope * ray).sum() * ray).flatten(), dim=0).view_as(slope)


def cosine(prior: Tensor, energy: Tensor, signs: int) -> float:
    """The expected cosine of an estimate with normals of this mean energy [C,H,W]."""
    noise = water_filling(prior, K * K * signs)
    told = K * K * signs * noise / (noise * energy).sum()
    weight = prior / (1 + prior * told)
    found = (weight * told * energy).sum()
    return float(found / (weight.square() * (told.square() * energy + told)).sum().sqrt())


def nearest_of_four(model: nn.Module, images: Tensor, labels: Tensor, draw: Callable[[Tensor], Tensor]) -> float:
    """The median distance to the boundary along the nearest of four directions, infinite where none crosses it."""
    least = []
    for image, label in zip(images, labels.tolist(), strict=True):
        found = [math.inf]
        for _ in range(4):
            way = draw(image)
            reach = math.sqrt(image.numel()) / 2  # half a pixel's range in root mean square
            point, crossed = boundary(model, image, label, (image + reach * way / way.norm()).clamp(0, 1))
            found += [float(torch.dist(point, image))] * crossed
        least.append(min(found))
    return median(torch.tensor(least).numpy())


def tile(generator: torch.Generator, image: Tensor) -> Tensor:
    """A random pattern of 2 x 2 pixels, with which the other attacks start."""
    channels, height, width = image.shape
    return sampler("tiles", (channels, height, width), min(height, width) / 2, generator)(1)[0]


def wavelet(generator: torch.Generator, image: Tensor) -> Tensor:
    """A new wavelet."""
    family = patterns.Wavelets(Task(image, 0, None, "l2", None, generator, 0))
    return family.direction(family.new())


def main() -> None:
    parser = argparse.ArgumentParser(description="Where normals lie, and how far the boundary is along patterns.")
    parser.add_argument("--only", nargs="+", choices=list(CHOSEN), default=list(CHOSEN))
    parser.add_argument("--images", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for data in args.only:
        skip, n = CHOSEN[data]
        model, images, labels, _ = inputs(data, skip, args.images or n)
        result = run_attack(model, images, labels, "waterfill", "l2", budget=120)
        ours = Spectrum(images[0])
        energy = torch.zeros_like(images[0])
        for image, label, end in zip(images, labels.tolist(), result.adversarials, strict=True):
            point, _ = boundary(model, image, label, end)
            energy += ours.basis.analyse(normal(model, image, label, point)[None])[0].square() / len(images)
        side = float(min(images.shape[2:]))
        with patch.multiple(spectrum, COLOUR=0.3, CYCLES=40.0, COARSE=40.0 / side, MIDDLE=1.0):
            before = Spectrum(images[0]).variances()
        print(
            f"{data}, images {skip} to {skip + len(images)}: energy by colour",
            [round(float(e), 2) for e in energy.sum((1, 2))],
        )
        priors = {"present": ours.variances(), "before": before, "white": torch.full_like(energy, 1 / energy.numel())}
        for name, prior in (priors | {"oracle": energy.clamp_min(1e-9) / energy.sum()}).items():
            print(f"  cosine, {name:8}" + "".join(f"  {q}: {cosine(prior, energy, q):.3f}" for q in SIGNS))
        generator = torch.Generator().manual_seed(0)
        near = partial(nearest_of_four, model, images, labels)
        print(f"  nearest of four, tiles of period 2: {near(partial(tile, generator)):.3g}")
        for periods in ((2.0, 4.0), (4.0, 8.0), (8.0, 16.0)):
            with patch.object(patterns, "PERIODS", periods):
                print(f"  nearest of four, wavelets of periods {periods}: {near(partial(wavelet, generator)):.3g}")


if __name__ == "__main__":
    main()
