"""A guest takes turns with its host, draws from a stream of its own, and always ends with it."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import registry
from robustbox.attacks.guest import Ask, Guest, Randomness
from robustbox.protocol import Answer, BudgetExhausted, Task

ANSWER = Answer.of(torch.tensor([1]))
ROW = torch.zeros(1, 1, 2, 2)


def randomness(seed: int = 0, with_numpy: bool = True) -> Randomness:
    return Randomness(torch.Generator().manual_seed(seed), with_numpy)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_turns_are_strict_and_the_end_is_seen() -> None:
    log: list[str] = []

    def body(ask: Ask) -> None:
        for turn in range(3):
            log.append(f"guest {turn}")
            assert ask(ROW + turn) is ANSWER

    guest = Guest(body, randomness())
    request = guest.resume()
    while request is not None:
        log.append(f"host {int(request[0, 0, 0, 0])}")
        time.sleep(0.01)  # a guest that did not wait would be ahead by now
        request = guest.resume(ANSWER)
    assert log == ["guest 0", "host 0", "guest 1", "host 1", "guest 2", "host 2"]
    guest.dismiss()


def test_what_the_guest_raises_is_raised_by_resume() -> None:
    def body(ask: Ask) -> None:
        ask(ROW)
        raise ValueError("no start")

    guest = Guest(body, randomness())
    guest.resume()
    with pytest.raises(ValueError, match="no start"):
        guest.resume(ANSWER)
    guest.dismiss()


def test_dismissal_ends_code_that_swallows_exceptions_and_runs_its_finally() -> None:
    cleaned: list[bool] = []

    def body(ask: Ask) -> None:
        try:
            while True:
                try:
                    ask(ROW)
                except Exception:
                    continue
        finally:
            cleaned.append(True)
            ask(ROW)  # asking again on the way out is no way back

    guest = Guest(body, randomness())
    guest.resume()
    guest.resume(ANSWER)
    guest.dismiss()
    guest.dismiss()
    assert cleaned == [True]


def test_an_interrupt_while_the_guest_works_ends_the_guest_and_restores_the_state() -> None:
    def body(ask: Ask) -> None:
        ask(ROW)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)
        torch.rand(7), np.random.rand(7)
        ask(ROW)

    of_torch, of_numpy = torch.get_rng_state(), np.random.get_state()[1]
    guest = Guest(body, randomness())
    guest.resume()
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
    try:
        with pytest.raises(KeyboardInterrupt):
            guest.resume(ANSWER)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert torch.equal(torch.get_rng_state(), of_torch)
    assert np.array_equal(np.random.get_state()[1], of_numpy)


def drawn(guests: int, noise: bool) -> list[list[Tensor]]:
    """What each of some interleaved guests draws, its host drawing in between where it says so."""
    draws: list[list[Tensor]] = [[] for _ in range(guests)]

    def body(k: int, ask: Ask) -> None:
        for _ in range(3):
            draws[k].append(torch.cat([torch.randn(5).double(), torch.from_numpy(np.random.randn(3))]))
            ask(ROW)

    party = [Guest(lambda ask, k=k: body(k, ask), randomness(k)) for k in range(guests)]  # type: ignore[misc]
    for turn in range(4):
        for guest in party:
            guest.resume(ANSWER if turn else None)
            if noise:
                torch.randn(3), np.random.randn(1)
    for guest in party:
        guest.dismiss()
    return draws


def test_a_guest_draws_its_own_numbers_and_leaves_the_hosts_alone() -> None:
    torch.manual_seed(3), np.random.seed(3)
    expected = torch.randn(4), np.random.randn(3)
    alone, company = drawn(1, noise=False)[0], drawn(5, noise=True)
    assert all(map(torch.equal, alone, company[0]))
    assert not torch.equal(company[0][0], company[1][0])
    torch.manual_seed(3), np.random.seed(3)
    first = torch.randn(2), np.random.randn(1)  # numpy keeps the second of a pair of Gaussians for the next call
    drawn(2, noise=False)
    rest = torch.randn(2), np.random.randn(2)
    assert np.array_equal(np.concatenate([first[1], rest[1]]), expected[1])
    assert torch.equal(torch.cat([first[0], rest[0]]), expected[0])


def search() -> Iterator[object]:
    task = Task(torch.rand(1, 4, 4), 0, None, "l2", None, torch.Generator(), 100)
    return registry.load("attacks", "foolbox:BoundaryAttack")().search(task)


def test_a_search_that_is_closed_or_out_of_budget_or_dropped_ends_its_thread() -> None:
    idle, closed, spent, dropped = (search() for _ in range(4))
    before = threading.active_count()
    for started in (closed, spent, dropped):
        next(started)
    assert threading.active_count() == before + 3
    closed.close()  # type: ignore[attr-defined]
    with pytest.raises(BudgetExhausted):
        spent.throw(BudgetExhausted())  # type: ignore[attr-defined]
    assert threading.active_count() == before + 1
    del started, dropped, idle
    gc.collect()
    assert threading.active_count() == before
