"""Rows of several sources in given shares: what adds up, what repeats, what is a function of the seed alone."""

import os
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertdist.data import sharding
from bertdist.data.sharding import mixed_epoch_order, rows_per_source

WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=5)


@given(WEIGHTS, st.integers(0, 500), st.integers(0, 9))
def test_shares_add_up_and_are_as_near_as_whole_rows_can_be(
    weights: list[float], rows: int, seed: int
) -> None:
    found = rows_per_source(weights, rows, seed)
    assert sum(found) == rows and found == rows_per_source(weights, rows, seed)
    assert all(
        abs(count - weight / sum(weights) * rows) < 1 + 1e-6
        for count, weight in zip(found, weights, strict=True)
    )


def test_the_smallest_weight_has_its_share_in_the_long_run() -> None:
    drawn = [rows_per_source([999, 1], 10, 0, window)[1] for window in range(20_000)]
    assert set(drawn) == {0, 1} and sum(drawn) == pytest.approx(200, rel=0.25)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.data(), st.integers(0, 9))
def test_no_row_comes_a_second_time_before_all_of_its_source_came_once(
    parts: list[int], data: st.DataObject, seed: int
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(parts), max_size=len(parts)))
    times: Counter[int] = Counter()
    for epoch in range(4):
        found = mixed_epoch_order(parts, weights, seed, epoch).tolist()
        assert (
            len(found) == sum(parts)
            and found == mixed_epoch_order(parts, weights, seed, epoch).tolist()
        )
        times.update(found)
        for part, rows in enumerate(parts):
            of_part = [times[row] for row in range(sum(parts[:part]), sum(parts[:part]) + rows)]
            assert max(of_part) - min(of_part) <= 1


def test_equal_weights_of_equal_sources_are_every_row_once() -> None:
    assert sorted(mixed_epoch_order([6, 6], [1, 1], 3, 2).tolist()) == list(range(12))
    assert (
        mixed_epoch_order([6, 6], [1, 1], 3, 2).tolist()
        != mixed_epoch_order([6, 6], [1, 1], 3, 1).tolist()
    )
    assert (
        mixed_epoch_order([6, 6], [1, 1], 3, 2).tolist()
        != mixed_epoch_order([6, 6], [1, 1], 4, 2).tolist()
    )


def test_weights_that_are_not_kept_are_seen() -> None:
    """The property above fails for rows drawn with replacement."""
    import numpy as np

    times = Counter(np.random.default_rng(0).integers(0, 12, 48).tolist())
    assert max(times[row] for row in range(12)) - min(times[row] for row in range(12)) > 1


@pytest.mark.parametrize(("other", "status"), [(0, 7), (1, 1)])
def test_a_worker_whose_parent_has_died_before_it_began_ends(other: int, status: int) -> None:
    """torch's own watchdog compares with the parent of that moment, and would never see it."""
    parent = os.getpid() + other
    pid = os.fork()
    if pid == 0:
        sharding._start_worker(parent, 0)
        os._exit(7)  # the control: it goes on
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
