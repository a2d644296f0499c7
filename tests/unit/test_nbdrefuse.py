# SPDX-License-Identifier: BSD-2-Clause
"""The server without a disk, as the kernel's nbd meets it."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from pvfront.blkfront.nbdrefuse import refuse

READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3
PATIENCE = 60


def request(kind: int, cookie: int, length: int, payload: bytes = b"") -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, cookie, 4096, length) + payload


def replies(data: bytes) -> list[tuple[int, int]]:
    """Error and cookie of each."""
    found = list(struct.iter_unpack(">IIQ", data))
    assert all(magic == 0x67446698 for magic, _, _ in found)
    return [(error, cookie) for _, error, cookie in found]


async def said(sent: bytes, *, at_once: int = 1 << 20) -> tuple[list[tuple[int, int]], int]:
    """The replies to what is `sent` in pieces, and how many it says there were."""
    ours, kernels = socket.socketpair()
    with ours, kernels:
        kernels.setblocking(False)
        serving = asyncio.create_task(refuse(ours))
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE):
            for start in range(0, len(sent), at_once):
                await loop.sock_sendall(kernels, sent[start : start + at_once])
            kernels.shutdown(socket.SHUT_WR)
            count = await serving
            ours.shutdown(socket.SHUT_WR)
            data = b""
            while piece := await loop.sock_recv(kernels, 65536):
                data += piece
    return replies(data), count


@pytest.mark.parametrize("at_once", [1, 7, 28, 1 << 20])
async def test_every_request_fails_with_an_i_o_error_however_it_comes(at_once: int) -> None:
    sent = (
        request(READ, 1, 1 << 20)
        + request(WRITE, 2, 600, bytes(600))
        + request(FLUSH, 3, 0)
        + request(WRITE, 2**64 - 1, 512, b"\x25\x60\x95\x13" * 128)
    )
    answers, count = await said(sent, at_once=at_once)
    assert answers == [(5, 1), (5, 2), (5, 3), (5, 2**64 - 1)]
    assert count == 4


async def test_more_than_any_buffer_holds_is_taken() -> None:
    length = 256 << 10
    answers, _ = await said(b"".join(request(WRITE, n, length, bytes(length)) for n in range(32)))
    assert [cookie for _, cookie in answers] == list(range(32))


@pytest.mark.parametrize("last", [request(DISCONNECT, 9, 0), b"nonsense" * 8, b""])
async def test_it_ends_with_a_disconnect_nonsense_or_the_end(last: bytes) -> None:
    answers, count = await said(request(READ, 1, 512) + last)
    assert (answers, count) == ([(5, 1)], 1)
