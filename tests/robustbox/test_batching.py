"""The fused size is learnt from the run's own full passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from robustbox.batching import BatchSize


def settle(seconds: Callable[[int], float]) -> list[int]:
    batch, sizes = BatchSize(), []
    for _ in range(200):
        sizes.append(batch.size)
        batch.observe(batch.size, seconds(batch.size))
    return sizes


@pytest.mark.parametrize("best", [1, 8, 32, 64, 512, 4096])
def test_it_climbs_to_the_fastest_size(best: int) -> None:
    sizes = settle(lambda n: n * (1 + 0.3 * abs(n.bit_length() - best.bit_length())))
    assert set(sizes[-50:]) == {best}


def test_it_does_not_move_for_less_than_five_percent() -> None:
    assert settle(lambda n: n * (1 + 0.01 * abs(n.bit_length() - 9)))[-1] == 32


def test_one_slow_pass_does_not_mislead_it() -> None:
    batch = BatchSize()
    for k in range(60):
        batch.observe(batch.size, batch.size * (100 if k % 3 == 0 else 1) * abs(batch.size.bit_length() - 8 + 1e-3))
    assert batch.size == 128


def test_passes_that_are_not_full_teach_nothing_and_a_fixed_size_stays() -> None:
    batch = BatchSize()
    for _ in range(50):
        batch.observe(7, 1e-9)
    assert batch.size == 32
    fixed = BatchSize(10)
    for _ in range(50):
        fixed.observe(10, 1e-9)
    assert fixed.size == 10


def test_a_full_device_halves_it_for_good() -> None:
    batch = BatchSize()
    batch.out_of_memory()
    assert batch.size == 16
    for _ in range(20):
        batch.observe(16, 1e-9)
    assert batch.size == 16


@pytest.mark.parametrize("multiple", [3, 5, 7])
def test_it_climbs_where_rows_go_together_and_no_pass_is_as_large_as_its_size(multiple: int) -> None:
    batch = BatchSize()
    for _ in range(100):
        rows = max(batch.size // multiple, 1) * multiple
        batch.observe(rows, 1.0, multiple)  # more rows cost nothing
        batch.observe(1, 1e-9, 1)  # the last pass of a round
    assert batch.size == 4096
