"""Attacks around attacks: a scheme `S:NAME` makes of any attack one that asks the same queries in another way.

A wrapped attack has the options of both, and works in the norms and with the knowledge of the attack that it wraps. Schemes
nest: `oars:blinded:nes` is OARS around a blinded NES.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor

from robustbox import registry
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, Attack, Query, Search, Task

W = TypeVar("W", bound="Wrapper")


class Wrapper(Attack):
    """An attack that asks another one's queries in its own way; `wrapped` makes a class for each pair.

    Attributes:
        wraps: the class of the attack inside.
    """

    wraps: ClassVar[type[Attack]]

    def __post_init__(self) -> None:
        self.inner()  # its options are checked at once

    def inner(self) -> Attack:
        """The attack inside, with its share of the options."""
        return self.wraps(**{name: getattr(self, name) for name in _options(self.wraps)})

    def options(self) -> dict[str, object]:
        """The hyper-parameters of both, for the record."""
        return dict(vars(self)) | self.inner().options()

    def check(self, task: Task) -> None:
        self.inner().check(task)

    @property
    def shares(self) -> bool:
        return False

    def searches(self, tasks: Sequence[Task]) -> list[Search]:
        return [self.search(task) for task in tasks]  # not those of the attack inside, which do not pass through here


def wrapped(wrapper: type[W], scheme: str, name: str) -> type[W]:
    """The class of `scheme:name`: a frozen dataclass whose fields are the options of the wrapper and of the attack `name`.

    It inherits from both, so that what the attack says of itself holds for the pair; only the wrapper's methods are used.

    Raises:
        InputError: no such attack (with the nearest names), none that can be wrapped, or an option that both have.
    """
    found: Any = registry.load("attacks", name) if name else None
    if not (inspect.isclass(found) and issubclass(found, Attack) and dataclasses.is_dataclass(found)):
        raise InputError(f"{scheme}: goes before the name of an attack, as in {scheme}:cgba; '{name}' is none")
    if both := sorted(set(_options(found)) & set(_options(wrapper))):
        raise InputError(f"{scheme}:{name} cannot be: both {scheme} and {name} have the option {' and '.join(both)}")
    hints = get_type_hints(found) | get_type_hints(wrapper)
    options = [
        (field.name, hints[field.name], dataclasses.field(default=field.default, default_factory=field.default_factory))
        for part in (wrapper, found)
        for field in _options(part).values()
    ]
    namespace = {"__doc__": f"{scheme} around {name}.", "name": f"{scheme}:{name}", "wraps": found}
    made: Any = dataclasses.make_dataclass(
        f"{wrapper.__name__}{found.__name__}",
        options,
        bases=(wrapper, found),
        namespace=namespace,
        frozen=True,
        kw_only=True,
    )
    return made


def _options(part: type[Attack]) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(part) if field.init}  # type: ignore[arg-type]


Unit = tuple[int, ...]
"""Positions of rows that are of use only together."""


def units(query: Query) -> list[Unit]:
    """Positions that are asked, and asked again, together."""
    if query.groups is None:
        return [(position,) for position in range(len(query.rows))]
    members: dict[int, list[int]] = {}
    for position, group in enumerate(query.groups):
        members.setdefault(group, []).append(position)
    return [tuple(positions) for positions in members.values()]


def relayed(inner: Search, ask: Callable[[Query], Generator[Query, Answer, Answer | None]]) -> Search:
    """What the search inside asks, each query by way of `ask`, whose answer it is told; None from `ask` ends both."""
    answer: Answer | None = None
    with closing(inner):
        while True:
            try:
                query = next(inner) if answer is None else inner.send(answer)
            except StopIteration:
                return
            answer = yield from ask(query)
            if answer is None:
                return


class Collected:
    """The answer to a query of n rows that comes in pieces; a position that was never answered stays refused.

    Args:
        like: an earlier answer, which shows whether there are scores, and of how many classes.
    """

    def __init__(self, n: int, like: Answer | None = None) -> None:
        self.labels = torch.full((n,), -1)
        self.status = torch.full((n,), REJECTED, dtype=torch.uint8)
        self.scores: Tensor | None = None
        if like is not None and like.scores is not None:
            self.scores = like.scores.new_full((n, like.scores.shape[1]), torch.nan)

    def put(self, positions: list[int], answer: Answer) -> None:
        """Take the answer to the rows of these positions."""
        self.labels[positions], self.status[positions] = answer.labels, answer.status
        if answer.scores is not None:
            if self.scores is None:
                self.scores = answer.scores.new_full((len(self.labels), answer.scores.shape[1]), torch.nan)
            self.scores[positions] = answer.scores

    def answer(self) -> Answer:
        """What was collected."""
        return Answer(self.labels, self.scores, self.status)
