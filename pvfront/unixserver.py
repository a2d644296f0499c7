# SPDX-License-Identifier: BSD-2-Clause
"""A Unix socket that only root may use, a task for each connection, none left at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

log = logging.getLogger(__name__)

GRACE = 1.0
"""Seconds that a connection gets to end by itself, and its last bytes to be read."""
LINE = 1 << 16

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(path: Path, handler: Handler, *, grace: float = GRACE) -> AsyncIterator[None]:
    """Serves each connection at `path` with `handler`, and hangs up when that returns.

    What is at `path` already is replaced. At the end nothing is taken any more, connections that
    take longer than `grace` seconds are cut, and the path is gone.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except Exception:
            log.exception("%s: a connection", path)
        finally:
            await hang_up(writer)

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    _remove(path)
    mask = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(connected, str(path), limit=LINE)
    finally:
        os.umask(mask)
    try:
        yield
    finally:
        _remove(path)  # first: once nobody listens, the path may be the next one's
        server.close()
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Ends a connection, and returns when its descriptor is closed.

    What the other end does not read within `GRACE` seconds is lost.
    """
    writer.close()
    with contextlib.suppress(OSError):
        try:
            async with asyncio.timeout(GRACE):
                await writer.wait_closed()
        except TimeoutError:
            writer.transport.abort()
            await writer.wait_closed()
