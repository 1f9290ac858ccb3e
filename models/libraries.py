"""Models of other libraries, by name: `timm:NAME` and `torchvision:NAME`.

Pretrained weights come from the library's cache or the network. Random weights come only when they are asked for in so
many words: `timm:resnet18?weights=random` (drawn from seed 0, whatever the global random state). A model takes images
in [0, 1] of the size that its library states, and normalises them inside as its library states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from robustbox.errors import InputError, unknown_name

from .cards import Card, normalised
from .names import one_line, split_options
from .networks import seeded


def timm_model(text: str) -> nn.Module:
    """A pretrained model of timm: `timm:NAME`, or `timm:NAME.TAG` for one of several sets of weights.

    Raises:
        InputError: no such model, no pretrained weights for it, or they cannot be fetched.
    """
    import timm
    from timm.data.config import resolve_model_data_config

    name, options = split_options(text, ("weights",))
    pretrained = options.get("weights") != "random"
    if not timm.is_model(name):
        raise unknown_name("model of timm", name, timm.list_models())
    if pretrained and "weights" in options:
        raise InputError(f"timm:{text}: weights can only be random; sets of weights are named as timm:NAME.TAG")
    if pretrained and not timm.is_model_pretrained(name):
        raise InputError(f"timm has no weights for {name}: take another model, or timm:{name}?weights=random")
    network = _built("timm", name, lambda: timm.create_model(name, pretrained=pretrained))
    config = resolve_model_data_config(network)
    card = Card(
        name=f"timm:{text}",
        task="as timm states",
        input_shape=config["input_size"],
        classes=network.num_classes,
        mean=config["mean"],
        std=config["std"],
        licence=network.pretrained_cfg.get("license") or "not known",
        source="timm" if pretrained else "random weights, seed 0",
    )
    return normalised(network, card)


def torchvision_model(text: str) -> nn.Module:
    """A pretrained classifier of torchvision: `torchvision:NAME`, or `torchvision:NAME?weights=IMAGENET1K_V1`.

    Raises:
        InputError: no such classifier, no such weights, or they cannot be fetched.
    """
    from torchvision import models

    name, options = split_options(text, ("weights",))
    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("model of torchvision", name, known)
    sets = models.get_model_weights(name)
    wanted = options.get("weights", "DEFAULT")
    if wanted not in (*sets.__members__, "random"):
        raise unknown_name(f"set of weights of torchvision:{name}", wanted, [*sets.__members__, "random"])
    weights = None if wanted == "random" else sets[wanted]
    network = _built("torchvision", name, lambda: models.get_model(name, weights=weights))
    stated = weights or sets["DEFAULT"]
    images, names = stated.transforms(), tuple(stated.meta["categories"])
    card = Card(
        name=f"torchvision:{text}",
        task="ImageNet (ILSVRC 2012)",
        input_shape=(3, *images.crop_size * 2),
        classes=len(names),
        class_names=names,
        mean=tuple(images.mean),
        std=tuple(images.std),
        source=f"torchvision, {weights}" if weights else "random weights, seed 0",
    )
    return normalised(network, card)


def _built(library: str, name: str, build: Callable[[], Any]) -> Any:
    try:
        with seeded():
            return build()
    except Exception as error:  # every way of fetching has its own ways to fail
        raise InputError(
            f"{library} cannot load the weights of {name} ({one_line(error)}): connect this machine to the network or "
            f"fill {library}'s cache, or ask for random weights by {library}:{name}?weights=random"
        ) from error
