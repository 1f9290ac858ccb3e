"""What `waterfill`'s choices rest on: where normals lie (white-box), and how far the boundary is along single patterns.

    python scripts/eval_normals.py                        CIFAR-10, MNIST and ImageNet: some minutes
    python scripts/eval_normals.py --only cifar10 --images 20
    python scripts/eval_normals.py --only towards mnist --exact 1 0.3 0.1
    python scripts/eval_normals.py --only cifar10 mnist --along 1000
    python scripts/eval_normals.py --only mnist --white-box 1000 --skip 0 --images 50
    python scripts/eval_normals.py --only cifar10 mnist --known 1000
    python scripts/eval_normals.py --only cifar10 mnist --starts

Images are those on which options were chosen. The normals are gradients of the margin at the boundary points that `waterfill`
reaches with 120 queries, their part along the ray left out; the cosine is the expected one of an estimate from so many signs,
asked with the noise that a prior shares out for them and weighed by it, with normals of the mean energy measured. `oracle` is
that mean energy itself, and `groups` the prior with the factors that `Spectrum` learns set to what each image's own normal has:
what learning could bring at most, a mean over images.
`towards` are CIFAR-10's images, each towards the next class.
With --exact nothing is estimated: an iteration takes the white-box normal across the ray, turned away from it at random to the
cosine given, and asks rows for its search alone. It tells what better estimates could bring.
With --along, what 1000 queries (or so many) reach: the median distance R at the start of some iterations, the cosine of the
ray with the white-box normal, and their product, the distance of the tangent plane: where a boundary is flat, none is nearer.
With --white-box, that distance over the least one that foolbox's DDN finds (300 steps), quartiles over images.
With --known, the distance of `waterfill` over that with bands and cells, from the start, as the mean energy has them (at
120 queries), at 100, 250, 500 and 1000 queries and paired: what learning a network's spectrum could bring at most.
With --starts, of how many classes but its own `find_start` finds each image a point without an image of them, and with which
median of rows; and where its waves give way to as many rows of white noise.
Distances along patterns are medians over images of the nearest of four, by bisection.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from foolbox import PyTorchModel
from foolbox.attacks import DDNAttack
from foolbox.criteria import Misclassification, TargetedMisclassification
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_waterfill import MARKS, curve, inputs, paired

from robustbox import run_attack
from robustbox.attacks import patterns, starts, waterfill
from robustbox.attacks import spectrum as spectrum_of
from robustbox.attacks.noise import Drawn
from robustbox.attacks.spectrum import K, Spectrum, summed, water_filling
from robustbox.attacks.subspaces import sampler
from robustbox.protocol import Answer, Query, Task
from robustbox.statistics import median

CHOSEN = {"cifar10": (100, 60), "towards": (100, 24), "mnist": (100, 60), "imagenet": (30, 12)}
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


def slope(model: nn.Module, label: int, point: Tensor, target: int | None = None) -> Tensor:
    """The gradient of the margin into the goal at a point [C,H,W]: the target, or without one what is not the label."""
    point = point.clone().requires_grad_()
    with torch.enable_grad():
        scores = model(point[None])[0]
        others = scores.detach().clone()
        others[label if target is None else target] = -math.inf
        rival = scores[others.argmax()]
        margin = rival - scores[label] if target is None else scores[target] - rival
        return torch.autograd.grad(margin, point)[0]


def normal(model: nn.Module, image: Tensor, label: int, point: Tensor, target: int | None = None) -> Tensor:
    """That gradient without its part along the ray, of length 1."""
    steep = slope(model, label, point, target)
    ray = F.normalize((point - image).flatten(), dim=0).view_as(steep)
    return F.normalize((steep - (steep * ray).sum() * ray).flatten(), dim=0).view_as(steep)


def cosine(prior: Tensor, energy: Tensor, signs: int) -> float:
    """The expected cosine of an estimate with normals of this mean energy [C,H,W]."""
    noise = water_filling(prior, K * K * signs)
    told = K * K * signs * noise / (noise * energy).sum()
    weight = prior / (1 + prior * told)
    found = (weight * told * energy).sum()
    return float(found / (weight.square() * (told.square() * energy + told)).sum().sqrt())


def groups_known(spectrum: Spectrum, energy: Tensor) -> Tensor:
    """The prior with the factors of its groups set to what a normal of this energy [C,H,W] has, sum 1."""
    prior = spectrum.variances()
    known = prior.clone()
    for groups in spectrum.groups:
        there, expected = summed(groups, energy, prior)
        known *= (there / expected.clamp_min(1e-12))[groups[0]].view_as(prior).clamp_min(1e-6)
    return known / known.sum()


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


def exactly(data: str, share: float, count: int | None, budget: int = 500) -> None:
    """Print the distances of `waterfill` whose estimate is the white-box normal, turned away until their cosine is `share`."""
    model, images, labels, aim = chosen(data, count)
    found: dict[int, Tensor] = {}

    def told(*given: Any) -> Generator[Query, Answer, float]:
        task, point, _, _, _, evidence, asked, *_ = given
        label = int(model(task.image[None]).argmax())
        true = normal(model, task.image, label, point[0], task.target)
        aside = torch.randn(true.shape, generator=task.generator)
        aside -= (aside * true).sum() * true
        mixed = share * true + math.sqrt(1 - share**2) * aside / torch.linalg.vector_norm(aside)
        found[id(evidence)] = asked.basis.analyse(mixed[None])[0]
        return 0.5
        yield  # a generator, which asks nothing

    with (
        patch.object(waterfill, "_ask", told),
        patch.object(spectrum_of.Evidence, "mean", lambda evidence, _: found[id(evidence)]),
        patch.object(spectrum_of.Evidence, "rule_out", lambda *_: None),
    ):
        options = {"learn": False}
        result = run_attack(model, images, labels, "waterfill", "l2", budget=budget, attack_options=options, **aim)
    marks = [mark for mark in (100, 150, 200, 300, 500) if mark <= budget]
    curves = curve({"traces": result.traces}, marks)
    medians = "  ".join(f"{mark}: {median(curves[:, k]):.3g}" for k, mark in enumerate(marks))
    print(f"{data}, {len(images)} images, normals of cosine {share:g}: {medians}", flush=True)


def along(data: str, budget: int, count: int | None) -> None:
    """Print how near `waterfill` is at the start of its iterations, and how near the tangent plane there is."""
    model, images, labels, aim = chosen(data, count)
    found: dict[int, list[tuple[float, float]]] = {}
    arc = waterfill.semicircle

    def seen(image: Tensor, point: Tensor, estimate: Tensor) -> Callable[[float], Tensor]:
        k = next(k for k, each in enumerate(images) if torch.equal(each, image))
        steep = slope(model, int(labels[k]), point[0], int(aim["targets"][k]) if aim else None)
        ray = (point - image).flatten()
        found.setdefault(k, []).append((float(ray.norm()), float(F.cosine_similarity(ray, steep.flatten(), dim=0))))
        return arc(image, point, estimate)

    with patch.object(waterfill, "semicircle", seen):
        run_attack(model, images, labels, "waterfill", "l2", budget=budget, **aim)
    last = min(map(len, found.values()))
    print(
        f"{data}, {len(images)} images, {budget} queries: iteration, distance, cosine of ray and normal, their product"
    )
    for t in (*range(1, last, 3), last):
        far, cosine = torch.tensor([each[t - 1] for each in found.values()]).T
        print(
            f"  {t:3}  {median(far.numpy()):.3g}  {median(cosine.numpy()):.3f}  {median((far * cosine).numpy()):.3g}",
            flush=True,
        )


def white_box(data: str, budget: int, count: int | None, skip: int | None) -> None:
    """Print the distances of `waterfill` over those of a white-box attack."""
    model, images, labels, aim = chosen(data, count, skip)
    goal = TargetedMisclassification(aim["targets"]) if aim else Misclassification(labels)
    seen = PyTorchModel(model.eval(), bounds=(0, 1), device=images.device)
    rows, _, _ = DDNAttack(steps=300, init_epsilon=1.0, gamma=0.02)(seen, images, goal, epsilons=None)
    least = torch.where(goal(rows, model(rows)), (rows - images).flatten(1).norm(dim=1), math.inf)
    result = run_attack(model, images, labels, "waterfill", "l2", budget=budget, **aim)
    ours = torch.tensor(result.distance_at(budget))
    quartiles = ", ".join(f"{float(q):.2f}" for q in (ours / least).quantile(torch.tensor([0.25, 0.5, 0.75]).double()))
    print(
        f"{data}, {len(images)} images, {budget} queries: median {median(ours.numpy()):.3g}, "
        f"white-box {median(least.numpy()):.3g}; ours over it, quartiles {quartiles}",
        flush=True,
    )


def known(data: str, budget: int, count: int | None) -> None:
    """Print the distances of `waterfill` over those with the factors of the mean white-box normal from the start."""
    model, images, labels, aim = chosen(data, count)
    energy = torch.stack(energies(model, images, labels, aim)).mean(0)
    usual = Spectrum(images[0]).variances()
    factors = groups_known(Spectrum(images[0]), energy) / usual
    kept = Spectrum.__init__

    def told(spectrum: Spectrum, like: Tensor) -> None:
        kept(spectrum, like)
        spectrum._base = spectrum._base * factors

    plain = run_attack(model, images, labels, "waterfill", "l2", budget=budget, **aim)
    with patch.object(Spectrum, "__init__", told):
        given = run_attack(model, images, labels, "waterfill", "l2", budget=budget, **aim)
    marks = [mark for mark in MARKS if mark <= budget]
    theirs, ours = (curve({"traces": result.traces}, marks) for result in (plain, given))
    each = "  ".join(f"{mark}: {paired(ours[:, [k]], theirs[:, [k]])[0]:.3f}" for k, mark in enumerate(marks))
    mean, low, high = paired(ours, theirs)
    print(
        f"{data}, {len(images)} images, over that with factors known: {each}; {mean:.3f} ({low:.3f}-{high:.3f})",
        flush=True,
    )


def energies(model: nn.Module, images: Tensor, labels: Tensor, aim: dict[str, Any]) -> list[Tensor]:
    """The energy of each image's white-box normal in the basis [C,H,W], at points that 120 queries reached."""
    result = run_attack(model, images, labels, "waterfill", "l2", budget=120, **aim)
    basis, each = Spectrum(images[0]).basis, []
    for k, (image, label, end) in enumerate(zip(images, labels.tolist(), result.adversarials, strict=True)):
        target = int(aim["targets"][k]) if aim else None
        point = end if aim else boundary(model, image, label, end)[0]
        if bool(torch.isfinite(point).all()):
            each.append(basis.analyse(normal(model, image, label, point, target)[None])[0].square())
    return each


