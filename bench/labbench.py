# SPDX-License-Identifier: BSD-2-Clause
"""What the benchmarks in the lab share: figures, and guests that are started again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from figure import Figure
from lab.errors import CommandFailed, DeadlineExceeded
from lab.guest import Kind, triple_fault
from lab.progress import say
from lab.scenario import Lab

LOSSES = 3  # of a guest, to the emulator

COUNTERS = "awk '/^cpu /{print $2+$3+$4+$7+$8} /^(ctxt|intr) /{print $2}' /proc/stat | xargs"
"""A command: CPU time in ticks of 10 ms, interrupts, context switches, of a whole guest."""


@dataclass
class Counted:
    """What a guest did in all while a job ran."""

    cpu: float  # seconds
    interrupts: int
    switches: int


def counted(before: str, after: str) -> Counted:
    """From two lines of `COUNTERS`."""
    pairs = zip(map(int, before.split()), map(int, after.split()), strict=True)
    ticks, interrupts, switches = (new - old for old, new in pairs)
    return Counted(ticks / 100, interrupts, switches)


def through_losses(
    lab: Lab, kind: Kind, life: Callable[[set[str]], Iterator[list[Figure]]]
) -> Iterator[list[Figure]]:
    """What `life` gives, in another guest after each that the emulator triple-faults.

    `life` notes in the set what it has done, and does not do it again.
    """
    done: set[str] = set()
    for number in range(1 + LOSSES):
        begin = lab.outer.console.position()
        try:
            yield from life(done)
            return
        except (CommandFailed, DeadlineExceeded):
            guest = lab.guest(kind)
            fault = triple_fault(lab.outer.console.since(begin), guest.console())
            if guest.running() or not fault or number == LOSSES:
                raise
            say(f"the emulator triple-faulted the {kind} guest: another one")
            guest.close()
