"""What a gate keeps in a file: it goes on after the end of its process as if it had not ended."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustbox import registry
from robustbox.defenses.gate import StatefulDefense, StatefulGate
from robustbox.defenses.smoothing import Smoothing
from robustbox.errors import InputError, ModelError, StorageError
from robustbox.protocol import BlackBox
from robustbox.state import Shelf, State
from tests.defenses.test_gate import GATES, QUERIES, WIDE, Echo, FlakyEcho, NearGate, Sent, ask, joined, statuses
from tests.toys import HalfSpace

SAME = ("rows", "hits", "banned_rows", "accounts", "accounts_hit", "accounts_banned", "first_hit")


@contextmanager
def kept(gate: BlackBox, path: Path) -> Iterator[BlackBox]:
    """A gate that keeps what it remembers in a file, while the block lasts."""
    state = State(str(path), {})
    gate.persist(state)
    try:
        yield gate
    finally:
        state.close()


def prints(path: Path) -> int:
    """Fingerprints in a file."""
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM prints").fetchone()[0])


@given(QUERIES | WIDE, GATES, st.integers(0, 30), st.sets(st.integers(1, 30), max_size=5))
def test_a_gate_goes_on_as_if_its_process_had_not_ended(
    queries: list[Sent], defense: NearGate, end: int, cuts: set[int]
) -> None:
    end = min(end, len(queries))
    calm = StatefulGate(Echo(), defense, seed=0)
    wanted = ask(calm, queries, [*cuts, end])
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for part, inside in ((queries[:end], cuts), (queries[end:], {cut - end for cut in cuts})):
            gate = StatefulGate(Echo(), defense, seed=0)
            with kept(gate, Path(folder) / "state"):
                parts += [ask(gate, part, [*inside])] if part else []
    answer = joined(parts)
    assert statuses(answer) == statuses(wanted)
    assert torch.equal(answer.labels, wanted.labels)
    assert [gate.statistics()[key] for key in SAME] == [calm.statistics()[key] for key in SAME]
    assert [gate.noticed(account) for account in range(4)] == [calm.noticed(account) for account in range(4)]


def stream(n: int) -> Tensor:
    """Images [n,3,32,32], of which every other resembles the one four before it."""
    rows = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for k in range(4, n, 2):
        rows[k] = (rows[k - 4] + 0.01 * rows[k]).clamp(0, 1)
    return rows


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("blacklight", {"action": "decoy"}),
        ("blacklight", {"scope": "global", "warm": "foolbox:cifar10", "warm_rows": 5}),
        ("blacklight-keyed", {"k": 2}),
        ("piha", {"window": 20}),
        ("osd", {"k": 2, "reset_on_hit": False}),
        ("osd", {"k": 2}),
        ("iot-sdm", {"k": 2}),
        ("qpa", {"scope": "global"}),
        ("gwad", {"length": 8}),
    ],
)
def test_every_gate_comes_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    defense: StatefulDefense = registry.load("defenses", name)(**options)
    rows, accounts = stream(40), torch.arange(40) // 2 % 2
    gates = [StatefulGate(HalfSpace(), defense, 0) for _ in range(3)]
    wanted = [gates[0].answer(rows[part], accounts[part]) for part in (slice(25), slice(25, 40))][1]
    with kept(gates[1], tmp_path / "state"):
        gates[1].answer(rows[:25], accounts[:25])
    with kept(gates[2], tmp_path / "state"):
        found = gates[2].answer(rows[25:], accounts[25:])
    assert torch.equal(found.labels, wanted.labels)
    assert torch.equal(found.status, wanted.status)
    assert found.scores is not None
    assert wanted.scores is not None
    assert torch.equal(found.scores.nan_to_num(), wanted.scores.nan_to_num())
    calm, ended, gone_on = (gate.statistics() for gate in gates)
    assert [gone_on[key] for key in SAME] == [calm[key] for key in SAME]
    assert gone_on["hits"] != ended["hits"]


@pytest.mark.parametrize("scope", ["account", "global"])
def test_the_file_has_no_more_rows_than_the_memory(scope: Any, tmp_path: Path) -> None:
    defense = NearGate(window=5, scope=scope)
    for _ in range(2):
        with kept(StatefulGate(Echo(), defense, 0), tmp_path / "state") as gate:
            for start in range(0, 90, 9):
                ask(gate, [(k % 2, 1000 * start + 3 * k) for k in range(9)])
        assert prints(tmp_path / "state") == (10 if scope == "account" else 5)
    gwad = registry.load("defenses", "gwad")(length=6)
    with kept(gwad.wrap(HalfSpace(), 0), tmp_path / "steps") as gate:
        gate.answer(stream(30), torch.zeros(30, dtype=torch.long))
    assert prints(tmp_path / "steps") == 8


def test_nothing_is_kept_of_the_evaluator_nor_of_whom_a_ban_ends(tmp_path: Path) -> None:
    with kept(StatefulGate(Echo(), NearGate(action="ban"), 0), tmp_path / "state") as gate:
        ask(gate, [(-3, 50), (-3, 70), (1, 50), (1, 70), (2, 10)])
        assert statuses(ask(gate, [(1, 50)])) == "r"
    assert prints(tmp_path / "state") == 1
    with kept(StatefulGate(Echo(), NearGate(action="ban"), 0), tmp_path / "state") as gate:
        assert statuses(ask(gate, [(1, 90), (2, 10), (-3, 50)])) == "bra"
        assert gate.noticed(1) == (1, 3)


def test_a_row_that_got_no_answer_before_the_process_ended_is_judged_anew(tmp_path: Path) -> None:
    """The model fails, the service is started again, and an honest client sends its rows once more."""
    with kept(StatefulGate(FlakyEcho([2]), NearGate(action="ban"), 0), tmp_path / "state") as gate:
        ask(gate, [(1, 10)])
        with pytest.raises(ModelError):
            ask(gate, [(1, 50), (1, 70), (1, 10)])
    with kept(StatefulGate(Echo(), NearGate(action="ban"), 0), tmp_path / "state") as gate:
        assert statuses(ask(gate, [(1, 50), (1, 70), (1, 10)])) == "aar"
        assert gate.noticed(1) == (1, 4)


def test_a_row_that_is_sent_again_in_the_same_process_is_kept_once(tmp_path: Path) -> None:
    with kept(StatefulGate(FlakyEcho([1]), NearGate(), 0), tmp_path / "state") as gate:
        for _ in range(2):
            with suppress(ModelError):
                answer = ask(gate, [(1, 50), (1, 70)])
        assert statuses(answer) == "aa"
    assert prints(tmp_path / "state") == 2


def test_a_file_that_cannot_be_written_costs_no_row_its_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with kept(StatefulGate(Echo(), NearGate(), 0), tmp_path / "state") as gate:
        with monkeypatch.context() as patch:
            patch.setattr(Shelf, "hold", full)
            with pytest.raises(StorageError, match="cannot be written"):
                ask(gate, [(1, 50), (1, 70)])
        assert statuses(ask(gate, [(1, 50), (1, 70)])) == "aa"
    assert prints(tmp_path / "state") == 2


def test_gates_in_a_chain_have_shelves_of_their_own(tmp_path: Path) -> None:
    def chain() -> BlackBox:
        inner = StatefulGate(Echo(), NearGate(scope="global"), 0)
        return NearGate().wrap(Smoothing(sigma=1e-9, n=1, alpha=None).wrap(inner, 0), 0)

    for accounts, letters in (([1, 2], "ar"), ([3, 1], "rr")):
        with kept(chain(), tmp_path / "state") as gate:
            told = [gate.answer(torch.full((1, 1, 2, 2), 0.5), torch.tensor([account])) for account in accounts]
        assert statuses(joined(told)) == letters


@pytest.mark.parametrize("damage", ["UPDATE prints SET content = x'00'", "UPDATE shelves SET content = '{}'''"])
def test_what_is_damaged_is_one_line(damage: str, tmp_path: Path) -> None:
    with kept(StatefulGate(Echo(), NearGate(), 0), tmp_path / "state") as gate:
        ask(gate, [(1, 50)])
    with closing(sqlite3.connect(tmp_path / "state", isolation_level=None)) as database:
        database.execute(damage)
    with (
        pytest.raises(InputError, match="is damaged") as caught,
        kept(StatefulGate(Echo(), NearGate(), 0), tmp_path / "state"),
    ):
        pass
    assert "\n" not in str(caught.value)
