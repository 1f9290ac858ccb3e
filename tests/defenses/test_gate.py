"""The stateful gate's decision loop, against a model of it that knows no batches, and what a run makes of its refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import robustbox as rb
from robustbox import registry
from robustbox.defenses.gate import Action, Shape, StatefulDefense, StatefulGate
from robustbox.defenses.gate import Scope as Whose
from robustbox.defenses.input_noise import InputNoise
from robustbox.defenses.memory import Memory, Verdict
from robustbox.dispatch import joined
from robustbox.errors import InputError, ModelError
from robustbox.models.data import Data
from robustbox.protocol import ANSWERED, BANNED, REJECTED, Answer, BlackBox, Query, Search, Task
from tests.toys import Flaky, HalfSpace, Scripted, images

SHAPE = (1, 2, 2)


class Near(Memory):
    """Numbers; a hit is within 1 of a stored one; the lowest row among the nearest counts."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.next = 0

    def judge(self, print: int) -> Verdict:
        near = [(abs(print - value), number) for number, value in self.rows.items() if abs(print - value) <= 1]
        return Verdict(bool(near), min(near)[1] if near else -1)

    def store(self, print: int, verdict: Verdict) -> int:
        self.rows[self.next] = print
        self.next += 1
        return self.next - 1

    def forget(self, before: int) -> None:
        self.rows = {number: value for number, value in self.rows.items() if number >= before}

    @property
    def stored(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        return 8 * len(self.rows)


@dataclass(frozen=True, kw_only=True)
class NearGate(StatefulDefense):
    """Refuses rows whose first values, in hundredths, are within 1 of each other."""

    name: ClassVar[str] = "near"
    secrets: list[int] = field(default_factory=list)

    def secret(self, shape: Shape, generator: torch.Generator) -> int:
        self.secrets.append(int(torch.randint(2**60, (1,), generator=generator)))
        return self.secrets[-1]

    def prints(self, rows: Tensor, secrets: Sequence[int]) -> list[int]:
        return [round(100 * float(row[0, 0, 0])) for row in rows]

    def memory(self, secret: int) -> Memory:
        return Near()


class Echo(BlackBox):
    """Answers each row with its own values, and keeps what it saw."""

    name, classes, scores, input_shape = "echo", 4, "logit", SHAPE

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.seen += zip(accounts.tolist(), numbers(rows), strict=True)
        return Answer.of(rows.flatten(1).argmax(dim=1), rows.flatten(1))


def numbers(rows: Tensor) -> list[int]:
    return [round(100 * float(row.flatten()[0])) for row in rows]


def rows_of(values: Sequence[int]) -> Tensor:
    rows = torch.zeros(len(values), *SHAPE)
    rows[:, 0, 0, 0] = torch.tensor(values) / 100
    rows[:, 0, 1, 1] = 0.5
    return rows


Sent = tuple[int, int]  # account, number


def ask(gate: BlackBox, queries: Sequence[Sent], cuts: Sequence[int] = ()) -> Answer:
    """The answers to queries that are sent in passes, cut where stated."""
    edges = [0, *sorted(cut for cut in set(cuts) if 0 < cut < len(queries)), len(queries)]
    parts = []
    for start, stop in pairwise(edges):
        accounts, values = zip(*queries[start:stop], strict=True)
        parts.append(gate.answer(rows_of(values), torch.tensor(accounts)))
    scores = [part.scores for part in parts if part.scores is not None]
    return Answer(torch.cat([p.labels for p in parts]), torch.cat(scores), torch.cat([p.status for p in parts]))


def statuses(answer: Answer) -> str:
    """One letter a row: answered, rejected, banned."""
    return "".join("arb"[status] for status in answer.status.tolist())


def model(queries: Sequence[Sent], gate: NearGate) -> tuple[str, list[int | None]]:
    """The status of each query and the number whose answer it is given: the rules, one query at a time."""
    histories: dict[object, list[tuple[int, int | None]]] = {}  # number stored, number whose answer was given
    strikes: dict[int, int] = {}
    told: list[int | None] = []
    letters = ""
    for account, number in queries:
        if gate.action == "ban" and strikes.get(account, 0) >= gate.strikes:
            letters, told = letters + "b", [*told, None]
            continue
        history = histories.setdefault(account if gate.scope == "account" else "all", [])
        near = [(abs(number - value), k) for k, (value, _) in enumerate(history) if abs(number - value) <= 1]
        refused = bool(near) and gate.action in ("reject", "ban")
        given = None if refused else history[min(near)[1]][1] if near and gate.action == "decoy" else number
        letters, told = letters + "ar"[refused], [*told, given]
        if not near or gate.store_rejected:
            history.append((number, given))
        if gate.window is not None:
            del history[: -gate.window]
        if near:
            strikes[account] = strikes.get(account, 0) + 1
            if gate.reset_on_hit:
                history.clear()
    return letters, told


QUERIES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 12).map(lambda k: 8 * k + k % 2)), min_size=1, max_size=40
)
WIDE = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=40)
GATES = st.builds(
    NearGate,
    action=st.sampled_from(["reject", "ban", "silent", "decoy"]),
    scope=st.sampled_from(["account", "global"]),
    strikes=st.integers(1, 3),
    window=st.none() | st.integers(1, 8),
    store_rejected=st.booleans(),
    reset_on_hit=st.booleans(),
)


