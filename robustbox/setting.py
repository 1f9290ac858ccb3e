"""From an `AttackConfig`, which names things, to what `run_attack` takes: images, labels, and its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustbox.config import AttackConfig
from robustbox.distances import rounded
from robustbox.errors import InputError
from robustbox.folder import read_adversarials
from robustbox.identity import sha256, stream
from robustbox.protocol import BlackBox

SAMPLES = {
    "cifar10-resnet20": "foolbox:cifar10",
    "digits-cnn": "digits",
    "imagenet-efficientnet-lite0": "foolbox:imagenet",
}
"""The data that each model of the zoo is attacked on unless told otherwise."""
_IMAGES = 20
"""Images attacked unless told otherwise."""


def own_data(model: str) -> str:
    """The name of the data set that comes with a model.

    Raises:
        InputError: none does.
    """
    if model not in SAMPLES:
        raise InputError(f"model {model} comes with no images of its own: name some with --data (see --list)")
    return SAMPLES[model]


def count(wanted: int | None, there: int) -> int:
    """How many images of a data set are attacked.

    Raises:
        InputError: more than there are, or none.
    """
    if wanted is None:
        return min(_IMAGES, there)
    if not 1 <= wanted <= there:
        raise InputError(f"--images must be from 1 to {there}, the size of the data set; not {wanted}")
    return wanted


def arguments(config: AttackConfig, box: BlackBox, everything: Tensor, classes: Tensor, n: int) -> dict[str, Any]:
    """What `run_attack` takes beside black box, images and labels, to attack the first n images of a data set."""
    images, labels = everything[:n], classes[:n]
    same = ["attack", "attack_options", "norm", "epsilon", "budget", "total_budget", "defense", "defense_options"]
    same += ["knowledge", "levels", "seed", "keep_going", "max_rows", "eot", "accounts"]
    return {
        **{name: getattr(config, name) for name in same},
        "targets": _targets(config, box, images, labels),
        "pool": _rest(everything, classes, n),
        "starts": None if config.starts is None else _starts(config.starts, images, config.levels),
    }


def _targets(config: AttackConfig, box: BlackBox, images: Tensor, labels: Tensor) -> int | list[int] | None:
    """Target classes as `run_attack` takes them; a random one depends on seed and image, not on its neighbours."""
    if not isinstance(config.targets, str):
        return config.targets
    classes = box.classes
    if classes is None or classes < 2:
        raise InputError(
            f"--targets {config.targets}: the model does not tell its number of classes, name them one by one"
        )
    if config.targets == "next":
        return [(int(label) + 1) % classes for label in labels]
    cpu = torch.device("cpu")
    streams = [stream(cpu, config.seed, sha256(image), "target") for image in images]
    steps = [int(torch.randint(1, classes, (1,), generator=generator)) for generator in streams]
    return [(int(label) + step) % classes for label, step in zip(labels, steps, strict=True)]


def _starts(path: str, images: Tensor, levels: int | None) -> Tensor:
    """The rows of a file for images [N,C,H,W], in their order; NaN for those of which it has none.

    Raises:
        InputError: it cannot be read, or has none for any of them.
    """
    rows, originals = read_adversarials(path)
    if originals is None:
        if len(rows) != len(images):
            raise InputError(
                f"{path} has {len(rows)} rows and does not say for which images; {len(images)} are attacked"
            )
        return rows
    place = {name: position for position, name in enumerate(originals)}
    found = [place.get(sha256(image), place.get(sha256(rounded(image, levels)))) for image in images]
    if all(position is None for position in found):
        raise InputError(f"{path} has adversarials of other images: attack those that it was made of")
    none = torch.full(rows.shape[1:], torch.nan)
    return torch.stack([none if position is None else rows[position].float() for position in found])


def _rest(images: Tensor, labels: Tensor, n: int) -> tuple[Tensor, Tensor] | None:
    """The images that are not attacked, nor copies of those that are: the attacker's own."""
    attacked = {sha256(image) for image in images[:n]}
    own = [i for i in range(n, len(images)) if sha256(images[i]) not in attacked]
    return (images[own], labels[own]) if own else None
