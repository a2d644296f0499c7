# SPDX-License-Identifier: BSD-2-Clause
"""`pvfront console attach`: a terminal, or a pipe, at a console (attachserver.py)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import termios
import tty
from collections.abc import Iterator

from ..cli.output import note, with_store
from ..errors import PvfrontError
from ..platform import platform
from . import keys
from .attachserver import DATA, FRAME
from .frontend import attach_path
from .hub import CHUNK
from .service import find, names


def attach(name: str, *, write: bool, steal: bool, history: int, escape: int) -> int:
    """Stays attached until the byte `escape` on a terminal, the end of standard input or the
    console's; the exit status.
    """
    on = platform()
    devid = with_store(lambda store: _number(store, name))
    return asyncio.run(
        _attach(
            os.fspath(attach_path(on.run_dir, keys.bus_name(devid))),
            {"who": _who(), "write": write, "steal": steal, "history": history},
            name,
            escape,
        )
    )


async def _number(store: object, name: str) -> int:
    return find(name, await names(store))  # type: ignore[arg-type]


def _who() -> str:
    """For the others: "pid 7 on /dev/pts/3"."""
    where = ""
    with contextlib.suppress(OSError):
        where = f" on {os.ttyname(0)}"
    return f"pid {os.getpid()}{where}"


async def _attach(path: str, request: dict[str, object], name: str, escape: int) -> int:
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise PvfrontError(
            f"{name}: nobody serves it ({error.strerror})",
            hint="systemctl start pvfront-console; `pvfront console list` shows who has it",
        ) from None
    writer.write(json.dumps(request).encode() + b"\n")
    try:
        answer = json.loads(await reader.readline())
    except (OSError, ValueError):
        raise PvfrontError(f"{name}: its service ended without an answer") from None
    writes = answer.get("writes") is True
    if request["write"] and not writes:
        note(f"{name}: {answer.get('writer')} writes; read only", "--steal takes its place")
    end = asyncio.get_running_loop().create_future()
    with _raw(), _input(writer, end, writes=writes, escape=escape):
        reading = asyncio.create_task(_show(reader))
        await asyncio.wait({reading, end}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            reading.cancel()
            if writes:
                # What was typed last is still to go.
                with contextlib.suppress(OSError):
                    await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    with contextlib.suppress(asyncio.CancelledError):
        why = await reading
        note(f"{name}: detached: {why or 'its service has ended'}")
        return 1
    return 0


async def _show(reader: asyncio.StreamReader) -> str:
    """Shows what comes; returns why it ended."""
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
        while True:
            kind, length = FRAME.unpack(await reader.readexactly(FRAME.size))
            body = await reader.readexactly(length)
            if kind != DATA:
                return body.decode(errors="replace")
            while body:
                body = body[os.write(1, body) :]
    return ""


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Standard input, if it is a terminal, gives bytes as they are typed, and echoes none."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)  # what was typed already is not to be thrown away
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _input(
    writer: asyncio.StreamWriter, end: asyncio.Future[None], *, writes: bool, escape: int
) -> Iterator[None]:
    """Sends what is typed meanwhile; `end` is set at `escape` on a terminal, or its end."""
    loop = asyncio.get_running_loop()
    terminal = sys.stdin.isatty()
    tasks: set[asyncio.Task[None]] = set()

    async def resume() -> None:
        with contextlib.suppress(OSError):
            await writer.drain()
            loop.add_reader(0, typed)

    def typed() -> None:
        data = os.read(0, CHUNK)
        at = data.find(escape) if terminal else -1
        if writes and data[: at if at >= 0 else None]:
            writer.write(data[: at if at >= 0 else None])
        if at >= 0 or not data:
            loop.remove_reader(0)
            if not end.done():
                end.set_result(None)
            return
        if writes:
            loop.remove_reader(0)
            task = asyncio.create_task(resume())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    loop.add_reader(0, typed)
    try:
        yield
    finally:
        loop.remove_reader(0)
        for task in tasks:
            task.cancel()
