# SPDX-License-Identifier: BSD-2-Clause
"""Granted pages shared out among the devices of a service."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.budget import Budget, Grant, share

LIMIT, LEAST = 16384, 12


def one_by_one(limit: int, devices: int, asks: int) -> list[int]:
    """What devices get that come one after the other, each with its least in any case."""
    got: list[int] = []
    for count in range(1, devices + 1):
        got.append(min(asks, max(LEAST, share(limit, sum(got), count))))
    return got


def test_a_device_that_is_alone_leaves_most_to_others() -> None:
    assert share(LIMIT, 0, 1) == 2 * LIMIT // 9


def test_devices_get_less_as_they_become_more() -> None:
    assert [share(LIMIT, 0, count) for count in (1, 4, 16, 64)] == [3640, 1820, 606, 165]


def test_devices_that_come_one_by_one_always_find_their_least() -> None:
    got = one_by_one(LIMIT, 128, 4000)
    assert sum(got) < LIMIT
    assert min(got) >= LEAST
    assert sum(got[:64]) < LIMIT * 9 // 10


def test_64_that_are_there_from_the_start_all_get_the_like() -> None:
    held = 0
    got = []
    for _ in range(64):
        got.append(share(LIMIT, held, 64))
        held += got[-1]
    assert min(got) > 80
    assert max(got) < 2 * min(got) + 1


@given(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.integers(0, 1000))
def test_a_share_is_never_more_than_there_is(limit: int, held: int, devices: int) -> None:
    assert 0 <= share(limit, held, devices) <= max(limit - held, 0)


def test_a_device_does_not_count_what_it_held_itself() -> None:
    budget = Budget(lambda: LIMIT)
    first, _ = budget.share("a")
    budget.hold("a", Grant(9000, 3640))
    assert budget.share("a")[0] == first


def test_the_others_pages_and_number_count_and_are_said() -> None:
    budget = Budget(lambda: LIMIT)
    budget.hold("a", Grant(3640, 3640))
    pages, why = budget.share("b")
    assert pages == share(LIMIT, 3640, 2)
    assert why == "a share of 16384 pages for 2 devices, of which the others hold 3640"


def test_devices_that_are_expected_count_before_they_are_seen() -> None:
    budget = Budget(lambda: LIMIT, expected=8)
    assert budget.share("a")[0] == share(LIMIT, 0, 8)
    budget.expect(2)
    assert budget.share("a")[0] == share(LIMIT, 0, 2)


def test_what_is_released_or_gone_is_free_again() -> None:
    budget = Budget(lambda: LIMIT)
    budget.hold("a", Grant(100, 100))
    budget.hold("b", Grant(100, 50, "no room"))
    assert budget.held == 150
    budget.release("a")
    assert (budget.held, budget.devices, budget.grant("a")) == (50, 2, None)
    budget.leave("a")
    budget.leave("a")
    budget.release("a")
    assert (budget.held, budget.devices) == (50, 1)
    assert budget.grant("b") == Grant(100, 50, "no room")


@pytest.mark.parametrize("limit", [None, 100, 0])
def test_the_limit_is_asked_each_time(limit: int | None) -> None:
    now: list[int | None] = [LIMIT]
    budget = Budget(lambda: now[0])
    assert budget.share("a")[0] == share(LIMIT, 0, 1)
    now[0] = limit
    assert budget.share("a")[0] == (None if limit is None else share(limit, 0, 1))
