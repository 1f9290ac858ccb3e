"""Images with labels, by name: `digits`, `foolbox:SET`, `npz:PATH`, `folder:PATH`, `torchvision:NAME`.

Each function raises InputError, one line that says what to do, where its data cannot be had.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robustbox.errors import InputError, unknown_name

from .names import one_line, split_options

DIGITS_CLASSES = tuple("0123456789")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_FOOLBOX = ("cifar10", "cifar100", "fashionMNIST", "imagenet", "mnist")
_IMAGE_FILES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TORCHVISION = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "STL10", "SVHN", "USPS")
"""The sets of torchvision that hold images of one size with a class each, and have a test part."""


class Data(NamedTuple):
    """Images to attack.

    Args:
        images: float32 [N,C,H,W] in [0, 1].
        labels: int64 [N].
        classes: the names of the classes in order, or None where not known.
        name: how reports call it.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] | None
    name: str


def digits(train: bool = False) -> Data:
    """The 8x8 grey digits of scikit-learn, divided by 16: 360 images that `digits-cnn` was not trained on.

    (With `train` the 1437 others.) The test images, 35 to 37 of each class, are those that scikit-learn draws by
    `train_test_split(range(1797), test_size=360, random_state=0, stratify=target)`, in its order.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    rows = np.arange(len(bunch.target))
    train_rows, test_rows = train_test_split(rows, test_size=360, random_state=0, stratify=bunch.target)
    chosen = train_rows if train else test_rows
    name = "digits (train)" if train else "digits"
    return _data(bunch.images[chosen, None] / 16, bunch.target[chosen], DIGITS_CLASSES, name)


def digits_part(part: str) -> Data:
    """A part of scikit-learn's digits: `train`, the 1437 that `digits-cnn` was trained on, or `test`, as `digits`."""
    if part not in ("train", "test"):
        raise unknown_name("part of digits", part, ("train", "test"))
    return digits(train=part == "train")


def foolbox_samples(dataset: str) -> Data:
    """The 20 sample images of a data set that come with foolbox; `imagenet` is resized to 224x224."""
    import foolbox

    if dataset not in _FOOLBOX:
        raise unknown_name("data set of foolbox", dataset, _FOOLBOX)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses a model, which tells it no more than the two arguments do
        samples: Any = foolbox.utils.samples
        images, labels = samples(None, dataset, batchsize=20, data_format="channels_first", bounds=(0, 1))
    known = {"cifar10": CIFAR10_CLASSES, "mnist": DIGITS_CLASSES}
    classes = imagenet_classes() if dataset == "imagenet" else known.get(dataset)
    return _data(images, labels, classes, f"foolbox:{dataset}")


def npz(path: str) -> Data:
    """A numpy archive with the arrays `images` and `labels`, and the names of the classes as `classes` if it likes.

    Images are uint8 0 to 255 or float in [0, 1], [N,H,W] (grey), [N,H,W,C] or [N,C,H,W] with 1 or 3 channels; where
    both orders are possible uint8 is [N,H,W,C] and float [N,C,H,W]. Nothing is unpickled.
    """
    name = f"npz:{path}"
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {key: archive[key] for key in ("images", "labels", "classes") if key in archive}
    except FileNotFoundError as error:
        raise InputError(f"{name}: there is no such file") from error
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error, TypeError, AttributeError) as error:
        raise InputError(f"{name} is not a sound .npz archive of plain arrays: {one_line(error)}") from error
    if missing := {"images", "labels"} - found.keys():
        raise InputError(f"{name} lacks the array '{min(missing)}': it must hold images and labels")
    classes = tuple(str(c) for c in found["classes"]) if "classes" in found else None
    return _data(_channels_first(found["images"], name), found["labels"], classes, name)


def folder(path: str) -> Data:
    """Image files of one size, grey where all are, RGB otherwise.

    They stand in a folder a class, PATH/CLASS/FILE, classes numbered in the order of their names, or as the model numbers
    them whose names they are (`robustbox.numbering`); or all in one, named by the number of their class in four digits,
    PATH/IIII_ANYTHING.
    """
    name, root = f"folder:{path}", Path(path)
    if not root.is_dir():
        raise InputError(f"{name}: there is no such folder")
    kinds = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [(file, label) for label, kind in enumerate(kinds) for file in _image_files(root / kind)]
    classes: tuple[str, ...] | None = tuple(kinds)
    if not files:
        files = [(file, int(file.name[:4])) for file in _image_files(root) if re.match(r"\d{4}_", file.name)]
        classes = None
    if not files:
        raise InputError(f"{name} holds no images: it must hold CLASS/FILE, or files named by class as 0007_name.png")
    images = _stacked([(str(file), _opened(file)) for file, _ in files], name)
    return _data(images, [label for _, label in files], classes, name)


