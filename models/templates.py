"""Other people's services: a request from a template, an answer from the paths at which it stands."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx2
import numpy as np
import torch
from numpy.typing import NDArray

from robustbox.errors import InputError
from robustbox.protocol import BANNED, REJECTED, Answer
from robustbox.wire import NPY, pack

from .courier import Message
from .dialects import Dialect, Rows, answer_of, grid, picture
from .failures import Failed, Garbled
from .paths import follow, read_path
from .service_file import Request, Response

_TYPES = {"npy": NPY, "png": "image/png", "jpeg": "image/jpeg"}


class Template(Dialect):
    """A service described by where its rows and answers go (`Request`, `Response`), and by its number of classes.

    Raises:
        InputError: the description makes no sense.
    """

    def __init__(self, request: Request, response: Response, classes: int | None) -> None:
        self.request, self.response = request, response
        self.classes = classes or (response.classes and len(response.classes)) or None
        self.encoding = request.encoding or ("float" if request.body == "json" else "png")
        self.levels = None if self.encoding in ("float", "npy") else 256
        self.lossy = self.encoding == "jpeg"
        self.batch = request.batch or 1
        self.rows, self.labels, self.scores, self.names = (
            None if text is None else read_path(text)
            for text in (response.rows, response.labels, response.scores, response.names)
        )
        self._places = None if response.classes is None else {name: k for k, name in enumerate(response.classes)}
        self._check()

    def _check(self) -> None:
        request, response = self.request, self.response
        for wrong, complaint in (
            (self.labels is None and self.scores is None, "response needs labels, scores, or both"),
            (self.names is not None and self.scores is None, "response.names go with response.scores"),
            (request.body != "json" and request.template is not None, "request.template goes with body: json"),
            (request.body == "json" and request.template is None, "request.template is missing: the JSON body"),
            (
                request.body != "json" and self.encoding in ("float", "uint8"),
                f"{self.encoding} goes with body: json only",
            ),
            (request.body == "raw" and self.encoding != "npy" and self.batch > 1, "a raw picture is one row: batch: 1"),
            (bool(response.rejected or response.banned) and self.batch > 1, "rejected and banned go with batch: 1"),
            (self.names is not None and self._kind_is_logit(), "names go with probabilities: what is missing has 0"),
            (self.classes == 1, "one class is no choice: a service that gives one score a row has two classes"),
        ):
            if wrong:
                raise InputError(f"service: {complaint}")
        if request.body == "json":
            marks = _marks(request.template)
            if len(marks) != 1:
                raise InputError("service: request.template must hold $images or $image, once")
            if self.batch > 1 and marks == ["$image"] and not _repeats(request.template):
                raise InputError(
                    "service: with a batch above 1 $image must stand in a list of one element, or be $images"
                )

    def _kind_is_logit(self) -> bool:
        return self.response.kind == "logit"

    def say(self, rows: Rows, accounts: NDArray[np.int64] | None) -> Message:
        values: NDArray[Any] = rows if self.levels is None else grid(rows)
        if self.encoding not in ("png", "jpeg") and self.request.layout == "hwc":
            values = values.transpose(0, 2, 3, 1)
        n = len(rows)
        if self.request.body == "raw" and self.encoding == "npy":
            return Message(n, {"content": pack(values)}, {"content-type": NPY})
        items = [self._item(row) for row in values]
        if self.request.body == "raw":
            return Message(n, {"content": items[0]}, {"content-type": _TYPES[self.encoding]})
        if self.request.body == "multipart":
            suffix, kind = self.encoding, _TYPES[self.encoding]
            files = [(self.request.form_field, (f"{k}.{suffix}", item, kind)) for k, item in enumerate(items)]
            return Message(n, {"files": files, "data": self.request.form})
        plain = [base64.b64encode(item).decode() if isinstance(item, bytes) else item for item in items]
        content = json.dumps(filled(self.request.template, plain)).encode()
        return Message(n, {"content": content}, {"content-type": "application/json"})

    def _item(self, row: NDArray[Any]) -> Any:
        if self.encoding in ("png", "jpeg"):
            return picture(row, self.encoding, self.request.quality)
        return pack(row) if self.encoding == "npy" else row.tolist()

    def hear(self, response: httpx2.Response, n: int) -> Answer:
        for status, code in ((REJECTED, self.response.rejected), (BANNED, self.response.banned)):
            if response.status_code in code:
                return Answer(torch.full((n,), -1), None, torch.full((n,), status, dtype=torch.uint8))
        try:
            found = self._found(response.json(), n)
            labels = None if self.labels is None else [self._label(label) for label, _, _ in found]
            scores = None if self.scores is None else [self._scored(scores, names) for _, scores, names in found]
            return answer_of(labels, None if scores is None else self._stacked(scores))
        except (ValueError, TypeError, IndexError, RecursionError, OverflowError) as error:
            raise Garbled(str(error).partition("\n")[0][:200]) from error

    def _found(self, document: Any, n: int) -> list[tuple[Any, Any, Any]]:
        """Label, scores and names of each row as the service gives them; None for what it is not asked for."""
        paths = (self.labels, self.scores, self.names)
        if self.rows is None and self.batch > 1:
            columns = [[None] * n if path is None else _column(follow(document, path), n) for path in paths]
            return list(zip(*columns, strict=True))
        entries = [document] if self.rows is None else follow(document, self.rows)
        if not isinstance(entries, list) or len(entries) != n:
            raise ValueError(f"{len(entries) if isinstance(entries, list) else 'no'} answers for {n} rows")
        label, scores, names = ([None if path is None else follow(entry, path) for entry in entries] for path in paths)
        return list(zip(label, scores, names, strict=True))

    def _label(self, found: Any) -> int:
        """A class's number, from its number or its name."""
        if isinstance(found, str) and self._places is not None and found in self._places:
            return self._places[found]
        if isinstance(found, str) and self._places is None and found.isdecimal():
            return int(found)
        if isinstance(found, bool) or not isinstance(found, int | float) or found != int(found) or found < 0:
            raise ValueError(
                f"the label {str(found)[:40]!r} is no class" + ("" if self._places else "; list response.classes")
            )
        return int(found)

    def _scored(self, found: Any, names: Any) -> list[float]:
        """A row's scores, in the order of classes; a single number is that of class 1 of two."""
        if names is not None:
            if not isinstance(found, list) or not isinstance(names, list) or len(found) != len(names):
                raise ValueError("names and scores are not two lists of one length")
            found = dict(zip(names, found, strict=True))
        if isinstance(found, list):
            return [float(score) for score in found]
        if isinstance(found, int | float) and not isinstance(found, bool):
            return [float(found)]
        if not isinstance(found, dict):
            raise ValueError("scores are no list and no number")
        if self.classes is None:
            raise ValueError("scores by name need classes or response.classes")
        scores = [0.0] * self.classes
        for name, score in found.items():
            scores[self._label(name)] = float(score)
        return scores

    def _stacked(self, rows: list[list[float]]) -> NDArray[np.float32]:
        """The scores of all rows, [n,K]; [n,1] where there is one a row."""
        widths = {len(row) for row in rows}
        if len(widths) != 1 or 0 in widths or self.classes not in (None, max(2, *widths)):
            raise ValueError(f"{sorted(widths)} scores a row")
        if widths == {1} and self.labels is not None:
            what = (
                "one score beside a label, and nobody says of which class: leave out response.labels or response.scores"
            )
            raise Failed(what, charged=True, again=False)
        return np.array(rows, dtype=np.float32)


