"""Black boxes from what users have: a torch module, any callable, or a name.

A row's answer is independent of its batch only as far as the model's is. Libraries take other kernels for other batch
sizes, which round floats differently: the scores of a row may differ in their last bits from batch to batch (1e-6 is
usual for float32 on a CPU), and its label where two classes are that close.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustbox import registry
from robustbox.errors import InputError, ModelError
from robustbox.protocol import Answer, BlackBox, Scores
from robustbox.scores import interpreted, read


class LocalBox(BlackBox):
    """A black box whose model runs in this process: a subclass runs it, this class reads what it returns.

    For n rows that is either scores, floats [n,K] with K >= 2 (or an object that holds them as `logits`), or labels,
    integers [n]. A model that says yes or no may return one float a row, [n,1] or [n]: `scores.two_classes` makes two of it.
    Unless `scores` was declared, the first answer shows which, for good; scores are probabilities where all its rows lie in
    [0, 1] and sum to 1 as nearly as their precision allows (`scores.tolerance`), and logits otherwise. NaN and a wrong number
    of rows are for the oracle to find.

    A pass that the device cannot hold is halved until it fits, and later ones are asked in parts that fit. That happens here,
    behind all defenses: what remembers rows or draws noise for them must see each of them once.
    """

    _most: int | None = None  # rows that fit, once some did not

    @abstractmethod
    def _run(self, rows: Tensor) -> Any:
        """What the model returns for rows float32 [n,C,H,W] on `device`; called without gradients."""

    @torch.no_grad()  # not inference_mode: a defense may want gradients of what it keeps
    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """Answer rows float32 [n,C,H,W] in [0, 1] in one pass of the model, or in as few as the device can hold.

        Raises:
            ModelError: the model returned neither scores nor labels, or not those that it returned before; or the device
                cannot hold a single row.
        """
        output = self._fitting(rows)
        if output.is_floating_point():
            scores = self._scored(output)
            return Answer.of(scores.argmax(dim=1), scores)
        self.scores = self.scores or "none"
        if self.scores != "none":
            raise ModelError(f"{self.name} returned labels where scores were due: it must always return the same")
        return Answer.of(output.long())

    def scores_of(self, returned: Any, n: int) -> Tensor:
        """The scores [n,K] of what the model returned for n rows, as in its answers; gradients pass."""
        return self._scored(read(returned, n, self.device, self.name))

    def _scored(self, output: Tensor) -> Tensor:
        """Scores [n,K], K >= 2, from floats [n,K] or [n,1], the first of which show what they are."""
        if self.scores == "none":
            raise ModelError(f"{self.name} returned scores where labels were due: it must always return the same")
        declare = f"{type(self).__name__}(..., scores='logit')"
        scores, kind = interpreted(output, self.scores, self.name, declare)
        self.classes = self.classes or scores.shape[1]
        if scores.shape[1] != self.classes:
            raise ModelError(f"{self.name} returned scores of {scores.shape[1]} classes, and has {self.classes}")
        self.scores = kind
        return scores

    def _fitting(self, rows: Tensor) -> Tensor:
        """Floats [n,K] or integer labels [n], in passes that the device can hold."""
        n = len(rows)
        if self._most is None or n <= self._most:
            try:
                returned = self._run(rows)
            except torch.OutOfMemoryError as error:
                if n <= 1:
                    raise ModelError(f"{self.name}: the device cannot hold one row: {error}") from error
            else:
                return read(returned, n, self.device, self.name)
            self._most = n // 2  # the error, and the memory that it holds on to, is gone by now
        parts = [self._fitting(part) for part in rows.split(self._most)]
        if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
            raise ModelError(f"{self.name} returned scores of one kind for some rows and of another for others")
        return torch.cat(parts)


class ModuleBox(LocalBox):
    """A torch module, run in evaluation mode and without gradients.

    A module in training mode is in evaluation mode only while it answers; one in evaluation mode is taken as it stands,
    with any part that its owner left in training mode (dropout, say; set `stochastic` then).

    Args:
        module: takes rows float32 [n,C,H,W] in [0, 1]. Where it has a `card` (robustbox.models.cards.Card), that says
            its name, input shape, number of classes, kind of scores, and the sha256 of its weights.
        device: where it is moved to; "auto" leaves it where it stands.
        scores: what it returns, `logit`, `probability`, or `none` for labels, where neither card nor first answer shall decide.
    """

    def __init__(self, module: nn.Module, device: str | torch.device = "auto", scores: Scores | None = None) -> None:
        self.module = module if device == "auto" else module.to(_checked(device))
        self.device = next((tensor.device for tensor in self._tensors()), torch.device("cpu"))
        self.card: Any = getattr(module, "card", None)
        self.name = type(module).__name__
        if self.card is not None:
            self.name, self.input_shape = self.card.name, self.card.input_shape
            self.classes, self.scores = self.card.classes, self.card.scores
            if self.classes == 1:  # outputs, not classes
                self.classes = 2
            self.class_names: tuple[str, ...] | None = getattr(self.card, "class_names", None)
        self.scores = scores or self.scores

    def _run(self, rows: Tensor) -> Any:
        if not getattr(self.module, "training", False):  # frozen TorchScript has no modes
            return self.module(rows)
        with evaluating(self.module):
            return self.module(rows)

    def _tensors(self) -> Iterator[Tensor]:
        return chain(self.module.parameters(), self.module.buffers())

    @cached_property
    def weights_sha256(self) -> str:
        """The hash of the weights: the card's, else over the names, types, shapes and bytes of the state dict."""
        if getattr(self.card, "sha256", None):
            return str(self.card.sha256)
        digest = hashlib.sha256()
        for name, value in self.module.state_dict().items():
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def describe(self) -> dict[str, object]:
        return {
            **super().describe(),
            "kind": "module",
            "weights_sha256": self.weights_sha256,
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
        }


