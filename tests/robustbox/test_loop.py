"""The query loop: exact budgets, fused passes that change nothing, and books that the attack has no say in."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch

from robustbox import ModelError, run_attack
from robustbox.loop import Progress
from robustbox.protocol import Answer, BudgetExhausted, Query, Search, Task
from robustbox.records import inside
from tests.toys import Failing, Gate, HalfSpace, Scripted, Walk, images, stubborn

BUDGETS = (1, 2, 7, 100)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_row_after_the_budget_never_reaches_the_model(budget: int, size: int) -> None:
    box = HalfSpace()
    result = run_attack(box, images(5), [0] * 5, Walk(size=size), budget=budget)
    assert box.rows == sum(result.ledger.values())
    assert result.queries.tolist() == [budget] * 5
    assert result.ledger["attack"] == 5 * budget
    assert set(result.stop_reasons) == {"budget"}


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_row_is_counted_when_images_end_in_different_ways(budget: int) -> None:
    def script(task: Task) -> Search:
        kind = int(task.image.double().sum() * 1e6) % 3
        for k in range(1000):
            if kind == 1 and k == 3:
                raise RuntimeError("planted")
            if kind == 2 and k == 4:
                return
            yield Query((task.image + 0.05 * k).clamp(0, 1)[None].repeat(2, 1, 1, 1))

    rows = torch.cat([images(12), images(2, mean=0.9, seed=1)])  # the last two are misclassified
    box = HalfSpace()
    result = run_attack(box, rows, [0] * 14, Scripted(script), epsilon=9.0, budget=budget)
    assert box.rows == sum(result.ledger.values())
    assert result.ledger["attack"] == result.queries.sum()
    assert (result.queries <= budget).all()
    assert result.queries[12:].tolist() == [0, 0]
    if budget == 100:
        assert {"success", "error", "misclassified"} <= set(result.stop_reasons)


def test_an_attack_alone_and_among_many_is_told_the_same_whatever_is_fused() -> None:
    rows = images(64)
    alone = [_transcript(rows[i : i + 1], "auto") for i in (0, 17, 63)]
    for company, fused in ((slice(0, 64), 1), (slice(0, 64), 7), (slice(0, 64), 512), (slice(0, 64), "auto")):
        transcripts, result = _transcript(rows[company], fused)
        for (own, lone), i in zip(alone, (0, 17, 63), strict=True):
            key = float(rows[i].double().sum())
            assert transcripts[key] == own[key]
            assert result.traces[i] == lone.traces[0]
            assert torch.equal(result.adversarials[i], lone.adversarials[0])


def _transcript(rows: torch.Tensor, fused: int | str) -> tuple[dict, object]:
    walk = Walk(size=5)
    result = run_attack(HalfSpace(), rows, [0] * len(rows), walk, budget=93, max_rows=fused)
    return walk.transcript, result


def test_order_does_not_matter() -> None:
    rows = images(6)
    forward = run_attack(HalfSpace(), rows, [0] * 6, Walk(), budget=50)
    back = run_attack(HalfSpace(), rows.flip(0), [0] * 6, Walk(), budget=50)
    assert forward.traces == back.traces[::-1]


def test_another_seed_gives_another_run_and_the_same_seed_the_same() -> None:
    runs = [run_attack(HalfSpace(), images(2), [0, 0], Walk(), budget=50, seed=s).traces for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("fused", [4, 10, 33])
def test_no_pass_is_larger_than_asked_and_finished_images_are_not_forwarded(fused: int) -> None:
    box = HalfSpace()
    result = run_attack(box, images(20), [0] * 20, Walk(size=3, queries=5), budget=100, max_rows=fused)
    assert max(box.passes) == fused
    assert result.queries.tolist() == [15] * 20
    assert set(result.stop_reasons) == {"finished"}
    assert box.rows == 20 + 300 + result.success.sum()


def test_the_last_query_is_cut_sent_and_charged_and_the_attack_may_clean_up_but_not_go_on() -> None:
    told: list[object] = []

    def script(task: Task) -> Search:
        try:
            told.append((yield Query(task.image[None].repeat(5, 1, 1, 1))))
            yield Query(task.image[None].repeat(5, 1, 1, 1))
        except BudgetExhausted:
            told.append("exhausted")
            raise

    box = HalfSpace()
    result = run_attack(box, images(1), [0], Scripted(script), budget=7)
    assert isinstance(told[0], Answer)
    assert told[1:] == ["exhausted"]
    assert result.queries[0] == 7
    stubbornly = run_attack(HalfSpace(), images(1), [0], Scripted(stubborn), budget=3)
    assert (stubbornly.queries[0], stubbornly.stop_reasons[0]) == (3, "budget")


def test_an_attack_learns_how_many_queries_remain() -> None:
    walk = Walk(size=4)
    run_attack(HalfSpace(), images(1), [0], walk, budget=10)
    (told,) = walk.transcript.values()
    assert told[::2] == [10, 6, 2]


@pytest.mark.parametrize("total", [1, 10, 64, 250])
def test_a_total_budget_holds_to_the_row_in_image_order(total: int) -> None:
    box = HalfSpace()
    result = run_attack(box, images(4), [0] * 4, Walk(size=3), budget=50, total_budget=total, max_rows=5)
    assert result.ledger["attack"] == min(total, 200)
    assert box.rows == sum(result.ledger.values())
    assert all(np.diff(result.queries) <= 0)
    assert ("total-budget" in result.stop_reasons) == (total < 200)


def test_the_result_is_the_nearest_row_that_was_really_sent_with_its_norm_recomputed() -> None:
    def script(task: Task) -> Search:
        for far in (0.5, 0.3, 0.4, 0.25, 0.1):
            yield Query((task.image + far).clamp(0, 1)[None])

    for norm, scale in (("l2", 8 * 3**0.5), ("linf", 1.0)):
        box, rows = HalfSpace(), images(3)
        result = run_attack(box, rows, [0] * 3, Scripted(script), norm=norm, budget=9)
        assert [[query for query, _ in trace] for trace in result.traces] == [[1, 2, 4]] * 3
        assert result.first_success.tolist() == [1] * 3
        np.testing.assert_allclose(result.distance, 0.25 * scale, rtol=1e-5)
        sent = torch.cat(box.seen)
        for adversarial in result.adversarials:
            assert (sent == adversarial).flatten(1).all(1).any()
        assert (box.of(result.adversarials).labels == 1).all()


def test_l0_counts_pixels_not_values() -> None:
    def script(task: Task) -> Search:
        row = torch.ones_like(task.image)
        row[:, 0, :3] = task.image[:, 0, :3]
        row[0, 0, 0] = 1.0
        yield Query(row[None])

    result = run_attack(HalfSpace(), images(1), [0], Scripted(script), norm="l0", budget=5)
    assert result.distance.tolist() == [62.0]  # 64 pixels less two; the third differs in one channel


def test_with_an_epsilon_the_attack_stops_at_its_first_success_unless_told_to_go_on() -> None:
    def script(task: Task) -> Search:
        for far in (0.5, 0.3, 0.25, 0.24):
            yield Query((task.image + far).clamp(0, 1)[None])

    setting = {"norm": "linf", "epsilon": 0.3, "budget": 9}
    stops = run_attack(HalfSpace(), images(2), [0, 0], Scripted(script), **setting)
    assert (stops.queries.tolist(), stops.first_success.tolist()) == ([2, 2], [2, 2])
    assert stops.stop_reasons == ["success", "success"]
    goes_on = run_attack(HalfSpace(), images(2), [0, 0], Scripted(script), keep_going=True, **setting)
    assert (goes_on.queries.tolist(), goes_on.first_success.tolist()) == ([4, 4], [2, 2])
    np.testing.assert_allclose(goes_on.distance, 0.24, rtol=1e-5)


def test_a_success_outside_the_ball_is_a_failure_without_an_adversarial() -> None:
    result = run_attack(HalfSpace(), images(2), [0, 0], Walk(), norm="linf", epsilon=0.01, budget=30)
    assert not result.success.any()
    assert result.adversarials.isnan().all()
    assert np.isnan(result.distance).all()
    assert result.first_success.tolist() == [0, 0]
    assert np.isfinite(result.distance_at(30)).all()  # the curve still says how near it came


def test_targeted_goals_count_the_target_alone() -> None:
    def script(task: Task) -> Search:
        yield Query((task.image + 0.5).clamp(0, 1)[None])

    box = HalfSpace(classes=3)
    hit = run_attack(box, images(1), [0], Scripted(script), targets=1, budget=5)
    miss = run_attack(box, images(1), [0], Scripted(script), targets=[2], budget=5)
    assert (hit.success[0], miss.success[0]) == (True, False)


def test_an_attack_that_raises_or_asks_nonsense_ends_its_own_image_only() -> None:
    nonsense = {
        "nan": lambda x: torch.full_like(x, torch.nan)[None],
        "box": lambda x: (x + 0.7)[None],
        "shape": lambda x: x,
        "double": lambda x: x.double()[None],
        "empty": lambda x: x[None][:0],
    }
    rows = images(6)
    order = {float(row.double().sum()): i for i, row in enumerate(rows)}

    def script(task: Task) -> Search:
        mode = order[float(task.image.double().sum())]
        yield Query((task.image + 0.4).clamp(0, 1)[None])
        if mode < 5:
            yield Query(list(nonsense.values())[mode](task.image))
        yield Query((task.image + 0.3).clamp(0, 1)[None])

    box = HalfSpace()
    result = run_attack(box, rows, [0] * 6, Scripted(script), budget=9)
    assert result.stop_reasons == ["error"] * 5 + ["finished"]
    assert result.queries.tolist() == [1] * 5 + [2]
    assert result.success.all()  # what was found before the error counts
    for said, part in zip(result.errors, ("NaN", "outside the box", "shape", "float64", "shape"), strict=False):
        assert said is not None
        assert part in said
    assert box.rows == sum(result.ledger.values())


def test_an_attack_that_catches_the_error_of_its_own_row_may_not_go_on() -> None:
    def script(task: Task) -> Search:
        while True:
            with suppress(ValueError):
                yield Query(torch.full_like(task.image, torch.nan)[None])

    result = run_attack(HalfSpace(), images(2), [0, 0], Scripted(script), budget=9)
    assert result.stop_reasons == ["error"] * 2
    assert result.queries.tolist() == [0, 0]


def test_an_image_that_ended_in_the_round_in_which_the_model_failed_has_ended() -> None:
    rows = images(3)
    last = float(rows[2].double().sum())

    def script(task: Task) -> Search:
        yield Query((task.image + 0.4).clamp(0, 1)[None])
        if float(task.image.double().sum()) == last:
            yield Query(task.image[None])

    with pytest.raises(ModelError) as stop:
        run_attack(Failing(7, lambda answer: 1 / 0), rows, [0] * 3, Scripted(script), max_rows=3)  # type: ignore[arg-type, return-value]
    assert stop.value.result is not None
    assert stop.value.result.stop_reasons == ["finished", "finished", "stopped"]


def test_refused_rows_are_charged_and_never_count_as_successes() -> None:
    box = Gate(k=2, free=3)
    walk = Walk(size=4)
    result = run_attack(box, images(3), [0] * 3, walk, budget=40)
    assert result.queries.tolist() == [40] * 3
    answers = [answer for told in walk.transcript.values() for answer in told[1::2]]
    refused = [label for labels, statuses in answers for label, status in zip(labels, statuses, strict=True) if status]
    assert len(refused) >= 50
    assert set(refused) == {-1}
    for adversarial in result.adversarials[torch.from_numpy(result.success)]:
        assert HalfSpace().of(adversarial[None]).labels[0] == 1


def test_calibration_is_charged_to_the_attacker_on_a_ledger_of_its_own() -> None:
    result = run_attack(HalfSpace(), images(2), [0, 0], Walk(size=2, queries=4, kind="calibrate"), budget=50)
    assert result.ledger["calibrate"] == 16
    assert result.ledger.get("attack", 0) == 0
    assert result.queries.tolist() == [8, 8]


def test_accounts_tell_images_apart_and_do_not_depend_on_company() -> None:
    rows = torch.cat([images(3), images(1)])  # the first image comes twice
    box, alone = HalfSpace(), HalfSpace()
    run_attack(box, rows, [0] * 4, Walk(queries=2), budget=10)
    run_attack(alone, rows[:1], [0], Walk(queries=2), budget=10)
    attackers = {account for account, n in box.by_account.items() if n >= 6}
    assert len(attackers) == 4
    assert set(alone.by_account) <= set(box.by_account)


def test_progress_is_told_once_a_round() -> None:
    states: list[Progress] = []
    run_attack(HalfSpace(), images(3), [0] * 3, Walk(size=2, queries=3), budget=10, progress=states.append)
    assert [state.rows for state in states] == [6, 12, 18, 18]
    assert states[-1].live == 0
    assert states[-1].done == 3
    assert states[0].total == 30
    assert states[-1].total == 18


def test_a_model_that_writes_into_its_input_does_not_change_what_was_found() -> None:
    class Writer(HalfSpace):
        def answer(self, rows: torch.Tensor, accounts: torch.Tensor) -> Answer:
            answer = super().answer(rows, accounts)
            rows.zero_()
            return answer

    plain = run_attack(HalfSpace(), images(3), [0] * 3, Walk(), budget=30)
    writer = run_attack(Writer(), images(3), [0] * 3, Walk(), budget=30)
    assert torch.equal(plain.adversarials, writer.adversarials)
    assert plain.traces == writer.traces


def test_an_attack_that_writes_into_its_answers_and_rows_changes_nothing_else() -> None:
    def script(task: Task) -> Search:
        for far in (0.5, 0.3):
            rows = (task.image + far).clamp(0, 1)[None]
            answer = yield Query(rows)
            rows.zero_()
            answer.labels.fill_(0)

    result = run_attack(HalfSpace(), images(3), [0] * 3, Scripted(script), norm="linf", budget=5)
    np.testing.assert_allclose(result.distance, 0.3, rtol=1e-5)
    assert (result.adversarials.mean(dim=(1, 2, 3)) > 0.6).all()


def test_a_pass_that_does_not_fit_the_device_is_split_and_charged_once() -> None:
    class Small(HalfSpace):
        def answer(self, rows: torch.Tensor, accounts: torch.Tensor) -> Answer:
            if len(rows) > 5:
                raise torch.OutOfMemoryError("planted")
            return super().answer(rows, accounts)

    box, free = Small(), HalfSpace()
    result = run_attack(box, images(4), [0] * 4, Walk(size=7), budget=35, max_rows=20)
    assert box.rows == sum(result.ledger.values())
    assert result.traces == run_attack(free, images(4), [0] * 4, Walk(size=7), budget=35).traces


@pytest.mark.parametrize(
    ("far", "epsilon", "answer"),
    [(0.3, None, True), (np.inf, None, False), (0.3, 0.3, True), (0.3 + 5e-7, 0.3, True), (0.31, 0.3, False)],
)
def test_inside(far: float, epsilon: float | None, answer: bool) -> None:
    assert inside(far, epsilon) is answer
