"""A model behind an HTTP service, as a black box. docs/remote.md describes it; `addresses.py` has the names of such models.

What a row costs is the service's to say; what we asked is counted here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbox.errors import InputError, ModelError
from robustbox.protocol import ANSWERED, Answer, BlackBox
from robustbox.scores import interpreted
from robustbox.wire import SCORES

from .courier import Courier, Message
from .dialects import Dialect, Robustbox, Rows
from .failures import Garbled
from .price import Purse
from .service_file import ServiceFile
from .templates import Template


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a pass that go into one request."""

    rows: Rows
    accounts: NDArray[np.int64]
    token: str | None


class RemoteBox(BlackBox):
    """A black box behind an HTTP service.

    A pass is cut into requests of at most `batch` rows, of one token each. They go out in order: `concurrency` at once, but
    one after the other where the service is stateful, so that it sees the rows in the order in which they were asked.

    Args:
        service: where it is and how it is spoken to.
        name: how reports call it, and how it is asked for.

    Raises:
        InputError: it cannot be reached, refuses the token, or does not speak the language that it should.
    """

    def __init__(self, service: ServiceFile, name: str) -> None:
        self.service, self.name = service, name
        self._purse = Purse(service.price_per_1000, service.currency, service.max_cost, service.ledger)
        self._courier = Courier(service, self._purse, self._key_header())
        self.input_shape = None if service.input_shape is None else tuple(service.input_shape)  # type: ignore[assignment]
        self.classes = service.classes
        self.stochastic, self.stateful = service.stochastic, service.stateful
        self.paid = bool(service.price_per_1000)
        self._acts = False
        self._run: str | None = None  # with how many passes were answered, what the keys of requests hang on
        self._passes, self._in_doubt = 0, 0
        self._reported: dict[str, Any] = {}
        self._dialect: Dialect
        if service.response is None:
            self._dialect = Robustbox(service.request)
            self._url = f"{service.url.rstrip('/')}/v1/answer"
            self._introduce()
        else:
            self.class_names = service.response.classes
            self.scores = "none" if service.response.scores is None else service.response.kind
            if service.response.names is not None:  # a list of the best, in which what is missing has 0
                self.scores = "probability"
            self._dialect = Template(service.request, service.response, self.classes)
            self.classes = self._dialect.classes
            self._url = service.url
        self.levels = self._dialect.levels
        one_by_one = self.stateful or service.concurrency == 1
        self._threads = None if one_by_one else ThreadPoolExecutor(service.concurrency, "remote")

    def _key_header(self) -> str | None:
        return "Idempotency-Key" if self.service.response is None else self.service.idempotency_header

    def _introduce(self) -> None:
        """Ask a robustbox service what it is; that costs no row."""
        url = f"{self.service.url.rstrip('/')}/v1/model"
        try:
            found = self._courier.send(
                "GET", url, Message(0, {}), self._courier.tokens.of(-1), _introduction, attempts=2
            )
        except ModelError as error:
            hint = "" if "HTTP 401" in str(error) else "; another service needs a YAML file: remote:FILE.yaml"
            raise InputError(f"{error}{hint}") from None
        self._reported = {"service": found["name"]}
        shape = found["input_shape"]
        self.input_shape = self.input_shape or (None if shape is None else tuple(shape))
        self.classes = self.classes or found["classes"]
        self.scores = found["scores"]
        self.stochastic |= found["stochastic"]
        self.stateful |= found["stateful"]
        self._acts = bool(found["client"]["acts"])
        self._dialect.batch = min(self._dialect.batch, found["max_rows"])

    @torch.no_grad()
    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """Answer rows float32 [n,C,H,W] in [0, 1], in as many requests as it takes.

        Raises:
            InputError: the service takes 8-bit images, and a row is not on their grid; no request was sent.
            ModelError: the service failed, or there is not enough money; every row of the pass is lost.
        """
        parts = list(self._parts(rows.cpu().numpy(), accounts.cpu().numpy()))
        acting = self._courier.tokens.of(-1) if self._acts else ""  # the attacker's own tokens act for nobody
        messages = [
            replace(self._dialect.say(p.rows, p.accounts if p.token == acting else None), key=self._key(k, p))
            for k, p in enumerate(parts)
        ]
        if self._threads is None or len(parts) == 1:
            answers = [self._exchange(*pair) for pair in zip(messages, parts, strict=True)]
        else:
            running = [self._threads.submit(self._exchange, *pair) for pair in zip(messages, parts, strict=True)]
            try:
                wait(running, return_when=FIRST_EXCEPTION)
            finally:  # after a failure, and after Ctrl-C too, nothing more is sent
                for waiting in running:
                    waiting.cancel()
            wait([future for future in running if not future.cancelled()])
            failed = [f for f in running if not f.cancelled() and f.exception() is not None]
            answers = [(failed[0] if failed else future).result() for future in running]
        self._answered()
        return self._joined(answers, len(rows))

    def _parts(self, rows: Rows, accounts: NDArray[np.int64]) -> Iterator[_Part]:
        """The requests of a pass, in order: rows of one token, at most `batch`."""
        tokens = [self._courier.tokens.of(account) for account in accounts.tolist()]
        start = 0
        while start < len(rows):
            stop = start
            while stop < len(rows) and stop - start < self._dialect.batch and tokens[stop] == tokens[start]:
                stop += 1
            yield _Part(rows[start:stop], accounts[start:stop], tokens[start])
            start = stop

    def _key(self, number: int, part: _Part) -> str | None:
        """The key of a part of the next pass, the same in every session of a run that has a journal."""
        if self._run is None:
            return None
        digest = hashlib.blake2b(f"{self._run} {self._passes} {number}".encode(), digest_size=16)
        digest.update(part.rows.tobytes() + part.accounts.tobytes())
        return digest.hexdigest()

    def _exchange(self, message: Message, part: _Part) -> Answer:
        def read(response: httpx2.Response) -> Answer:
            self.scores = self.scores or _told(response.headers.get(SCORES))
            return self._dialect.hear(response, message.rows)

        return self._courier.send("POST", self._url, message, part.token, read)

    def _joined(self, answers: Sequence[Answer], n: int) -> Answer:
        """The answers of all requests as one; a refused row has NaN for scores."""
        labels = torch.cat([answer.labels for answer in answers])
        status = torch.cat([answer.status for answer in answers])
        given = [answer.scores for answer in answers if answer.scores is not None]
        if not given:
            return Answer(labels, None, status)
        if len({scores.shape[1] for scores in given}) != 1:
            raise ModelError(f"{self.name} answered scores of different numbers of classes")
        blank = [torch.full((len(answer), given[0].shape[1]), torch.nan) for answer in answers]
        each = zip(answers, blank, strict=True)
        told = torch.cat([none if answer.scores is None else answer.scores for answer, none in each])
        scores, self.scores = interpreted(told, self.scores, self.name, "response: {kind: logit} in its file")
        if told.shape[1] == 1:
            labels = scores.argmax(dim=1).where(status == ANSWERED, labels)
        self.classes = self.classes or scores.shape[1]
        return Answer(labels, scores, status)

    def resume(self, key: str) -> None:
        """Name all requests by the run, so that the service knows those that an earlier session sent, and count them apart."""
        self._run, self._passes, self._in_doubt = key or None, 0, 0
        self._purse.begin(key)

    def skip(self, rows: Tensor, accounts: Tensor, answered: bool) -> None:
        """Count what an earlier session of the run bought, and give its accounts the tokens that they had."""
        for account in accounts.tolist():
            self._courier.tokens.of(account)
        if answered:
            self._purse.recall(len(rows), answered=True)
            self._answered()
        elif self._courier.key_header is None or not self._in_doubt:  # under one key it is charged once
            self._purse.recall(len(rows), answered=False)
            self._in_doubt = len(rows)

    def _answered(self) -> None:
        """A pass was answered; what was in flight of it in earlier sessions under the same keys is in doubt no more."""
        if self._courier.key_header is not None:
            self._purse.resolve(self._in_doubt)
        self._passes, self._in_doubt = self._passes + 1, 0

    def close(self) -> None:
        """Give the connections back."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._courier.close()

    def describe(self) -> dict[str, object]:
        """What a result must record: the service, how it was spoken to, and what it cost. No token, and no header."""
        service = self.service
        return {
            **super().describe(),
            "kind": "remote",
            "url": self._courier.shown(service.url),
            **self._reported,
            "language": "robustbox" if service.response is None else "template",
            "levels": self.levels,
            "lossy": self._dialect.lossy,
            "batch": self._dialect.batch,
            "concurrency": service.concurrency if self._threads is not None else 1,
            "tls_verified": service.verify if service.url.startswith("https") else None,
            "traffic": self._purse.describe(),
        }


def _introduction(response: httpx2.Response) -> dict[str, Any]:
    """What a robustbox service says of itself."""
    try:
        found = response.json()
        if found["protocol"] != 1:
            raise Garbled(f"protocol {found['protocol']}, this robustbox speaks 1")
        kinds = {"name": str, "stochastic": bool, "stateful": bool, "max_rows": int, "client": dict}
        if any(not isinstance(found[key], kind) for key, kind in kinds.items()):
            raise TypeError
        shape, classes = found["input_shape"], found["classes"]
        if shape is not None and (len(shape) != 3 or not all(isinstance(length, int) for length in shape)):
            raise TypeError
        if classes is not None and not isinstance(classes, int):
            raise TypeError
        found["scores"], found["client"]["acts"] = _told(found["scores"]), found["client"].get("acts", False)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, Garbled):
            raise
        raise Garbled("no robustbox service") from error
    return dict(found)


def _told(scores: Any) -> Any:
    return scores if scores in ("none", "probability", "logit") else None
