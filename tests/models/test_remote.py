"""Models behind an address: the same answers as in process, whoever asks, and what it cost."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import robustbox as rb
import robustbox.attack as cli
from robustbox.accounts import Accounts, Client, read_tokens
from robustbox.boxes import as_black_box
from robustbox.defenses.blacklight import Blacklight
from robustbox.errors import InputError, ModelError
from robustbox.models.addresses import ACCOUNT_TOKENS, TOKEN
from robustbox.models.remote import RemoteBox
from robustbox.models.service_file import Request, Retry, ServiceFile, read_service
from robustbox.protocol import Answer, BlackBox
from robustbox.service import Limits, Service
from tests.services import running, served
from tests.toys import HalfSpace, images

SECRET = "s3cr3t-t0ken"


class Small(HalfSpace):
    """A half-space that says which rows it takes."""

    input_shape = (3, 8, 8)


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (TOKEN, ACCOUNT_TOKENS, "MINE", "THEIRS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.txt"
    file.write_text(f"{SECRET} name=judge acts\n")
    return file


def written(folder: Path, **service: Any) -> str:
    """A YAML file of a service, as it is asked for."""
    file = folder / "service.yaml"
    file.write_text(yaml.safe_dump(service))
    return f"remote:{file}"


def attack(model: Any, rows: Any, labels: Any, name: str, **options: Any) -> rb.AttackResult:
    return rb.run_attack(model, rows, labels, name, max_rows=16, keep_going=True, **options)


def assert_same(found: rb.AttackResult, expected: rb.AttackResult) -> None:
    """Bit for bit what the attacker saw, did and paid."""
    assert found.traces == expected.traces
    assert found.ledger["attack"] == expected.ledger["attack"]
    for field in ("queries", "rejected", "first_rejected", "accounts_burnt", "success_any"):
        assert getattr(found, field).tolist() == getattr(expected, field).tolist(), field
    torch.testing.assert_close(found.adversarials, expected.adversarials, rtol=0, atol=0, equal_nan=True)


# The same as in process


@pytest.fixture(scope="module")
def resnet() -> tuple[BlackBox, torch.Tensor, torch.Tensor]:
    data = rb.load_data("foolbox:cifar10")
    return as_black_box(rb.load_model("cifar10-resnet20")), data.images[:2], data.labels[:2]


@pytest.mark.parametrize(
    ("name", "options", "gate"),
    [
        ("square", {"norm": "linf", "epsilon": 0.03, "budget": 24}, {}),
        ("hop-skip-jump", {"budget": 60, "accounts": 3}, {"action": "ban", "strikes": 8}),
        ("oars:hop-skip-jump", {"budget": 120, "accounts": 2}, {"action": "ban", "strikes": 40}),
        ("oars:square", {"norm": "linf", "epsilon": 0.06, "budget": 60}, {}),
    ],
)
def test_through_tokens_and_blacklight_attacks_do_what_they_do_in_process(
    name: str, options: Any, gate: Any, resnet: Any, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, rows, labels = resnet
    here = attack(Blacklight(**gate).wrap(box, 0), rows, labels, name, **options)
    monkeypatch.setenv(TOKEN, SECRET)
    with served(Blacklight(**gate).wrap(box, 0), Accounts(read_tokens(str(tokens)))) as (address, service):
        there = attack(address, rows, labels, name, **options)
    assert_same(there, here)
    assert there.rejected.sum() > 0
    assert there.meta["stateful"]
    assert sum(service.rows.values()) == sum(there.ledger.values())


def test_accounts_that_are_tokens_do_what_accounts_do_in_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each of the attacker's accounts is a token; the service gives them the numbers that they have in process."""
    rows = images(2, (3, 16, 16))
    options = {"budget": 80, "accounts": 2, "max_rows": 16}
    gate, inner = Blacklight(action="ban", strikes=3), HalfSpace()
    here = rb.run_attack(gate.wrap(inner, 0), rows, [0, 0], "hop-skip-jump", **options)  # type: ignore[arg-type]
    assert here.accounts_burnt.tolist() == [1, 1]
    numbers = [account for account in inner.by_account if account >= 0]  # in the order of their first rows
    assert len(numbers) == 4
    lines = [f"token-{k} account={number}" for k, number in enumerate(numbers)]
    (tmp_path / "tokens").write_text("\n".join([f"{SECRET} acts", *lines]))
    monkeypatch.setenv(TOKEN, SECRET)
    monkeypatch.setenv(ACCOUNT_TOKENS, "token-0, token-1 token-2\ttoken-3")
    with served(gate.wrap(HalfSpace(), 0), Accounts(read_tokens(str(tmp_path / "tokens")), 80)) as (address, _):
        there = rb.run_attack(address, rows, [0, 0], "hop-skip-jump", **options)  # type: ignore[arg-type]
        assert_same(there, here)
        monkeypatch.setenv(ACCOUNT_TOKENS, "token-0")
        with pytest.raises(ModelError, match="opens account 2, but ROBUSTBOX_ACCOUNT_TOKENS holds 1 tokens"):
            rb.run_attack(address, rows, [0, 0], "hop-skip-jump", **options)  # type: ignore[arg-type]


