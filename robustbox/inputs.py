"""Checks what a caller hands over, before a single query is spent. Every error says what is wrong and what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from robustbox import registry
from robustbox.defense_file import is_file, read_defense, takes_options
from robustbox.distances import rounded
from robustbox.errors import InputError, unknown_name
from robustbox.identity import sha256
from robustbox.options import check_options, check_values
from robustbox.protocol import NORMS, Attack, BlackBox, Defense, Norm
from robustbox.records import inside


def check_images(images: Tensor | ArrayLike, box: BlackBox, what: str = "images") -> Tensor:
    """Images as float32 [N,C,H,W] on the black box's device.

    Raises:
        InputError: not four axes, no image, the wrong channels or size, integers, NaN, or values outside [0, 1].
    """
    tensor = as_tensor(images)
    if tensor.ndim != 4:
        raise InputError(f"{what} must have the shape [N,C,H,W], not {list(tensor.shape)}")
    if not tensor.numel():
        raise InputError(f"there is no image to attack: {what} has the shape {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise InputError(f"{what} must be floats in [0, 1], not {tensor.dtype}: divide 8-bit values by 255")
    if box.input_shape is not None and tuple(tensor.shape[1:]) != tuple(box.input_shape):
        raise InputError(f"{what} are {_size(tensor.shape[1:])}, the model takes {_size(box.input_shape)} (C x H x W)")
    low, high = torch.aminmax(tensor)
    if not bool((low >= 0) & (high <= 1)):
        worst = int(tensor.flatten(1).sub(0.5).abs().amax(dim=1).nan_to_num(nan=math.inf).argmax())
        low, high = torch.aminmax(tensor[worst])
        kind = "NaN" if tensor[worst].isnan().any() else f"values from {low.item():.8g} to {high.item():.8g}"
        hint = "rescale them; normalisation belongs to the model"
        raise InputError(f"{what} must lie in [0, 1], but number {worst} has {kind}: {hint}")
    return tensor.detach().to(box.device, torch.float32).contiguous()


def as_tensor(values: Tensor | ArrayLike) -> Tensor:
    """A tensor of what a caller gave, arrays with reversed axes among them."""
    try:
        return values if isinstance(values, Tensor) else torch.as_tensor(np.ascontiguousarray(values))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"a tensor or an array of numbers was expected, not {type(values).__name__}: {error}"
        ) from error


def check_labels(labels: Tensor | ArrayLike, n: int, classes: int | None, what: str = "labels") -> list[int]:
    """Labels as N ints.

    Raises:
        InputError: the wrong number of them, not integers, negative, or not below the number of classes.
    """
    values = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if values.shape != (n,):
        raise InputError(f"{what} must be {n} integers, one an image, not an array of shape {list(values.shape)}")
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"{what} must be integers, not {values.dtype}")
    wrong = np.flatnonzero((values < 0) | (values >= (math.inf if classes is None else classes)))
    if len(wrong):
        limit = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise InputError(f"{what} must be {limit}, but number {wrong[0]} is {values[wrong[0]]}")
    return [int(value) for value in values]


def check_targets(
    targets: int | Tensor | ArrayLike | None, labels: Sequence[int], classes: int | None
) -> list[int] | None:
    """Target classes as N ints, or None for untargeted goals; a single class is meant for all images.

    Raises:
        InputError: as for labels, or a target that equals its image's label.
    """
    if targets is None:
        return None
    if np.ndim(targets.detach().cpu() if isinstance(targets, Tensor) else targets) == 0:
        targets = np.full(len(labels), targets)
    found = check_labels(targets, len(labels), classes, "targets")
    for index, (target, label) in enumerate(zip(found, labels, strict=True)):
        if target == label:
            raise InputError(f"the target of image {index} is its own label {label}: choose another class")
    return found


def check_threat(norm: str, epsilon: float | None, levels: int | None) -> Norm:
    """Refuse norms, radii and grey levels that mean nothing, and a ball in which rounding leaves no row but the image."""
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    if epsilon is not None and not (isinstance(epsilon, Real) and 0 < epsilon < math.inf):
        raise InputError(f"epsilon must be a positive number, or None to minimise the distance; not {epsilon!r}")
    if levels is not None and (not _is_int(levels) or levels < 2):
        raise InputError(
            f"levels must be a whole number of grey levels, 2 or more (256 for 8 bits), or None; not {levels!r}"
        )
    if epsilon is not None and levels is not None and norm != "l0" and not inside(1 / (levels - 1), epsilon):
        raise InputError(
            f"epsilon={epsilon:g} is less than one of {levels} grey levels: no row but the image lies in the ball; "
            f"epsilon must be at least 1/{levels - 1}, about {math.ceil(1e4 / (levels - 1)) / 1e4:g}"
        )
    return norm


def check_levels(levels: int | None, box: BlackBox) -> None:
    """Refuse rows that cannot travel to the model as they are."""
    if box.levels is not None and levels != box.levels:
        raise InputError(f"{box.name} takes images of {box.levels} grey levels: give levels={box.levels}")


def check_count(value: Any, what: str, least: int = 1) -> int:
    """A whole number of at least one, or another least, as a plain int; anything else is refused."""
    if not _is_int(value) or value < least:
        raise InputError(f"{what} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def check_seed(seed: Any) -> int:
    """A whole number, as a plain int: streams are named by it."""
    if not _is_int(seed):
        raise InputError(f"seed must be a whole number, not {seed!r}")
    return int(seed)


def check_pool(
    pool: tuple[Tensor | ArrayLike, Tensor | ArrayLike] | None, images: Tensor, box: BlackBox, levels: int | None
) -> tuple[Tensor, Tensor] | None:
    """The attacker's own images and labels, which may not hold an attacked image as it is transmitted with so many levels.

    Raises:
        InputError: they do, or are no images of this black box, or of another shape than the attacked ones.
    """
    if pool is None:
        return None
    own = _check_alike(check_images(pool[0], box, "pool images"), images, "pool images")
    labels = check_labels(pool[1], len(own), box.classes, "pool labels")
    attacked = {sha256(image) for image in images}
    for index, image in enumerate(rounded(own, levels)):
        if sha256(image) in attacked:
            raise InputError(f"pool image {index} is one of the attacked images: the pool must be the attacker's own")
    return own, torch.tensor(labels, device=box.device)


def check_starts(starts: Tensor | ArrayLike | None, images: Tensor, box: BlackBox) -> list[Tensor | None]:
    """Rows [C,H,W] to begin from, one an image; None where there is none, which a row of NaN says.

    Raises:
        InputError: not one row an image, or rows that are no images of this black box, or of another shape than the images.
    """
    n = len(images)
    if starts is None:
        return [None] * n
    rows = as_tensor(starts).detach()
    if rows.ndim != 4 or len(rows) != n:
        raise InputError(f"starts must be {n} rows [C,H,W], one an image, not an array of shape {list(rows.shape)}")
    given = (~rows.isnan().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    found: list[Tensor | None] = [None] * n
    if given:
        begun = _check_alike(check_images(rows[given], box, "starts"), images, "starts")
        for i, row in zip(given, begun, strict=True):
            found[i] = row
    return found


def _check_alike(rows: Tensor, images: Tensor, what: str) -> Tensor:
    """Refuse rows that no attack can bring together with the images: a callable does not say what shape it takes."""
    if rows.shape[1:] != images.shape[1:]:
        one, other = (" x ".join(map(str, each.shape[1:])) for each in (rows, images))
        raise InputError(f"{what} are {one}, the attacked images {other} (C x H x W)")
    return rows


def resolve_attack(attack: str | Attack, options: Mapping[str, Any] | None) -> Attack:
    """The attack of a name and its options, or the attack itself."""
    if not isinstance(attack, str):
        if options:
            raise InputError("attack_options go with the name of an attack; this attack carries its own")
        if not isinstance(attack, Attack):
            raise InputError(f"attack must be a name or an Attack, not {type(attack).__name__}")
        check_options(attack.name, attack)
        return attack
    built = _build("attack", registry.load("attacks", attack), attack, options)
    if not isinstance(built, Attack):
        raise InputError(f"'{attack}' is not an attack but a {type(built).__name__}")
    return built


def resolve_defenses(
    defense: str | Defense | Sequence[str | Defense] | None, options: Mapping[str, Any] | None
) -> list[Defense]:
    """The defenses, outermost first; options go with the only name beside files."""
    if defense is None:
        defense = []
    chain = list(defense) if isinstance(defense, Sequence) and not isinstance(defense, str) else [defense]
    own = takes_options(chain)
    if options and own is None:
        raise InputError(
            "defense_options go with the name of one defense, alone or among files; of several, pass Defense objects"
        )
    built = [_defense(d, options if d == own else None) if isinstance(d, str) else d for d in chain]
    for given, item in zip(chain, built, strict=True):
        if not isinstance(item, Defense):
            raise InputError(f"defense must be a name or a Defense, not {type(item).__name__}")
        if item is given:
            check_options(item.name, item)
    return built


def _defense(name: str, options: Mapping[str, Any] | None) -> Any:
    if is_file(name):
        return read_defense(name)
    return _build("defense", registry.load("defenses", name), name, options)


def _build(what: str, factory: Any, name: str, options: Mapping[str, Any] | None) -> Any:
    if not isinstance(options or {}, Mapping):
        raise InputError(f"{what}_options must be a mapping from names to values, not {type(options).__name__}")
    known = inspect.signature(factory).parameters
    for option in options or {}:
        if option not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise unknown_name(f"option of {what} {name}", option, known)
    check_values(name, factory, options or {})
    try:
        return factory(**(options or {}))
    except TypeError as error:
        raise InputError(f"{what} {name}: {error}") from error


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
