"""ZO-DS and ZO-AE-DS with RGE and CGE at equal oracle rows before `cifar10-resnet20`, beside their controls.

    python scripts/eval_zo_cifar.py --seeds 0 1 --rows 100000 --images 100 --n 500

Trains on the first 10,000 of the shuffled CIFAR-10 training set, certifies the first images of the test file at sigma 0.25. The
paper's setting is --rows 1950000000 (RGE) or 3870000000 (CGE), --images 10000, --n 10000, with --depth 17 --width 64. A cell
writes its trend (agreement of the held-out images with the model's clean answers, under one noise draw) over the rows spent.
Images whose class 100 draws do not guess spend no further ones. --bfloat16 certifies defense and model in that precision, about
2.5 times as fast where the processor has it; training stays in single precision, whose differences it needs.
Cells that stand in the file --out are not measured again, and a training that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works uninstalled

from eval_zo_mnist import RADII, keep, share
from train_cifar10 import data_folder, training_set

from robustbox.api import load_model
from robustbox.boxes import ModuleBox
from robustbox.certificates import Certifier, certified_share
from robustbox.defense_file import read_defense, write_defense
from robustbox.defenses.zo_training import ZOTrainer
from robustbox.oracle import Oracle
from robustbox.trainer import Workshop

CELLS: dict[str, dict[str, Any] | None] = {
    "undefended": None,
    "ae-only": {"variant": "ae-only", "pretrain": 0},
    "ds-only": {"variant": "ds-only"},
    "ZO-DS (RGE)": {"variant": "ds", "estimator": "rge"},
    "ZO-DS (CGE)": {"variant": "ds", "estimator": "cge", "batch": 1},
    "ZO-AE-DS (RGE)": {"estimator": "rge"},
    "ZO-AE-DS (CGE)": {"estimator": "cge"},
}
"""Two controls that ask nothing: the auto-encoder, and the denoiser that learnt from pixels alone, with which all trained ones
begin. Pixel-wise CGE asks 6145 rows an image: its batches are single images."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--rows", type=int, default=100_000, help="oracle rows of every trained defense (100000)")
    parser.add_argument("--batch", type=int, default=8, help="images a step of training (8): few rows want many steps")
    parser.add_argument(
        "--rate", type=float, default=1e-4, help="of Adam (0.0001: at 0.001 the held-out images got worse)"
    )
    parser.add_argument("--pretrain", type=int, default=2, help="epochs of denoising by mean squared error (2)")
    parser.add_argument("--images", type=int, default=200, help="test images to certify (200)")
    parser.add_argument("--n", type=int, default=10_000, help="noise draws an image (10000)")
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--autoencoder", default="cifar-192")
    parser.add_argument("--ae-epochs", type=int, default=20)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--bfloat16", action="store_true", help="certify what answers in bfloat16")
    parser.add_argument("--out", type=Path, default=Path("build/zo_cifar.json"))
    options = parser.parse_args()

    images, labels = training_set(data_folder() / "cifar10_train_jpeg.tar.gz")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:10_000]
    own, truth = images[chosen].float() / 255, labels[chosen].tolist()
    test = np.load(data_folder() / "cifar10_test_dev.npz")
    fresh = torch.from_numpy(test["images"][: options.images]).permute(0, 3, 1, 2).float() / 255
    fresh_labels = test["labels"][: options.images].tolist()
    box = ModuleBox(load_model("cifar10-resnet20"))
    names = ("sigma", "rows", "batch", "rate", "pretrain", "autoencoder", "ae_epochs", "depth", "width")
    common = {name: getattr(options, name) for name in names}
    done = json.loads(options.out.read_text()) if options.out.exists() else {}
    for seed in options.seeds:
        for name in options.cells:
            key, cell = f"{name} {seed}", CELLS[name]
            if key in done:
                continue
            print(key, flush=True)
            base: Any = box
            entry: dict[str, Any] = {}
            if cell is not None:
                stem = "".join(letter if letter.isalnum() else "-" for letter in key)
                file = options.out.with_name(f"{options.out.stem}-{stem}.safetensors")
                if not file.exists():
                    shop = Workshop(
                        *(Oracle(box, "score"), own, truth, seed, file.with_suffix(".checkpoint")),
                        report=lambda line: print("   ", line, flush=True),
                    )
                    defense = ZOTrainer(**{**common, **cell}).train(shop)
                    write_defense(file, defense, {"ledger": dict(shop.oracle.ledger), **shop.record})
                entry, base = {"file": file.name}, read_defense(file).wrap(box, seed)
            certifier, oracle = Certifier(options.sigma, 100, options.n, batch=64, seed=seed), Oracle(base)
            with torch.autocast(box.device.type, torch.bfloat16, enabled=options.bfloat16):
                found = [certifier.certify(oracle, *each) for each in zip(fresh, fresh_labels, strict=True)]
            entry["certified"] = {str(r): share(*certified_share(found, fresh_labels, r)) for r in RADII}
            entry |= {"n": options.n, "images": options.images, "bfloat16": options.bfloat16}
            keep(options.out, done, key, entry)
    print("\n| defense | seed | " + " | ".join(f"r = {r}" for r in RADII) + " |\n|---|---|" + "---|" * len(RADII))
    for name in CELLS:
        for seed in options.seeds:
            if cell := done.get(f"{name} {seed}"):
                each = [cell["certified"][str(r)] for r in RADII]
                texts = [f"{c['share']:.1%} ({c['low']:.0%} to {c['high']:.0%})" for c in each]
                print(f"| {name} | {seed} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
