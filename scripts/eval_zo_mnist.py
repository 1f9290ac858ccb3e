"""ZO-AE-DS and its controls on MNIST: certified accuracy before a fragile classifier, and reconstruction under attack.

    python scripts/eval_zo_mnist.py classify --seeds 0 1
    python scripts/eval_zo_mnist.py classify --seeds 0 1 --hardened
    python scripts/eval_zo_mnist.py reconstruct --seeds 0 1
    python scripts/eval_zo_mnist.py cosine

All train their own black box on MNIST images 0-5999 and test on images 6000-6000+N. `classify`: a small BatchNorm CNN that one
noise draw of sigma 0.5 breaks on half of the images (`--hardened`: the same one trained under that noise, which stands it by
itself); every trained defense asks the same number of oracle rows. `cosine`: how near the estimates come to the true
gradient of the loss that trains, at latents and at pixels. `reconstruct`:
y = A^T x with A [784,576], entries N(0, 1/576), seed 0; the black box is a convolutional auto-encoder that takes A y,
rescaled to [0, 1], to x; the attack is l2 PGD on its input (40 steps, white box through the whole defense, one
noise draw a step), and the smoothed output is the mean over 10 draws. Cells that stand in the
file --out are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works uninstalled

from robustbox.boxes import ModuleBox
from robustbox.certificates import Certifier, certified_share
from robustbox.defenses.zo_ae_ds import ZOAEDS
from robustbox.defenses.zo_estimators import CGE, RGE, GradientEstimator, TwoPoint
from robustbox.defenses.zo_training import ZOTrainer
from robustbox.identity import stream
from robustbox.oracle import Oracle
from robustbox.statistics import wilson
from robustbox.trainer import Workshop

CPU = torch.device("cpu")
RADII = (0.0, 0.25, 0.5, 0.75)
CELLS: dict[str, dict[str, Any] | None] = {
    "undefended": None,
    "ae-only": {"variant": "ae-only"},
    "ZO-DS (RGE)": {"variant": "ds", "estimator": "rge"},
    "ZO-DS (CGE)": {"variant": "ds", "estimator": "cge"},
    "ZO-AE-DS (RGE)": {"estimator": "rge"},
    "ZO-AE-DS (CGE)": {"estimator": "cge"},
    "FO-DS": {"variant": "ds", "order": "first"},
    "FO-AE-DS": {"order": "first"},
}


def mnist() -> tuple[Tensor, Tensor]:
    """Images [9000,1,28,28] in [0, 1] and labels."""
    folder = Path(os.environ.get("ROBUSTBOX_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
    data = np.load(folder / "mnist_test_dev.npz")
    return torch.from_numpy(data["images"]).float()[:, None] / 255, torch.from_numpy(data["labels"]).long()


def fragile() -> nn.Module:
    """A BatchNorm CNN for MNIST: right on clean images, lost under noise that it never saw."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 49, 10)),
    )


