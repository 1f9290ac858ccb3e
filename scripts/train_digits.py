"""Train the zoo's `digits-cnn` on the training part of scikit-learn's digits, and say how good it is on the test part.

    python scripts/train_digits.py --out models/weights/digits-cnn.safetensors

AdamW with a cosine learning rate, random shifts by up to one pixel, label smoothing 0.1; ten seconds on a CPU. The run
is seeded, but the last bits depend on the machine and its number of threads. The card in models/cards.py states the
hash that the script prints.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from robustbox.models.data import digits
from robustbox.models.networks import DigitsCNN


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [N,1,8,8] moved by -1, 0 or 1 pixel along both axes; what enters is black."""
    n, _, height, width = images.shape
    top, left = torch.randint(3, (2, n, 1, 1), generator=generator)
    rows, columns = torch.arange(height).view(1, -1, 1) + top, torch.arange(width) + left
    return F.pad(images, (1, 1, 1, 1))[torch.arange(n).view(n, 1, 1), 0, rows, columns].unsqueeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3, help="the first learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)  # the initial weights
    generator = torch.Generator().manual_seed(options.seed)
    train, test = digits(train=True), digits()
    model = DigitsCNN()
    optimizer = torch.optim.AdamW(model.parameters(), options.rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    for _ in range(options.epochs):
        for batch in torch.randperm(len(train.images), generator=generator).split(options.batch):
            logits = model(shifted(train.images[batch], generator))
            loss = F.cross_entropy(logits, train.labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()

    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), options.out)
    with torch.no_grad():
        right = int((model(test.images).argmax(1) == test.labels).sum())
    print(f"{right} of {len(test.labels)} test images right, loss {loss.item():.3f}")
    print(f"sha256 {hashlib.sha256(options.out.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
