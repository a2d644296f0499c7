# SPDX-License-Identifier: BSD-2-Clause
"""The store's bytes: whatever arrives, in whatever pieces, is packets or one clear end."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from contextlib import suppress

from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from pvfront import xswire
from pvfront.errors import PvfrontError
from pvfront.xslink import Link, XenstoreLost
from pvfront.xswire import Op, Packet, Parser, Permission, WireError, XenstoreError

KNOWN = [int(op) for op in Op]
U32 = st.one_of(st.integers(0, 70), st.integers(0, 0xFFFFFFFF))


def frame(op: int, req_id: int, tx_id: int, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack("=IIII", op, req_id, tx_id, size) + payload


payloads = st.one_of(
    st.binary(max_size=80),
    st.lists(st.binary(max_size=12), max_size=5).map(lambda parts: b"\0".join(parts) + b"\0"),
    st.integers(0, 4100).map(bytes),
)
frames = st.one_of(
    st.builds(frame, st.sampled_from(KNOWN), U32, U32, payloads),
    st.builds(frame, st.sampled_from(KNOWN), U32, U32, payloads, U32),
    st.builds(frame, U32, U32, U32, payloads),
    st.binary(max_size=60),
)
streams = st.lists(frames, max_size=6).map(b"".join)


def cut(stream: bytes, sizes: list[int]) -> Iterator[bytes]:
    """The stream in pieces of these sizes, again and again."""
    turn = 0
    while stream:
        size = sizes[turn % len(sizes)]
        turn += 1
        yield stream[:size]
        stream = stream[size:]


pieces = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def parse(parts: Iterator[bytes], limit: int) -> tuple[list[Packet], str | None, int]:
    """The packets; what was wrong, if something was; what is left."""
    parser = Parser(limit)
    found: list[Packet] = []
    for part in parts:
        try:
            for packet in parser.feed(part):
                found.append(packet)
        except WireError as error:
            return found, str(error), 0
    return found, None, parser.partial


@examples(400)
@given(streams, pieces, st.sampled_from([16, 4096, 1 << 20]))
def test_the_pieces_in_which_a_stream_arrives_change_nothing(
    stream: bytes, sizes: list[int], limit: int
) -> None:
    whole = parse(iter([stream] if stream else []), limit)
    assert parse(cut(stream, sizes), limit) == whole
    packets, wrong, left = whole
    assert all(len(packet.payload) <= limit for packet in packets)
    again = b"".join(frame(*packet) for packet in packets)
    assert stream.startswith(again)
    if wrong is None:
        assert len(again) + left == len(stream)
    else:
        assert wrong.isprintable()
        assert len(wrong) < 120


@examples(400)
@given(st.binary(max_size=80), st.text(max_size=20))
def test_any_error_reply_is_one_printable_error(payload: bytes, path: str) -> None:
    error = xswire.error_from_reply("read", path, payload)
    assert isinstance(error, XenstoreError)
    assert error.errno > 0
    assert str(error).isprintable()
    assert len(str(error)) < 600


@examples(400)
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60).map(xswire.decode)), st.booleans())
def test_any_path_is_sent_as_it_is_or_refused(path: str, watch: bool) -> None:
    refusal = ""
    try:
        data = xswire.encode_path(path, "read", watch=watch)
    except XenstoreError as error:
        refusal = str(error)
    if refusal:
        assert refusal.isprintable()
        return
    assert xswire.decode(data) == path
    assert b"\0" not in data
    assert not data.endswith(b"\n")


@examples(300)
@given(st.one_of(st.text(max_size=12), st.from_regex(r"[nrwb][0-9]{1,7}", fullmatch=True)))
def test_any_permission_is_read_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        permission = Permission.parse(text)
        assert Permission.parse(str(permission)) == permission


class Wire:
    """A transport whose other end is the test."""

    payload_max = 4096
    in_flight = 8
    refused: frozenset[Op] = frozenset()

    def __init__(self, link: Link) -> None:
        self.sent: list[bytes] = []
        link.transport = self

    def send(self, data: bytes, req_id: int) -> None:
        self.sent.append(data)

    async def close(self) -> None:
        pass


asked = st.lists(
    st.sampled_from([Op.READ, Op.DIRECTORY, Op.WRITE, Op.TRANSACTION_START]), max_size=5
)


@examples(600)
@given(asked, streams, pieces, st.booleans())
def test_whatever_a_store_sends_each_question_is_answered_or_fails_with_the_connection(
    ops: list[Op], stream: bytes, sizes: list[int], ends: bool
) -> None:
    async def conversation() -> None:
        link = Link("a store")
        wire = Wire(link)
        events: list[str | None] = []
        link.watches[b"1"] = events.append
        calls = [asyncio.ensure_future(link.request(op, "a", b"a\0", seconds=60.0)) for op in ops]
        await asyncio.sleep(0)
        assert len(wire.sent) == len(ops)
        for part in cut(stream, sizes):
            link.feed(part)
        if ends:
            link.end_of_file()
        await asyncio.sleep(0)
        if link.failure is not None:
            assert link.failure.reason.isprintable()
            assert events[-1:] == [None]
        for call in calls:
            if link.failure is not None:
                assert call.done(), "a question without an answer on a link that is dead"
            if not call.done():
                call.cancel()
                continue
            if (error := call.exception()) is not None:
                assert isinstance(error, PvfrontError)
                assert isinstance(error, XenstoreLost) or error.errno > 0
        await link.close()
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(conversation())