@given(QUERIES | WIDE, GATES, st.lists(st.integers(1, 39), max_size=6))
def test_the_gate_decides_as_one_that_sees_one_query_at_a_time(
    queries: list[Sent], defense: NearGate, cuts: list[int]
) -> None:
    inner = Echo()
    gate = StatefulGate(inner, defense, seed=0)
    answer = ask(gate, queries, cuts)
    letters, told = model(queries, defense)
    assert statuses(answer) == letters
    assert answer.scores is not None
    for row, number in enumerate(told):
        if number is None:
            assert answer.labels[row] == -1
            assert answer.scores[row].isnan().all()
        else:
            assert torch.equal(answer.scores[row], rows_of([number]).flatten())
    own = [query for query, number in zip(queries, told, strict=True) if number == query[1]]
    if defense.action != "decoy":
        assert inner.seen == own  # the model sees what was answered, and nothing else
    else:
        assert set(inner.seen) <= set(queries)
        assert len(inner.seen) <= len(own)
    statistics = gate.statistics()
    assert statistics["rows"] == len(queries)
    assert statistics["banned_rows"] == letters.count("b")
    if defense.action in ("reject", "ban"):
        assert statistics["hits"] == letters.count("r")


@given(WIDE, st.integers(0, 3))
def test_accounts_do_not_meet(queries: list[Sent], strikes: int) -> None:
    """An account alone and among others, its rows in whatever passes, is answered alike."""
    defense = NearGate(action="ban", strikes=strikes) if strikes else NearGate()
    together = statuses(ask(StatefulGate(Echo(), defense, 0), queries))
    for account in {account for account, _ in queries}:
        alone = [query for query in queries if query[0] == account]
        letters = statuses(ask(StatefulGate(Echo(), defense, 0), alone, range(1, len(alone))))
        assert letters == "".join(x for x, (whose, _) in zip(together, queries, strict=True) if whose == account)


class FlakyEcho(Flaky, Echo):
    """An echo that fails."""


def patiently(gate: BlackBox, queries: Sequence[Sent], cuts: Sequence[int]) -> Answer:
    """As `ask`, and what failed is sent again, in halves."""
    try:
        return ask(gate, queries, cuts)
    except ModelError:
        half = len(queries) // 2
        return joined([patiently(gate, part, ()) for part in (queries[:half], queries[half:]) if part])


@given(QUERIES | WIDE, GATES, st.sets(st.integers(1, 20), max_size=8))
def test_rows_that_are_sent_again_since_the_model_failed_are_judged_once(
    queries: list[Sent], defense: NearGate, failing: set[int]
) -> None:
    gate, calm = (StatefulGate(inner, defense, seed=0) for inner in (FlakyEcho([*failing]), Echo()))
    answer, wanted = patiently(gate, queries, ()), ask(calm, queries)
    assert statuses(answer) == statuses(wanted)
    assert torch.equal(answer.labels, wanted.labels)
    for key in ("rows", "hits", "banned_rows", "first_hit", "accounts_banned"):
        assert gate.statistics()[key] == calm.statistics()[key]


