# SPDX-License-Identifier: BSD-2-Clause
"""How large a vif's queues and pools are: never more than there is room for, never too little."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.abi import lib
from pvfront.netfront.features import Offer
from pvfront.netfront.multicast import joined, parse
from pvfront.netfront.settings import NetSettings, parse_option
from pvfront.netfront.shape import (
    GOOD,
    LEAST,
    RING_PAGES,
    RX_LEAST,
    TX_LEAST,
    Shape,
    fewer_pages,
    fewer_ports,
    fit,
    wanted,
)

ASKED = st.builds(
    Shape,
    queues=st.integers(1, 16),
    tx=st.sampled_from([257, 288]),
    rx=st.just(256),
    split=st.booleans(),
)


def test_a_queue_is_within_what_a_worker_takes() -> None:
    full = Shape()
    assert full.tx + full.rx <= lib.PVF_MAX_POOL_PAGES
    assert RING_PAGES == lib.PVF_NET_RING_PAGES
    assert (LEAST.tx, LEAST.rx) == (TX_LEAST, RX_LEAST)


def test_what_is_wanted_is_what_both_ends_can() -> None:
    assert wanted(Offer(sg=True, max_queues=4, split_event_channels=True), 2) == Shape(
        2, 288, 256, split=True
    )
    assert not wanted(Offer(split_event_channels=True), 2, split=False).split
    assert wanted(Offer(), 16) == Shape(1, 257, 256)
    assert wanted(Offer(max_queues=4), 0).queues == 1


@given(ASKED, st.integers(0, 20_000))
def test_a_shape_fits_its_pages_unless_it_is_the_least(asked: Shape, pages: int) -> None:
    found = fit(asked, pages)
    assert found.pages <= max(pages, LEAST.pages)
    assert TX_LEAST <= found.tx <= asked.tx
    assert RX_LEAST <= found.rx <= asked.rx
    assert 1 <= found.queues <= asked.queues
    if found.queues > 1:
        assert found.tx + found.rx >= GOOD, "queues go before the pages that each needs"


@given(ASKED)
def test_with_room_for_all_nothing_is_given_up(asked: Shape) -> None:
    assert fit(asked, asked.pages) == asked


@given(ASKED, st.integers(0, 20_000), st.lists(st.booleans(), max_size=40))
def test_trying_less_ends_with_the_least_and_never_goes_back(
    asked: Shape, pages: int, ports: list[bool]
) -> None:
    shape: Shape | None = fit(asked, pages)
    tries = 0
    while shape is not None:
        assert shape.pages <= max(asked.pages, LEAST.pages)
        of_ports = bool(ports) and ports.pop()
        following = fewer_ports(shape) if of_ports else fewer_pages(asked, shape)
        if following is not None:
            if of_ports:
                assert following.ports < shape.ports
            else:
                assert following.pages < shape.pages
                assert following.ports <= shape.ports
            tries += 1
        else:
            assert of_ports or shape.pages <= LEAST.pages
        shape = following
    assert tries < 60


def test_one_of_two_event_channels_is_given_up_before_a_queue() -> None:
    shape = Shape(4, split=True)
    steps = []
    following: Shape | None = shape
    while (following := fewer_ports(following or shape)) is not None:
        steps.append((following.queues, following.split))
    assert steps == [(4, False), (2, False), (1, False)]


def test_a_shape_is_said_in_words() -> None:
    assert str(Shape(1, 18, 20)) == "1 queue of 18 TX and 20 RX pages"
    assert str(replace(Shape(), queues=2, split=True)).endswith("two event channels each")


# -- settings, and what was joined -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [("max_queues=16", "max_queues", 16), ("hash=0", "hash", 0),
     ("multicast_filter=1", "multicast_filter", 1)],
)  # fmt: skip
def test_settings_are_numbers_within_their_range(text: str, key: str, value: int) -> None:
    assert parse_option(text) == (key, value)
    assert getattr(NetSettings(**{key: value}), key) == value


@pytest.mark.parametrize("text", ["hash", "hash=2", "hash=x", "max_queues=17", "colour=1", "=1"])
def test_any_other_setting_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"KEY=VALUE|must be a number|must be yes or no"):
        parse_option(text)


DEV_MCAST = """\
2    eth0            1     0     333300000001
7    enX0            1     0     01005e000001
7    enX0            2     0     3333ff0a0b0c
7    enX0            1     0     nothexatall
7    enX01           1     0     01005e0000fb
9    ib0             1     0     00ffffffff12401bffff00000000000000000001
"""


def test_what_an_interface_listens_to_is_read_from_the_kernels_list(tmp_path) -> None:
    path = tmp_path / "dev_mcast"
    path.write_text("".join(line + "\n" for line in DEV_MCAST.splitlines() if "not" not in line))
    assert joined("enX0", path) == [bytes.fromhex("01005e000001"), bytes.fromhex("3333ff0a0b0c")]
    assert joined("enX9", path) == []
    assert joined("enX0", tmp_path / "none") == []
    path.write_text("".join(f"7 enX0 1 0 01005e0000{n:02x}\n" for n in range(200)))
    assert len(joined("enX0", path)) == 64
    assert parse("", "enX0") == []
