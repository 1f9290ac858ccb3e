"""Where in a network: its tensors by the name of a module, or by the role that they play in any architecture."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from robustbox.errors import InputError

Side = Literal["pre", "post"]


@dataclass(frozen=True)
class Place:
    """A tensor in a network: what goes into a module (`pre`), or what comes out of it (`post`).

    Args:
        name: how reports call it: side and name of the module, as `post:layer3`.
        module: the module.
        side: which of the two.
    """

    name: str
    module: nn.Module
    side: Side


def find(network: nn.Module, at: Sequence[str]) -> list[Place]:
    """The places that names and roles mean in a network, each once, in the order asked for.

    A plain name (of `named_modules()`) is the output of that module; `pre:NAME` is its input, `post:NAME` its output,
    and both go with roles too:

        input        what the first convolution or linear layer is given
        stem         what the first stage is given; in networks without a stem, the output of the first layer
        stage:K      the output of stage K, from 1 (0: the stem): `layer1`, ... of a ResNet, the children of `stages`,
                     `layers` or `blocks`; of a plain `features`, its parts (VGG: each pooling); else each layer but the last
        block:K      what block K is given, from 0: the residual stream of a transformer, mixer or residual network
        conv:K, linear:K   what the K-th convolution or linear layer is given, from 0
        penultimate  what the last convolution or linear layer is given (in classifiers the pooled features)
        logits       the output of the network

    Raises:
        InputError: nothing has that name or plays that role.
    """
    found: dict[tuple[int, str], Place] = {}
    names = {id(module): name for name, module in network.named_modules()}
    for text in at:
        side, colon, rest = text.partition(":")
        asked: Side | None = side if colon and side in ("pre", "post") else None  # type: ignore[assignment]
        for module, own in _named(network, rest if asked else text):
            place = Place(f"{asked or own}:{names[id(module)]}", module, asked or own)
            found.setdefault((id(module), place.side), place)
    return list(found.values())


@contextmanager
def intercepted(places: Sequence[Place], edit: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """While it lasts, and in this thread only, `edit(k, tensor)` sees every tensor that passes the k-th place.

    What it returns goes on in the tensor's stead; None leaves it. The hooks are gone afterwards.

    Raises:
        InputError: a module takes no hooks (TorchScript).
    """
    here = threading.get_ident()

    def hook(k: int, side: Side) -> Callable[..., Any]:
        def pre(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != here:
                return None
            if not args:
                return args, _edited(kwargs, lambda tensor: edit(k, tensor))
            return _edited(args, lambda tensor: edit(k, tensor)), kwargs

        def post(_: nn.Module, args: Any, output: Any) -> Any:
            if threading.get_ident() != here:
                return None
            return _edited(output, lambda tensor: edit(k, tensor))

        return pre if side == "pre" else post

    with ExitStack() as handles:
        for k, place in enumerate(places):
            try:
                if place.side == "pre":
                    handle = place.module.register_forward_pre_hook(hook(k, "pre"), with_kwargs=True)
                else:
                    handle = place.module.register_forward_hook(hook(k, "post"))
            except RuntimeError as error:
                raise InputError(f"the network cannot be entered at {place.name}: it takes no hooks") from error
            handles.callback(handle.remove)
        yield


def _edited(value: Any, edit: Callable[[Tensor], Tensor | None]) -> Any:
    """A module's input or output with its first floating tensor edited; the very same object where nothing is."""
    if isinstance(value, Tensor):
        new = edit(value) if value.is_floating_point() else None
        return value if new is None else new
    for key in _keys(value):
        if _holds_one(item := value[key]):
            new = _edited(item, edit)
            return value if new is item else _with(value, key, new)
    return value


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else [*range(len(value))] if isinstance(value, tuple | list) else []