def torchvision_dataset(text: str) -> Data:
    """The test images of a torchvision data set of one image size: `NAME?root=FOLDER&download=yes`.

    The root is `data` unless given, and nothing is downloaded unless asked.
    """
    from torchvision import datasets

    name, options = split_options(text, ("root", "download"))
    if name not in _TORCHVISION:
        raise unknown_name("data set of torchvision", name, _TORCHVISION)
    if options.get("download", "no") not in ("yes", "no"):
        raise InputError(f"torchvision:{text}: download must be yes or no")
    root, download = options.get("root", "data"), options.get("download") == "yes"
    part: dict[str, Any] = {"split": "test"} if name in ("STL10", "SVHN") else {"train": False}
    try:
        dataset = getattr(datasets, name)(root, download=download, **part)
    except Exception as error:  # every set has its own ways to fail
        raise InputError(
            f"torchvision:{name} cannot be had from the folder '{root}' ({one_line(error)}): "
            f"name another by torchvision:{name}?root=FOLDER, or ask for a download by &download=yes"
        ) from error
    pairs = [dataset[i] for i in range(len(dataset))]
    images = _stacked([(f"image {i}", image) for i, (image, _) in enumerate(pairs)], f"torchvision:{name}")
    classes = getattr(dataset, "classes", None)
    return _data(images, [int(label) for _, label in pairs], classes and tuple(classes), f"torchvision:{name}")


def imagenet_classes() -> tuple[str, ...]:
    """The names of the 1000 classes of ILSVRC 2012, as torchvision has them."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def _image_files(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(file for file in files if file.suffix.lower() in _IMAGE_FILES)


def _opened(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} cannot be read as an image: {one_line(error)}") from error


def _stacked(images: list[tuple[str, Image.Image]], name: str) -> NDArray[np.uint8]:
    """Images (and how to call each) as uint8 [N,C,H,W]: grey where all are, RGB otherwise."""
    usual = Counter(image.size for _, image in images).most_common(1)[0][0]
    for what, image in images:
        if image.size != usual:
            raise InputError(
                f"{name}: {what} is {_by(image.size)}, most are {_by(usual)} (width x height): all must have one size"
            )
        if image.mode[0] in "IF":
            raise InputError(f"{name}: {what} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
    mode = "L" if all(image.mode in ("1", "L") for _, image in images) else "RGB"
    stack = np.stack([np.asarray(image.convert(mode)) for _, image in images])
    return stack[:, None] if mode == "L" else stack.transpose(0, 3, 1, 2)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _channels_first(images: NDArray[Any], name: str) -> NDArray[Any]:
    """Images [N,H,W], [N,H,W,C] or [N,C,H,W] as [N,C,H,W]."""
    if images.ndim == 3:
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[axis] in (1, 3) for axis in (1, 3))
    if last and (not first or images.dtype == np.uint8):
        return images.transpose(0, 3, 1, 2)
    if first:
        return images
    raise InputError(f"{name}: images is {list(images.shape)}: it must be [N,H,W], [N,H,W,C] or [N,C,H,W], C 1 or 3")


def _data(images: NDArray[Any], labels: Any, classes: tuple[str, ...] | None, name: str) -> Data:
    """Data from uint8 or float images [N,C,H,W] and N labels, checked."""
    truth = np.asarray(labels)
    if truth.shape != (len(images),) or not np.issubdtype(truth.dtype, np.integer):
        raise InputError(f"{name}: labels is {truth.dtype} {list(truth.shape)}: it must be {len(images)} integers")
    if not len(images):
        raise InputError(f"{name} holds no images")
    if images.dtype == np.uint8:
        tensor = torch.from_numpy(np.ascontiguousarray(images)).float().div_(255)
    elif np.issubdtype(images.dtype, np.floating):
        tensor = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    else:
        raise InputError(f"{name}: images is {images.dtype}: it must be uint8, or float in [0, 1]")
    low, high = torch.aminmax(tensor)
    if not bool((low >= 0) & (high <= 1)):  # NaN fails too
        raise InputError(f"{name}: images has values from {low:.4g} to {high:.4g}: floats must lie in [0, 1]")
    if truth.min() < 0 or (classes and truth.max() >= len(classes)):
        due = f"from 0 to {len(classes) - 1}" if classes else "0 or more"
        raise InputError(f"{name}: labels has {truth.min()} to {truth.max()}: classes are numbered {due}")
    return Data(tensor, torch.from_numpy(truth.astype(np.int64)), classes, name)
