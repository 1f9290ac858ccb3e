"""Reads files of weights: only those whose hash the card states, and never by unpickling objects."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from robustbox.errors import InputError

from .cards import Card


def read_safetensors(path: Path, card: Card) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        InputError: no such file, a pickle, or not the file whose hash the card states.
    """
    content = _content(path, card)
    if content.startswith((b"\x80", b"PK")):
        raise InputError(f"{path} is a pickle, which could run any code when it is read: weights must be safetensors")
    return parse_safetensors(_checked(content, path, card))


def read_checkpoint(path: Path, card: Card) -> dict[str, Tensor]:
    """The tensors of a torch checkpoint in the order in which it holds them; objects of other types are refused.

    Raises:
        InputError: no such file, or not the file whose hash the card states.
    """
    content = _checked(_content(path, card), path, card)
    tensors: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return tensors


def _content(path: Path, card: Card) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"the weights of {card.name} cannot be read from {path}: {error.strerror}") from error


def _checked(content: bytes, path: Path, card: Card) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != card.sha256:
        raise InputError(
            f"{path} is not the file of {card.name}'s weights, but truncated or another one: its sha256 begins with "
            f"{found[:12]}, the card's with {str(card.sha256)[:12]}; install it again"
        )
    return content
