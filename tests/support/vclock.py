# SPDX-License-Identifier: BSD-2-Clause
"""An event loop whose time passes only when nothing else happens, and then at once.

A wait of ten seconds takes no time and is exact to a microsecond. What a test needs for that:
everything that it waits for happens in the loop itself. Calls to threads are made in place.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

import pytest

from pvfront import device, walk, xenbus


class _Selector(selectors.SelectSelector):
    """Never sleeps: what it would have slept is added to the loop's time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("the loop would sleep for ever: nobody is left to wake it")
        if not ready and timeout:
            # A little more: rounded down, a deadline would stay a little ahead for ever.
            self.now += timeout + 1e-6
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its `time` is also that of modules which `keep_time` has patched."""

    def __init__(self) -> None:
        self._selector_of_time = _Selector()
        super().__init__(self._selector_of_time)

    def time(self) -> float:
        return self._selector_of_time.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def keep_time(patch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop) -> None:
    """A device's loop and all below it have the time of `loop`."""
    assert isinstance(loop, VirtualLoop)
    for module in (device, walk, xenbus):
        patch.setattr(module, "time", Clock(loop))


class Clock:
    """Stands for the `time` module in a module under test."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.time()

    def time(self) -> float:
        return self._loop.time()