def test_noise_before_a_gate_does_not_make_new_rows_of_those_that_are_sent_again() -> None:
    refused = []
    for failing in ([], [2]):
        gate = NearGate(action="ban").wrap(FlakyEcho(failing), 0)
        box, told = InputNoise(sigma=0.002).wrap(gate, 0), []
        for value in (50, 70, 90):
            rows, one = rows_of([value]), torch.tensor([1])
            try:
                told.append(box.answer(rows, one))
            except ModelError:
                told.append(box.answer(rows, one))
        refused.append(statuses(joined(told)))
    assert refused == ["aaa", "aaa"]


def test_a_row_that_failed_is_not_waited_for_for_ever() -> None:
    gate = StatefulGate(FlakyEcho([2]), NearGate(), 0)
    with pytest.raises(ModelError):
        ask(gate, [(1, 50), (2, 50)], [1])
    assert (
        statuses(ask(gate, [(2, 90), (2, 50), (1, 90)])) == "ara"
    )  # it went on to something else: a repeat is a repeat


def test_antithetic_partners_in_one_pass_see_each_other() -> None:
    assert statuses(ask(StatefulGate(Echo(), NearGate(), 0), [(1, 50), (2, 50), (1, 51), (1, 49)])) == "aarr"


def test_a_ban_takes_effect_within_the_pass_and_a_new_account_starts_blank() -> None:
    defense = NearGate(action="ban", strikes=2)
    gate = StatefulGate(Echo(), defense, 0)
    assert statuses(ask(gate, [(1, 50), (1, 50), (1, 10), (1, 50), (1, 90), (2, 50)])) == "ararba"
    assert statuses(ask(gate, [(1, 30), (3, 50), (2, 90)])) == "baa"
    assert gate.statistics()["accounts_banned"] == 1
    assert gate.statistics()["first_hit"] == {"1": 2}
    assert (gate.standing(1).rows, gate.standing(1).hits, gate.standing(1).banned) == (6, 2, True)
    # With one history for all, a new account inherits it.
    gate = StatefulGate(Echo(), NearGate(action="ban", scope="global"), 0)
    assert statuses(ask(gate, [(1, 50), (1, 50), (2, 50), (2, 51), (3, 10)])) == "arrba"


@pytest.mark.parametrize("allowed", [1, 4])
def test_accounts_burnt_are_rejections_where_one_strike_bans(allowed: int) -> None:
    """P13: an attacker that moves on to its next account at each ban, until it has no more."""
    gate = StatefulGate(Echo(), NearGate(action="ban"), 0)
    account, refused, answered = 0, 0, 0
    for _ in range(40):
        status = int(ask(gate, [(account, 50)]).status[0])
        answered += status == ANSWERED
        refused += status == REJECTED
        account = min(account + (status == REJECTED), allowed - 1)
    assert (answered, refused, gate.statistics()["accounts_banned"]) == (allowed, allowed, allowed)


def test_a_run_charges_refused_rows_and_fuses_as_it_likes() -> None:
    """P11, P12: by `run_attack`: what is sent is what is counted, alone and in company, in passes of 1 and 64."""

    class Half(Echo):
        input_shape, scores, classes = (1, 4, 4), "none", 2

        def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
            self.seen += zip(accounts.tolist(), numbers(rows), strict=True)
            return Answer.of((rows.double().mean(dim=(1, 2, 3)) > 0.5).long())

    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.4
    found = []
    for few, fused in ((slice(2, 3), 64), (slice(0, 6), 64), (slice(0, 6), 1)):
        inner, defense = Half(), NearGate(window=30)
        result = rb.run_attack(
            inner, images[few], [0] * len(images[few]), "random", budget=67, defense=defense, max_rows=fused
        )
        assert (result.queries == 67).all()
        assert len(inner.seen) < sum(result.ledger.values())  # some were refused
        assert len(set(defense.secrets)) == len(defense.secrets)  # each account has its own
        found.append((result.traces[2 % len(images[few])], result.adversarials[2 % len(images[few])]))
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.equal(found[0][1].nan_to_num(), found[1][1].nan_to_num())
    assert torch.equal(found[0][1].nan_to_num(), found[2][1].nan_to_num())