class CallableBox(LocalBox):
    """Any callable from a batch, float32 [n,C,H,W] in [0, 1] on `device`, to scores or labels, tensors or numpy arrays.

    Args:
        function: the callable.
        device: where it wants its rows; "auto" is the CPU.
        scores: what it returns, where the first answer shall not decide: `logit`, `probability`, or `none` for labels.
        name: how reports call it; its own name unless given.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        device: str | torch.device = "auto",
        scores: Scores | None = None,
        name: str | None = None,
    ) -> None:
        self.function = function
        self.device = torch.device("cpu") if device == "auto" else _checked(device)
        self.scores = scores
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    def _run(self, rows: Tensor) -> Any:
        return self.function(rows)

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "kind": "callable"}


def as_black_box(
    model: str | BlackBox | nn.Module | Callable[[Tensor], Any], device: str | torch.device | Literal["auto"] = "auto"
) -> BlackBox:
    """The black box of a model: of a name (`robustbox.registry`), a module or a callable; a black box is its own.

    Args:
        model: the model.
        device: where it shall run; "auto" takes CUDA, where it is, for names, leaves modules where they stand, and
            gives callables their rows on the CPU. A BlackBox has its own device and keeps it.

    Raises:
        InputError: no such name, weights that cannot be loaded, no model at all, or a device that is not there.
    """
    if isinstance(model, BlackBox):
        return model
    if isinstance(model, str):
        found = registry.make("models", model)
        return as_black_box(found, ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if isinstance(model, type):
        raise InputError(f"model is the class {model.__name__}: pass an instance of it")
    if isinstance(model, nn.Module):
        return ModuleBox(model, device)
    if callable(model):
        return CallableBox(model, device)
    raise InputError(f"model must be a name, a torch module or a callable, not {type(model).__name__}")


def _checked(device: str | torch.device) -> torch.device:
    """The device, if tensors can be put on it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device '{device}' is not to be had: {reason}") from error


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and every part of it back into the mode it was in.

    The flags are set one by one: `train()` would turn on parts that were off, and exported programs lack `eval()`.
    """
    training = [part for part in module.modules() if getattr(part, "training", False)]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