def test_a_box_knows_what_the_service_is() -> None:
    gate = Blacklight().wrap(Small(classes=4), 0)
    with served(gate, limits=Limits(rows=7)) as (address, _):
        box = as_black_box(f"{address}/")
        assert isinstance(box, RemoteBox)
        assert (box.input_shape, box.classes, box.scores) == ((3, 8, 8), 4, "logit")
        assert (box.stateful, box.stochastic, box.levels) == (True, False, None)
        answer = box.answer(images(20), -torch.arange(1, 21))
        assert len(answer) == 20
        assert box.describe()["traffic"] == {"requests": 4, "repeats": 0, "rows_answered": 20, "rows_doubtful": 0}
    assert box.describe()["batch"] == 7
    assert box.describe()["service"] == "half-space behind blacklight"


def test_images_of_another_size_are_refused_before_a_query() -> None:
    box = Small()
    with (
        served(box) as (address, _),
        pytest.raises(InputError, match="images are 3 x 9 x 9, the model takes 3 x 8 x 8"),
    ):
        rb.run_attack(address, images(1, (3, 9, 9)), [0])
    assert box.rows == 0


@pytest.mark.parametrize("concurrency", [1, 8])
def test_rows_keep_their_order(concurrency: int) -> None:
    rows = images(50)
    with served(HalfSpace()) as (address, _):
        box = RemoteBox(ServiceFile(url=address, concurrency=concurrency, request=Request(batch=3)), "remote")
        answer = box.answer(rows, torch.zeros(50, dtype=torch.int64))
    assert torch.equal(answer.scores, HalfSpace().of(rows).scores)  # type: ignore[arg-type]


def test_a_stateful_service_is_asked_one_request_after_the_other() -> None:
    class Order(Small):
        stateful = True

    inner, rows = Order(), images(40)
    with served(inner, fuse=1) as (address, _):
        RemoteBox(ServiceFile(url=address, concurrency=8, request=Request(batch=1)), "remote").answer(
            rows, torch.zeros(40, dtype=torch.int64)
        )
    assert torch.equal(torch.cat(inner.seen), rows)


# Eight bits


@pytest.mark.parametrize("encoding", ["uint8", "png"])
def test_eight_bits_arrive_as_the_oracle_rounded_them(encoding: str, tmp_path: Path) -> None:
    here = attack(HalfSpace(), images(2), [0, 0], "cgba", budget=40, levels=256)
    with served(HalfSpace()) as (address, _):
        name = written(tmp_path, url=address, request={"encoding": encoding})
        there = attack(name, images(2), [0, 0], "cgba", budget=40, levels=256)
        assert_same(there, here)
        with pytest.raises(InputError, match="takes images of 256 grey levels: give levels=256"):
            attack(name, images(2), [0, 0], "cgba", budget=40)
        box = as_black_box(name)
        with pytest.raises(InputError, match="not on their grid: give --levels 256"):
            box.answer(images(2), torch.zeros(2, dtype=torch.int64))
    assert box.describe()["traffic"]["requests"] == 1  # type: ignore[index]  # it asked what the service is
    assert there.meta["model"]["lossy"] is False


