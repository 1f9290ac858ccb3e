"""The service: who may ask what, what it refuses and how, and that it lives on."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from robustbox.accounts import Accounts, Client, read_tokens
from robustbox.bodies import Refusal, read_rows
from robustbox.errors import InputError
from robustbox.protocol import Answer
from robustbox.serve import ServeConfig, build, main, parse
from robustbox.service import Limits, Service
from robustbox.wire import ACCOUNT, KEY, NPY, REPLAYED, pack, pack_answer, unpack, unpack_answer
from tests.services import served
from tests.toys import Failing, Gate, HalfSpace, images

SHAPE = (3, 8, 8)
ROWS = images(4).numpy()
BYTES = np.random.default_rng(0).integers(0, 256, (4, *SHAPE)).astype(np.uint8)


class Small(HalfSpace):
    """A half-space that says which rows it takes."""

    input_shape = SHAPE


def png(row: Any, **options: Any) -> bytes:
    """A row uint8 [C,H,W] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(row.transpose(1, 2, 0)).save(file, **{"format": "PNG", **options})
    return file.getvalue()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.txt"
    lines = [
        "# who may ask",
        "alpha account=7",
        "beta name=poor budget=3",
        "gamma name=judge acts  # the evaluator",
        "",
    ]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def guarded(tokens: Path) -> Iterator[tuple[httpx2.Client, Service, Small]]:
    """A service with tokens and a budget of 10 rows an account, and somebody who speaks to it."""
    box = Small()
    accounts = Accounts(read_tokens(str(tokens)), 10)
    with (
        served(box, accounts, Limits(rows=8, megabytes=0.1)) as (address, service),
        httpx2.Client(base_url=address) as http,
    ):
        yield http, service, box


