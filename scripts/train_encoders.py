"""Train the encoders of the gates `osd` and `iot-sdm` on the shared data, and calibrate their thresholds.

    python scripts/train_encoders.py osd --out defenses/weights/osd.safetensors
    python scripts/train_encoders.py iot-sdm --out defenses/weights/iot-sdm.safetensors

Contrastive: two disturbed copies of an image shall lie together, those of different images at least a margin apart
(Hadsell et al. 2006). The osd encoder sees the CIFAR-10 training set. The iot-sdm encoder was published for images of
malware, which are not to be had; it sees grey MNIST digits and grey CIFAR-10 images, enlarged to 224 pixels.

The threshold is the mean distance to the k nearest of all other training images that only one training image in a
thousand falls short of. Reported with it: the share of fresh images within it, and of disturbed copies near their image.
A few minutes on one core; seeded, but the last bits depend on the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works uninstalled

from train_cifar10 import data_folder, training_set

from robustbox.defenses.encoders import IoTEncoder, OSDEncoder, grey

MARGIN = 10**0.5


@dataclass(frozen=True)
class Job:
    """What to train on what: images uint8 for training, fresh ones, how a batch becomes rows, and the k of the gate."""

    network: Callable[[], nn.Module]
    images: Tensor
    fresh: Tensor
    rows: Callable[[Tensor], Tensor]
    k: int


def colour(images: Tensor) -> Tensor:
    """uint8 [n,C,H,W] as floats in [0, 1]."""
    return images.float() / 255


def enlarged(images: Tensor) -> Tensor:
    """uint8 [n,1,32,32] as grey floats [n,1,224,224]."""
    return grey(images.float() / 255, 224)


def osd() -> Job:
    """CIFAR-10: 50,000 training images, 2,000 fresh ones."""
    images, _ = training_set(data_folder() / "cifar10_train_jpeg.tar.gz")
    return Job(OSDEncoder, images, _cifar_test()[:2000], colour, k=50)


def iot_sdm() -> Job:
    """6,000 MNIST digits and 6,000 CIFAR-10 images, grey; 1,000 fresh ones of each."""
    digits = torch.from_numpy(np.load(data_folder() / "mnist_test_dev.npz")["images"])[:, None]
    digits = F.pad(digits, (2, 2, 2, 2))
    photos = grey(_cifar_test().float(), 32).round().to(torch.uint8)
    images, fresh = (torch.cat((digits[part], photos[part])) for part in (slice(0, 6000), slice(6000, 7000)))
    return Job(IoTEncoder, images, fresh, enlarged, k=11)


def _cifar_test() -> Tensor:
    return torch.from_numpy(np.load(data_folder() / "cifar10_test_dev.npz")["images"]).permute(0, 3, 1, 2)


def disturb(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows under what a client or an attacker might do: shift, brightness, contrast, and noise of three textures."""
    n, _, height, width = rows.shape
    reach = max(1, height // 16)
    shift = torch.randint(-reach, reach + 1, (n, 2), generator=generator).tolist()
    moved = torch.stack([row.roll(tuple(by), (1, 2)) for row, by in zip(rows, shift, strict=True)])
    gain = 1 + 0.2 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    light = 0.1 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    size = 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
    coarse = max(1, 2 ** int(torch.randint(3, (1,), generator=generator)))
    noise = torch.randn(n, rows.shape[1], height // coarse, width // coarse, generator=generator)
    return (moved * gain + light + size * F.interpolate(noise, (height, width))).clamp_(0, 1)


def contrast(first: Tensor, second: Tensor) -> Tensor:
    """The contrastive loss of n pairs of embeddings [n,D], each image's copies against those of all others."""
    distance = torch.cdist(first, second)
    same = distance.diagonal().square().mean()
    others = F.relu(MARGIN - distance[~torch.eye(len(first), dtype=torch.bool)]).square()
    hardest = others.topk(len(others) // 8).values.mean()
    return same + hardest


@torch.no_grad()
def embedded(network: nn.Module, job: Job, images: Tensor) -> Tensor:
    """Embeddings [n,D] of uint8 images."""
    return torch.cat([network(job.rows(part)) for part in images.split(250)])


def nearness(points: Tensor, others: Tensor, k: int, itself: bool) -> Tensor:
    """Mean distance of each point to its k nearest others [n]; `itself`: the points are among the others."""
    found = []
    for part in points.split(500):
        near = torch.cdist(part, others).topk(k + itself, largest=False).values
        found.append(near[:, int(itself) :].mean(dim=1))
    return torch.cat(found)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gate", choices=["osd", "iot-sdm"])
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write (float16)")
    parser.add_argument("--seconds", type=float, default=300, help="processor time to train for (300)")
    parser.add_argument("--pairs", type=int, default=64, help="images a step, two copies of each (64)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate at the start (0.001)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    job = osd() if options.gate == "osd" else iot_sdm()
    torch.manual_seed(options.seed)  # the initial weights
    generator = torch.Generator().manual_seed(options.seed)
    network = job.network()
    optimizer = torch.optim.Adam(network.parameters(), options.rate)
    start, step, loss = time.process_time(), 0, torch.zeros(())
    while (spent := (time.process_time() - start) / options.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * (1 - spent)
        rows = job.rows(job.images[torch.randint(len(job.images), (options.pairs,), generator=generator)])
        first, second = network(torch.cat((disturb(rows, generator), disturb(rows, generator)))).chunk(2)
        loss = contrast(first, second)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {spent:.0%}: loss {loss.item():.3f}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, options.out)

    network.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    network.eval()
    table = embedded(network, job, job.images[:12000])
    own = nearness(table, table, job.k, itself=True)
    threshold = own.kthvalue(max(1, len(own) // 1000)).values.item()
    fresh = nearness(embedded(network, job, job.fresh), table, job.k, itself=False)
    print(f"{step} steps; threshold {threshold:.4f} (k = {job.k}), median over training images {own.median():.4f}")
    print(f"fresh images within it: {int((fresh <= threshold).sum())} of {len(fresh)}")
    for sigma in (0.001, 0.01, 0.05, 0.1):
        rows = job.rows(job.fresh[:20])
        probes = [(row + sigma * torch.randn(job.k + 1, *row.shape, generator=generator)).clamp(0, 1) for row in rows]
        with torch.no_grad():
            near = [nearness(network(probe), network(probe), job.k, itself=True).mean() for probe in probes]
        caught = sum(bool(value <= threshold) for value in near)
        mean = torch.stack(near).mean()
        print(f"noise {sigma}: mean distance of an image's {job.k + 1} copies {mean:.4f}, {caught} of 20 caught")


if __name__ == "__main__":
    main()
