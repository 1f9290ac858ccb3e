"""How rows and answers travel between `robustbox.serve` and its clients: NumPy arrays one after the other, never a pickle.

A body of the type `application/x-npy` is one or more arrays in NumPy's npy format, each right after the one before:

    request     rows float32 [n,C,H,W] in [0, 1] or uint8 (0 to 255), then, where the client acts for accounts, int64 [n]
    answer      labels int64 [n], status uint8 [n], scores float [n,K] (K = 0: none)

Floats arrive as they were sent, to the last bit. docs/serve.md describes the protocol.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from robustbox.protocol import ANSWERED, BANNED, REJECTED, Answer

NPY = "application/x-npy"
STATUS = {ANSWERED: "answered", REJECTED: "rejected", BANNED: "banned"}
"""The status of a row in JSON."""
SCORES, KEY, REPLAYED, ACCOUNT = "Robustbox-Scores", "Idempotency-Key", "Robustbox-Replayed", "Robustbox-Account"
"""Headers: what the scores are; the key of a request, equal in its repeats; whether it was answered before; who sends it."""

_HEADER = 4096
"""Bytes that the header of an array may have. It is read by patterns: numpy's own reader evaluates it."""
_DTYPE = re.compile(rb"'descr'\s*:\s*'([<>|=]?(?:f[248]|[iu][1248]))'")
_ORDER = re.compile(rb"'fortran_order'\s*:\s*(True|False)\b")
_SHAPE = re.compile(rb"'shape'\s*:\s*\(([\d\s,]{0,200})\)")


def pack(*arrays: NDArray[Any]) -> bytes:
    """Arrays as bytes, one after the other."""
    buffer = io.BytesIO()
    for array in arrays:
        npy.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def unpack(content: bytes, most: int) -> list[NDArray[Any]]:
    """At most `most` arrays of plain numbers; read-only views of the content, which must end with the last of them.

    Raises:
        ValueError: the content is anything else; nothing that it says about itself is believed.
    """
    view, start, arrays = memoryview(content), 0, list[NDArray[Any]]()
    while start < len(view):
        if len(arrays) == most:
            raise ValueError(f"more than {most} arrays, or bytes after the last")
        array, start = _array(view, start)
        arrays.append(array)
    return arrays


def _array(view: memoryview, start: int) -> tuple[NDArray[Any], int]:
    """The array that begins at `start`, and where it ends."""
    magic = bytes(view[start : start + 12])
    wide = magic[6:7] == b"\2"  # version 2 has four bytes for the length of the header, version 1 two
    length = int.from_bytes(magic[8 : 12 if wide else 10], "little")
    first = start + (12 if wide else 10) + length
    if magic[:6] != npy.MAGIC_PREFIX or magic[6:8] not in (b"\1\0", b"\2\0") or length > _HEADER or first > len(view):
        raise ValueError(f"no npy array at byte {start}")
    header = bytes(view[first - length : first])
    named, order, sides = (pattern.search(header) for pattern in (_DTYPE, _ORDER, _SHAPE))
    if named is None or order is None or sides is None:
        raise ValueError("an npy array of something else than plain numbers")
    dtype, shape = np.dtype(named[1].decode()), tuple(map(int, re.findall(rb"\d+", sides[1])))
    size = math.prod(shape) * dtype.itemsize
    if order[1] == b"True" and len(shape) > 1:
        raise ValueError("an array in Fortran's order: it must be in C's")
    if size > len(view) - first:
        raise ValueError(f"an array of {size} bytes, of which {len(view) - first} are there")
    if not size:
        if max(shape, default=0) > 2**40:
            raise ValueError(f"an array of shape {list(shape)}")
        return np.empty(shape, dtype), first
    flat: NDArray[Any] = np.frombuffer(view, dtype, math.prod(shape), first)
    return flat.reshape(shape), first + size


def pack_answer(answer: Answer) -> bytes:
    """An answer as bytes."""
    labels = answer.labels.long().cpu().numpy()
    scores = np.empty((len(labels), 0), np.float32) if answer.scores is None else answer.scores.float().cpu().numpy()
    return pack(labels, answer.status.to(torch.uint8).cpu().numpy(), scores)


def unpack_answer(content: bytes, n: int) -> Answer:
    """The answer to n rows, as the service gave it.

    Raises:
        ValueError: these bytes are no answer to n rows.
    """
    arrays = unpack(content, 3)
    if len(arrays) != 3:
        raise ValueError(f"{len(arrays)} arrays where labels, status and scores were due")
    labels, status, scores = arrays
    shapes = (labels.ndim, status.ndim, scores.ndim)
    if shapes != (1, 1, 2) or {len(labels), len(status), len(scores)} != {n}:
        raise ValueError(f"labels {list(labels.shape)} and scores {list(scores.shape)} for {n} rows")
    if labels.dtype.kind != "i" or status.dtype != np.uint8 or scores.dtype.kind != "f" or (status > BANNED).any():
        raise ValueError("labels, status or scores of another type than the protocol's")
    return Answer(
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(scores.astype(np.float32)) if scores.shape[1] else None,
        torch.from_numpy(status.copy()),
    )
