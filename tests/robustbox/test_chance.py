"""Black boxes that answer at random, or ban accounts: EOT, the vote on a success, and who sends what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustbox import InputError, run_attack
from robustbox.consensus import consensus
from robustbox.protocol import ANSWERED, BANNED, REJECTED, Answer, Query, Search, Task
from tests.toys import HalfSpace, Scripted, Walk, images


class Coin(HalfSpace):
    """A half-space that gives the other of two labels with probability p."""

    stochastic = True

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.generator = p, torch.Generator().manual_seed(0)

    def of(self, rows: Tensor) -> Answer:
        answer = super().of(rows)
        flip = torch.rand(len(rows), generator=self.generator) < self.p
        return Answer(torch.where(flip, 1 - answer.labels, answer.labels), answer.scores, answer.status)


class Bouncer(HalfSpace):
    """A half-space that refuses every account's k-th row and serves the account no more."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.sent = k, Counter[int]()

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        answer = super().answer(rows, accounts)
        for i, account in enumerate(accounts.tolist()):
            self.sent[account] += 1
            if self.sent[account] >= self.k:
                answer.labels[i], answer.status[i] = -1, BANNED
        return answer


def script(at: Callable[[Task], float], rows: int = 1, account: int = 0) -> Scripted:
    """Asks the image brightened, for ever."""

    def search(task: Task) -> Search:
        while True:
            row = (task.image + at(task)).clamp(0, 1)[None]
            yield Query(row.expand(rows, -1, -1, -1), account=account)

    return Scripted(search)


def test_consensus_is_the_label_of_most_and_the_mean_of_the_answered() -> None:
    labels = torch.tensor([2, 0, 2, 1, 1, -1, -1, -1, -1, 1, 0, -1])
    scores = torch.arange(24.0).view(12, 2)
    scores[5] = torch.nan
    status = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 0, 0, 1], dtype=torch.uint8)
    answer = consensus(Answer(labels, scores, status), 3)
    assert answer.labels.tolist() == [2, 1, -1, 0]
    assert answer.status.tolist() == [ANSWERED, ANSWERED, REJECTED, ANSWERED]
    assert answer.scores is not None
    assert answer.scores.tolist() == [[2, 3], [7, 8], [0, 0], [19, 20]]


def test_eot_asks_each_row_so_often_and_charges_it() -> None:
    box = HalfSpace()
    seen: list[int] = []

    def search(task: Task) -> Search:
        while True:
            seen.append(task.remaining)
            yield Query(torch.rand(2, *task.image.shape, generator=task.generator))

    result = run_attack(box, images(1), [0], Scripted(search), budget=24, eot=5)
    assert result.queries.tolist() == [20]
    assert seen == [4, 2, 0]
    assert result.stop_reasons == ["budget"]
    asked = torch.cat(box.seen)[1:21].view(4, 5, 3, 8, 8)
    assert (asked == asked[:, :1]).all()
    assert (asked[1:, 0] != asked[:-1, 0]).any(dim=(1, 2, 3)).all()
    assert box.rows == sum(result.ledger.values())


def test_on_a_deterministic_black_box_eot_changes_the_price_and_nothing_else() -> None:
    plain = run_attack(HalfSpace(), images(3), [0] * 3, "cgba", budget=200)
    fivefold = run_attack(HalfSpace(), images(3), [0] * 3, "cgba", budget=1000, eot=5, max_rows=7)
    assert (fivefold.adversarials == plain.adversarials).all()
    assert [[(5 * query, far) for query, far in trace] for trace in plain.traces] == fivefold.traces


def test_eot_gives_the_books_the_majority_and_remembers_the_luck() -> None:
    def search(task: Task) -> Search:  # adversarial from 0.2 on
        yield Query(torch.stack([(task.image + far).clamp(0, 1) for far in (0.15, 0.25)]))

    once = run_attack(Coin(0.3), images(20), [0] * 20, Scripted(search), "linf", budget=2)
    assert (once.distance < 0.2).any()  # books kept by single answers believe in luck
    often = run_attack(Coin(0.3), images(20), [0] * 20, Scripted(search), "linf", budget=2 * 35, eot=35)
    assert often.success.all()
    assert (often.distance > 0.2).all()
    assert often.success_any.all()


def test_a_success_of_a_stochastic_black_box_is_put_to_the_vote_before_it_ends_the_attack() -> None:
    held = run_attack(Coin(0.1), images(8), [0] * 8, script(lambda _: 0.3), "linf", epsilon=0.3, budget=40)
    assert set(held.stop_reasons) == {"success"}
    assert (held.queries == held.first_success + 9).all()
    assert held.success.all()
    luck = run_attack(Coin(0.1), images(8), [0] * 8, script(lambda _: 0.1), "linf", epsilon=0.3, budget=90)
    assert set(luck.stop_reasons) == {"budget"}
    assert (luck.queries == 90).all()
    assert luck.success_any.any()
    assert not luck.success.any()
    assert luck.distance.tolist() != luck.distance.tolist()  # all NaN: what was outvoted is no adversarial
    assert (luck.first_success == 0).all()


class Scored(HalfSpace):
    """Answers the attacker by a list of labels, and the evaluator by 0."""

    stochastic = True

    def __init__(self, labels: list[int]) -> None:
        super().__init__()
        self.labels = labels

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        answer = super().answer(rows, accounts)
        for i, account in enumerate(accounts.tolist()):
            answer.labels[i] = self.labels.pop(0) if account >= 0 and self.labels else 0
        return answer


