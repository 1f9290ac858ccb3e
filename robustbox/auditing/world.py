"""What the names in an audit stand for: black boxes and data, the caller's own ones included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from robustbox.api import load_data
from robustbox.boxes import as_black_box
from robustbox.numbering import numbered
from robustbox.protocol import BlackBox


@dataclass(frozen=True)
class World:
    """Names of the caller's own beside the registered ones.

    Args:
        models: by name, anything that `run_attack` takes as a model.
        data: by name, images [N,C,H,W] in [0, 1] and labels [N].
    """

    models: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def box(self, name: str, device: str) -> BlackBox:
        """The undefended black box of a name; the same one whenever it is asked for in this process."""
        return as_black_box(self.models[name], device) if name in self.models else _box(name, device)

    def everything(self, name: str, box: BlackBox | None = None) -> tuple[Tensor, Tensor]:
        """All images and labels of a data set, these as a black box numbers its classes."""
        if name not in self.data:
            images, labels = (_data(name) if box is None else numbered(_data(name), box, name))[:2]
            return images, labels
        images, labels = self.data[name]
        return torch.as_tensor(images), torch.as_tensor(labels)


@cache
def _box(name: str, device: str) -> BlackBox:
    return as_black_box(name, device)


@cache
def _data(name: str) -> Any:
    return load_data(name)
