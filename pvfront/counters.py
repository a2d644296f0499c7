# SPDX-License-Identifier: BSD-2-Clause
"""The counters of all served devices at one moment, as `top` and `metrics` take them.

They are read from what supervisors and workers leave in the run directory and from /proc: neither
the store nor a supervisor is asked, so that looking every second costs domain 0 nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import inventory, sysfs
from .console.keys import name_of
from .platform import Platform, platform

CLASSES = ("console", "vbd", "vif")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Sample:
    """One device. `at`: seconds of CLOCK_MONOTONIC.

    `queues`: the counters of each queue that has been used (abi.BlkStats, struct pvf_net_stats,
    struct pvf_cons_stats), None: they cannot be read. `cpu`: seconds of processor time of its
    worker since `started`, ticks since the boot; None: it does not run.
    """

    klass: str
    id: int
    at: float
    label: str = ""
    os_device: str = ""
    phase: str = ""
    generation: int = 0
    reconnects: int = 0
    pid: int | None = None
    started: int | None = None
    cpu: float | None = None
    queues: Sequence[Mapping[str, Any]] | None = field(default=None)

    @property
    def name(self) -> str:
        """What people call it: xvdb, vif0; a console as its channel of the xl config."""
        if self.klass == "console":
            return name_of(self.label, self.id)[0]
        return inventory.label(self.klass, self.id)

    @property
    def bus_name(self) -> str:
        return f"{self.klass}-{self.id}"


def sample(on: Platform | None = None) -> list[Sample]:
    """Every served device, by class and number. `on`: None is ours."""
    on = on or platform()
    found = []
    for file in sysfs.listdir(on.run_dir):
        klass, _, number = file.removesuffix(".json").partition("-")
        if klass not in CLASSES or not file.endswith(".json"):
            continue
        if number.isascii() and number.isdigit() and len(number) <= inventory.MAX_ID_DIGITS:
            one = _sample(klass, int(number), on)
            if one is not None:
                found.append(one)
    return sorted(found, key=lambda one: (one.klass, one.id))


def _sample(klass: str, number: int, on: Platform) -> Sample | None:
    """None if it has gone since its file was listed."""
    state = inventory.read_state(f"{klass}-{number}", on.run_dir)
    if state is None:
        return None
    pid = state.get("worker_pid")
    pid = pid if isinstance(pid, int) and pid > 0 else None
    started, cpu = None, None
    if pid is not None:
        times = process_times(sysfs.read(on.roots.proc / str(pid) / "stat") or "")
        if times is not None:
            started, cpu = times[1], times[0] / _TICKS
    queues = inventory.statistics(pid, state.get("statistics_file"), klass)
    return Sample(
        klass,
        number,
        time.monotonic(),
        label=str(state.get("label") or ""),
        os_device=str(state.get("os_device") or ""),
        phase=str(state.get("phase") or ""),
        generation=_number(state.get("generation")),
        reconnects=_number(state.get("reconnects")),
        pid=pid,
        started=started,
        cpu=cpu,
        queues=None if queues is None else [queue for queue in queues if used(klass, queue)],
    )


def used(klass: str, queue: Mapping[str, Any]) -> bool:
    """Whether this connection, or an earlier one, has used a queue of a worker's."""
    pages = {"vbd": "pool_pages", "vif": "rx_pool_pages"}.get(klass)
    return bool(pages is None or queue[pages] or queue["wakeups"])


def process_times(stat: str) -> tuple[int, int] | None:
    """Ticks of processor time of a process and its threads, and when it began (proc_pid_stat(5)).

    None for what is no such line. The name, in parentheses, may hold anything.
    """
    fields = stat.rpartition(")")[2].split()
    wanted = [fields[index] for index in (11, 12, 19)] if len(fields) > 19 else []
    if not wanted or not all(text.isascii() and text.isdigit() for text in wanted):
        return None
    user, system, started = map(int, wanted)
    return user + system, started


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
