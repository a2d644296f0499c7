# SPDX-License-Identifier: BSD-2-Clause
"""Waiting for what somebody else brings about: ask again until it holds, or say what never came.

A deadline here is no expectation of speed: it ends a test that would wait for ever. Where a machine
does something else beside the tests, a process may need many seconds to do anything at all.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

PATIENCE = float(os.environ.get("PVFRONT_PATIENCE", "60"))
"""Seconds that anything may take that another process, thread or task does."""


def _late(what: str, seconds: float, why: Callable[[], object]) -> str:
    return f"within {seconds:g} s this never came: {what}\n{why()}"


def wait_for(
    what: str,
    holds: Callable[[], Any],
    *,
    why: Callable[[], object] = str,
    seconds: float = PATIENCE,
) -> Any:
    """Asks until `holds()` is true and returns its answer; `why` adds to what a failure says."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, _late(what, seconds, why)
        time.sleep(0.002)
    return found


async def eventually(
    what: str,
    holds: Callable[[], Any],
    *,
    why: Callable[[], object] = str,
    seconds: float = PATIENCE,
) -> Any:
    """The same while a loop runs; `holds` may be a coroutine function."""
    end = time.monotonic() + seconds
    while True:
        found = holds()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < end, _late(what, seconds, why)
        await asyncio.sleep(0.005)
