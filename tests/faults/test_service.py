"""A service's bad days: after each no row is lost, none is bought twice, both sides count the same, or one line says why."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import numpy as np
import pytest
import torch

import robustbox as rb
from robustbox.accounts import Accounts
from robustbox.errors import InputError, ModelError
from robustbox.models import remote
from robustbox.models.remote import RemoteBox
from robustbox.models.service_file import Request, Response, Retry, ServiceFile
from robustbox.protocol import Answer
from robustbox.service import Service
from robustbox.wire import pack, unpack
from tests.services import running, served
from tests.toys import Failing, HalfSpace, images

Message = MutableMapping[str, Any]
N, BUDGET = 3, 60
HARMED = (1, 2, 6, 11)
"""Which answers a run's bad day spoils."""
DUE = N * BUDGET + 2 * N
"""Rows of a run: each image's budget, its clean check, its verification."""


class Mischief:
    """A middleman before a service that does harm to some of its answers, counted from 0; the rows were bought by then.

    `early` harms come instead of asking the service.
    """

    def __init__(self, inner: Any, harm: str, which: tuple[int, ...] | None, early: bool = False) -> None:
        self.inner, self.harm, self.which, self.early = inner, harm, which, early
        self.posts = 0

    async def __call__(
        self,
        scope: Any,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.inner(scope, receive, send)
        number, self.posts = self.posts, self.posts + 1
        if self.which is not None and number not in self.which:
            return await self.inner(scope, receive, send)
        start: Message = {"type": "http.response.start", "status": 200, "headers": []}
        body = b""
        if self.early:
            while (await receive()).get("more_body"):
                pass
        else:
            sent: list[Message] = []

            async def note(message: Message) -> None:
                sent.append(message)

            await self.inner(scope, receive, note)
            start, body = sent[0], b"".join(message.get("body", b"") for message in sent[1:])
        await getattr(self, self.harm)(start, body, send)

    async def _reply(self, send: Any, start: Message, body: bytes, length: int | None = None) -> None:
        headers = [(key, value) for key, value in start["headers"] if key != b"content-length"]
        length = len(body) if length is None else length
        await send({**start, "headers": [*headers, (b"content-length", b"%d" % length)]})
        await send({"type": "http.response.body", "body": body, "more_body": length != len(body)})

    async def failure(self, start: Message, body: bytes, send: Any) -> None:
        await self._reply(send, {**start, "status": 500}, b"Oops")

    async def gateway(self, start: Message, body: bytes, send: Any) -> None:
        await self._reply(send, {**start, "status": 502}, b"<html>bad gateway</html>")

    async def busy(self, start: Message, body: bytes, send: Any) -> None:
        headers = [(b"retry-after", b"0.02")]
        await self._reply(send, {**start, "status": 429, "headers": headers}, b"slow down")

    async def garbage(self, start: Message, body: bytes, send: Any) -> None:
        await self._reply(send, start, bytes(range(256)) * 4)

    async def truncated(self, start: Message, body: bytes, send: Any) -> None:
        await self._reply(send, start, body[: len(body) // 2])

    async def half(self, start: Message, body: bytes, send: Any) -> None:
        await self._reply(send, start, body[: len(body) // 2], len(body))

    async def few(self, start: Message, body: bytes, send: Any) -> None:
        await self._reply(send, start, pack(*(array[:-1] for array in unpack(body, 3))))

    async def twice(self, start: Message, body: bytes, send: Any) -> None:
        await self._reply(send, start, body + body)

    async def slow(self, start: Message, body: bytes, send: Any) -> None:
        await asyncio.sleep(0.5)
        await self._reply(send, start, body)

    async def trickle(self, start: Message, body: bytes, send: Any) -> None:
        await send({**start, "headers": [h for h in start["headers"] if h[0] != b"content-length"]})
        for k in range(0, len(body), len(body) // 8):
            await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": body[k : k + len(body) // 8], "more_body": True})
        await send({"type": "http.response.body", "body": b""})


AFTER = ("failure", "gateway", "garbage", "truncated", "half", "few", "twice", "slow", "trickle")
"""Harms done to answers that were bought."""
EARLY = ("failure", "gateway", "busy")


@contextlib.contextmanager
def harmed(harm: str, which: tuple[int, ...] | None = HARMED, early: bool = False) -> Iterator[tuple[str, Service]]:
    """A half-space behind a middleman."""
    service = Service(HalfSpace(), Accounts())
    with running(Mischief(service.application(), harm, which, early)) as address:
        yield address, service


def client(address: str, **other: Any) -> RemoteBox:
    """The service's client, in a hurry."""
    retry = Retry(attempts=3, wait=0.001, wait_most=0.5)
    return RemoteBox(ServiceFile(url=address, **{"retry": retry, "timeout": 0.4, **other}), "remote")


def keyless(address: str) -> RemoteBox:
    """A client that speaks to the service as to a stranger, of which it does not know whether it charges repeats."""
    request = Request(body="raw", encoding="npy", batch=64)
    response = Response(labels="labels", scores="scores", kind="logit")
    return client(f"{address}/v1/answer", request=request, response=response, classes=2)


def run(model: Any) -> rb.AttackResult:
    return rb.run_attack(model, images(N), [0] * N, "cgba", budget=BUDGET, max_rows=16)


@pytest.fixture(scope="module")
def undisturbed() -> rb.AttackResult:
    return run(HalfSpace())


def traffic(box: RemoteBox) -> Any:
    return box.describe()["traffic"]


def assert_same(found: rb.AttackResult, expected: rb.AttackResult) -> None:
    assert found.ledger == expected.ledger == {"verify": 2 * N, "attack": N * BUDGET}
    assert found.traces == expected.traces
    assert torch.equal(found.adversarials, expected.adversarials)


@pytest.mark.parametrize(("harm", "early"), [*((harm, False) for harm in AFTER), *((harm, True) for harm in EARLY)])
def test_a_bad_day_changes_nothing_and_buys_nothing_twice(harm: str, early: bool, undisturbed: rb.AttackResult) -> None:
    with harmed(harm, early=early) as (address, service):
        box = client(address)
        assert_same(run(box), undisturbed)
        assert sum(service.rows.values()) == DUE
        assert service.replayed == 0 if early else service.replayed > 0
        sent = traffic(box)
    assert (sent["repeats"], sent["rows_answered"], sent["rows_doubtful"]) == (len(HARMED), DUE, 0)


def test_what_a_stranger_may_have_charged_twice_is_counted_apart(undisturbed: rb.AttackResult) -> None:
    with harmed("half") as (address, service):
        box = keyless(address)
        assert_same(run(box), undisturbed)
        sent = traffic(box)
        assert sum(service.rows.values()) == DUE + sent["rows_doubtful"]
    assert sent["repeats"] == len(HARMED)
    assert sent["rows_answered"] == DUE < DUE + sent["rows_doubtful"]


def test_a_refused_request_is_not_held_to_be_charged(undisturbed: rb.AttackResult) -> None:
    with harmed("busy", early=True) as (address, service):
        box = keyless(address)
        assert_same(run(box), undisturbed)
        assert sum(service.rows.values()) == DUE
    assert traffic(box)["rows_doubtful"] == 0


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        ("failure", "HTTP 500 Oops"),
        ("garbage", "an answer that makes no sense"),
        ("half", "peer closed connection"),
        ("few", "labels"),
        ("slow", "ReadTimeout"),
    ],
)
def test_a_service_that_stays_broken_ends_the_run_with_one_line(harm: str, line: str) -> None:
    """The rows in flight are charged once on our side and at most once on theirs; what was found before is kept."""
    with harmed(harm, which=tuple(range(4, 100))) as (address, service):
        box = client(address)
        with pytest.raises(ModelError, match=line) as stop:
            run(box)
        found, sent = stop.value.result, traffic(box)
        assert sum(service.rows.values()) == sent["rows_answered"] + sent["rows_doubtful"]
    assert isinstance(found, rb.AttackResult)
    assert sum(found.ledger.values()) == sent["rows_answered"] + sent["rows_doubtful"]
    assert f"; sent 3 times; {sent['rows_doubtful']} rows may have been charged all the same" in str(stop.value)
    assert "\n" not in str(stop.value)


def test_nan_ends_the_run_with_one_line() -> None:
    def wrong(answer: Answer) -> Answer:
        assert answer.scores is not None
        return Answer(answer.labels, torch.full_like(answer.scores, torch.nan), answer.status)

    with served(Failing(20, wrong)) as (address, service):
        with pytest.raises(ModelError, match="answered NaN or infinite scores for") as stop:
            run(client(address))
        assert isinstance(stop.value.result, rb.AttackResult)
        assert sum(stop.value.result.ledger.values()) == sum(service.rows.values())


def test_a_service_that_breaks_inside_charges_nothing() -> None:
    def wrong(answer: Answer) -> Answer:
        raise RuntimeError("inside")

    with served(Failing(20, wrong), Accounts(budget=1000)) as (address, service):
        with pytest.raises(ModelError, match="HTTP 500 the model failed; sent 3 times"):
            run(client(address))
        assert sum(service.rows.values()) < 20
        assert service.accounts.standing(service.accounts.client(None))["sent"] == sum(service.rows.values())


def test_a_patience_longer_than_ours_ends_the_run() -> None:
    class Patient(Mischief):
        async def busy(self, start: Message, body: bytes, send: Any) -> None:
            await self._reply(send, {**start, "status": 429, "headers": [(b"retry-after", b"3600")]}, b"")

    patient = Patient(Service(HalfSpace(), Accounts()).application(), "busy", (0,), True)
    with running(patient) as address, pytest.raises(ModelError, match="HTTP 429; it asks to wait 3600 s"):
        run(client(address))


class Cutter(threading.Thread):
    """A proxy that resets the connection when some answers, counted from 0, begin to arrive; they were bought by then."""

    def __init__(self, upstream: int, which: tuple[int, ...]) -> None:
        super().__init__(daemon=True)
        self.upstream, self.which, self.answers = upstream, which, 0
        self.door = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.door.getsockname()[1]}"

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.carry, args=self.door.accept()[:1], daemon=True).start()

    def carry(self, near: socket.socket) -> None:
        far = socket.create_connection(("127.0.0.1", self.upstream))
        asked = threading.Event()
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def there() -> None:
            with contextlib.suppress(OSError):
                while chunk := near.recv(65536):
                    asked.set()
                    far.sendall(chunk)
            far.close()

        threading.Thread(target=there, daemon=True).start()
        with contextlib.suppress(OSError):
            while chunk := far.recv(65536):
                if asked.is_set():
                    asked.clear()
                    number, self.answers = self.answers, self.answers + 1
                    if number in self.which:
                        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        break
                near.sendall(chunk)
        near.close()


def test_connection_resets_change_nothing_and_buy_nothing_twice(undisturbed: rb.AttackResult) -> None:
    with served(HalfSpace()) as (address, service):
        cutter = Cutter(int(address.rpartition(":")[2]), HARMED)
        cutter.start()
        box = client(cutter.address)
        assert_same(run(box), undisturbed)
        assert sum(service.rows.values()) == DUE
        assert service.replayed > 0
        cutter.door.close()
    assert traffic(box)["repeats"] == len(HARMED)


def test_nobody_there_is_bad_input() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    with pytest.raises(InputError, match=rf"127.0.0.1:{port}/v1/model: ConnectError"):
        rb.run_attack(f"http://127.0.0.1:{port}", images(1), [0])


def test_concurrent_requests_survive_bad_days() -> None:
    """Rows come back in order, whichever request was answered first or again."""
    rows = images(64)
    with harmed("half", which=(0, 3, 4, 9)) as (address, service):
        box = client(address, concurrency=8, request=Request(batch=4))
        answer = box.answer(rows, torch.zeros(64, dtype=torch.int64))
        assert sum(service.rows.values()) == 64
    expected = HalfSpace().of(rows)
    assert answer.scores is not None
    assert expected.scores is not None
    assert torch.equal(answer.scores, expected.scores)
    assert np.array_equal(answer.labels, expected.labels)


@pytest.mark.parametrize("interrupted", [False, True])
def test_after_a_failure_or_an_interruption_nothing_more_is_sent(
    interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if interrupted:
        monkeypatch.setattr(remote, "wait", interrupt)
    inner = Mischief(Service(HalfSpace(), Accounts()).application(), "slow" if interrupted else "failure", None)
    with running(inner) as address:
        box = client(address, concurrency=2, request=Request(batch=1), retry=Retry(attempts=1), timeout=5.0)
        with pytest.raises(KeyboardInterrupt if interrupted else ModelError):
            box.answer(images(40), torch.zeros(40, dtype=torch.int64))
        box.close()
        assert inner.posts <= 6
        assert box.describe()["traffic"]["requests"] == inner.posts + 1  # type: ignore[index]
