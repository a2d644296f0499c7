# SPDX-License-Identifier: BSD-2-Clause
"""When a device's workers die so often that no more are started. Pure.

The rule and its names are systemd's (StartLimitBurst=, StartLimitIntervalSec=), what comes after is
named as the kernel's nbd does: requests wait `dead_conn_timeout` seconds, then they fail.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """`start_limit_burst` deaths within `start_limit_interval` seconds are a crash loop; 0: no
    number is one. `dead_conn_timeout`: seconds that users' requests wait for somebody to help.
    """

    start_limit_burst: int = 5
    start_limit_interval: float = 10.0
    dead_conn_timeout: float = 120.0


class Deaths:
    """The latest deaths of one device's workers. Once there are too many, that is so for good."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.verdict: str | None = None
        self._times: deque[float] = deque(maxlen=max(1, limits.start_limit_burst))

    def died(self, now: float, why: str) -> None:
        """A worker ended at `now` (of a clock that only goes forward) that nobody asked to."""
        self._times.append(now)
        burst, interval = self.limits.start_limit_burst, self.limits.start_limit_interval
        if burst and len(self._times) == burst and now - self._times[0] <= interval:
            times = f"{burst} times within {interval:g} s" if burst > 1 else "once"
            self.verdict = self.verdict or f"its worker died {times}, the last time: {why}"