def heavy_noise(task: Task) -> Iterator[Drawn]:
    """White noise in place of the waves, in stages of ten rows too."""
    draw = sampler("full", (*task.image.shape,), 1, task.generator)
    for _ in range(starts.WAVES // 10):
        yield Drawn((task.image + 8 * draw(10)).clamp(0, 1))


def found(data: str, count: int | None) -> None:
    """Print towards how many classes a start is found without an image of them."""
    model, images, labels, _ = chosen(data, count)
    classes = int(model(images[:1]).shape[1])
    again, turn = images.repeat(classes - 1, 1, 1, 1), torch.arange(1, classes).repeat_interleave(len(images))
    for name, stage in {"waves": starts._waves, "white noise": heavy_noise}.items():
        with patch.object(starts, "_waves", stage):
            own = labels.repeat(classes - 1)
            towards = (own + turn) % classes
            result = run_attack(model, again, own, "hop-skip-jump", "l2", budget=100, targets=towards)
        needed = result.first_success[result.first_success > 0]
        print(
            f"{data}, {len(images)} images, {name}: {len(needed)} of {len(again)} starts found, "
            f"with {median(needed):.0f} rows (median)",
            flush=True,
        )


def chosen(data: str, count: int | None, skip: int | None = None) -> tuple[nn.Module, Tensor, Tensor, dict[str, Any]]:
    """Model, images, labels and the targets, if any, of a data set, from its first image on or from number `skip`."""
    first, n = CHOSEN[data]
    first = first if skip is None else skip
    model, images, labels, pool = inputs("cifar10" if data == "towards" else data, first, count or n)
    return model, images, labels, {"targets": (labels + 1) % 10, "pool": pool} if data == "towards" else {}


def main() -> None:
    parser = argparse.ArgumentParser(description="Where normals lie, and how far the boundary is along patterns.")
    parser.add_argument("--only", nargs="+", choices=list(CHOSEN), default=list(CHOSEN))
    parser.add_argument("--images", type=int)
    parser.add_argument("--exact", type=float, nargs="+", metavar="COSINE", help="white-box normals of these cosines")
    parser.add_argument("--along", type=int, metavar="QUERIES", help="how near the iterations of a run come")
    parser.add_argument("--white-box", type=int, metavar="QUERIES", help="how near DDN comes, beside so many queries")
    parser.add_argument(
        "--known", type=int, metavar="QUERIES", help="what a network's mean spectrum from the start saves"
    )
    parser.add_argument("--skip", type=int, help="the first image of --white-box")
    parser.add_argument(
        "--starts", action="store_true", help="towards how many classes a start is found without their images"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    for data in args.only:
        if args.white_box:
            white_box(data, args.white_box, args.images, args.skip)
            continue
        if args.known:
            known(data, args.known, args.images)
            continue
        if args.starts:
            found(data, args.images)
            continue
        if args.along:
            along(data, args.along, args.images)
            continue
        if args.exact:
            for share in args.exact:
                exactly(data, share, args.images)
            continue
        model, images, labels, aim = chosen(data, args.images)
        ours, each = Spectrum(images[0]), energies(model, images, labels, aim)
        energy = torch.stack(each).mean(0)
        print(
            f"{data}, images {CHOSEN[data][0]} to {CHOSEN[data][0] + len(images)}: energy by colour",
            [round(float(e), 2) for e in energy.sum((1, 2))],
        )
        priors = {"present": ours.variances(), "white": torch.full_like(energy, 1 / energy.numel())}
        for name, prior in (priors | {"oracle": energy.clamp_min(1e-9) / energy.sum()}).items():
            print(f"  cosine, {name:8}" + "".join(f"  {q}: {cosine(prior, energy, q):.3f}" for q in SIGNS))
        means = [sum(cosine(groups_known(ours, e), e, q) for e in each) / len(each) for q in SIGNS]
        print("  cosine, groups  " + "".join(f"  {q}: {mean:.3f}" for q, mean in zip(SIGNS, means, strict=True)))
        if aim:
            continue
        generator = torch.Generator().manual_seed(0)
        near = partial(nearest_of_four, model, images, labels)
        print(f"  nearest of four, tiles of period 2: {near(partial(tile, generator)):.3g}")
        for periods in ((2.0, 4.0), (4.0, 8.0), (8.0, 16.0)):
            with patch.object(patterns, "PERIODS", periods), patch.object(patterns, "WINDOWS", (1e3, 1e3)):
                print(f"  nearest of four, wavelets of periods {periods}: {near(partial(wavelet, generator)):.3g}")


if __name__ == "__main__":
    main()
