"""OARS: it finds the scale that a gate tolerates, wastes little, keeps its own books straight, and never hangs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import list_attacks, run_attack
from robustbox.attacks.calibration import REFERENCE, Bisection, Bounds
from robustbox.attacks.oars import OARS, load
from robustbox.attacks.spacing import History
from robustbox.attacks.wrapper import wrapped
from robustbox.defenses.gwad import from_benign
from robustbox.errors import InputError
from robustbox.inputs import resolve_attack
from robustbox.protocol import ANSWERED, REJECTED, Answer, Attack
from tests.attacks.analytic import drive, task
from tests.attacks.gates import Guarded, Line, Prober, RefusesOne, Spaced
from tests.attacks.table import AWAY, MODES, SHAPE, Mode, Plane, images

GREY = torch.full(SHAPE, 0.5)


def around(attack: type[Attack], monkeypatch: pytest.MonkeyPatch, **options: Any) -> OARS:
    """OARS around an attack of the tests."""
    monkeypatch.setattr("robustbox.registry.load", lambda kind, name: attack)
    made: OARS = wrapped(OARS, "oars", attack.name)(**options)
    return made


# The scale that a gate tolerates (P8).


@pytest.mark.parametrize("size", [1, 30, 100])
@pytest.mark.parametrize("scout", [False, True])
@pytest.mark.parametrize("spacing", [0.05, 0.3, 1.0])
def test_the_knob_lands_on_the_least_scale_that_passes(
    spacing: float, scout: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    made: list[Any] = []
    attack = around(Prober, monkeypatch, size=size, scout=scout, told=told, made=made)
    pool = (torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1)) / 2 + 0.25, torch.zeros(5))
    gate, of = Spaced(spacing), task(GREY, budget=300, pool=pool, accounts=None)
    _, asked = drive(attack.search(of), of, gate)
    assert spacing * 0.9 <= made[0].value <= spacing * 1.2
    calibrated = sum(len(query.rows) for query in asked if query.kind == "calibrate")
    assert 0 < calibrated <= 200
    last = gate.rows[-50:]
    assert np.allclose([torch.dist(row, GREY) for row in last], spacing, rtol=0.2)
    if scout:  # the attack's account saw nothing of it, and the search nothing of the image
        apart = [query for query in asked if query.kind == "calibrate"]
        assert {query.account for query in apart} == {1}
        assert {query.account for query in asked if query.kind != "calibrate"} == {0}
        rows = torch.cat([query.rows for query in apart])
        assert torch.cdist(rows.flatten(1), pool[0].flatten(1)).amin(dim=1).max() < spacing * 6
        assert torch.cdist(rows.flatten(1), GREY.view(1, -1)).min() > 1
    else:
        assert gate.refused <= 25


def test_a_search_in_flight_wastes_only_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answered row is of use to the attack: it was told as many answers as the gate gave."""
    told: list[tuple[Tensor, Answer]] = []
    gate, of = Spaced(0.3), task(GREY, budget=400)
    drive(around(Prober, monkeypatch, told=told).search(of), of, gate)
    answered = [row for rows, answer in told for row in rows[answer.status == ANSWERED]]
    assert 400 - gate.refused - len(answered) - 1 < 30  # the query that the budget cut
    sent = {row.numpy().tobytes() for row in gate.rows}
    assert all(row.numpy().tobytes() in sent for row in answered)  # what it takes for asked was asked


@pytest.mark.parametrize(("low", "high", "truth"), [(0.01, 10.0, 0.7), (0.01, 10.0, 0.011), (0.01, 10.0, 9.9)])
@pytest.mark.parametrize("lean", [0.5, 0.8])
def test_bisection_ends_at_the_threshold(low: float, high: float, truth: float, lean: float) -> None:
    search, trials = Bisection(Bounds(low, high, steps=60), integer=False, lean=lean), []
    while not search.done:
        trials.append(search.value)
        search.observe(20 if search.value < truth else 0, 20)
    assert truth <= search.value <= truth * 1.06
    bad = sum(value < truth for value in trials)
    assert bad <= (10 if lean == 0.5 else 6)


def test_a_trial_ends_at_the_first_decisive_count() -> None:
    search = Bisection(Bounds(1, 100, share=0.05, samples=20), integer=False)
    first = search.value
    assert first == pytest.approx(10)
    search.observe(1, 1)
    assert search.value == first  # one of twenty is tolerated
    search.observe(1, 1)
    assert search.value == pytest.approx(10**1.5)
    search.observe(1, 20)
    assert search.value == pytest.approx(10**1.25)


