# SPDX-License-Identifier: BSD-2-Clause
"""What both ends can, to rings and pools."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.blkfront import rings
from pvfront.blkfront.features import RingLimits
from pvfront.blkfront.rings import LEAST, Shape
from pvfront.blkfront.settings import DiskSettings

BLKBACK = RingLimits(max_indirect=256, max_ring_page_order=4, max_queues=8)
SETTINGS = DiskSettings()

SHAPES = st.builds(
    Shape,
    queues=st.integers(1, 16),
    order=st.integers(0, 4),
    pool=st.integers(11, 1056),
    segments=st.integers(11, 256),
)


def test_a_poor_backend_gets_one_ring_of_one_page_and_direct_requests() -> None:
    shape = rings.wanted(RingLimits(), SETTINGS, 4)
    assert shape == Shape(queues=1, order=0, pool=352, segments=11)
    assert (shape.slots, shape.pages, shape.indirect) == (32, 353, False)


def test_of_a_rich_backend_is_taken_what_the_settings_want() -> None:
    shape = rings.wanted(BLKBACK, SETTINGS, 4)
    assert shape == Shape(queues=4, order=2, pool=704, segments=64)
    assert (shape.slots, shape.pages, shape.indirect) == (128, 4 * 708, True)


def test_the_settings_bring_nothing_that_the_backend_has_not() -> None:
    settings = DiskSettings(max_ring_page_order=4, max_indirect_segments=256)
    limits = RingLimits(max_indirect=32, max_ring_page_order=1, max_queues=2)
    assert rings.wanted(limits, settings, 4) == Shape(queues=2, order=1, pool=704, segments=32)


def test_indirect_requests_that_carry_no_more_than_direct_ones_are_not_used() -> None:
    assert not rings.wanted(RingLimits(max_indirect=11), SETTINGS, 1).indirect
    off = DiskSettings(max_indirect_segments=0)
    assert rings.wanted(BLKBACK, off, 1).segments == 11


def test_there_are_no_more_queues_than_the_target_carries() -> None:
    assert rings.wanted(BLKBACK, SETTINGS, 1).queues == 1


def test_a_pool_has_no_more_pages_than_its_ring_can_use() -> None:
    settings = DiskSettings(max_pool_pages=1056)
    assert rings.wanted(RingLimits(max_indirect=16), settings, 1).pool == 32 * 17
    assert rings.wanted(BLKBACK, settings, 1).pool == 1056


def test_with_room_for_all_everything_that_was_asked_is_given() -> None:
    asked = rings.wanted(BLKBACK, SETTINGS, 4)
    assert rings.fit(asked, asked.pages) == asked
    assert rings.fit(asked, 1 << 20) == asked


@pytest.mark.parametrize(
    ("pages", "wanted"),
    [
        (2000, Shape(4, 2, 496, 64)),  # pages go first,
        (1424, Shape(4, 2, 352, 64)),
        (1423, Shape(2, 2, 704, 64)),  # then queues, whose pages the others get,
        (711, Shape(1, 2, 704, 64)),
        (300, Shape(1, 2, 296, 64)),
        (132, Shape(1, 2, 128, 31)),  # then segments: four of the largest fit,
        (100, Shape(1, 1, 98, 23)),  # and slots for which there is no page
        (34, Shape(1, 0, 33, 11)),
        (12, LEAST),
    ],
)
def test_in_less_room_what_costs_least_is_given_up_first(pages: int, wanted: Shape) -> None:
    assert rings.fit(Shape(4, 2, 704, 64), pages) == wanted


def test_the_least_is_one_request() -> None:
    assert LEAST.pages == 12
    assert rings.fit(rings.wanted(BLKBACK, SETTINGS, 4), 0) == LEAST


@given(SHAPES, st.integers(0, 20000))
def test_what_fits_is_never_more_than_there_is_nor_than_was_asked(asked: Shape, pages: int) -> None:
    shape = rings.fit(asked, pages)
    assert shape.pages <= max(pages, LEAST.pages)
    assert shape.queues <= asked.queues
    assert shape.order <= asked.order
    assert 11 <= shape.pool <= asked.pool
    assert 11 <= shape.segments <= asked.segments
    assert shape.segments + 1 <= shape.pool or not shape.indirect, "the largest request fits"


@given(SHAPES, st.none() | st.integers(0, 20000))
def test_what_is_tried_shrinks_with_every_step_and_ends_at_the_least(
    asked: Shape, begin: int | None
) -> None:
    steps = list(rings.smaller(asked, begin))
    assert len(steps) < 14
    assert steps[-1].pages == LEAST.pages
    assert all(later.pages < former.pages for former, later in pairwise(steps))
    if begin is None:
        assert steps[0] == asked


def test_what_the_backend_says_at_connected_counts() -> None:
    made = Shape(1, 2, 704, 64)
    assert rings.started(made, RingLimits(), SETTINGS).segments == 11
    assert rings.started(made, RingLimits(max_indirect=32), SETTINGS).segments == 32
    direct = Shape(1, 0, 88, 11)
    assert rings.started(direct, BLKBACK, SETTINGS).segments == 21, "as far as the pool goes"


def test_a_shape_says_what_it_is() -> None:
    assert str(Shape(2, 2, 704, 64)) == "2 queues of 128 slots and 704 pages, 64 segments"
    assert str(LEAST) == "1 queue of 32 slots and 11 pages, 11 segments"