@pytest.mark.parametrize(("eot", "votes", "enough"), [(1, 9, 7), (5, 3, 3), (9, 3, 3)])
def test_it_takes_seven_votes_of_nine_and_three_consensuses(eot: int, votes: int, enough: int) -> None:
    for agreeing in (enough - 1, enough):
        labels = [1] * eot + [1] * agreeing * eot + [0] * (votes - agreeing) * eot
        result = run_attack(Scored(labels), images(1), [0], script(lambda _: 0.1), epsilon=9.0, budget=200, eot=eot)
        ended = agreeing == enough
        assert result.stop_reasons == ["success" if ended else "budget"]
        assert result.queries.tolist() == [(1 + votes) * eot if ended else 200 // eot * eot]
        assert result.success_any.all()
        assert not result.success.any()  # the evaluator has the last word


def test_a_success_that_cannot_be_put_to_the_vote_is_left_to_the_evaluator() -> None:
    last = run_attack(Coin(0.0), images(2), [0, 0], script(lambda _: 0.3), "linf", epsilon=0.3, budget=1)
    assert last.queries.tolist() == [1, 1]
    assert last.success.all()

    class OnceOnly(Coin):
        """Refuses what the attacker sent before."""

        def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
            known = [float(row.sum()) for row, account in zip(rows, accounts, strict=True) if account >= 0]
            answer = super().answer(rows, accounts)
            for i, account in enumerate(accounts.tolist()):
                if account >= 0 and (known.index(float(rows[i].sum())) < i or float(rows[i].sum()) in self.old):
                    answer.labels[i], answer.status[i] = -1, REJECTED
            self.old |= set(known)
            return answer

        old: set[float] = set()  # noqa: RUF012

    refused = run_attack(OnceOnly(0.0), images(1), [0], script(lambda _: 0.3), "linf", epsilon=0.3, budget=50)
    assert refused.stop_reasons == ["success"]
    assert refused.rejected.tolist() == [9]
    assert refused.success.all()


def test_the_attack_goes_on_with_the_answer_that_was_put_to_the_vote() -> None:
    told: list[list[int]] = []

    def search(task: Task) -> Search:
        while True:
            answer = yield Query((task.image + 0.1).clamp(0, 1).expand(3, -1, -1, -1))
            told.append(answer.labels.tolist())

    run_attack(Coin(0.2), images(4), [0] * 4, Scripted(search), "linf", epsilon=0.3, budget=60, max_rows=2)
    assert all(len(labels) == 3 for labels in told)
    assert any(1 in labels for labels in told)


@pytest.mark.parametrize("accounts", [1, 3])
def test_a_banned_attacker_takes_the_next_account_until_there_is_none(accounts: int) -> None:
    box = Bouncer(10)
    result = run_attack(box, images(2), [0, 0], script(lambda _: 0.0, 4), budget=1000, accounts=accounts)
    assert result.stop_reasons == ["banned"] * 2
    assert result.accounts_burnt.tolist() == [accounts] * 2
    assert result.queries.tolist() == [12 * accounts] * 2  # the query in which the ban came is charged whole
    assert result.rejected.tolist() == [3 * accounts] * 2
    assert result.first_rejected.tolist() == [10] * 2
    assert result.refusals == [[(10, 12), (22, 24), (34, 36)][:accounts]] * 2
    attackers = [account for account, rows in box.sent.items() if rows == 12]
    assert len(attackers) == 2 * accounts


def test_any_number_of_accounts_spends_the_budget() -> None:
    result = run_attack(Bouncer(10), images(1), [0], script(lambda _: 0.0), budget=95, accounts=None)
    assert result.stop_reasons == ["budget"]
    assert result.accounts_burnt.tolist() == [9]
    assert result.rejected.tolist() == [9]


def test_a_scout_sends_from_an_account_of_its_own_while_there_is_one() -> None:
    left: list[int | None] = []

    def search(task: Task) -> Search:
        for which in (0, 1, 0, 1):
            left.append(task.accounts)
            yield Query(task.image[None], account=which)
        left.append(task.accounts)
        yield Query(task.image[None], account=2)

    box = Bouncer(100)
    result = run_attack(box, images(1), [0], Scripted(search), budget=9, accounts=2)
    assert sorted(box.sent.values()) == [1, 2, 2]  # the evaluator's, the attacker's two
    assert left == [1, 1, 0, 0, 0]
    assert result.errors[0] == "ValueError: the attack asked for account 2, but has opened all 2 it may have"


def test_counts_must_be_counts() -> None:
    for name in ("eot", "accounts"):
        with pytest.raises(InputError, match=name):
            run_attack(HalfSpace(), images(1), [0], Walk(), budget=5, **{name: 0})


def test_an_attack_without_l2_takes_its_own_norm() -> None:
    assert run_attack(HalfSpace(), images(1), [0], "random-pixels", epsilon=3, budget=5).meta["norm"] == "l0"
    assert run_attack(HalfSpace(), images(1), [0], "random", budget=5).meta["norm"] == "l2"


def test_a_task_that_the_attack_refuses_costs_nothing() -> None:
    class Picky(Walk):
        def check(self, task: Task) -> None:
            raise InputError(f"not with epsilon {task.epsilon}")

    box = HalfSpace()
    with pytest.raises(InputError, match="not with epsilon"):
        run_attack(box, images(1), [0], Picky(), epsilon=0.5)
    assert box.rows == 0