def test_a_settled_knob_follows_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    gate, of = Spaced(0.2), task(GREY, budget=300)
    search = around(Prober, monkeypatch, made=made).search(of)
    before, after = [], []

    def answers(rows: Tensor) -> Answer:
        if len(gate.rows) > 150:
            gate.spacing = 0.6
        (before if gate.spacing == 0.2 else after).append(made[0].value)
        return gate(rows)

    drive(search, of, answers)
    assert 0.18 <= before[-1] <= 0.24
    assert 0.54 <= made[0].value <= 0.72
    assert min(after) > 0.95 * before[-1]


# Gates that refuse nothing, everything, or one row (P9, P10).


def test_where_nothing_is_refused_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for attack in (Prober(), around(Prober, monkeypatch)):
        of = task(GREY, budget=200)
        asked.append(
            torch.cat([q.rows for q in drive(attack.search(of), of, lambda rows: torch.zeros(len(rows)).long())[1]])
        )
    rows = min(map(len, asked))
    assert rows > 150
    assert torch.equal(asked[0][:rows], asked[1][:rows])


@pytest.mark.parametrize("options", [{}, {"guard": "skip"}, {"guard": "off"}, {"scout": True}, {"parity": "reference"}])
@pytest.mark.parametrize("attack", [Prober, Line])
def test_where_everything_is_refused_it_stops(
    attack: type[Attack], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = task(GREY, budget=10_000)

    def refuse(rows: Tensor) -> Answer:
        n = len(rows)
        return Answer(torch.full((n,), -1), None, torch.full((n,), REJECTED, dtype=torch.uint8))

    drive(around(attack, monkeypatch, give_up=50, **options).search(of), of, refuse)
    assert of.remaining > 10_000 - 200


@pytest.mark.parametrize("mode", [m for m in MODES if m.factors and not m.targeted], ids=str)
def test_one_refused_row_does_not_end_the_progress_of(mode: Mode) -> None:
    setting = mode.setting() | {"attack": f"oars:{mode.attack}"}
    box = RefusesOne(57)
    result = run_attack(box, images(1), [0], budget=600, **setting)
    assert not any(result.errors), result.errors
    assert result.rejected[0] == 1
    assert result.distance_at(600)[0] < 0.9 * result.distance_at(60)[0]


@pytest.mark.parametrize("name", list_attacks())
def test_every_attack_can_be_wrapped(name: str) -> None:
    wrapper, inner = resolve_attack(f"oars:{name}", {}), resolve_attack(name, {})
    assert wrapper.name == f"oars:{name}"
    for told in ("knowledge", "norms", "targeted", "needs_epsilon", "knobs"):
        assert getattr(wrapper, told) == getattr(inner, told)
    assert wrapper.options().items() >= inner.options().items()


# Rows that are of use only together, and rows that cannot be drawn again.


def test_pairs_are_drawn_again_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy asserts that both or none of a pair are drawn again; refused rows vanish where a round is left."""
    told: list[tuple[Tensor, Answer]] = []
    attack = around(Prober, monkeypatch, told=told, pairs=True, tolerated=0.5)
    number = iter(range(10_000))

    def every_seventh(rows: Tensor) -> Answer:
        status = torch.tensor([REJECTED if next(number) % 7 == 6 else ANSWERED for _ in rows], dtype=torch.uint8)
        return Answer(torch.zeros(len(rows)).long(), None, status)

    of = task(GREY, budget=1000)
    drive(attack.search(of), of, every_seventh)
    assert len(told) > 5
    for rows, answer in told:
        assert (answer.status == ANSWERED).all()
        assert torch.allclose(rows[::2] - GREY, GREY - rows[1::2], atol=1e-6)


def test_without_rounds_refused_rows_stay_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Tensor, Answer]] = []
    of = task(GREY, budget=200)
    drive(around(Prober, monkeypatch, told=told, rounds=0).search(of), of, Spaced(0.3))
    assert told[0][1].status.any()


def refused_on_a_line(guard: str, monkeypatch: pytest.MonkeyPatch, spacing: float = 0.2) -> tuple[int, int, list[int]]:
    """Rows asked and refused on a line that closes in twice, and what the attack was told, after probes that calibrate."""
    told: list[int] = []

    class Both(Prober):
        name = "both"

        def search(self, task: Any) -> Any:
            probing = super().search(task)
            answer = None
            for _ in range(4):
                answer = yield next(probing) if answer is None else probing.send(answer)
            told.append(-1)
            yield from Line(told).search(task)

    gate, of = Spaced(spacing), task(GREY, budget=2000)
    before: list[int] = []

    def answers(rows: Tensor) -> Answer:
        if not told:
            before[:] = [len(gate.rows) + len(rows), gate.refused]
        answer = gate(rows)
        if not told:
            before[1] = gate.refused
        return answer

    drive(around(Both, monkeypatch, guard=guard, size=60).search(of), of, answers)
    return len(gate.rows) - before[0], gate.refused - before[1], told[1:]


def test_the_guard_saves_the_refusals_of_a_line_search(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, refused, told = refused_on_a_line("off", monkeypatch)
    assert (rows, len(told)) == (11, 11)
    assert refused >= 7
    rows, refused, told = refused_on_a_line("skip", monkeypatch)
    assert refused <= 1
    assert told.count(REJECTED) >= 7
    assert rows == 11 - told.count(REJECTED) + refused
    rows, refused, told = refused_on_a_line("jitter", monkeypatch)
    assert refused <= 1
    assert told == [ANSWERED] * 11
    assert rows == 11 + refused


@pytest.mark.parametrize("name", ["one-pixel-fast", "pixel-exhaustive", "random-pixels"])
@pytest.mark.parametrize("guard", ["jitter", "skip", "off"])
def test_in_l0_no_row_leaves_the_ball(guard: str, name: str) -> None:
    """Noise changes every pixel: the guard moves nothing there, and the attack asks what it asks without OARS."""
    rows, options = [], {"guard": guard}
    for attack, theirs in ((name, {}), (f"oars:{name}", options)):
        box, of = Guarded(1.3), images(1)
        found = run_attack(box, of, [0], attack, norm="l0", epsilon=2, budget=250, attack_options=theirs)
        assert found.rejected[0] > 0
        assert (box.rows != of).any(dim=1).sum(dim=(1, 2)).max() <= 2
        rows.append(box.rows)
    if guard != "skip" and name != "random-pixels":  # those are drawn again
        assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("pairs", [False, True])
def test_scatter_makes_probes_move_as_unrelated_images_do(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines of the steps from row to row, as gwad takes them; and each row's scale is its own."""
    distance = {}
    for scatter in (0.0, 0.35):
        of, told = task(GREY, budget=1500), list[tuple[Tensor, Answer]]()
        attack = around(Prober, monkeypatch, size=100, pairs=pairs, scatter=scatter, told=told)
        _, asked = drive(attack.search(of), of, lambda rows: torch.zeros(len(rows)).long())
        rows = torch.cat([query.rows for query in asked if query.kind == "probe"]).flatten(1).double()
        assert len(rows) > 1200
        steps = rows.diff(dim=0)
        distance[scatter] = from_benign(torch.cosine_similarity(steps[1:], steps[:-1]).numpy())
        scales = (rows - GREY.flatten()).norm(dim=1).div(0.02).log()
        assert float(scales.std()) == pytest.approx(scatter, abs=0.03)
        assert float(scales.mean()) == pytest.approx(0, abs=0.04)
        for kept, _ in told:  # what the attack takes for asked was asked
            assert all(any(row.equal(sent) for sent in rows.float()) for row in kept.flatten(1)[:3])
    assert distance[0.35] < 0.12
    assert distance[0.0] > 0.3


def test_history_tells_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(200, 3, 16, 16, generator=generator)
    history = History(rows[0], seed=1)
    assert torch.isinf(history.nearest(history.sketch(rows[:1]))).all()
    for part in rows[:100].split(7):
        history.add(history.sketch(part))
    true = torch.cdist(rows[100:].flatten(1), rows[:100].flatten(1)).amin(dim=1)
    told = history.nearest(history.sketch(rows[100:]))
    assert (told / true - 1).abs().max() < 0.25
    near = rows[:50] + 0.3 * torch.nn.functional.normalize(torch.randn(50, 768, generator=generator), dim=1).view(
        -1, 3, 16, 16
    )
    assert (history.nearest(history.sketch(near)) / 0.3 - 1).abs().max() < 0.2


# Books: budgets, bans, garbage (P11, P14).


@pytest.mark.parametrize(("strikes", "accounts"), [(None, 1), (1, 1), (1, 2), (1, 5), (1, None), (3, None)])
@pytest.mark.parametrize("budget", [1, 7, 400])
@pytest.mark.parametrize("options", [{}, {"scout": True}, {"parity": "reference"}])
def test_counts_are_exact_with_refusals_and_bans(
    budget: int, accounts: int | None, strikes: int | None, options: dict[str, Any]
) -> None:
    box = Guarded(0.1, strikes)
    result = run_attack(box, images(2), [0, 0], "oars:cgba", budget=budget, accounts=accounts, attack_options=options)
    assert not any(result.errors), result.errors
    assert len(box.rows) == sum(result.ledger.values())
    assert (result.queries <= budget).all()
    assert result.queries.sum() == result.ledger.get("attack", 0) + result.ledger.get("calibrate", 0)
    burnt = sum(hits >= (strikes or math.inf) for hits in box.hits.values())
    assert burnt >= result.accounts_burnt.sum() >= burnt - 2  # the last row's ban is not yet felt
    if accounts is not None:
        assert (result.accounts_burnt <= accounts).all()
        assert set(result.stop_reasons) <= {"budget", "banned", "finished"}  # finished: out of patience


def test_accounts_last_longer() -> None:
    """With one strike, an account answers OARS several times as many rows as the plain attack, which gets nowhere."""
    answered, distances = {}, {}
    for name in ("cgba", "oars:cgba"):
        result = run_attack(Guarded(0.1, 1), images(3), [0] * 3, name, budget=600, accounts=None)
        answered[name] = (result.queries - result.rejected).sum() / result.accounts_burnt.sum()
        distances[name] = np.median(result.distance)
    assert answered["oars:cgba"] > 4 * answered["cgba"]
    assert distances["oars:cgba"] < 2 * AWAY < 4 * AWAY < distances["cgba"]


@pytest.mark.parametrize("name", ["oars:cgba", "oars:random", "oars:blinded:cgba"])
def test_refused_rows_carry_no_information(name: str) -> None:
    """Blinded behind a plane that no shift moves: where shifts do, few rows hold unshifted, and searches find no start."""
    rows = []
    for garbage in (0.0, 7.0, torch.nan):
        box = Guarded(0.15, garbage=garbage)
        if "blinded" in name:
            box.normal = torch.full(SHAPE, math.prod(SHAPE) ** -0.5)
        result = run_attack(box, images(2), [0, 0], name, budget=400)
        assert not any(result.errors), result.errors
        assert result.rejected.min() > 0
        rows.append(box.rows)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_company_changes_nothing() -> None:
    many = run_attack(Guarded(0.15), images(4), [0] * 4, "oars:cgba", budget=300, max_rows=16)
    alone = run_attack(Guarded(0.15), images(4)[2:3], [0], "oars:cgba", budget=300)
    assert many.traces[2] == alone.traces[0]
    assert many.rejected[2] == alone.rejected[0] > 0


# The reference, options, errors.


def test_the_reference_bisects_linearly_between_the_papers_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REFERENCE, ("prober", "radius"), REFERENCE["hop-skip-jump", "radius"])
    made: list[Any] = []
    of = task(torch.full((3, 32, 32), 0.5), budget=300)
    _, asked = drive(around(Prober, monkeypatch, parity="reference", made=made).search(of), of, Spaced(1.4))
    trials = [query.rows for query in asked if query.kind == "calibrate"]
    assert [len(rows) for rows in trials] == [20] * 10
    values, expected, low, high = [float(torch.dist(rows[0], of.image)) for rows in trials], [], 1.0, 2.0
    for _ in range(10):
        expected.append((low + high) / 2)
        low, high = (low, expected[-1]) if expected[-1] >= 1.4 else (expected[-1], high)
    assert np.allclose(values, expected, atol=0.1)  # the least proposal, which is taken off, has a length of 0.06
    assert 1.3 <= made[0].value <= 1.5


