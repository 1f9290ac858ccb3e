"""Labels by the model's own numbers: where both data and model name their classes, the names decide."""

from __future__ import annotations

from typing import Any

import torch

from robustbox.errors import InputError
from robustbox.protocol import BlackBox


def numbered(data: Any, box: BlackBox, name: str) -> Any:
    """A data set with labels as the model numbers its classes, where the names of both are known.

    Where the model has none of the data's names, or either names nothing, the data set is returned as it is.

    Raises:
        InputError: the model has some of the names only, under other numbers; or several classes of one name.
    """
    own, theirs = getattr(data, "classes", None), _names(box)
    if not own or not theirs or tuple(own) == theirs:
        return data
    places = {each: theirs.index(each) for each in own if each in theirs}
    if double := next((each for each in places if theirs.count(each) > 1), None):
        raise InputError(f"{name}: {box.name} has more than one class '{double}': give labels by number")
    if len(places) == len(own):
        numbers = torch.tensor([places[each] for each in own])
        return data._replace(labels=numbers[data.labels], classes=theirs)
    moved = next((each for i, each in enumerate(own) if places.get(each, i) != i), None)
    if moved is not None:
        unknown = next(each for each in own if each not in places)
        raise InputError(
            f"{name}: class '{moved}' is number {places[moved]} of {box.name}, which has no class '{unknown}': give that one "
            "the name that the model has for it, or leave it out"
        )
    return data


def _names(box: BlackBox) -> tuple[str, ...] | None:
    """The names of the classes of the model behind all defenses, in order; None where it does not tell them."""
    while box.inner is not None:
        box = box.inner
    names = getattr(box, "class_names", None)
    return None if names is None else tuple(names)