def test_a_jpeg_loses_and_the_record_says_so(tmp_path: Path) -> None:
    inner, rows = HalfSpace(), (images(2) * 255).round() / 255
    with served(inner) as (address, _):
        box = as_black_box(written(tmp_path, url=address, request={"encoding": "jpeg", "quality": 60}))
        box.answer(rows, torch.zeros(2, dtype=torch.int64))
    assert box.describe()["lossy"] is True
    assert 0 < float((inner.seen[0] - rows).abs().mean()) < 0.1


# Money


def paid(address: str, **other: Any) -> RemoteBox:
    return RemoteBox(ServiceFile(url=address, price_per_1000=50.0, **{"max_cost": 1.0, **other}), "remote")


def test_no_request_is_sent_that_could_cost_too_much() -> None:
    """A row is 5 cents: the purse holds 20. The run ends with one line, and with what it found."""
    inner = Small()
    with served(inner) as (address, _):
        box = paid(address)
        with pytest.raises(ModelError, match=r"above max_cost 1 USD: .* USD are spent; they were not sent") as stop:
            rb.run_attack(box, images(2), [0, 0], "random", budget=100, max_rows=6)
    assert 14 < inner.rows <= 20
    assert isinstance(stop.value.result, rb.AttackResult)
    told = stop.value.result.meta["model"]["traffic"]
    assert told["cost_at_most"] == told["cost_at_least"] == pytest.approx(0.05 * inner.rows)
    assert (told["price_per_1000"], told["currency"], told["max_cost"]) == (50.0, "USD", 1.0)


def test_a_dry_run_says_what_it_could_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = HalfSpace(classes=10)
    with served(inner) as (address, _):
        name = written(tmp_path, url=address, price_per_1000=2, currency="EUR")
        words = ["--data", "digits", "--images", "3", "--attack", "random", "--budget", "48", "--dry-run"]
        assert cli.main(["--model", name, *words]) == 0
    assert "0.3 EUR" in capsys.readouterr().out  # 3 x 48 rows of the attack, 6 of the evaluator
    assert inner.rows == 0


def test_the_stop_on_money_holds_when_a_run_goes_on(tmp_path: Path) -> None:
    model = HalfSpace()
    with served(model) as (address, _):
        for _ in range(2):
            with pytest.raises(ModelError, match="above max_cost 1 USD"):
                rb.run_attack(paid(address), images(3), [0] * 3, "cgba", budget=20, out=tmp_path, max_rows=4)
            assert model.rows <= 20
        asked = model.rows
        box = paid(address, max_cost=9.0)
        rb.run_attack(box, images(3), [0] * 3, "cgba", budget=20, out=tmp_path, max_rows=4)
    traffic = box.describe()["traffic"]
    assert traffic["rows_answered"] == model.rows > asked  # type: ignore[index]
    assert model.rows == sum(rb.run_attack(HalfSpace(), images(3), [0] * 3, "cgba", budget=20).ledger.values())


def test_runs_on_one_box_have_their_own_traffic_and_one_purse(tmp_path: Path) -> None:
    class Tired(HalfSpace):
        strength = 10**9

        def of(self, rows: torch.Tensor) -> Answer:
            if self.rows > self.strength:
                raise RuntimeError("planted")
            return super().of(rows)

    def traffic(result: rb.AttackResult) -> dict[str, Any]:
        found: dict[str, Any] = result.meta["model"]["traffic"]
        return found

    model = Tired()
    with served(model) as (address, _):
        box = paid(address, max_cost=9.0, retry=Retry(attempts=1))
        for out in (None, tmp_path / "first"):
            before = model.rows
            result = rb.run_attack(box, images(2), [0, 0], "random", budget=20, out=out)
            assert traffic(result)["rows_answered"] == model.rows - before == sum(result.ledger.values())
        before, model.strength = model.rows, model.rows + 30
        setting: dict[str, Any] = {"budget": 30, "out": tmp_path / "stopped", "max_rows": 4}
        with pytest.raises(ModelError):
            rb.run_attack(box, images(2), [0, 0], "random", **setting)
        model.strength = 10**9
        result = rb.run_attack(box, images(2), [0, 0], "random", **setting)  # the same process goes on
        assert traffic(result)["rows_answered"] == sum(result.ledger.values())
        assert traffic(result)["rows_doubtful"] == 0
        with pytest.raises(ModelError, match=r"USD are spent"):
            rb.run_attack(box, images(2), [0, 0], "random", budget=90)
    assert 0.05 * (model.rows + 4) > 8.5  # not counted twice: the purse was emptied by what was really bought


