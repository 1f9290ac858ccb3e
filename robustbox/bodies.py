"""The bodies of requests to `robustbox.serve`, read as by a reader that trusts nothing: rows, or one clear refusal."""

from __future__ import annotations

import base64
import binascii
import io
import json
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robustbox.wire import NPY, unpack

Shape = tuple[int, int, int]
_SIDE = 4096
"""The longest side of an image where the model takes any size."""


class Refusal(Exception):  # noqa: N818  (an answer, not a fault)
    """What a client is told instead of an answer.

    Args:
        status: the HTTP status.
        code: a word for programs.
        message: a line for people.
        wait: seconds after which asking again makes sense, or None.
    """

    def __init__(self, status: int, code: str, message: str, wait: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.wait = status, code, wait


def read_rows(kind: str, body: bytes, shape: Shape | None, most: int) -> tuple[Tensor, list[int] | None]:
    """The rows float32 [n,C,H,W] in [0, 1] of a request, and the accounts that send them, where it names some.

    Args:
        kind: the content type, without parameters, in lower case.
        body: the bytes.
        shape: the (C, H, W) that the model takes, or None for any.
        most: the most rows.

    Raises:
        Refusal: what is wrong with them.
    """
    try:
        rows, accounts = _parsed(kind, body, shape, most)
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise Refusal(400, "bad_body", f"the body cannot be read as {kind}: {_line(error)}") from error
    if rows.ndim != 4 or 0 in rows.shape or (shape is not None and rows.shape[1:] != shape):
        due = ["n", *shape] if shape else ["n", "C", "H", "W"]
        raise Refusal(400, "bad_shape", f"rows of shape {list(rows.shape)}: they must be {due}")
    if len(rows) > most:
        raise Refusal(413, "too_many_rows", f"{len(rows)} rows: a request may hold {most}")
    with np.errstate(over="ignore"):
        values = torch.from_numpy(np.array(rows, np.float32))  # a copy: the body is read-only
    if rows.dtype == np.uint8:
        values.div_(255)
    low, high = torch.aminmax(values)
    if not bool((low >= 0) & (high <= 1)):  # NaN fails too
        raise Refusal(400, "bad_values", "rows must lie in [0, 1], without NaN")
    if accounts is not None and len(accounts) != len(rows):
        raise Refusal(400, "bad_accounts", f"{len(accounts)} accounts for {len(rows)} rows")
    return values, accounts


def _parsed(kind: str, body: bytes, shape: Shape | None, most: int) -> tuple[NDArray[Any], list[int] | None]:
    """Rows of plain numbers and any shape; ValueError and its like where the body makes no sense."""
    if kind == NPY:
        arrays = unpack(body, 2)
        if not arrays:
            raise ValueError("it is empty")
        rows = _numbers(arrays[0])
        return rows, _accounts(arrays[1]) if len(arrays) > 1 else None
    if kind in ("image/png", "image/jpeg"):
        return _picture(body, shape)[None], None
    if kind == "application/json":
        return _document(json.loads(body), shape, most)
    known = f"{NPY}, application/json, image/png or image/jpeg"
    raise Refusal(415, "bad_type", f"the content type must be {known}")


def _document(found: Any, shape: Shape | None, most: int) -> tuple[NDArray[Any], list[int] | None]:
    """The rows of a JSON object: `rows` as nested lists, or `images` as PNG or JPEG files in base64."""
    if not isinstance(found, dict) or len(found.keys() & {"rows", "images"}) != 1:
        raise ValueError("it must be an object with either rows or images")
    if unknown := sorted(found.keys() - {"rows", "images", "accounts"}):
        raise ValueError(f"it has the unknown key {unknown[0][:40]!r}")
    accounts = _accounts(np.asarray(found["accounts"])) if found.get("accounts") is not None else None
    if "rows" in found:
        rows = np.asarray(found["rows"])
        if rows.dtype.kind == "i":
            rows = rows.astype(np.float64)
        return _numbers(rows), accounts
    files = found["images"]
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise ValueError("images must be a list of files in base64")
    if len(files) > most:
        raise Refusal(413, "too_many_rows", f"{len(files)} images: a request may hold {most}")
    try:
        pictures = [_picture(base64.b64decode(file, validate=True), shape) for file in files]
    except binascii.Error as error:
        raise ValueError(f"an image is not base64: {error}") from error
    return np.stack(pictures), accounts


def _picture(content: bytes, shape: Shape | None) -> NDArray[np.uint8]:
    """An 8-bit PNG or JPEG file as uint8 [C,H,W], grey or RGB as the model takes it; its size is checked first."""
    due = None if shape is None else (shape[2], shape[1])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
            if (due is not None and image.size != due) or max(image.size) > _SIDE:
                wanted = f"{due[0]}x{due[1]}" if due else f"at most {_SIDE}x{_SIDE}"
                raise ValueError(f"an image of {image.size[0]}x{image.size[1]} (width x height): it must be {wanted}")
            if image.mode not in ("1", "L", "P", "RGB"):
                raise ValueError(f"an image of mode {image.mode}: it must be 8-bit grey or RGB, without alpha")
            grey = shape[0] == 1 if shape else image.mode in ("1", "L")
            values = np.asarray(image.convert("L" if grey else "RGB"))
    except ValueError:
        raise
    except Exception as error:  # every decoder has its own ways to fail
        raise ValueError("not a sound PNG or JPEG file") from error
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _numbers(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind != "f" and array.dtype != np.uint8:
        raise ValueError(f"rows of {array.dtype}: they must be floats in [0, 1], or uint8")
    return array


def _accounts(array: NDArray[Any]) -> list[int]:
    if array.ndim != 1 or array.dtype.kind != "i":
        raise ValueError("accounts must be integers of 64 bits, one a row")
    return [int(account) for account in array]


def _line(error: BaseException) -> str:
    """The first line of an error's text, not too long of it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
