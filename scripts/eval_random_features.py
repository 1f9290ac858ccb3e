"""Random features beside input noise at the same drop in accuracy and no defense, under six attacks and under EOT.

    python scripts/eval_random_features.py run cifar|imagenet [--hours H] [--attacks A ...]
    python scripts/eval_random_features.py table cifar|imagenet

`run` writes a file a cell under build/random-features, `table` prints them for docs/random-features.md. A cell is one
attack on one defended model; `run` goes through them in order of importance and on from where it stopped.
An image's result does not depend on the others: of a cell with more images than are asked for now, the first ones count.
The scale of each defense is the largest whose drop, by its upper 95 % bound on images that are never attacked, is at most
1 % or 2 %. Needs the real data (`ROBUSTBOX_DATA`, else ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import robustbox as rb
from robustbox.boxes import as_black_box
from robustbox.defenses.input_noise import InputNoise
from robustbox.defenses.noise_scale import calibrate, right
from robustbox.defenses.random_features import RandomFeatures
from robustbox.oracle import Oracle
from robustbox.protocol import BlackBox, Defense
from robustbox.statistics import wilson

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ROBUSTBOX_DATA", ROOT.parent / "shared" / "data"))
OUT = ROOT / "build" / "random-features"
ATTACKS = ("square", "nes", "sign-hunter", "rays", "sign-flip", "hop-skip-jump")


@dataclass(frozen=True)
class Setting:
    """One model and what is done to it: the first `images` are attacked, the last `held` calibrate, at scales `between`."""

    model: str
    epsilon: float
    images: int
    held: int
    draws: int
    steps: int
    at: str
    between: dict[str, tuple[float, float]]
    budget: int = 1000


RANGES = {"random-features": (0.5, 10.0), "input-noise": (0.005, 0.1)}
WIDE = {"random-features": (0.05, 10.0), "input-noise": (0.0005, 0.1)}
"""Scales between which the one is sought that costs the drop; 200 images can vouch for less noise than 2,000."""
SETTINGS = {
    "cifar": Setting("cifar10-resnet20", 8 / 255, 50, 2000, 1, 6, "stage:-1", RANGES),
    "imagenet": Setting("imagenet-efficientnet-lite0", 0.05, 12, 200, 1, 6, "stage:-1", WIDE),
}


def cells(name: str) -> list[tuple[str, str, float, int]]:
    """(attack, defense, drop, eot), the most telling first."""
    order = [("square", "none", 0.0, 1)]
    order += [("square", d, 0.02, eot) for eot in (1, 5, 10) for d in RANGES]
    for attack in ATTACKS[1:]:
        order += [(attack, "none", 0.0, 1), *((attack, d, 0.02, 1) for d in RANGES)]
    order += [("square", d, 0.01, 1) for d in RANGES]
    order += [(attack, d, 0.02, eot) for attack in ("nes", "sign-hunter") for eot in (5, 10) for d in RANGES]
    return order + [(attack, d, 0.01, 1) for attack in ATTACKS[1:] for d in RANGES]


def images_of(name: str) -> tuple[Tensor, Tensor]:
    """All images [N,C,H,W] in [0, 1] and their labels."""
    if name == "cifar":
        with np.load(DATA / "cifar10_test_dev.npz") as arrays:
            pixels, labels = arrays["images"], arrays["labels"]
    else:
        from PIL import Image

        with zipfile.ZipFile(DATA / "imagenet_sample_dev.zip") as archive:
            files = sorted(f for f in archive.namelist() if f.lower().endswith((".jpg", ".jpeg")))
            files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
            pixels = np.stack([np.asarray(Image.open(archive.open(f)).convert("RGB")) for f in files])
            labels = np.array([int(Path(f).name[:4]) for f in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255), torch.from_numpy(labels.astype(np.int64))


def recipe(defense: str, nu: float, at: str) -> Defense:
    """The defense of a scale."""
    return InputNoise(nu) if defense == "input-noise" else RandomFeatures(nu, at)


def scales(name: str, box: BlackBox, images: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """What each defense's scale is at each drop, kept in a file."""
    setting, path = SETTINGS[name], OUT / name / "scales.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    oracle = Oracle(box)
    held, truth = images[-setting.held :], labels[-setting.held :]
    clean = None
    for drop in (0.02, 0.01):
        for defense, between in setting.between.items():
            if (key := f"{defense}@{drop}") not in found:
                clean = right(oracle, box, held, truth.numpy(), 0, 32) if clean is None else clean
                scale = calibrate(
                    lambda nu, defense=defense: recipe(defense, nu, setting.at),  # type: ignore[misc]
                    oracle,
                    held,
                    truth,
                    drop,
                    between=between,
                    draws=setting.draws,
                    steps=setting.steps,
                    clean=clean,
                )
                found[key] = scale.record()
                write(path, found)
                print(key, found[key], flush=True)
    return found