def ask(
    http: httpx2.Client, token: str | None, body: bytes | None = None, kind: str = NPY, **headers: str
) -> httpx2.Response:
    given = {} if token is None else {"authorization": f"Bearer {token}"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    content = pack(ROWS) if body is None else body
    return http.post("/v1/answer", content=content, headers={**given, "content-type": kind, **named})


def refused(response: httpx2.Response, status: int, code: str) -> str:
    """The message of a refusal, which has this status and code."""
    assert response.status_code == status, response.text
    told = response.json()
    assert set(told) == {"error"}
    assert told["error"]["code"] == code
    return str(told["error"]["message"])


# Who may ask


def test_a_token_sends_rows_for_its_account(guarded: Any) -> None:
    http, _, box = guarded
    response = ask(http, "alpha", accept=NPY)
    answer = unpack_answer(response.content, 4)
    assert answer.scores is not None
    assert torch.equal(answer.scores, HalfSpace().of(torch.from_numpy(ROWS)).scores)  # type: ignore[arg-type]
    assert box.by_account == {7: 4}
    assert ask(http, "beta", pack(ROWS[:1])).status_code == 200
    assert box.by_account == {7: 4, 2: 1}  # numbered by its place


def test_without_a_token_or_with_a_wrong_one_nothing_is_asked(guarded: Any) -> None:
    http, _, box = guarded
    assert "Bearer TOKEN" in refused(ask(http, None), 401, "no_token")
    assert "delta" not in refused(ask(http, "delta"), 401, "unknown_token")
    refused(http.get("/v1/model"), 401, "no_token")
    refused(ask(http, None, authorization="Basic alpha"), 401, "no_token")
    assert box.rows == 0


def test_nobody_sends_rows_for_anothers_account(guarded: Any) -> None:
    http, _, box = guarded
    refused(ask(http, "alpha", robustbox_account="2"), 403, "not_your_account")
    refused(ask(http, "alpha", pack(ROWS, np.array([7, 7, 7, 2]))), 403, "not_your_account")
    assert box.rows == 0
    assert ask(http, "alpha", robustbox_account="7").status_code == 200
    assert ask(http, "gamma", pack(ROWS, np.array([7, -5, 2, 2**62]))).status_code == 200
    assert box.by_account == {7: 5, -5: 1, 2: 1, 2**62: 1}
    refused(ask(http, "gamma", robustbox_account=str(2**63)), 400, "bad_accounts")
    refused(ask(http, "gamma", pack(ROWS, np.arange(3))), 400, "bad_accounts")


def test_budgets_hold_to_the_row_and_a_refusal_costs_nothing(guarded: Any) -> None:
    http, _, box = guarded
    for rows, status in ((4, 200), (7, 402), (4, 200), (3, 402), (2, 200), (1, 402)):
        assert ask(http, "alpha", pack(np.repeat(ROWS, 2, 0)[:rows])).status_code == status
    assert "1 rows asked, 0 left of 10" in refused(ask(http, "alpha", pack(ROWS[:1])), 402, "over_budget")
    assert "4 rows asked, 3 left of 3" in refused(ask(http, "beta"), 402, "over_budget")
    for _ in range(3):  # the evaluator's accounts are below 0
        assert ask(http, "gamma", pack(ROWS, -np.arange(1, 5))).status_code == 200
    refused(ask(http, "gamma", pack(ROWS[:1], np.array([7]))), 402, "over_budget")
    assert box.rows == 10 + 12
    told = http.get("/v1/model", headers={"authorization": "Bearer alpha"}).json()["client"]
    assert told == {"account": 7, "acts": False, "sent": 10, "left": None, "left_of_account": 0}


def test_a_repeat_under_one_key_is_asked_and_charged_once(guarded: Any) -> None:
    http, service, box = guarded
    first, again = (ask(http, "alpha", idempotency_key="k", accept=NPY) for _ in range(2))
    assert first.content == again.content
    assert (REPLAYED in first.headers, again.headers[REPLAYED]) == (False, "1")
    assert (box.rows, service.replayed) == (4, 4)
    refused(ask(http, "alpha", pack(ROWS[:1]), idempotency_key="k"), 409, "other_request")
    assert ask(http, "gamma", idempotency_key="k").status_code == 200  # another client's key is another key
    assert box.rows == 8


def test_a_key_that_comes_twice_at_once_is_charged_once() -> None:
    entered, gate = threading.Event(), threading.Event()

    class Slow(Small):
        def of(self, rows: torch.Tensor) -> Answer:
            entered.set()
            gate.wait(10)
            return super().of(rows)

    box, found = Slow(), []
    with served(box) as (address, _), httpx2.Client(base_url=address) as http:
        threads = [
            threading.Thread(target=lambda: found.append(ask(http, None, idempotency_key="k"))) for _ in range(3)
        ]
        threads[0].start()
        assert entered.wait(10)
        for thread in threads[1:]:
            thread.start()
        gate.set()
        for thread in threads:
            thread.join()
    assert {response.text for response in found} == {found[0].text}
    assert (len(found), box.rows) == (3, 4)


def test_an_answer_that_failed_is_not_kept_and_not_charged() -> None:
    def wrong(answer: Answer) -> Answer:
        if box.rows < 8:
            raise RuntimeError("a secret of the model's")
        return answer

    box = Failing(0, wrong)
    with served(box, Accounts(budget=4)) as (address, _), httpx2.Client(base_url=address) as http:
        response = ask(http, None, idempotency_key="k")
        assert "secret" not in refused(response, 500, "model_failed")
        assert ask(http, None, idempotency_key="k").status_code == 200  # within the budget


# What it is asked


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        (NPY, pack(ROWS), ROWS),
        (NPY, pack(ROWS.astype(">f8")), ROWS),
        (NPY, pack(BYTES), BYTES / np.float32(255)),
        ("application/json; charset=utf-8", json.dumps({"rows": ROWS.tolist()}).encode(), ROWS),
        ("application/json", json.dumps({"rows": [[[[0, 1]]]]}).encode(), None),
        ("image/png", png(BYTES[0]), BYTES[:1] / np.float32(255)),
        (
            "application/json",
            json.dumps({"images": [base64.b64encode(png(row)).decode() for row in BYTES]}).encode(),
            BYTES / np.float32(255),
        ),
    ],
)
def test_rows_arrive_as_they_were_sent(kind: str, body: bytes, expected: Any) -> None:
    box = HalfSpace()
    with served(box) as (address, _), httpx2.Client(base_url=address) as http:
        response = ask(http, None, body, kind)
    assert response.status_code == 200, response.text
    assert expected is None or np.array_equal(box.seen[0].numpy(), expected)
    told = response.json()
    assert told["labels"] == box.of(box.seen[0]).labels.tolist()
    assert torch.equal(torch.tensor(told["scores"]), box.of(box.seen[0]).scores)  # type: ignore[arg-type]


