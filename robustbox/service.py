"""The HTTP side of `robustbox.serve`: an ASGI application around one black box. docs/serve.md describes what it answers.

    GET  /v1/model     what it takes and gives, and what the client may still ask
    POST /v1/answer    rows in, answers out; a repeat under the same Idempotency-Key is answered once and charged once
    GET  /health       whether it serves
    GET  /metrics      counters, in the text format of Prometheus

Every refusal is a JSON object {"error": {"code", "message"}} under a 4xx status, and costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from robustbox.accounts import Accounts, Client
from robustbox.bodies import Refusal, read_rows
from robustbox.errors import ModelError
from robustbox.oracle import unusable
from robustbox.protocol import Answer, BlackBox
from robustbox.wire import ACCOUNT, KEY, NPY, REPLAYED, SCORES, STATUS, pack_answer
from robustbox.worker import Worker

_DRAIN = 2**28
"""Bytes of a body that is too large which are still read, and thrown away, so that the client hears why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask of the service.

    Args:
        rows: rows a request.
        megabytes: size of a body.
        waiting: rows that may wait for the model; what comes then is told to come again.
        seconds: time in which a body must arrive.
        remembered: keys whose answers are kept for repeats.
    """

    rows: int = 1024
    megabytes: float = 64.0
    waiting: int = 65536
    seconds: float = 60.0
    remembered: int = 4096


@dataclass(slots=True)
class Kept:
    """What a key stands for: the digest of its request, and the answer, there or to come."""

    digest: bytes
    answer: asyncio.Future[Answer]


class Service:
    """A black box as a service.

    Args:
        box: the black box, defended or not.
        accounts: tokens and budgets.
        limits: what a request may ask.
        fuse: the most rows of requests that wait which are sent to the model in one pass.
    """

    def __init__(self, box: BlackBox, accounts: Accounts, limits: Limits | None = None, fuse: int = 64) -> None:
        self.box, self.accounts, self.limits = box, accounts, limits or Limits()
        self.worker = Worker(box, fuse)
        self.requests: Counter[int] = Counter()
        self.rows: Counter[str] = Counter()  # by status: their sum is what the black box was asked
        self.replayed = 0
        self._kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()
        self.held = contextlib.ExitStack()  # closed when the service has ended

    def application(self) -> Starlette:
        """The ASGI application."""

        @contextlib.asynccontextmanager
        async def working(app: Starlette) -> AsyncIterator[None]:
            task = asyncio.create_task(self.worker.run())
            try:
                yield
            finally:
                task.cancel()
                self.worker.close()
                self.held.close()

        routes = [
            Route("/v1/model", self._model),
            Route("/v1/answer", self._answer, methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        handlers = {Refusal: self._refused, HTTPException: self._refused, ClientDisconnect: self._refused}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=working)

    async def _answer(self, request: Request) -> Response:
        client = self.accounts.client(request.headers.get("authorization"))
        body = await self._body(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        named = request.headers.get(ACCOUNT, "")
        key = request.headers.get(KEY)
        digest = hashlib.blake2b(b"\0".join((kind.encode(), named.encode(), body))).digest()
        if key is not None and (kept := self._kept.get((client.name, key))) is not None:
            if kept.digest != digest:
                raise Refusal(409, "other_request", f"this {KEY} was used for another request")
            answer = await self._wait(kept.answer)
            self.replayed += len(answer)
            return self._respond(request, answer, {REPLAYED: "1"})
        rows, accounts = read_rows(kind, body, self.box.input_shape, self.limits.rows)
        if named:
            accounts = [_account(named)] * len(rows)
        senders = self.accounts.senders(client, accounts, len(rows))
        if self.worker.waiting + len(rows) > self.limits.waiting:
            raise Refusal(429, "busy", "too many rows wait for the model: come again", wait=1)
        self.accounts.charge(client, senders)
        coming = self.worker.submit(rows, senders)
        coming.add_done_callback(lambda done: self._book(done, client, key, senders))
        if key is not None:
            self._remember((client.name, key), Kept(digest, coming))
        return self._respond(request, await self._wait(coming))

    async def _wait(self, coming: asyncio.Future[Answer]) -> Answer:
        try:
            return await asyncio.shield(coming)  # a client that leaves does not take the answer with it
        except ModelError as error:
            raise Refusal(500, "model_failed", str(error)) from error

    def _book(self, done: asyncio.Future[Answer], client: Client, key: str | None, senders: list[int]) -> None:
        """Count what was answered; a pass in which the model failed costs nothing, and like one of NaN is not kept."""
        sound = done.exception() is None and not bool(unusable(done.result()).any())
        if done.exception() is None:
            self.rows.update(STATUS[status] for status in done.result().status.tolist())
        else:
            self.accounts.refund(client, senders)
        if key is not None and not sound:
            self._kept.pop((client.name, key), None)

    def _remember(self, key: tuple[str, str], kept: Kept) -> None:
        self._kept[key] = kept
        while len(self._kept) > self.limits.remembered:
            self._kept.popitem(last=False)

    async def _body(self, request: Request) -> bytes:
        """The body, which must be of a lawful size and arrive in time."""
        most, found, size = int(self.limits.megabytes * 2**20), list[bytes](), 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= most:
                        found.append(chunk)
                    elif size > _DRAIN:
                        break
        except TimeoutError:
            raise Refusal(408, "too_slow", f"the body took more than {self.limits.seconds:g} s") from None
        if size > most:
            raise Refusal(413, "too_large", f"the body is larger than {self.limits.megabytes:g} MiB")
        return b"".join(found)

    def _respond(self, request: Request, answer: Answer, headers: dict[str, str] | None = None) -> Response:
        headers = {SCORES: self.box.scores or "none", **(headers or {})}
        if NPY in request.headers.get("accept", ""):
            content = pack_answer(answer)
            return self._counted(Response(content, media_type=NPY, headers=headers))
        scores = None if answer.scores is None else [_finite(row) for row in answer.scores.tolist()]
        status = [STATUS[code] for code in answer.status.tolist()]
        found = {"labels": answer.labels.tolist(), "status": status, "scores": scores}
        return self._counted(JSONResponse(found, headers=headers))

    async def _model(self, request: Request) -> Response:
        client = self.accounts.client(request.headers.get("authorization"))
        box = self.box
        found = {
            "protocol": 1,
            "name": box.name,
            "input_shape": box.input_shape,
            "classes": box.classes,
            "scores": box.scores,
            "stochastic": box.stochastic,
            "stateful": box.stateful,
            "max_rows": self.limits.rows,
            "client": self.accounts.standing(client),
        }
        return self._counted(JSONResponse(found))

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        counters = [f'robustbox_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.requests.items())]
        counters += [f'robustbox_rows_total{{status="{status}"}} {n}' for status, n in sorted(self.rows.items())]
        counters += [
            f"robustbox_rows_replayed_total {self.replayed}",
            f"robustbox_rows_waiting {self.worker.waiting}",
            f"robustbox_passes_total {self.worker.passes}",
            f"robustbox_model_seconds_total {self.worker.seconds:.6f}",
        ]
        return PlainTextResponse("\n".join(counters) + "\n", media_type="text/plain; version=0.0.4")

    async def _refused(self, request: Request, error: Exception) -> Response:
        """What a client is told that gets no answer."""
        if isinstance(error, ClientDisconnect):
            return _Nothing()
        if isinstance(error, HTTPException):
            pages = "GET /v1/model, POST /v1/answer, GET /health and GET /metrics"
            error = Refusal(error.status_code, "no_such_page", f"{error.detail}: there are {pages}")
        assert isinstance(error, Refusal)
        headers = {} if error.wait is None else {"Retry-After": str(error.wait)}
        told = {"error": {"code": error.code, "message": str(error)}}
        return self._counted(Response(json.dumps(told), error.status, headers, "application/json"))

    def _counted(self, response: Response) -> Response:
        self.requests[response.status_code] += 1
        return response


class _Nothing(Response):
    """What a client is told that has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return None


def _account(text: str) -> int:
    """An account of 64 bits, as a header names it."""
    try:
        account = int(text) if len(text) < 21 else 2**63
    except ValueError:
        account = 2**63
    if not -(2**63) <= account < 2**63:
        raise Refusal(400, "bad_accounts", f"{ACCOUNT} must be an integer of 64 bits")
    return account


def _finite(row: list[float]) -> list[float] | None:
    """The scores of a row; None where it has none, as a refused row."""
    return row if all(abs(value) < float("inf") for value in row) else None
