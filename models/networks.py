"""The architectures of the zoo's own networks, and what networks of all sources need.

Both take images in [0, 1] and normalise inside, so that every norm and every noise scale of an attack is in the units
of the image that a client would send.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Build networks on the CPU from a seed; torch draws initial weights from its global state, which is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, channel by channel: [N,C,H,W] -> [N,C,H,W]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        # Not part of the state dict: the zoo's card states them, the weights file holds only what was trained.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with an identity shortcut (He et al. 2016, option A: subsample and pad, no parameters)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016, section 4.2: 6n + 2 layers, widths 16, 32, 64; n = 3 is ResNet-20.

    Takes [N,3,32,32] in [0, 1] and answers logits [N, classes]. The names of the parameters are those of the widespread
    re-implementation by Y. Idelbayev, so that its weights load too.
    """

    def __init__(self, n: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, 1)
        self.layer2 = self._stage(16, 32, n, 2)
        self.layer3 = self._stage(32, 64, n, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(width_in: int, width: int, n: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(width_in, width, stride), *(BasicBlock(width, width, 1) for _ in range(n - 1)))

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalize(images))))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


class DigitsCNN(nn.Module):
    """A small network for the 8x8 grey digits of scikit-learn: [N,1,8,8] in [0, 1] -> logits [N,10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits
