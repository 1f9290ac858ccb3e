"""What a client says to a service: the language of `robustbox.serve`; `templates.py` has those of others."""

from __future__ import annotations

import base64
import io
import json
from abc import ABC, abstractmethod
from typing import Any

import httpx2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from robustbox.errors import InputError
from robustbox.protocol import Answer
from robustbox.wire import NPY, pack, unpack_answer

from .courier import Message
from .failures import Garbled
from .service_file import Request

Rows = NDArray[np.float32]


class Dialect(ABC):
    """How a service is spoken to.

    Attributes:
        levels: 256 where rows are sent as 8 bits, else None.
        lossy: whether what arrives is not quite the row (JPEG).
        batch: the most rows of a request.
    """

    levels: int | None
    lossy: bool
    batch: int

    @abstractmethod
    def say(self, rows: Rows, accounts: NDArray[np.int64] | None) -> Message:
        """The request for rows [n,C,H,W], n at most `batch`, sent by accounts where the service lets one act for them."""

    @abstractmethod
    def hear(self, response: httpx2.Response, n: int) -> Answer:
        """The answer to n rows.

        Raises:
            Garbled: it is none.
        """


class Robustbox(Dialect):
    """The language of `robustbox.serve`: `npy` sends floats as they are, `uint8`, `png` and `jpeg` 8 bits."""

    def __init__(self, request: Request) -> None:
        self.encoding = request.encoding or "npy"
        if self.encoding == "float" or request.template is not None or request.body != "json" or request.form:
            raise InputError(
                "without response the service speaks robustbox's language: of request only encoding (npy, uint8, png, "
                "jpeg), quality and batch say something"
            )
        self.levels = None if self.encoding == "npy" else 256
        self.lossy = self.encoding == "jpeg"
        self.batch = request.batch or 256
        self.quality = request.quality

    def say(self, rows: Rows, accounts: NDArray[np.int64] | None) -> Message:
        if self.encoding in ("png", "jpeg"):
            files = [picture(row, self.encoding, self.quality) for row in grid(rows)]
            document: dict[str, Any] = {"images": [base64.b64encode(file).decode() for file in files]}
            if accounts is not None:
                document["accounts"] = accounts.tolist()
            return Message(len(rows), {"content": json.dumps(document).encode()}, _types("application/json"))
        sent = rows if self.encoding == "npy" else grid(rows)
        content = pack(sent) if accounts is None else pack(sent, accounts)
        return Message(len(rows), {"content": content}, _types(NPY))

    def hear(self, response: httpx2.Response, n: int) -> Answer:
        kind = response.headers.get("content-type", "")
        if not kind.startswith(NPY):
            raise Garbled(f"the content type {kind[:40]!r}")
        try:
            return unpack_answer(response.content, n)
        except ValueError as error:
            raise Garbled(str(error)) from error


def _types(sent: str) -> dict[str, str]:
    return {"content-type": sent, "accept": NPY}


def grid(rows: Rows) -> NDArray[np.uint8]:
    """Rows that stand on the grid of 8 bits, 0 to 255.

    Raises:
        InputError: one does not; nothing is rounded behind the attack's back.
    """
    scaled = rows * np.float32(255)
    whole: Rows = np.rint(scaled)
    if (np.abs(scaled - whole) > 1e-3).any():
        raise InputError("this service takes 8-bit images, and a row is not on their grid: give --levels 256")
    return whole.astype(np.uint8)


def picture(row: NDArray[np.uint8], encoding: str, quality: int) -> bytes:
    """A row [C,H,W] as a PNG or JPEG file, grey or RGB."""
    if row.shape[0] not in (1, 3):
        raise InputError(f"rows of {row.shape[0]} channels are no {encoding} file: they must have 1 or 3")
    file = io.BytesIO()
    image = Image.fromarray(row[0] if row.shape[0] == 1 else np.ascontiguousarray(row.transpose(1, 2, 0)))
    if encoding == "png":
        image.save(file, "PNG", compress_level=1)
    else:
        image.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def answer_of(labels: list[int] | None, scores: NDArray[np.float32] | None) -> Answer:
    """An answer from labels, scores [n,K], or both; without labels the best score's."""
    tensor = None if scores is None else torch.from_numpy(scores)
    if labels is None:
        assert tensor is not None
        return Answer.of(tensor.argmax(dim=1), tensor)
    return Answer.of(torch.tensor(labels, dtype=torch.int64), tensor)