def test_a_jpeg_is_read_as_it_decodes() -> None:
    box, file = HalfSpace(), png(BYTES[0], format="JPEG", quality=50)
    with served(box) as (address, _), httpx2.Client(base_url=address) as http:
        assert ask(http, None, file, "image/jpeg").status_code == 200
    with Image.open(io.BytesIO(file)) as image:
        assert np.array_equal(box.seen[0][0].numpy(), np.asarray(image).transpose(2, 0, 1) / np.float32(255))


def test_refused_rows_have_a_status_and_no_scores() -> None:
    with served(Gate(2)) as (address, _), httpx2.Client(base_url=address) as http:
        told = ask(http, None).json()
        answer = unpack_answer(ask(http, None, accept=NPY).content, 4)
    assert told["status"] == ["answered", "rejected"] * 2
    assert told["labels"] == [0, -1] * 2
    assert answer.status.tolist() == [0, 1] * 2


def test_requests_that_wait_share_a_pass_and_each_gets_its_own() -> None:
    entered, gate = threading.Event(), threading.Event()

    class Slow(Small):
        def of(self, rows: torch.Tensor) -> Answer:
            entered.set()
            gate.wait(10)
            return super().of(rows)

    box, rows, found = Slow(), images(9).numpy(), dict[int, Any]()
    with served(box, fuse=6) as (address, service), httpx2.Client(base_url=address) as http:

        def one(k: int) -> None:
            found[k] = ask(http, None, pack(rows[k : k + 1])).json()["scores"][0]

        threads = [threading.Thread(target=one, args=[k]) for k in range(9)]
        threads[0].start()
        assert entered.wait(10)
        for thread in threads[1:]:
            thread.start()
        while service.worker.waiting < 8:
            pass
        gate.set()
        for thread in threads:
            thread.join()
    expected = HalfSpace().of(torch.from_numpy(rows)).scores
    assert torch.equal(torch.tensor([found[k] for k in range(9)]), expected)  # type: ignore[arg-type]
    assert box.passes == [1, 6, 2]


# What it refuses


BAD = [
    (NPY, b"", 400, "bad_body"),
    (NPY, b"\x93NUMPY", 400, "bad_body"),
    (NPY, pack(ROWS)[:-1], 400, "bad_body"),
    (NPY, pack(ROWS) + b"x", 400, "bad_body"),
    (NPY, pack(ROWS, np.arange(4), np.arange(4)), 400, "bad_body"),
    (NPY, pack(ROWS.astype(np.int64)), 400, "bad_body"),
    (NPY, pack(np.asfortranarray(ROWS)).replace(b"'fortran_order': False", b"'fortran_order': True "), 400, "bad_body"),
    (NPY, pack(ROWS).replace(b"(4, 3, 8, 8)", b"(4,-3, 8,-8)"), 400, "bad_body"),
    (NPY, pack(ROWS).replace(b"'<f4'", b"'|O8'"), 400, "bad_body"),
    (NPY, pack(ROWS[:, :1]), 400, "bad_shape"),
    (NPY, pack(ROWS[:0]), 400, "bad_shape"),
    (NPY, pack(ROWS[0]), 400, "bad_shape"),
    (NPY, pack(ROWS + 1), 400, "bad_values"),
    (NPY, pack(ROWS.astype(np.float64) * 1e300), 400, "bad_values"),
    (NPY, pack(np.full_like(ROWS, np.nan)), 400, "bad_values"),
    (NPY, pack(np.zeros((9, *SHAPE), np.uint8)), 413, "too_many_rows"),
    ("application/json", b"{", 400, "bad_body"),
    ("application/json", b"\xff\xfe\x00", 400, "bad_body"),
    ("application/json", b"[" * 50000, 400, "bad_body"),
    ("application/json", b"[]", 400, "bad_body"),
    ("application/json", b'{"rows": [[[[1, 2], [3]]]]}', 400, "bad_body"),
    ("application/json", b'{"rows": "0.5"}', 400, "bad_body"),
    ("application/json", b'{"rows": [[[["0.5"]]]]}', 400, "bad_body"),
    ("application/json", b'{"rows": [[[[1e999]]]]}', 400, "bad_shape"),
    ("application/json", b'{"rows": [[[[0.5]]]], "images": []}', 400, "bad_body"),
    ("application/json", b'{"rows": [[[[0.5]]]], "evil": 1}', 400, "bad_body"),
    ("application/json", json.dumps({"rows": ROWS[:1].tolist(), "accounts": ["7"]}).encode(), 400, "bad_body"),
    ("application/json", json.dumps({"rows": ROWS[:1].tolist(), "accounts": [2**70]}).encode(), 400, "bad_body"),
    ("application/json", b'{"images": ["%%%"]}', 400, "bad_body"),
    ("application/json", b'{"images": [7]}', 400, "bad_body"),
    ("image/png", b"\x89PNG\r\n\x1a\n", 400, "bad_body"),
    ("image/png", png(BYTES[0])[:120], 400, "bad_body"),
    ("image/png", png(np.zeros((3, 9, 8), np.uint8)), 400, "bad_body"),
    ("image/png", png(np.zeros((4, 8, 8), np.uint8)), 400, "bad_body"),
    ("image/gif", b"GIF89a", 415, "bad_type"),
    ("", b"", 415, "bad_type"),
]


