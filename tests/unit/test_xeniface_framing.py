# SPDX-License-Identifier: BSD-2-Clause
"""XENIFACE's bound of a message: what is passed on of a stream of them, however it is cut."""

from __future__ import annotations

import struct

import pytest

from pvfront.agent.xeniface.framing import _EMPTIED as EMPTIED
from pvfront.agent.xeniface.framing import MOST, Framing


def message(body: int, fields: int = 40, order: str = "<", flags: int = 0) -> bytes:
    """A message's bytes; `fields`: bytes of its header's fields, without their padding."""
    endian = {"<": b"l", ">": b"B"}[order]
    fixed = endian + bytes([1, flags, 1]) + struct.pack(f"{order}III", body, 7, fields)
    return fixed + b"x" * (fields + -fields % 8) + b"b" * body


def emptied(whole: bytes, body: int) -> bytes:
    return whole[:2] + bytes([EMPTIED]) + whole[3:4] + bytes(4) + whole[8 : len(whole) - body]


def passed(stream: bytes, step: int) -> bytes:
    framing = Framing()
    return b"".join(framing.feed(stream[at : at + step]) for at in range(0, len(stream), step))


STEPS = [1, 7, 16, 8192, 1 << 20]
SMALL = message(0) + message(5, fields=41) + message(2048, order=">")


@pytest.mark.parametrize("step", STEPS)
def test_messages_of_ordinary_size_are_passed_on_as_they_are(step: int) -> None:
    assert passed(SMALL, step) == SMALL


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("step", STEPS)
def test_a_large_message_loses_its_body_and_those_around_it_lose_nothing(
    step: int, order: str
) -> None:
    large = message(MOST, order=order)
    assert passed(SMALL + large + SMALL, step) == SMALL + emptied(large, MOST) + SMALL


@pytest.mark.parametrize("step", STEPS)
def test_of_a_message_whose_header_alone_is_large_nothing_is_passed_on(step: int) -> None:
    assert passed(SMALL + message(3, fields=MOST) + SMALL, step) == SMALL + SMALL


def test_the_largest_message_is_passed_on_and_one_byte_more_is_not() -> None:
    most = message(MOST - 16 - 40)
    assert len(most) == MOST
    assert passed(most, 4096) == most
    more = message(MOST - 16 - 40 + 1)
    assert passed(more, 4096) == emptied(more, MOST - 16 - 40 + 1)


def test_what_a_message_may_at_most_say_of_its_length_costs_no_memory() -> None:
    framing = Framing()
    head = b"l\x01\x00\x01" + struct.pack("<III", 0xFFFFFFFF, 7, 0xFFFFFFFF)
    assert framing.feed(head) == b""
    for _ in range(100):
        assert framing.feed(bytes(1 << 16)) == b""


def test_no_sender_can_say_that_its_message_has_lost_its_body() -> None:
    assert passed(message(5, flags=EMPTIED | 1), 4096) == message(5, flags=1)
