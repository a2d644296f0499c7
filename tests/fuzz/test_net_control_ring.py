# SPDX-License-Identifier: BSD-2-Clause
"""A control ring whose page its backend writes to as it likes: the answer, or one error."""

from __future__ import annotations

import struct

from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from pvfront.netfront.control import Answer, ControlGone, Ring

PAGE = 4096
RSP_PROD, SLOTS, SLOT = 8, 64, 16  # io/ring.h, io/netif.h

words = st.one_of(st.integers(0, 5), st.integers(0xFFFFFFF0, 0xFFFFFFFF), st.integers(0, 2**32 - 1))
honest = st.tuples(st.integers(0, 4), st.integers(0, 11), words, words)
anywhere = st.tuples(st.integers(0, PAGE - 9), st.binary(min_size=1, max_size=8))
turn = st.tuples(
    st.integers(0, 0xFFFF), st.lists(anywhere, max_size=3), st.none() | honest, st.none() | words
)


def clear(error: ControlGone) -> None:
    """One line, which names the rule."""
    assert str(error).startswith("the backend broke rule ")
    assert str(error).isprintable()
    assert len(str(error)) < 250


@examples(600)
@given(st.lists(turn, min_size=1, max_size=8))
def test_any_bytes_are_the_answer_that_was_asked_for_none_or_an_error_that_names_the_rule(
    turns: list[tuple[int, list[tuple[int, bytes]], tuple[int, ...] | None, int | None]],
) -> None:
    page = bytearray(PAGE)
    ring = Ring(page)
    number, waiting = 0, False
    try:
        for kind, written, answer, produced in turns:
            if not waiting:
                ring.ask(kind, [1, 2, 3])
                number, asked, waiting = number + 1, kind, True
            if answer is not None:
                at = SLOTS + (number - 1) % 128 * SLOT
                struct.pack_into("=HHII", page, at, *answer)
            for at, data in written:
                page[at : at + len(data)] = data
            if produced is not None:
                struct.pack_into("=I", page, RSP_PROD, produced)
            ring.want_event()
            found = ring.answer()
            if found is not None:
                assert isinstance(found, Answer)
                assert (found.id, found.kind) == (number, asked)
                waiting = False
    except ControlGone as error:
        clear(error)
    finally:
        ring.release()