def test_a_ledger_holds_over_many_runs(tmp_path: Path) -> None:
    inner, ledger = Small(), str(tmp_path / "books" / "ledger.sqlite")
    one = torch.zeros(1, dtype=torch.int64)
    with served(inner) as (address, _):
        for _ in range(2):
            box = paid(address, ledger=ledger)
            for _ in range(8):
                box.answer(images(1), one)
        box = paid(address, ledger=ledger)
        for _ in range(4):
            box.answer(images(1), one)
        with pytest.raises(ModelError, match="1 USD are spent"):
            box.answer(images(1), one)
        with pytest.raises(InputError, match="counts USD, not EUR"):
            paid(address, ledger=ledger, currency="EUR")
    assert inner.rows == 20


def test_what_costs_nothing_is_not_paid_for() -> None:
    """A request that the service refuses, or that never reached it, gives its money back."""
    with served(Small(), Accounts(budget=10)) as (address, _):
        box = paid(address, retry=Retry(attempts=1))
        for _ in range(30):
            with pytest.raises(ModelError, match="HTTP 402 11 rows asked, 10 left of 10"):
                box.answer(images(11), torch.full((11,), 3))
        box.answer(images(10), torch.full((10,), 3))
    for _ in range(3):
        with pytest.raises(ModelError, match=r"ConnectError|ReadError|RemoteProtocolError"):
            box.answer(images(9), torch.full((9,), -1))
    assert box.describe()["traffic"]["cost_at_least"] == 0.5  # type: ignore[index]


def test_the_rate_of_requests_is_kept() -> None:
    with served(Small()) as (address, _):
        service = ServiceFile(url=address, rate=50.0, concurrency=8, request=Request(batch=1))
        box = RemoteBox(service, "remote")
        start = time.monotonic()
        box.answer(images(20), torch.zeros(20, dtype=torch.int64))
        assert time.monotonic() - start >= 19 / 50


# Secrets


