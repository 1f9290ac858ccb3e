"""Train the zoo's `cifar10-resnet20` on the CIFAR-10 training set of the shared data, and say how good it is.

    python scripts/train_cifar10.py --out models/weights/cifar10-resnet20.safetensors

SGD with Nesterov momentum and a one-cycle learning rate, random crops and flips, label smoothing 0.1. Thirteen epochs take
about 25 minutes on two CPU cores. The run is seeded, but the last bits depend on the machine and its number of threads.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from robustbox.models.networks import CifarResNet

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def data_folder() -> Path:
    """The folder of the shared data: ROBUSTBOX_DATA, else ../shared/data beside the checkout."""
    return Path(os.environ.get("ROBUSTBOX_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))


def training_set(archive: Path) -> tuple[Tensor, Tensor]:
    """uint8 images [50000,3,32,32] and labels [50000] from `train/CLASS/NNNN.jpg` in a tar archive."""
    images, labels = [], []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".jpg"):
                file = tar.extractfile(member)
                assert file is not None
                images.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
                labels.append(CLASSES.index(Path(member.name).parent.name))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of the image padded by four pixels, flipped with probability one half; each row its own."""
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1, 1, 1), generator=generator)
    flip = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    columns = torch.arange(width).expand(n, 1, 1, width)
    columns = torch.where(flip, width - 1 - columns, columns) + left
    rows = torch.arange(height).view(1, 1, height, 1) + top
    index = torch.arange(n).view(n, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1), rows, columns
    return padded[index]


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images [N,3,32,32] that the model labels correctly, in its evaluation mode."""
    model.eval()
    hits = [model(x.float() / 255).argmax(1) == y for x, y in zip(images.split(128), labels.split(128), strict=True)]
    return torch.cat(hits).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.2, help="the peak of the learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)  # the initial weights
    generator = torch.Generator().manual_seed(options.seed)
    images, labels = training_set(data_folder() / "cifar10_train_jpeg.tar.gz")
    test = np.load(data_folder() / "cifar10_test_dev.npz")
    test_images, test_labels = torch.from_numpy(test["images"]).permute(0, 3, 1, 2), torch.from_numpy(test["labels"])

    model = CifarResNet().to(memory_format=torch.channels_last)
    steps = options.epochs * (len(images) // options.batch)
    optimizer = torch.optim.SGD(model.parameters(), options.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps, pct_start=0.25)
    for epoch in range(options.epochs):
        model.train()
        start, losses = time.time(), []
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // options.batch * options.batch].split(options.batch):
            rows = augment(images[batch], generator).float().div_(255).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(rows), labels[batch].long(), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        seconds, mean = time.time() - start, torch.stack(losses).mean().item()
        share = accuracy(model, test_images[:1000], test_labels[:1000])
        print(
            f"epoch {epoch + 1}/{options.epochs}: loss {mean:.3f}, first 1000 test {share:.3f}, {seconds:.0f} s",
            flush=True,
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items() if v.is_floating_point()}, options.out)
    print(f"accuracy on cifar10_test_dev.npz: {accuracy(model, test_images, test_labels):.4f}")


if __name__ == "__main__":
    main()