def _column(found: Any, n: int) -> list[Any]:
    """The entries of n rows; a flat list of n times K numbers is cut into n."""
    if isinstance(found, list) and len(found) > n and not len(found) % n:
        width = len(found) // n
        found = [found[k * width : (k + 1) * width] for k in range(n)]
    if not isinstance(found, list) or len(found) != n:
        raise ValueError(f"{len(found) if isinstance(found, list) else 'no'} answers for {n} rows")
    return found


def filled(node: Any, items: list[Any]) -> Any:
    """A template with the images put in."""
    if isinstance(node, dict):
        return {key: filled(value, items) for key, value in node.items()}
    if isinstance(node, list):
        if len(node) == 1 and "$image" in _marks(node):
            return [filled(node[0], [item]) for item in items]
        return [filled(value, items) for value in node]
    if not isinstance(node, str) or "$image" not in node:
        return node
    if node == "$images":
        return items
    return items[0] if node == "$image" else node.replace("$image", items[0])


def _marks(node: Any) -> list[str]:
    """The places of images in a template: `$images` for all, `$image` for one."""
    if isinstance(node, dict | list):
        return [mark for value in (node.values() if isinstance(node, dict) else node) for mark in _marks(value)]
    if isinstance(node, str) and "$image" in node:
        return ["$images" if node == "$images" else "$image"]
    return []


def _repeats(node: Any) -> bool:
    """Whether `$image` stands in a list of one element."""
    if isinstance(node, list) and len(node) == 1 and "$image" in _marks(node):
        return True
    return isinstance(node, dict | list) and any(map(_repeats, node.values() if isinstance(node, dict) else node))
