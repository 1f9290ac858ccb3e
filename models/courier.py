"""Carries requests to a service and answers back: retries, pauses, time-outs, TLS, tokens, and who paid for what.

Nothing that leaves this module shows a token: neither an error nor a log.
"""

from __future__ import annotations

import logging
import ssl
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import httpx2
import stamina

from robustbox.errors import InputError, ModelError

from .failures import AGAIN, UNSENT, Failed, Garbled, retry_after, told, untrusted
from .names import one_line
from .price import Purse
from .service_file import ServiceFile
from .tokens import Tokens

_OF_TRANSFER = ("content-encoding", "content-length", "transfer-encoding")
_LARGEST = 2**28
"""Bytes of an answer."""
T = TypeVar("T")
log = logging.getLogger("robustbox.remote")
logging.getLogger("stamina").addHandler(logging.NullHandler())  # it would say less than `log` does


@dataclass(frozen=True, slots=True)
class Message:
    """A request: the arguments that httpx takes for its body, its headers, and how many rows it buys.

    Its key is the same when an earlier session of the run may have sent it; None where no session can have.
    """

    rows: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    key: str | None = None


class Courier:
    """Sends messages to one service, from any number of threads.

    Args:
        service: the service.
        purse: keeps the money.
        key_header: the header of a request's key, where the service charges equal keys once; or None.

    Raises:
        InputError: an environment variable is not set, or a file of certificates cannot be read.
    """

    def __init__(self, service: ServiceFile, purse: Purse, key_header: str | None) -> None:
        self.service, self.purse, self.key_header = service, purse, key_header
        self.tokens = Tokens(service)
        self._client = httpx2.Client(
            headers={"user-agent": "robustbox", **service.headers, **self.tokens.headers},
            verify=_trust(service),
            timeout=httpx2.Timeout(service.timeout, connect=min(service.timeout, 15.0), pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=service.concurrency),
        )
        self._turn = Lock()
        self._next = 0.0

    def send(
        self,
        method: str,
        url: str,
        message: Message,
        token: str | None,
        read: Callable[[httpx2.Response], T],
        attempts: int | None = None,
    ) -> T:
        """Send a message until it is answered, as often as `retry.attempts` or `attempts` allow; all times under one key.

        `read` makes sense of the answer, or raises Garbled.

        Raises:
            ModelError: it was not, or there is not enough money; says what was perhaps charged all the same.
        """
        headers = dict(message.headers)
        if token is not None:
            headers[self.service.token_header] = self.service.token_prefix + token
        if self.key_header is not None:
            headers[self.key_header] = message.key or uuid.uuid4().hex
        retry, held, doubtful, sent = self.service.retry, False, 0, 0
        most = attempts or retry.attempts
        try:
            for attempt in stamina.retry_context(
                on=self._wait,
                attempts=most,
                timeout=None,
                wait_initial=retry.wait,
                wait_max=retry.wait_most,
                wait_jitter=retry.wait,
            ):
                with attempt:
                    self._pause()
                    if not held:
                        self.purse.reserve(message.rows)
                    self.purse.sent(again=attempt.num > 1)
                    sent = attempt.num
                    try:
                        found = self._attempt(method, url, message, headers, read)
                    except Failed as failure:
                        if failure.charged and self.key_header is None:
                            self.purse.settle(message.rows, answered=False)
                            doubtful += message.rows
                        elif failure.charged:
                            held = True
                        elif not held:
                            self.purse.release(message.rows)
                        if message.rows and failure.again and sent < most:
                            self._tell(failure, message.rows)
                        raise
                    self.purse.settle(message.rows, answered=True)
                    return found
        except Failed as failure:
            if held:
                self.purse.settle(message.rows, answered=False)
                doubtful = message.rows
            times = f"; sent {sent} times" if sent > 1 else ""
            perhaps = f"; {doubtful} rows may have been charged all the same" if doubtful else ""
            raise ModelError(f"{self.shown(url)}: {failure}{times}{perhaps}") from None
        raise AssertionError("the last attempt returns or raises")

    def _attempt(
        self,
        method: str,
        url: str,
        message: Message,
        headers: dict[str, str],
        read: Callable[[httpx2.Response], T],
    ) -> T:
        try:
            response = self._fetched(method, url, headers, message.body)
        except httpx2.HTTPError as error:
            what = self.tokens.hide(f"{type(error).__name__}: {one_line(error)}")
            raise Failed(what, not isinstance(error, UNSENT), again=not untrusted(error)) from None
        status = response.status_code
        charged = status not in self.service.retry.uncharged
        if not response.is_success and status not in self._verdicts():
            what, asked = f"HTTP {status} {self.tokens.hide(told(response))}".strip(), retry_after(response)
            if status in AGAIN and asked is not None and asked > self.service.retry.wait_most:
                raise Failed(f"{what}; it asks to wait {asked:g} s", charged, again=False)
            raise Failed(what, charged, status in AGAIN, asked)
        try:
            return read(response)
        except Garbled as error:
            raise Failed(self.tokens.hide(f"an answer that makes no sense: {error}"), charged, again=True) from None

    def _fetched(self, method: str, url: str, headers: dict[str, str], body: dict[str, Any]) -> httpx2.Response:
        """The whole answer, which must have arrived in time: a service that trickles is one that does not answer."""
        deadline = time.monotonic() + self.service.timeout
        with self._client.stream(method, url, headers=headers, **body) as response:
            chunks, size = [], 0
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                size += len(chunk)
                if time.monotonic() > deadline or size > _LARGEST:
                    raise httpx2.ReadTimeout("the answer trickles, or has no end")
        kept = [(key, value) for key, value in response.headers.items() if key not in _OF_TRANSFER]
        return httpx2.Response(response.status_code, headers=kept, content=b"".join(chunks))

    def _verdicts(self) -> list[int]:
        """HTTP statuses that are an answer: the service refused the row."""
        response = self.service.response
        return [] if response is None else [*response.rejected, *response.banned]

    def _wait(self, error: Exception) -> bool | float:
        """Whether to try again, and when the service says so after how long; all threads wait as long."""
        if not isinstance(error, Failed) or not error.again:
            return False
        if error.wait is None:
            return True
        with self._turn:
            self._next = max(self._next, time.monotonic() + error.wait)
        return error.wait

    def _pause(self) -> None:
        """Wait for one's turn: at most `rate` requests a second, and none while the service asks for patience."""
        step = 0.0 if self.service.rate is None else 1 / self.service.rate
        with self._turn:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + step
        if turn > now:
            time.sleep(turn - now)

    def _tell(self, failure: Failed, rows: int) -> None:
        once = "; the service charges a repeat once" if self.key_header else "; the repeat may be charged again"
        log.warning("%d rows are sent again: %s%s", rows, failure, once if failure.charged else "; it cost nothing")

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def shown(self, url: str) -> str:
        """An address without its query."""
        return self.tokens.hide(url.partition("?")[0])


def _trust(service: ServiceFile) -> ssl.SSLContext | bool:
    if not service.url.startswith("https"):
        return False  # nothing to verify; reading certificates takes time
    if not service.verify:
        log.warning("verify: false: whoever answers is believed to be the service")
        return False
    if service.ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=service.ca_file)
    except OSError as error:
        raise InputError(f"ca_file {service.ca_file} cannot be read: {one_line(error)}") from error
