"""Models from files: `file:PATH`, written by torch.export.save or torch.jit.save. No file is unpickled into objects.

TorchScript is read by torch's C++ reader, which knows no Python objects. The reader of exported programs, though,
unpickles objects and starts compiled code that stand among a file's parts: so the parts are checked, and it gets a new
archive of exactly those. A model is a program all the same: run those that you trust.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import nn

from robustbox.errors import InputError

from .cards import Card, carded
from .names import one_line

Parts = dict[str, bytes]


def model_file(path: str) -> nn.Module:
    """A model that torch.export.save or torch.jit.save wrote: `file:PATH`.

    It stands on the CPU, in evaluation mode; its card holds the shapes that an exported program states.

    Raises:
        InputError: the file cannot be read, is truncated, is a pickle or neither kind of model, or is a program that
            takes batches of one size only or was exported in training mode.
    """
    name = f"file:{path}"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from error
    parts = _unzipped(content, name)
    inner = {part.partition("/")[2] for part in parts}
    if "constants.pkl" in inner and any(part.startswith("code/") for part in inner):
        load: Callable[..., nn.Module] = torch.jit.load
        module = _read(name, lambda: load(io.BytesIO(content), map_location="cpu"))
        input_shape, classes = None, None
    elif "archive_format" in inner or "serialized_exported_program.json" in parts:
        _refuse_objects(parts, name)
        program = _read(name, lambda: torch.export.load(_zipped(parts)))
        input_shape, classes = _shapes(program, name)
        module = program.module()
    else:
        raise _pickle(name) if "data.pkl" in inner else _neither(name)
    sha256 = hashlib.sha256(content).hexdigest()
    card = Card(f"file:{Path(path).name}", "not known", input_shape, classes, scores=None, sha256=sha256)
    return carded(module, card)


def _unzipped(content: bytes, name: str) -> Parts:
    """The parts of a zip archive, whole and each once (torch takes names that differ in case for the same)."""
    if content.startswith(b"\x80"):
        raise _pickle(name)
    if not content.startswith(b"PK"):
        raise _neither(name)
    try:
        with ZipFile(io.BytesIO(content)) as archive:
            parts = {part.lower(): archive.read(part) for part in archive.namelist()}
            if len(parts) < len(archive.namelist()):
                raise BadZipFile("a part stands in it twice")
            return {part: parts[part.lower()] for part in archive.namelist()}
    except (BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise InputError(f"{name} is truncated or damaged: {one_line(error)}") from error


def _zipped(parts: Parts) -> io.BytesIO:
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    buffer.seek(0)
    return buffer


def _refuse_objects(parts: Parts, name: str) -> None:
    """Refuse an exported program with parts that its reader would unpickle into objects, or run."""
    for part, content in parts.items():
        place = part.lower()
        try:
            if "aotinductor" in place:
                raise ValueError("compiled code")
            if place.endswith(".pt"):
                torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if place.endswith(".json"):  # older readers take what is no JSON for a pickle
                for entry in dict(json.loads(content)).get("config", {}).values():
                    if entry["use_pickle"] or not entry["path_name"].startswith(("weight_", "tensor_")):
                        raise ValueError("a pickled object")
        except Exception as error:
            raise InputError(
                f"{name} holds more than tensors and a graph in its part {part} ({one_line(error)}): "
                "export a model of plain tensors by torch.export.save"
            ) from error


def _shapes(program: torch.export.ExportedProgram, name: str) -> tuple[tuple[int, int, int] | None, int | None]:
    """(C, H, W) and the number of classes, as far as an exported program fixes them."""
    signature = program.graph_signature
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    if len(signature.user_inputs) != 1:
        raise InputError(f"{name} takes {len(signature.user_inputs)} inputs: it must take one batch of images")
    batch, *shape = values[str(signature.user_inputs[0])].shape
    if isinstance(batch, int):
        raise InputError(
            f"{name} only takes batches of {batch}: export it with dynamic_shapes=({{0: torch.export.Dim.DYNAMIC}},)"
        )
    if any(_trains(node) for node in program.graph.nodes):
        raise InputError(f"{name} was exported in training mode: call model.eval() and export it again")
    fixed = len(shape) == 3 and all(isinstance(size, int) for size in shape)
    scores = list(getattr(values.get(str(signature.user_outputs[0])), "shape", ()))
    classes = scores[1] if len(scores) == 2 and isinstance(scores[1], int) else None
    return (shape[0], shape[1], shape[2]) if fixed else None, classes


def _trains(node: torch.fx.Node) -> bool:
    """Whether an operation (dropout, batch normalisation) does what it does in training."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return given.get("training", given.get("train")) is True


def _read(name: str, read: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces what will replace TorchScript
            return read()
    except Exception as error:  # torch's readers fail in many ways
        raise InputError(f"{name} cannot be read by torch {torch.__version__}: {one_line(error)}") from error


def _pickle(name: str) -> InputError:
    return InputError(f"{name} is a pickle, which could run any code when it is read, and is refused: {_SAVE}")


def _neither(name: str) -> InputError:
    return InputError(f"{name} is neither an exported program nor TorchScript: {_SAVE}")


_SAVE = "save the model by torch.export.save or torch.jit.save"
