# SPDX-License-Identifier: BSD-2-Clause
"""Calls that may hang in the kernel, in threads that neither the event loop nor the end of the
process waits for.

Daemon threads of their own: asyncio's executor joins its threads when the program ends, so one that
hangs there would hang the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from .errors import PvfrontError

T = TypeVar("T")


class Late(PvfrontError):
    """A call did not end in time; its thread goes on."""


async def in_daemon_thread(name: str, function: Callable[[], T]) -> T:
    """Runs a call that may block for ever. Being cancelled abandons the thread."""
    return await _start(name, function)


async def to_its_end(name: str, function: Callable[[], T], deadline: float) -> T:
    """Runs a call that must not run beside the next one. Raises Late after `deadline` seconds.

    A caller that is cancelled still waits, as long as that, for the thread's end.
    """
    future = _start(name, function)
    try:
        done, _ = await asyncio.wait({future}, timeout=deadline)
    except asyncio.CancelledError:
        await asyncio.wait({future}, timeout=deadline)
        if future.done():
            future.exception()  # nobody else will look at it
        raise
    if not done:
        future.cancel()
        raise Late(f"{name} did not end within {deadline:.0f} s")
    return future.result()


def _start(name: str, function: Callable[[], T]) -> asyncio.Future[T]:
    """The future gets what the call returns or raises, unless it is cancelled before."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def body() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=body, name=name, daemon=True).start()
    return future
