# SPDX-License-Identifier: BSD-2-Clause
"""How far the system's clock is from the host's, and setting it.

What user space can read of the host's time: in a HVM guest the emulated RTC, which Xen keeps from
its own wall clock, which dom0 sets (xen/arch/x86/hvm/rtc.c). PV and PVH guests have no RTC, and
Linux shows Xen's wall clock to nobody: there nothing is known. The kernel itself reads that clock
when a domain goes on (`timekeeping_resume`), so after a resume there is mostly nothing to set.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import sysfs
from ..errors import PvfrontError
from ..facts import guest_type
from ..statefile import write_json
from ..sysfs import Roots
from ..threads import to_its_end
from .context import Context, Resumed
from .helper import Command, command, pvfront_outside

log = logging.getLogger(__name__)

LIMIT = 0.5  # seconds of difference that are left alone
PATIENCE = 3.0  # seconds for a second to pass on the RTC
POLL = 0.01
NOTE = "time.json"


@dataclass(frozen=True, slots=True)
class Reading:
    """`difference`: seconds that the source is ahead of the system's clock, give or take
    `uncertainty`; None: there is no source, or it stands still, and `why` says so.
    """

    source: str
    difference: float | None = None
    uncertainty: float = 0.0
    why: str = ""


def measure(
    roots: Roots,
    *,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Reading:
    """Compares when a second begins. Blocks for a second or two."""
    kind = guest_type(roots)
    if kind != "HVM":
        who = f"a {kind} guest" if kind else "what is no guest of Xen"
        return Reading("unknown", why=f"{who} sees no clock of the host's")
    rtc = roots.sys / "class" / "rtc" / "rtc0"
    name = sysfs.read(rtc / "name") or ""
    before, last = now(), sysfs.read_int(rtc / "since_epoch")
    if not name or last is None:
        return Reading("unknown", why="there is no RTC")
    local = _local_offset(roots.root, before)
    begun = before
    while now() - begun < PATIENCE:
        sleep(POLL)
        this, value = now(), sysfs.read_int(rtc / "since_epoch")
        after = now()
        if value is not None and value != last:
            # It began after the last look and before the end of this one.
            half = (after - before) / 2
            return Reading(name.split()[0], value - local - (after - half), half)
        before = this
    return Reading(name.split()[0], why="the RTC stands still")


def _local_offset(root: Path, at: float) -> float:
    """Seconds that an RTC of local time is ahead of UTC; 0 if it is kept in UTC (hwclock(8))."""
    lines = (sysfs.read(root / "etc" / "adjtime") or "").splitlines()
    if len(lines) < 3 or lines[2].strip() != "LOCAL":
        return 0.0
    return float(time.localtime(at).tm_gmtoff)


def is_late(reading: Reading) -> bool:
    """Whether the clock is to be set."""
    return reading.difference is not None and abs(reading.difference) > LIMIT + reading.uncertainty


def set_clock(reading: Reading, run_dir: Path) -> None:
    """Sets the system's clock by the reading, and notes that. Raises PvfrontError."""
    assert reading.difference is not None
    try:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + reading.difference)
    except OSError as error:
        raise PvfrontError(
            f"the clock cannot be set: {sysfs.errno_text(error)}", hint="run it as root"
        ) from error
    run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    write_json(
        run_dir / NOTE,
        {"at": time.time(), "by": round(reading.difference, 3), "source": reading.source},
    )


def describe(reading: Reading, roots: Roots) -> dict[str, Any]:
    """For `pvfront time`: plain values only."""
    clocksource = roots.sys / "devices/system/clocksource/clocksource0/current_clocksource"
    found: dict[str, Any] = {
        "source": reading.source,
        "difference": None if reading.difference is None else round(reading.difference, 3),
        "uncertainty": round(reading.uncertainty, 3),
        "why": reading.why,
        "guest": guest_type(roots) or "none",
        "clocksource": sysfs.read(clocksource) or "unknown",
        "last_correction": None,
    }
    try:
        note = json.loads((roots.run / NOTE).read_text())
        found["last_correction"] = {key: note[key] for key in ("at", "by", "source")}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none was ever needed
    return found


class Clock:
    """After each resume: is the clock right, and if not, have it set."""

    name = "time"

    def __init__(
        self, *, run: Command = command, measure: Callable[[Roots], Reading] = measure
    ) -> None:
        self._run = run
        self._measure = measure
        self._last: Reading | None = None
        self._corrections = 0

    async def run(self, context: Context) -> None:
        with context.events.subscription() as told:
            while True:
                if isinstance(await told.get(), Resumed):
                    await self._check(context)

    async def _check(self, context: Context) -> None:
        roots = context.platform.roots
        reading = self._last = await to_its_end("clock", lambda: self._measure(roots), 30.0)
        if reading.difference is None:
            log.info("time: %s; the kernel's own correction stands", reading.why)
        elif not is_late(reading):
            log.info("time: %+.3f s from %s: left alone", reading.difference, reading.source)
        elif not context.settings.set_time:
            log.warning(
                "time: %+.3f s from %s, and not to be set", reading.difference, reading.source
            )
        else:
            log.warning("time: %+.3f s from %s: to be set", reading.difference, reading.source)
            self._corrections += 1
            # It measures for itself: what begins a program may take longer than we may be wrong.
            if failure := await pvfront_outside("time", "--set", run=self._run):
                raise PvfrontError(f"the clock is not set: {failure}")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = {"corrections": self._corrections}
        if self._last is not None:
            found["source"] = self._last.source
            found["difference"] = self._last.difference
        return found