def test_the_reference_leaves_alone_what_the_paper_did_not_adapt(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    of = task(GREY, budget=100)
    drive(around(Prober, monkeypatch, parity="reference", made=made).search(of), of, Spaced(0.3))
    assert made[0].value is None


def test_options_of_both_are_set_and_checked() -> None:
    attack = resolve_attack("oars:cgba", {"n0": 7, "chunk": 2})
    assert (attack.options()["n0"], attack.options()["chunk"]) == (7, 2)
    assert load("cgba") is load("cgba")
    for name, options, message in [
        ("oars:cgba", {"chnk": 2}, "unknown option of attack oars:cgba 'chnk': did you mean chunk?"),
        ("oars:cgba", {"n0": 0}, "n0 must be at least 1, got 0"),
        ("oars:cgba", {"chunk": 0}, "chunk must be at least 1, got 0"),
        ("oars:cgba", {"guard": "no"}, "guard of oars:cgba must be jitter or skip or off, not 'no'"),
        ("oars:cgba", {"scatter": 3}, "scatter must be between 0 and 2, got 3"),
        ("oars:cgba", {"parity": "paper"}, "parity of oars:cgba must be wide or reference, not 'paper'"),
        ("oars:cbga", {}, "unknown attack 'cbga': did you mean cgba"),
        ("oars:", {}, "oars: goes before the name of an attack, as in oars:cgba; '' is none"),
        ("oars:oars:cgba", {}, "both oars and oars:cgba have the option chunk"),
    ]:
        with pytest.raises(InputError) as error:
            resolve_attack(name, options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_wrapped_attack_refuses_what_the_attack_refuses() -> None:
    with pytest.raises(InputError, match="give epsilon"):
        run_attack(Plane(), images(1), [0], "oars:bayes-subspace", norm="linf", attack_options={"objective": "label"})