def test_a_token_appears_nowhere(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any, resnet: Any
) -> None:
    """Neither in the run's folder, nor in a log at any level, nor in an error, though the service shows it in its answers."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        token = dict(scope["headers"])[b"authorization"]
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"bad token " + token})

    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MINE", SECRET)
    monkeypatch.setenv("THEIRS", "h3ader")
    words = ["--data", "foolbox:cifar10", "--images", "1", "--attack", "random", "--budget", "4", "--out"]
    told = []
    with served(resnet[0], Accounts(read_tokens(str(tokens)))) as (address, _):
        name = written(tmp_path, url=address, token_env="MINE", headers_env={"X-Key": "THEIRS"})
        assert cli.main(["--model", name, *words, str(tmp_path / "run")]) == 0
        assert cli.main(["--model", f"http://user:{SECRET}@127.0.0.1:1", *words, str(tmp_path / "other")]) == 2
        told.append(repr(as_black_box(name)) + repr(vars(as_black_box(name))["service"]))
    with running(echo) as address:
        name = written(tmp_path, url=address, token_env="MINE", headers_env={"X-Key": "THEIRS"})
        assert cli.main(["--model", name, *words, str(tmp_path / "failed")]) == 2
    shown = capsys.readouterr()
    assert "bad token Bearer ***" in shown.err
    told += [shown.out, shown.err.replace(f"user:{SECRET}", ""), caplog.text]
    told += [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file() and file != tokens]
    assert (tmp_path / "run" / "results.json").is_file()
    assert [text for text in told if SECRET in text or "h3ader" in text] == []


def test_a_wrong_token_is_bad_input(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(Small(), Accounts(read_tokens(str(tokens)))) as (address, _):
        with pytest.raises(InputError, match="HTTP 401 a token is required"):
            as_black_box(address)
        monkeypatch.setenv(TOKEN, "wrong")
        with pytest.raises(InputError, match="HTTP 401 nobody holds this token"):
            as_black_box(address)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that nobody but its owner trusts, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    try:
        subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no openssl that makes certificates: {error}")
    return cert, key


@pytest.fixture
def secure(certificate: tuple[Path, Path]) -> Iterator[str]:
    cert, key = certificate
    application = Service(Small(), Accounts()).application()
    with running(application, ssl_certfile=str(cert), ssl_keyfile=str(key)) as address:
        yield address


def test_a_certificate_is_trusted_when_it_is_told_to_be(
    secure: str, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InputError, match="certificate verify failed"):
        as_black_box(secure)
    (tmp_path / "ca.pem").write_bytes(certificate[0].read_bytes())
    trusted = as_black_box(written(tmp_path, url=secure, ca_file="ca.pem"))  # beside the file
    assert trusted.answer(images(1), one).labels.tolist() == [0]
    blind = as_black_box(written(tmp_path, url=secure, verify=False))
    assert blind.answer(images(1), one).labels.tolist() == [0]
    assert [box.describe()["tls_verified"] for box in (trusted, blind)] == [True, False]
    for box in (trusted, blind):
        assert isinstance(box, RemoteBox)
        box.close()  # a server waits long for the end of a TLS connection
    with pytest.raises(InputError, match=r"ca_file .*nowhere.pem cannot be read"):
        as_black_box(written(tmp_path, url=secure, ca_file="nowhere.pem"))


# Bad input


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("http://", "an address looks like"),
        ("http://127.0.0.1:1/?key=x", "an address looks like"),
        ("remote:/nowhere.yaml", "/nowhere.yaml cannot be read"),
    ],
)
def test_bad_addresses_are_refused(address: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        as_black_box(address)


@pytest.mark.parametrize(
    ("service", "line"),
    [
        ({}, "lacks url"),
        ({"url": "ftp://x"}, "url must be an http:// or https:// address"),
        ({"url": "http://me:you@x"}, "no name or password"),
        ({"url": "http://x", "tokn_env": "A"}, "unknown key of .* 'tokn_env': did you mean token_env"),
        ({"url": "http://x", "retry": {"attempt": 3}}, "did you mean attempts"),
        ({"url": "http://x", "concurrency": "many"}, "concurrency must be int, not str 'many'"),
        ({"url": "http://x", "concurrency": True}, "concurrency must be int, not bool"),
        ({"url": "http://x", "concurrency": 0}, "concurrency must be at least 1"),
        ({"url": "http://x", "input_shape": [3, 8]}, r"input_shape must be \[C, H, W\]"),
        ({"url": "http://x", "max_cost": 3}, "max_cost needs price_per_1000"),
        ({"url": "http://x", "request": {"encoding": "gif"}}, "request: encoding must be float or uint8 or npy or png"),
        ({"url": "http://x", "request": {"template": {}}}, "without response the service speaks robustbox's language"),
        ({"url": "http://x", "token_env": "MINE"}, "environment variable MINE is not set"),
    ],
)
def test_bad_descriptions_are_refused(service: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=line):
        as_black_box(written(tmp_path, **service))


def test_a_page_that_is_no_service_is_bad_input(tmp_path: Path) -> None:
    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"<html>hello</html>"})

    with (
        running(page) as address,
        pytest.raises(InputError, match=r"no robustbox service.*another service needs a YAML file"),
    ):
        as_black_box(address)


def test_every_key_has_its_default(tmp_path: Path) -> None:
    assert read_service(written(tmp_path, url="http://x").removeprefix("remote:")) == ServiceFile(url="http://x")
    assert Accounts({"x": Client()}).standing(Client())["left"] is None