def test_bad_bodies_are_refused_cost_nothing_and_it_lives_on(guarded: Any) -> None:
    http, _, box = guarded
    for kind, body, status, code in BAD:
        refused(ask(http, "alpha", body, kind), status, code)
    assert box.rows == 0
    assert ask(http, "alpha", pack(np.concatenate([ROWS, ROWS]))).status_code == 200


def test_a_pickle_is_not_opened(guarded: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "owned"), "w"))

    file = io.BytesIO()
    np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)
    refused(ask(guarded[0], "alpha", file.getvalue()), 400, "bad_body")
    assert not (tmp_path / "owned").exists()


def test_a_body_of_100_megabytes_is_refused_and_it_lives_on(guarded: Any) -> None:
    http, _, box = guarded
    refused(ask(http, "alpha", bytes(100 * 2**20)), 413, "too_large")
    chunks = (bytes(2**20) for _ in range(100))  # of a length that is not told
    refused(ask(http, "alpha", chunks), 413, "too_large")  # type: ignore[arg-type]
    assert ask(http, "alpha").status_code == 200
    assert box.rows == 4


def test_other_pages_and_methods_are_refused_in_json(guarded: Any) -> None:
    http, _, _ = guarded
    assert "POST /v1/answer" in refused(http.get("/nowhere"), 404, "no_such_page")
    refused(http.get("/v1/answer"), 405, "no_such_page")
    refused(http.delete("/v1/model"), 405, "no_such_page")


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with served(Small(), limits=Limits(seconds=0.05)) as (address, _), httpx2.Client(base_url=address) as http:

        def trickle() -> Iterator[bytes]:
            yield pack(ROWS)[:50]
            threading.Event().wait(0.3)
            yield pack(ROWS)[50:]

        refused(ask(http, None, trickle()), 408, "too_slow")  # type: ignore[arg-type]


def test_health_and_metrics_are_for_everybody_and_add_up(guarded: Any) -> None:
    http, _, box = guarded
    ask(http, "alpha", idempotency_key="k")
    ask(http, "alpha", idempotency_key="k")
    ask(http, None)
    assert http.get("/health").json() == {"status": "ok"}
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines())
    assert float(found['robustbox_rows_total{status="answered"}']) == box.rows == 4
    assert float(found["robustbox_rows_replayed_total"]) == 4
    assert float(found['robustbox_requests_total{status="200"}']) == 2
    assert float(found['robustbox_requests_total{status="401"}']) == 1
    assert float(found["robustbox_passes_total"]) == 1
    assert not any(token in metrics.text for token in ("alpha", "beta", "gamma"))


