"""The networks of ZO-AE-DS: a denoiser that begins as the identity, and auto-encoders with small latents.

All take and return images in [0, 1] units; noisy ones may leave [0, 1]. A latent is [n,channels,height,width].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustbox.errors import unknown_name


class DnCNN(nn.Module):
    """The residual denoiser of Zhang et al. 2017: x - net(x), [n,C,H,W] -> [n,C,H,W].

    Orthogonal initial weights, those of the last convolution zero: untrained it returns its input exactly.

    Args:
        channels: of the images.
        depth: number of 3x3 convolutions (17 in the paper).
        width: channels between them (64 in the paper).
    """

    def __init__(self, channels: int, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width, eps=1e-4, momentum=0.95), nn.ReLU()]
        last = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.noise = nn.Sequential(*layers, last)
        for layer in self.noise:
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(last.weight)

    def forward(self, images: Tensor) -> Tensor:
        clean: Tensor = images - self.noise(images)
        return clean


@dataclass(frozen=True)
class Architecture:
    """An auto-encoder of convolutions, whose decoder mirrors the encoder.

    Args:
        shape: (C, H, W) of the images.
        layers: of the encoder, each (channels, kernel, stride, padding).
        relu: whether the latent goes through a ReLU too, as the paper's does; without one it has no edge at 0 that the
            steps of an estimate could cross.
    """

    shape: tuple[int, int, int]
    layers: tuple[tuple[int, int, int, int], ...]
    relu: bool = False

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the image and after each layer."""
        found = [self.shape[1:]]
        for _, kernel, stride, padding in self.layers:
            height, width = ((side + 2 * padding - kernel) // stride + 1 for side in found[-1])
            found.append((height, width))
        return found

    @property
    def latent(self) -> int:
        """The number of values of a latent, d_z."""
        height, width = self.sizes()[-1]
        return self.layers[-1][0] * height * width


def _cifar(latent: int) -> Architecture:
    """The paper's family for 32x32 images; 192 is its `192_24`."""
    widths = (latent // 8, latent // 4, latent // 2, latent)
    kernels = ((4, 4, 0), (3, 3, 2), (4, 2, 1), (2, 2, 0))
    layers = tuple((width, *kernel) for width, kernel in zip(widths, kernels, strict=True))
    return Architecture((3, 32, 32), layers, relu=True)


ARCHITECTURES = {
    "cifar-192": _cifar(192),
    "cifar-96": _cifar(96),
    "cifar-48": _cifar(48),
    "stl-576": Architecture(
        (3, 96, 96), ((18, 5, 3, 1), (72, 4, 4, 0), (144, 3, 3, 2), (288, 4, 2, 1), (576, 2, 2, 0)), relu=True
    ),
    "mnist-192": Architecture((1, 28, 28), ((3, 4, 2, 1), (12, 5, 3, 0)), relu=True),
    "mnist-32": Architecture((1, 28, 28), ((16, 4, 2, 1), (32, 5, 3, 0), (32, 4, 4, 0))),
    "digits-16": Architecture((1, 8, 8), ((8, 3, 2, 1), (16, 4, 4, 0))),
}
"""The auto-encoders by name: those of the paper (with a ReLU on the latent), and smaller ones of ours."""


class AutoEncoder(nn.Module):
    """The encoder and the decoder of an architecture; a sigmoid keeps what is decoded in [0, 1]."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        channels = [architecture.shape[0], *(layer[0] for layer in architecture.layers)]
        sizes = architecture.sizes()
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for i, (_, kernel, stride, padding) in enumerate(architecture.layers):
            down += [nn.Conv2d(channels[i], channels[i + 1], kernel, stride, padding), nn.ReLU()]
            mirrored = [(side - 1) * stride - 2 * padding + kernel for side in sizes[i + 1]]
            missing = (sizes[i][0] - mirrored[0], sizes[i][1] - mirrored[1])
            up = [
                nn.ConvTranspose2d(channels[i + 1], channels[i], kernel, stride, padding, missing),
                nn.ReLU() if i else nn.Sigmoid(),
                *up,
            ]
        self.encoder = nn.Sequential(*down) if architecture.relu else nn.Sequential(*down[:-1])
        self.decoder = nn.Sequential(*up)

    def forward(self, images: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(self.encoder(images))
        return decoded


def architecture(name: str) -> Architecture:
    """The architecture of a name.

    Raises:
        InputError: there is none.
    """
    if name not in ARCHITECTURES:
        raise unknown_name("auto-encoder", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def fitting(shape: tuple[int, ...]) -> str | None:
    """The name of the first architecture that takes images of a shape, or None."""
    return next((name for name, it in ARCHITECTURES.items() if it.shape == tuple(shape)), None)


class Guard(nn.Module):
    """Denoiser, encoder and decoder in a row: what stands before the black box, [n,C,H,W] -> [n,C,H,W].

    Args:
        channels: of the images.
        depth, width: of the denoiser; depth 0 is none (the identity).
        autoencoder: the name of an architecture, or None for a denoiser alone.
    """

    def __init__(self, channels: int, depth: int, width: int, autoencoder: str | None) -> None:
        super().__init__()
        self.denoiser: nn.Module = DnCNN(channels, depth, width) if depth else nn.Identity()
        self.encoder: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()
        if autoencoder is not None:
            both = AutoEncoder(architecture(autoencoder))
            self.encoder, self.decoder = both.encoder, both.decoder

    @torch.no_grad()
    def begin_at(self, colour: Tensor) -> None:
        """Let an untrained decoder return grey of this mean colour [C].

        From 0.5 the first steps on dark images drive every value down, and ReLUs of the latent die on the way: the
        decoder then answers black to everything.
        """
        last = [module for module in self.decoder.modules() if isinstance(module, nn.ConvTranspose2d)][-1]
        assert last.bias is not None
        last.bias.copy_(colour.clamp(0.002, 0.998).logit())

    def latent(self, images: Tensor) -> Tensor:
        """The half that the defender can see into, up to where the gradient is estimated."""
        latent: Tensor = self.encoder(self.denoiser(images))
        return latent

    def forward(self, images: Tensor) -> Tensor:
        guarded: Tensor = self.decoder(self.latent(images))
        return guarded

    def hashed(self) -> str:
        """The first digits of a sha256 over the weights."""
        import hashlib

        digest = hashlib.sha256()
        for name, value in self.state_dict().items():
            digest.update(
                name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()[:16]