def _holds_one(value: Any) -> bool:
    """Whether a value is or holds a floating tensor."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return any(_holds_one(value[key]) for key in _keys(value))


def _with(value: Any, key: Any, item: Any) -> Any:
    """A copy of a dict, list or tuple with one item exchanged."""
    if isinstance(value, dict):
        return type(value)({**value, key: item})
    items = [*value[:key], item, *value[key + 1 :]]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _named(network: nn.Module, name: str) -> list[tuple[nn.Module, Side]]:
    """The modules of a name or role, and the side that is meant where none is stated."""
    modules = dict(network.named_modules())
    role, colon, number = name.partition(":")
    layers = [module for module in modules.values() if isinstance(module, nn.Conv2d | nn.Linear)]
    if name in modules and name:
        return [(modules[name], "post")]
    if name == "logits":
        return [(network, "post")]
    if name == "input" and layers:
        return [(layers[0], "pre")]
    if name == "penultimate" and layers:
        return [(layers[-1], "pre")]
    if name == "stem" or (role == "stage" and number == "0"):
        return _stem(network, layers)
    kinds: dict[str, tuple[list[nn.Module], Side, int]] = {
        "stage": (stages(network), "post", 1),
        "block": (blocks(network), "pre", 0),
        "conv": ([layer for layer in layers if isinstance(layer, nn.Conv2d)], "pre", 0),
        "linear": ([layer for layer in layers if isinstance(layer, nn.Linear)], "pre", 0),
    }
    if colon and role in kinds:
        candidates, side, first = kinds[role]
        if number == "*" and candidates:
            return [(module, side) for module in candidates]
        if number.removeprefix("-").isdigit():
            k = int(number)
            k = k - first if k >= 0 else k + len(candidates)
            if 0 <= k < len(candidates):
                return [(candidates[k], side)]
    raise InputError(f"the network has no layer '{name}': {_candidates(network, kinds)}")


def _candidates(network: nn.Module, kinds: dict[str, tuple[list[nn.Module], Side, int]]) -> str:
    there = [f"{role}:{first} to {len(c) - 1 + first}" for role, (c, _, first) in kinds.items() if c]
    children = [name for name, _ in network.named_modules() if name and name.count(".") < 2]
    named = ", ".join(children[:12]) + (", ..." if len(children) > 12 else "")
    return f"it has {', '.join(there) or 'no layers that can be told apart'}; modules by name: {named or 'none'}"


def stages(network: nn.Module) -> list[nn.Module]:
    """The stages of a network, in order; the rule stands with `find`."""
    for module in _breadth_first(network):
        children = dict(module.named_children())
        if "layer1" in children and "layer2" in children:
            return [child for name, child in children.items() if name.startswith("layer") and name[5:].isdigit()]
        for name in ("stages", "layers", "blocks"):
            if isinstance(children.get(name), nn.Sequential | nn.ModuleList):
                return list(children[name].children())
        if isinstance(children.get("features"), nn.Sequential):
            return _parts(list(children["features"].children()))
    layers: list[nn.Module] = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return layers[:-1]


def _parts(features: list[nn.Module]) -> list[nn.Module]:
    """Stages of a plain sequence: where it has blocks, those without the stem that it begins with, else the poolings."""
    whole = [part for part in features if list(part.children())]
    if len(whole) > 1:
        return whole[1:] if whole[0] is features[0] else whole
    return [part for part in features if isinstance(part, nn.MaxPool2d | nn.AvgPool2d)]


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of all stages, in order: a stage's children where it is a sequence of blocks, else the stage itself."""
    found: list[nn.Module] = []
    for stage in stages(network):
        inside = getattr(stage, "blocks", stage)
        parts = list(inside.children()) if isinstance(inside, nn.Sequential | nn.ModuleList) else []
        found += parts if parts and all(list(part.children()) for part in parts) else [stage]
    return found


def _stem(network: nn.Module, layers: Sequence[nn.Module]) -> list[tuple[nn.Module, Side]]:
    """What the first stage is given; where that is the image, the output of the first layer."""
    if not layers:
        raise InputError("the network has no layer 'stem': it has neither convolutions nor linear layers")
    order, first = list(network.modules()), stages(network)[:1]  # modules stand in the order of registration
    if first and order.index(first[0]) > order.index(layers[0]):
        return [(first[0], "pre")]
    return [(layers[0], "post")]


def _breadth_first(network: nn.Module) -> Iterator[nn.Module]:
    queue = deque([network])
    while queue:
        module = queue.popleft()
        yield module
        queue.extend(module.children())