def test_secrets_hang_on_seed_and_scope_alone() -> None:
    def drawn(seed: int, scope: Whose, accounts: Sequence[int]) -> list[int]:
        defense = NearGate(scope=scope)
        ask(StatefulGate(Echo(), defense, seed), [(account, 10 * k) for k, account in enumerate(accounts)])
        return defense.secrets

    assert drawn(0, "account", [5, 6, 5]) == drawn(0, "account", [6, 5])[::-1]
    assert drawn(0, "account", [5]) != drawn(1, "account", [5])
    assert drawn(0, "global", [5, 6]) == drawn(0, "global", [7])


def test_a_warm_history_is_other_peoples_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    benign = Data(rows_of([10, 20, 30, 40]), torch.zeros(4, dtype=torch.long), None, "benign")
    monkeypatch.setattr(registry, "make", lambda kind, name: benign)
    gate: BlackBox = StatefulGate(Echo(), NearGate(warm="benign", warm_rows=4), 0)
    assert statuses(ask(gate, [(1, 10), (1, 15), (2, 41), (2, 15)])) == "rara"
    sampled = statuses(
        ask(StatefulGate(Echo(), NearGate(warm="benign", warm_rows=2), 0), [(1, k) for k in (10, 20, 30, 40)])
    )
    assert sorted(sampled) == list("aarr")
    # A decoy of a warm row: nobody was ever answered about it, so the model is.
    gate = StatefulGate(Echo(), NearGate(warm="benign", warm_rows=4, action="decoy"), 0)
    answer = ask(gate, [(1, 11), (1, 12)])
    assert answer.scores is not None
    assert answer.scores[:, 0].tolist() == pytest.approx([0.11, 0.11])
    with pytest.raises(InputError, match="holds 4 images"):
        StatefulGate(Echo(), NearGate(warm="benign", warm_rows=5), 0)
    other = Data(torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.long), None, "benign")
    monkeypatch.setattr(registry, "make", lambda kind, name: other)
    with pytest.raises(InputError, match=r"are \[3, 2, 2\], the model takes \[1, 2, 2\]"):
        StatefulGate(Echo(), NearGate(warm="benign", warm_rows=4), 0)


def test_gates_stack() -> None:
    """The refusals of an inner gate come through as they are."""
    inner = StatefulGate(Echo(), NearGate(action="ban"), 0)
    outer = StatefulGate(inner, NearGate(window=1), 1)
    # The outer one remembers one row only; the inner one all that got through.
    assert statuses(ask(outer, [(1, 50), (1, 50), (1, 10), (1, 50), (1, 90)])) == "ararb"


def test_the_record() -> None:
    gate = StatefulGate(Echo(), NearGate(window=2), 3)
    ask(gate, [(1, 50), (1, 50), (2, 50)])
    record: dict[str, Any] = gate.describe()
    assert record["options"]["action"] == "reject"
    assert record["statistics"]["first_hit"] == {"1": 2}
    assert record["statistics"]["bytes_per_query"] == 8
    assert record["statistics"]["milliseconds_per_query"] > 0
    assert (gate.name, gate.classes, gate.stochastic) == ("echo behind near", 4, False)


@pytest.mark.parametrize("option", ["strikes", "window", "warm_rows"])
def test_bad_options(option: str) -> None:
    with pytest.raises(InputError, match=f"near: {option} must be at least 1"):
        NearGate(**{option: 0})


def test_all_actions_are_known() -> None:
    assert Action.__args__ == ("reject", "ban", "silent", "decoy")  # type: ignore[attr-defined]
    assert (ANSWERED, REJECTED, BANNED) == (0, 1, 2)


def test_the_evaluator_is_judged_and_not_remembered() -> None:
    """Its clean check is no reason to refuse the attacker, and an adversarial is judged on a fresh account."""
    for scope in ("account", "global"):
        box = HalfSpace()
        clean = images(2, (3, 32, 32), mean=0.597)
        found = rb.run_attack(
            box, clean, [0, 0], near(), budget=1, defense="blacklight", defense_options={"scope": scope}
        )
        assert found.success.all()
        assert not found.rejected.any()
        assert found.success_fresh.tolist() == [scope == "account"] * 2  # a replay, where all share one history


def near() -> Scripted:
    """Asks one adversarial, as near to the image as it gets."""

    def search(task: Task) -> Search:
        yield Query((task.image + 0.601 - task.image.mean()).clamp(0, 1)[None])

    return Scripted(search)