@given(st.sampled_from([NPY, "application/json", "image/png", "image/jpeg", "x"]), st.data())
def test_whatever_the_bytes_they_are_rows_or_one_refusal(kind: str, data: st.DataObject) -> None:
    """Random bytes, and good bodies with some of their bytes changed: `scripts/fuzz_serve.py` does more of this."""
    good = {
        NPY: pack(ROWS),
        "application/json": b'{"rows": [[[[0.5, 1]]]], "accounts": [7]}',
        "image/png": png(BYTES[0]),
    }
    body = bytearray(data.draw(st.binary(max_size=300)) if data.draw(st.booleans()) else good.get(kind, b""))
    for _ in range(data.draw(st.integers(0, 8)) if body else 0):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    refusal = None
    try:
        rows, accounts = read_rows(kind, bytes(body), data.draw(st.sampled_from([None, SHAPE])), 8)
    except Refusal as error:
        refusal = error
    if refusal is not None:
        assert 400 <= refusal.status < 500
        assert len(str(refusal).splitlines()) == 1
    else:
        assert bool(((rows >= 0) & (rows <= 1)).all())
        assert accounts is None or len(accounts) == len(rows)


@given(st.integers(0, 5), st.integers(0, 4), st.randoms(use_true_random=False))
def test_answers_travel_unchanged(n: int, classes: int, random: Any) -> None:
    scores = torch.tensor([[random.uniform(-9, 9) for _ in range(classes)] for _ in range(n)]).reshape(n, classes)
    labels = torch.tensor([random.randrange(-1, 9) for _ in range(n)], dtype=torch.int64)
    status = torch.tensor([random.randrange(3) for _ in range(n)], dtype=torch.uint8)
    again = unpack_answer(pack_answer(Answer(labels, scores if classes else None, status)), n)
    assert torch.equal(again.labels, labels)
    assert torch.equal(again.status, status)
    assert again.scores is None if not classes else torch.equal(again.scores, scores)  # type: ignore[arg-type]
    assert unpack(b"", 3) == []


# The command line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--modle", "x"], "unknown option '--modle': did you mean --model"),
        (["--model", "cifar11"], "unknown model 'cifar11'"),
        (["--defense", "blacklite"], "did you mean blacklight"),
        (
            ["--defense", "blacklight", "--defense.kep", "9"],
            "unknown option '--defense.kep': did you mean --defense.keep",
        ),
        (["--defense", "blacklight", "--defense.keep", "few"], "--defense.keep: expected int"),
        (["--port", "many"], "--port: expected int"),
        (["--port", "70000"], "--port must be from 0 to 65535, not 70000"),
        (["--host", "0.0.0.0"], "give --tokens FILE"),
        (["--tokens", "/nowhere"], "the file of tokens /nowhere cannot be read"),
        (["--budget", "0"], "--budget must be a whole number of at least 1"),
        (["--request-megabytes", "0"], "--request-megabytes must be above 0"),
        (["--state", "/nowhere"], "none here does: leave it out"),
        (["--state", "/nowhere", "--defense", "jpeg"], "none here does: leave it out"),
        (["--state", "/nowhere/at/all", "--defense", "qpa"], "/nowhere/at/all cannot be used (unable to open database"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "digits-cnn", *words]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert len(told.splitlines()) == 1