def reconstructor() -> nn.Module:
    """A convolutional auto-encoder from rescaled A A^T x to x, as scores [n,784]."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU()),
        *(
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),
            nn.Sigmoid(),
            nn.Flatten(),
        ),
    )


def classifier(images: Tensor, labels: Tensor, sigma: float) -> nn.Module:
    """The black box of the classification task, trained under noise of sigma."""
    torch.manual_seed(0)
    return fitted(fragile(), images[:6000], labels[:6000], 6, F.cross_entropy, sigma)


def fitted(network: nn.Module, inputs: Tensor, goals: Tensor, epochs: int, loss: Any, sigma: float = 0.0) -> nn.Module:
    """The network after some epochs of Adam, on inputs under noise of sigma."""
    optimizer, order = torch.optim.Adam(network.parameters(), 2e-3), torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - epoch / epochs)
        for part in torch.randperm(len(inputs), generator=order).split(64):
            optimizer.zero_grad()
            noise = torch.randn(inputs[part].shape, generator=order) if sigma else 0.0
            loss(network.train()(inputs[part] + sigma * noise), goals[part]).backward()
            optimizer.step()
    return network.eval()


def measured(images: Tensor) -> Tensor:
    """A A^T x for every image, by one linear map of all values to [0, 1]."""
    A = torch.randn(784, 576, generator=torch.Generator().manual_seed(0)) / 576**0.5
    raw = images.flatten(1) @ A @ A.T
    return ((raw + 2.5) / 5.5).clamp(0, 1).view_as(images)


def trained(box: ModuleBox, images: Tensor, labels: Tensor, cell: dict[str, Any], seed: int) -> tuple[ZOAEDS, Workshop]:
    """The defense of a cell, and the books of its training."""
    shop = Workshop(
        Oracle(box, "score"), images, labels.tolist(), seed, report=lambda line: print("   ", line, flush=True)
    )
    defense = ZOTrainer(**cell).train(shop)
    assert isinstance(defense, ZOAEDS)
    return defense, shop


def classify(options: argparse.Namespace, done: dict[str, Any]) -> None:
    """Certified accuracies, cell by cell."""
    images, labels = mnist()
    model = classifier(images, labels, options.sigma if options.hardened else 0.0)
    kind = "hardened" if options.hardened else "classify"
    test, truth = images[6000 : 6000 + options.images], labels[6000 : 6000 + options.images]
    noise = torch.randn(1000, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean, hit = (
            float((model(rows).argmax(1) == labels[8000:]).float().mean())
            for rows in (images[8000:], images[8000:] + options.sigma * noise)
        )
    print(f"the black box: {clean:.3f} clean, {hit:.3f} under one noise draw of sigma {options.sigma}")
    common = {"sigma": options.sigma, "rows": options.rows, "depth": 3, "width": 8, "ae_epochs": options.ae_epochs}
    common |= {"autoencoder": options.autoencoder}
    for seed in options.seeds:
        for name in options.cells or CELLS:
            key, cell = f"{kind} {name} {seed}", CELLS[name]
            if key in done:
                continue
            print(key, flush=True)
            box, ledger, flat = ModuleBox(model), {}, None
            base: Any = box
            if cell is not None:
                defense, shop = trained(box, images[:6000], labels[:6000], {**common, **cell}, seed)
                base, ledger, flat = (
                    defense.wrap(box, seed),
                    dict(shop.oracle.ledger),
                    shop.record.get("agreement_by_rows"),
                )
            certifier, oracle = Certifier(options.sigma, 100, options.n, seed=seed), Oracle(base)
            found = [certifier.certify(oracle, *each) for each in zip(test, truth.tolist(), strict=True)]
            shares = {str(r): share(*certified_share(found, truth.tolist(), r)) for r in RADII}
            keep(options.out, done, key, {"certified": shares, "ledger": ledger, "trend": flat})
    print(f"\n| defense | {' | '.join(f'r = {r}' for r in RADII)} | rows |\n|---|{'---|' * len(RADII)}---|")
    for name in CELLS:
        cells = [done[f"{kind} {name} {seed}"] for seed in options.seeds if f"{kind} {name} {seed}" in done]
        if cells:
            texts = []
            for r in RADII:
                each = [cell["certified"][str(r)] for cell in cells]
                low, high = min(c["low"] for c in each), max(c["high"] for c in each)
                found = " / ".join(f"{each_share['share']:.1%}" for each_share in each)
                texts.append(f"{found} ({low:.0%} to {high:.0%})")
            print(f"| {name} | {' | '.join(texts)} | {cells[0]['ledger'].get('train', 0)} |")


ESTIMATORS: dict[str, GradientEstimator] = {
    "RGE, q = 20": RGE(q=20),
    "RGE, q = 100": RGE(q=100),
    "RGE, q = 192": RGE(q=192),
    "two-point, m = 96": TwoPoint(m=96),
    "CGE, forward": CGE(central=False),
    "CGE": CGE(),
}


def cosine(options: argparse.Namespace, done: dict[str, Any]) -> None:
    """Cosines of the estimates with the true gradient, at the places and steps of the training; nothing is written."""
    images, labels = mnist()
    model = classifier(images, labels, options.sigma if options.hardened else 0.0).requires_grad_(False)
    test = images[6000 : 6000 + options.images]
    noisy = test + options.sigma * torch.randn(test.shape, generator=torch.Generator().manual_seed(0))
    print(
        "\n| gradient at | d | estimator | rows | cosine, mean (deviation) | on a linear loss |\n|---|---|---|---|---|---|"
    )
    for place, cell in (("mnist-32", {}), ("mnist-192", {}), ("pixels", {"variant": "ds"})):
        shared = {"sigma": options.sigma, "rows": options.rows, "depth": 3, "width": 8, "ae_epochs": options.ae_epochs}
        both = {"variant": "ae-only", "autoencoder": place} if not cell else None
        guard = (
            trained(ModuleBox(model), images[:6000], labels[:6000], {**shared, **both}, 0)[0].guard if both else None
        )
        with torch.no_grad():
            answer = model(test).argmax(1)
            latent = noisy if guard is None else guard.latent(noisy)
        z, shape = latent.flatten(1), latent.shape[1:]

        def losses(points: Tensor, guard: Any = guard, shape: Any = shape, answer: Tensor = answer) -> Tensor:
            rows = points.reshape(-1, *shape)
            scores = model(rows if guard is None else guard.decoder(rows))
            truth = answer.repeat_interleave(points.shape[1])
            return F.cross_entropy(scores.double(), truth, reduction="none").view(points.shape[:2])

        at = z.clone().requires_grad_()
        (true,) = torch.autograd.grad(losses(at[:, None]).sum(), at)
        d = z.shape[1]
        for name, estimator in ESTIMATORS.items():
            with torch.no_grad():
                chunked = replace(estimator, chunk=64)
                made = torch.cat(
                    [
                        chunked.estimate(
                            partial(losses, answer=answer[k : k + 50]), z[k : k + 50], stream(CPU, 0, name, k)
                        )[0]
                        for k in range(0, len(z), 50)
                    ]
                )
            moves = true.norm(dim=1) > 0
            found = F.cosine_similarity(made, true, dim=1)[moves]
            q = {"rge": getattr(estimator, "q", 0), "two-point": getattr(estimator, "m", 0)}.get(estimator.name, 0)
            ideal = (q / (q + d - 1)) ** 0.5 if q else 1.0
            print(
                f"| {place} | {d} | {name} | {estimator.rows(d)} | {found.mean():.3f} ({found.std():.3f}) | {ideal:.3f} |",
                flush=True,
            )


def share(hits: int, of: int) -> dict[str, float]:
    """A share with its 95 % Wilson interval."""
    low, high = wilson(hits, of)
    return {"share": hits / of, "low": low, "high": high}


def attacked(model: Any, inputs: Tensor, goals: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """Inputs within l2 distance epsilon whose outputs are far from the goals: 40 steps of PGD, restarted nowhere."""
    delta = torch.randn(inputs.shape, generator=generator)
    delta = projected(delta, epsilon * torch.rand(len(inputs), generator=generator))
    for _ in range(40):
        delta.requires_grad_()
        loss = (model(inputs + delta) - goals).square().sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        step = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = projected(delta.detach() + 2 * epsilon / 40 * step, torch.full((len(inputs),), epsilon))
        delta = (inputs + delta).clamp(0, 1) - inputs
    return (inputs + delta).detach()


def projected(delta: Tensor, radius: Tensor) -> Tensor:
    """Each delta shortened to its radius."""
    norm = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
    return delta * (radius / norm).clamp_max(1).view(-1, 1, 1, 1)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of images [n,1,28,28] (Wang et al. 2004: Gaussian window of 11, deviation 1.5)."""
    x = torch.arange(11) - 5.0
    window = torch.outer(g := (-x.square() / (2 * 1.5**2)).exp(), g)
    window = (window / window.sum())[None, None]
    mean = [F.conv2d(v, window) for v in (a, b, a * a, b * b, a * b)]
    va, vb, cov = mean[2] - mean[0] ** 2, mean[3] - mean[1] ** 2, mean[4] - mean[0] * mean[1]
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean[0] * mean[1] + c1) * (2 * cov + c2) / ((mean[0] ** 2 + mean[1] ** 2 + c1) * (va + vb + c2))
    return float(value.mean())


