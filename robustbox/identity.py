"""Who is who: images by what they show, random streams by what they are for. Nothing depends on order or company."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def sha256(image: Tensor) -> str:
    """The identity of an image: sha256 over its shape and its float32 values, as hexadecimal digits."""
    content = image.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.sha256(f"{content.shape}".encode() + content.tobytes()).hexdigest()


def derive_seed(*identity: object) -> int:
    """A 63-bit number that depends on every part of the identity, the same on every machine and day."""
    digest = hashlib.sha256("\0".join(map(str, identity)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(device: torch.device, *identity: object) -> torch.Generator:
    """The random stream of an identity, on the device that will draw from it."""
    return torch.Generator(device).manual_seed(derive_seed(*identity))