def test_a_state_for_what_keeps_nothing_in_files_is_another_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A black box of one's own that watches accounts, but knows no `persist`; the file is given back."""

    class Watching(HalfSpace):
        def noticed(self, account: int) -> tuple[int, int]:
            return 0, 0

    monkeypatch.setattr("robustbox.serve.as_black_box", lambda model, device: Watching())
    state = tmp_path / "state"
    assert main(["--state", str(state)]) == 2
    told = capsys.readouterr().err
    assert "what half-space remembers of accounts cannot be kept in a file: leave it out" in told
    assert len(told.splitlines()) == 1
    with sqlite3.connect(state, timeout=0, isolation_level=None) as database:
        database.execute("BEGIN EXCLUSIVE")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "holds none"),
        ("secret\nsecret", "line 2: this token stands there before"),
        ("secret account=5\nother account=5", "line 2: account 5 or its name"),
        ("secret account=-1", "account must be a whole number"),
        ("secret hidden", "line 1: after the token come"),
        ("secret budget=", "budget must be"),
    ],
)
def test_a_bad_file_of_tokens_is_refused_without_showing_one(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(InputError, match=line) as refusal:
        read_tokens(str(tmp_path / "tokens"))
    assert not {"secret", "other", "hidden"} & set(re.findall(r"\w+", str(refusal.value)))


def test_the_defense_stands_before_the_model_with_its_options() -> None:
    config = parse(
        ["--model", "digits-cnn", "--defense", "blacklight", "--defense.keep", "9", "--defense.threshold", "4"]
    )
    assert config == ServeConfig(
        model="digits-cnn", defense="blacklight", defense_options={**config.defense_options, "keep": 9, "threshold": 4}
    )
    assert build(config).box.name == "digits-cnn behind blacklight"
    assert build(config).box.stateful


def started(root: Path, *words: str) -> tuple[subprocess.Popen[str], str]:
    """A service of digits-cnn in a process of its own, and its address."""
    command = [sys.executable, "-m", "robustbox.serve", "--model", "digits-cnn", "--port", "0", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("digits-cnn")
    return server, line.split()[-1]


def test_what_a_gate_remembers_outlives_kill_9(tmp_path: Path, root: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8)).astype(np.uint8)
    words = ["--defense", "blacklight", "--defense.action", "ban", "--state", str(tmp_path / "state")]
    told = []
    for accounts, senders in (([0, 0, 1], [1, 1, 2]), ([2, 1, 2], [1, 2, 3])):
        server, address = started(root, *words)
        try:
            body = pack(rows[accounts], np.array(senders))
            answer = httpx2.post(f"{address}/v1/answer", content=body, headers={"content-type": NPY})
            told += answer.json()["status"]
        finally:
            server.kill()
            server.wait(30)
        assert server.stderr is not None
        assert server.stderr.read() == ""
    assert told == ["answered", "rejected", "answered", "banned", "rejected", "answered"]


def test_a_state_is_for_one_service_and_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "digits-cnn", "--defense", "qpa", "--state", str(tmp_path / "state")]
    with build(parse(words)).held:
        assert main(words) == 2
        assert "cannot be used (database is locked): end the service that uses it" in capsys.readouterr().err
    for other, differing in (["--seed", "1"], "seed"), (["--defense.alpha", "0.1"], "defenses"):
        assert main([*words, *other]) == 2
        told = capsys.readouterr().err
        assert f"was kept by another service (its {differing} differ)" in told
        assert len(told.splitlines()) == 1
    for content in (b"no database" * 100, b""):
        (tmp_path / "state").write_bytes(content)
        if content:
            assert main(words) == 2
            assert "cannot be used (file is not a database)" in capsys.readouterr().err
    build(parse(words)).held.close()  # an empty file is a new one
    with contextlib.closing(sqlite3.connect(tmp_path / "other")) as database:
        database.execute("CREATE TABLE events (id)")
    assert main([*words[:-1], str(tmp_path / "other")]) == 2
    assert "is another kind of database" in capsys.readouterr().err


def test_it_says_that_memory_ends_with_the_process(root: Path) -> None:
    server, address = started(root, "--defense", "blacklight")
    assert httpx2.get(f"{address}/health").status_code == 200
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
    assert server.stderr is not None
    told = server.stderr.read()
    assert "--state FILE keeps them" in told
    assert len(told.splitlines()) == 1


def test_told_to_end_it_answers_what_is_in_flight(tmp_path: Path, root: Path) -> None:
    """A request is in flight when SIGTERM comes; it is answered, later ones find nobody, and the exit code is 0."""
    server, address = started(root)
    rows = np.zeros((1000, 1, 8, 8), np.uint8)
    found: list[httpx2.Response] = []

    def body() -> Iterator[bytes]:
        content = pack(rows)
        yield content[:1000]
        server.send_signal(signal.SIGTERM)
        threading.Event().wait(0.2)
        yield content[1000:]

    found.append(httpx2.post(f"{address}/v1/answer", content=body(), headers={"content-type": NPY, "accept": NPY}))
    assert len(unpack_answer(found[0].content, 1000)) == 1000
    assert server.wait(30) == 0
    assert server.stderr is not None
    assert server.stderr.read() == ""
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{address}/health")


def test_names_in_use(tokens: Path) -> None:
    """Headers and clients that the documentation names."""
    assert (KEY, ACCOUNT) == ("Idempotency-Key", "Robustbox-Account")
    assert sorted((c.account, c.name, c.budget, c.acts) for c in read_tokens(str(tokens)).values()) == [
        (2, "poor", 3, False),
        (3, "judge", None, True),
        (7, "client-1", None, False),
    ]
    assert Accounts().client(None) == Client(acts=True)