def reconstruct(options: argparse.Namespace, done: dict[str, Any]) -> None:
    """RMSE and SSIM under l2 attack, cell by cell."""
    images, labels = mnist()
    inputs = measured(images)
    torch.manual_seed(0)
    # cross-entropy, since a squared error lets the sigmoids of mostly black images die
    model = fitted(reconstructor(), inputs[:6000], images[:6000].flatten(1), 6, F.binary_cross_entropy)
    test, truth = inputs[6000 : 6000 + options.images], images[6000 : 6000 + options.images]
    common = {
        "sigma": options.sigma,
        "rows": options.rows,
        "depth": 5,
        "width": 16,
        "ae_epochs": options.ae_epochs,
        "loss": "mse",
    }
    common |= {"autoencoder": "mnist-192"}
    for seed in options.seeds:
        for name in options.cells or CELLS:
            key, cell = f"reconstruct {name} {seed}", CELLS[name]
            if key in done:
                continue
            print(key, flush=True)
            guard, ledger, draws = None, {}, 1
            if cell is not None:
                box = ModuleBox(model)
                box.scores = "logit"  # values, not probabilities
                defense, shop = trained(box, inputs[:6000], labels[:6000], {**common, **cell}, seed)
                guard, ledger, draws = defense.guard, dict(shop.oracle.ledger), 10
            generator = stream(CPU, seed, "reconstruct")

            def out(rows: Tensor, guard: Any = guard, generator: torch.Generator = generator) -> Tensor:
                if guard is None:
                    return model(rows)  # type: ignore[no-any-return]
                return model(guard(rows + options.sigma * torch.randn(rows.shape, generator=generator)))  # type: ignore

            row = {}
            for epsilon in range(5):
                sent = attacked(out, test, truth.flatten(1), float(epsilon), generator) if epsilon else test
                with torch.no_grad():
                    got = torch.stack([out(sent) for _ in range(draws)]).mean(dim=0).view_as(truth)
                rmse = float((got - truth).square().flatten(1).mean(dim=1).sqrt().mean())
                row[str(epsilon)] = [rmse, ssim(got, truth)]
            keep(options.out, done, key, {"rmse, ssim": row, "ledger": ledger})
    print("\n| defense | seed | " + " | ".join(f"l2 {e}" for e in range(5)) + " | rows |\n|---|---|" + "---|" * 6)
    for name in CELLS:
        for seed in options.seeds:
            if cell := done.get(f"reconstruct {name} {seed}"):
                texts = [f"{rmse:.3f} / {like:.3f}" for rmse, like in cell["rmse, ssim"].values()]
                print(f"| {name} | {seed} | {' | '.join(texts)} | {cell['ledger'].get('train', 0)} |")


def keep(path: Path, done: dict[str, Any], key: str, value: dict[str, Any]) -> None:
    """Write a cell down."""
    done[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(done, indent=1))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["classify", "reconstruct", "cosine"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS))
    parser.add_argument("--images", type=int, default=200, help="test images (200)")
    parser.add_argument("--n", type=int, default=1000, help="noise draws an image (1000)")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=300_000, help="oracle rows of every trained defense (300000)")
    parser.add_argument("--hardened", action="store_true", help="a classifier trained under the noise")
    parser.add_argument("--ae-epochs", type=int, default=8, help="of stage 1 (8)")
    parser.add_argument("--autoencoder", default="mnist-32", help="of the classification task (mnist-32)")
    parser.add_argument("--out", type=Path, default=Path("build/zo_mnist.json"))
    options = parser.parse_args()
    done = json.loads(options.out.read_text()) if options.out.exists() else {}
    {"classify": classify, "reconstruct": reconstruct, "cosine": cosine}[options.task](options, done)


if __name__ == "__main__":
    main()
