# SPDX-License-Identifier: BSD-2-Clause
"""The events of trace.py as `pvfront trace` shows them: whose, in order, who waited for whom.

Only files are read: neither the store nor a supervisor needs to be there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .blkfront.vdev import parse_name
from .errors import PvfrontError
from .inventory import label as named
from .inventory import read_state
from .trace import SERVICE, Event, Kind, names, read


class NothingOnRecord(PvfrontError):
    """There is no trace of this device."""


def label(name: str) -> str:
    """What people call it: "xvdb" for vbd-51728, "vbd" for the service of that class."""
    klass, _, rest = name.partition("-")
    if name.startswith(SERVICE):
        return rest
    return named(klass, int(rest)) if rest.isdigit() else name


def select(run_dir: Path, text: str | None) -> list[str]:
    """Whose traces are meant: a device, as `status` takes it, with its service; None: all.

    Raises NothingOnRecord, with those that there are.
    """
    there = names(run_dir)
    if text is None:
        return there
    wanted = text.replace("/", "-") if not text.startswith("/") else text
    number = parse_name(text)
    devices = [name for name in there if not name.startswith(SERVICE)]
    found = [
        name
        for name in devices
        if wanted in (name, name.partition("-")[2], label(name))
        or (number is not None and name == f"vbd-{number}")
        or _short(text) == _short(str((read_state(name, run_dir) or {}).get("os_device") or "-"))
    ]
    if len(found) == 1:
        service = f"{SERVICE}{found[0].partition('-')[0]}"
        return [*found, *(name for name in there if name == service)]
    if found:
        raise NothingOnRecord(
            f"{text!r} is more than one device", hint=f"say which: {', '.join(found)}"
        )
    known = ", ".join(map(label, devices)) or "none"
    raise NothingOnRecord(f"there is no trace of {text!r}", hint=f"there are traces of: {known}")


def _short(os_device: str) -> str:
    return os_device.removeprefix("/dev/")


class Timeline:
    """What is on record of some devices, and what comes."""

    def __init__(self, run_dir: Path, text: str | None = None) -> None:
        """Raises NothingOnRecord."""
        self._run_dir = run_dir
        self._text = text
        self._names = select(run_dir, text)
        self._reader = Reader()

    def news(self, most: int | None = None) -> list[Line]:
        """What is new since the last call; `most`: of it, the last so many lines."""
        if self._text is None:
            self._names = names(self._run_dir)  # devices come
        lines = self._reader.lines(read(self._run_dir, self._names))
        return list(lines) if most is None else list(deque(lines, most))


@dataclass(frozen=True, slots=True)
class Line:
    """An event as people read it. `delta`: seconds since the one before, None for the first.

    `answered`: of a state, the other end's state that it answers, and how many seconds that
    had waited for it.
    """

    event: Event
    delta: float | None
    answered: tuple[str, float] | None = None

    def as_json(self) -> dict[str, Any]:
        found = self.event.as_json()
        found["delta"] = self.delta
        if self.answered is not None:
            found["answered"], found["waited"] = self.answered
        return found


class Reader:
    """Follows a timeline: what waited for what is told by the states of the two ends.

    An end that writes its state answers the other's last one, if that was written after its
    own: so long the other end has waited for it.
    """

    def __init__(self) -> None:
        self._last: Event | None = None
        self._states: dict[tuple[str, str], Event] = {}
        self._seen: dict[str, int] = {}

    def lines(self, events: Iterable[Event]) -> Iterator[Line]:
        """Those of `events` that were not there before, in order."""
        for event in events:
            if event.serial <= self._seen.get(event.device, 0):
                continue
            self._seen[event.device] = event.serial
            delta = None if self._last is None else max(0.0, event.clock - self._last.clock)
            self._last = event
            yield Line(event, delta, self._answered(event))

    def _answered(self, event: Event) -> tuple[str, float] | None:
        ends = (str(Kind.FRONTEND), str(Kind.BACKEND))
        if event.kind not in ends:
            return None
        other = ends[event.kind == ends[0]]
        mine = self._states.get((event.device, event.kind))
        theirs = self._states.get((event.device, other))
        self._states[event.device, event.kind] = event
        if theirs is None or (mine is not None and mine.clock >= theirs.clock):
            return None
        return f"{other} {theirs.text}", max(0.0, event.clock - theirs.clock)