def run(name: str, hours: float, attacks: list[str]) -> None:
    """Fight the cells of some attacks that are not there yet, until the time is up."""
    setting, end = SETTINGS[name], time.monotonic() + 3600 * hours
    model = rb.load_model(setting.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster
    box = as_black_box(model)
    images, labels = images_of(name)
    kept = scales(name, box, images, labels)
    seen = right(Oracle(box), box, images[: 4 * setting.images], labels[: 4 * setting.images].numpy(), 0, 32)
    chosen = np.flatnonzero(seen)[: setting.images]
    for attack, defense, drop, eot in cells(name):
        path = OUT / name / f"{attack}-{defense}-{drop}-eot{eot}.json"
        if path.exists() or attack not in attacks:
            continue
        if time.monotonic() > end:
            return
        begin = time.monotonic()
        result = rb.run_attack(
            model,
            images[chosen],
            labels[chosen],
            attack,
            "linf",
            setting.epsilon,
            budget=setting.budget,
            eot=eot,
            max_rows=32,
            defense=None if defense == "none" else recipe(defense, kept[f"{defense}@{drop}"]["nu"], setting.at),
        )
        cell: dict[str, Any] = {
            "clean": result.clean_correct.tolist(),
            "any": result.success_any.tolist(),
            "fresh": result.success_fresh.tolist(),
            "undefended": result.success_undefended.tolist(),
            "queries": result.queries.tolist(),
            "seconds": time.monotonic() - begin,
        }
        write(path, cell)
        print(path.name, row(cell), f"{cell['seconds']:.0f} s", flush=True)


def row(cell: dict[str, Any]) -> str:
    """Robust accuracy by each rate: images that stayed right, of all; `fresh` with its interval."""
    clean, n = np.array(cell["clean"]), len(cell["clean"])
    strict = np.array(cell["fresh"]) & np.array(cell["undefended"])
    left = {name: int((clean & ~np.array(cell[name])).sum()) for name in ("any", "fresh", "undefended")}
    low, high = wilson(left["fresh"], n)
    fresh = f"**{left['fresh'] / n:.0%}** ({low:.0%} to {high:.0%})"
    return f"{fresh} | {left['any'] / n:.0%} | {left['undefended'] / n:.0%} | {int((clean & ~strict).sum()) / n:.0%}"


def table(name: str) -> None:
    """What there is, as markdown."""
    setting = SETTINGS[name]
    kept = json.loads((OUT / name / "scales.json").read_text())
    print("| defense | target | scale | drop on the held images (95 % interval) |\n|---|---|---|---|")
    for key, scale in kept.items():
        defense, _, drop = key.partition("@")
        interval = f"{scale['drop']:.2%} ({scale['low']:.2%} to {scale['high']:.2%})"
        print(f"| `{defense}` | {float(drop):.0%} | {scale['nu']:.3g} | {interval} |")
    print("\n| attack | defense | fresh | any | clean | strict | rows an image |\n|---|---|---|---|---|---|---|")
    missing = []
    for attack, defense, drop, eot in sorted(cells(name), key=lambda c: (ATTACKS.index(c[0]), c[3], -c[2], c[1])):
        path = OUT / name / f"{attack}-{defense}-{drop}-eot{eot}.json"
        label = "none" if defense == "none" else f"`{defense}`, {drop:.0%}"
        what = f"`{attack}`" + (f", EOT {eot}" if eot > 1 else "")
        if not path.exists():
            missing.append(f"{what} against {label}")
            continue
        cell = {key: value[: setting.images] for key, value in json.loads(path.read_text()).items() if key != "seconds"}
        print(f"| {what} | {label} | {row(cell)} | {np.mean(cell['queries']):.0f} |")
    print(f"\n{setting.images} images, {setting.budget} rows an image. Not run: {'; '.join(missing) or 'nothing'}.")


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("setting", choices=tuple(SETTINGS))
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=ATTACKS, help="what `run` runs (all)")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.setting, arguments.hours, arguments.attacks)
    else:
        table(arguments.setting)
