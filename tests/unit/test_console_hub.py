# SPDX-License-Identifier: BSD-2-Clause
"""Who reads a console, and how far behind; a stream is in the place of the worker's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from waiting import eventually

from pvfront.console import dump
from pvfront.console.history import SIZE, History
from pvfront.console.hotkeys import HotKeys
from pvfront.console.hub import Hub
from pvfront.console.pty import Pty
from pvfront.console.service import DUMP, Consoles
from pvfront.platform import platform

pytestmark = pytest.mark.asyncio

ESCAPE = b"\x1e"


class Wired:
    """A hub with hot keys, and the worker's end of its stream."""

    def __init__(self, directory: Path) -> None:
        self.worker, ours = socket.socketpair()
        self.worker.setblocking(False)
        self.pty = Pty.open(directory / "login")
        self.history = History.open(directory / "history")
        self.pressed: list[str] = []
        self.hub = Hub(
            "console-1", ours, self.pty, self.history,
            keys=HotKeys(ESCAPE[0], "d"), pressed=self.pressed.append,
        )  # fmt: skip

    def close(self) -> None:
        self.hub.close()
        self.hub.stream.close()
        self.worker.close()
        self.history.close(keep=False)
        self.pty.close()


@pytest_asyncio.fixture
async def wired(tmp_path: Path) -> AsyncIterator[Wired]:
    made = Wired(tmp_path)
    yield made
    made.close()


async def _program_reads(wired: Wired, count: int) -> bytes:
    program = os.open(wired.pty.link, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    found = bytearray()

    def read() -> bool:
        with contextlib.suppress(BlockingIOError):
            found.extend(os.read(program, SIZE))
        return len(found) >= count

    try:
        await eventually(f"{count} bytes on the terminal", read, why=lambda: str(len(found)))
    finally:
        os.close(program)
    return bytes(found)


async def test_an_escape_that_was_held_back_costs_no_byte_when_nothing_more_has_room(
    wired: Wired,
) -> None:
    sent = b"first" + bytes(range(32, 127)) * 700
    sent = sent[: SIZE - 1] + ESCAPE + b"?" + b"the end"
    loop = asyncio.get_running_loop()
    sending = asyncio.create_task(loop.sock_sendall(wired.worker, sent))
    # Nobody has the terminal open: what comes waits for a program, as much as there is room for.
    await eventually("no more room", lambda: wired.history.end >= SIZE - 1)
    assert await _program_reads(wired, len(sent)) == sent
    await sending
    assert wired.pressed == []


async def test_dumps_that_dom0_asks_for_and_does_not_read_do_not_pile_up(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(dump, "text", lambda *_: asked.append(1) or "x" * (1 << 20))
    consoles = Consoles(platform(), kept={})
    console: Any = types.SimpleNamespace(name="console-1", label="login", hub=wired.hub)
    press = consoles._pressed
    for _ in range(100):
        press(console, DUMP)
    await eventually("a dump", lambda: asked)
    # The stream takes only some of it; whoever presses again gets no other before it is gone.
    await eventually("it is under way", lambda: wired.hub._out)
    press(console, DUMP)
    assert len(asked) == 1
    loop, heard = asyncio.get_running_loop(), 0
    while heard < 1 << 20:
        heard += len(await loop.sock_recv(wired.worker, 1 << 16))

    def again() -> bool:
        press(console, DUMP)
        return len(asked) > 1

    await eventually("another", again)
