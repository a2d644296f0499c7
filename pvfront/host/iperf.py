# SPDX-License-Identifier: BSD-2-Clause
"""What iperf3's client reports; its status is 0 with an error as well."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from pvfront.errors import PvfrontError

from .child import START_SECONDS


async def report(run: Callable[[], Awaitable[str]]) -> dict[str, Any]:
    """`run` runs `iperf3 -J -c …` and tells what it said. Raises PvfrontError.

    It is run again while the server is busy: that may not have seen yet that the client before
    has ended. It says so and hangs up, which may overtake what it said.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        told: dict[str, Any] = json.loads(await run())
        if "error" not in told:
            return told
        cut = "Connection reset" in told["error"] and not told.get("intervals")
        refused = cut or "server is busy" in told["error"]
        if not refused or time.monotonic() > deadline:
            raise PvfrontError(f"iperf3: {told['error']}")
