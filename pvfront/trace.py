# SPDX-License-Identifier: BSD-2-Clause
"""The timeline of devices: what happened, when, in which generation. `pvfront trace` shows it.

Theory of operation
    A supervisor notes an event as it happens: states of both ends, steps of the walk and their
    reasons, waits and how long they took, phases, workers. Each device has a `Trace`, which is a
    ring of text in a file of fixed size, ``/run/pvfront/trace/vbd-51728``; the service has one for
    what concerns all. The file is mapped: an event costs a copy in memory and no system call, and a
    supervisor whose memory is locked never waits for it, whoever swaps to the disk that it is just
    connecting again. A killed supervisor loses nothing, the next one goes on in the same file.

    The file is a header and bytes that are written round and round: JSON objects, one a line.
    `head` counts all bytes ever written, and is written after them. A reader takes what is between
    the oldest byte that is left and `head`, and drops what is no whole line. So reading needs
    neither a lock nor a supervisor.

    The order of events is that of the clock that runs through a suspend and is never set
    (CLOCK_BOOTTIME). The time of day is there for people: a restore moves it.

Limits
    The supervisor reads states when a watch says "look again": of two changes in quick succession
    it may see the last one only. What it writes itself is all there.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

DIRECTORY = "trace"  # below the run directory
SERVICE = "service-"  # and a class: the trace of what concerns all devices of a service
SIZE = 64 << 10
_KEPT = 64  # files; of devices that nobody serves any more the oldest go
_LONGEST = 1000  # characters of a text: some of it was written by another domain

_MAGIC = b"PVFTRACE"
_HEADER = struct.Struct("=8sII")  # magic, version, size of the ring
_HEAD = struct.Struct("=Q")
_HEAD_AT = 16
_VERSION = 1
_DATA = 64


class Kind(enum.StrEnum):
    """What an event is about."""

    FRONTEND = "frontend"  # our end's state; fact: state
    BACKEND = "backend"  # the other end's; fact: state
    NODES = "nodes"  # online, present, moved
    STEP = "step"  # what the walk does next, and why
    WAITED = "waited"  # for the backend; facts: seconds, patience, came
    PHASE = "phase"  # where the device loop stands; facts: phase, reason
    ATTACHED = "attached"  # a generation holds ports and grants; facts: ports, pages
    DETACHED = "detached"  # the generation holds nothing any more
    WORKER = "worker"  # started, adopted, killed, ended by us; fact: pid
    DIED = "died"  # a worker that nobody asked to end; fact: pid
    TARGET = "target"  # the OS device's connection to the worker was lost
    BROKEN = "broken"  # the backend broke a rule; facts: rule, field, value
    STALL = "stall"  # the backend does not answer, or does again; facts: seconds, in_flight
    SUSPEND = "suspend"  # of the domain: how far it has come
    SERVICE = "service"  # the supervisor began or ended


class Note(Protocol):
    """Notes one event. Never raises, never blocks."""

    def __call__(self, kind: Kind, text: str, /, **facts: Any) -> None: ...


def nothing(kind: Kind, text: str, /, **facts: Any) -> None:
    """A `Note` that keeps nothing."""


@dataclass(frozen=True, slots=True)
class Event:
    """`time`: seconds since 1970; `clock`: seconds since boot. `serial` counts within a file."""

    serial: int
    time: float
    clock: float
    device: str
    generation: int
    kind: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "time": self.time,
            "clock": self.clock,
            "device": self.device,
            "generation": self.generation,
            "kind": self.kind,
            "text": self.text,
            **self.facts,
            "serial": self.serial,
        }


# -- the ring --------------------------------------------------------------------------------------


class Ring:
    """Lines, of which the oldest are overwritten, in a file that others read. One writer."""

    def __init__(self, path: Path, size: int = SIZE) -> None:
        """Goes on in the file that is there, or makes it. Raises OSError."""
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Every block now: one that is missing later would be a SIGBUS.
            os.posix_fallocate(fd, 0, _DATA + size)
            os.ftruncate(fd, _DATA + size)
            self._map = mmap.mmap(fd, _DATA + size)
        finally:
            os.close(fd)
        self.size = size
        if self._map[: _HEADER.size] != _HEADER.pack(_MAGIC, _VERSION, size):
            self._map[:] = bytes(_DATA + size)
            self._map[: _HEADER.size] = _HEADER.pack(_MAGIC, _VERSION, size)
        else:
            # Touched, and thereby locked where the process locks its memory.
            self._map[:] = self._map[:]
        (self.head,) = _HEAD.unpack_from(self._map, _HEAD_AT)

    def append(self, line: bytes) -> None:
        """Adds a line. Raises ValueError if it has a newline, or is longer than half the ring."""
        if b"\n" in line or len(line) >= self.size // 2:
            raise ValueError("a line of a trace is one line, and short")
        data = line + b"\n"
        at = self.head % self.size
        first = min(len(data), self.size - at)
        self._map[_DATA + at : _DATA + at + first] = data[:first]
        self._map[_DATA : _DATA + len(data) - first] = data[first:]
        self.head += len(data)
        _HEAD.pack_into(self._map, _HEAD_AT, self.head)

    def close(self) -> None:
        self._map.close()


def read_lines(path: Path) -> list[bytes]:
    """The lines that a ring holds now, whoever writes meanwhile; [] if it is none."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        raw = file.read(_DATA + (16 << 20))
        file.seek(_HEAD_AT)
        again = file.read(_HEAD.size)
        if len(raw) < _DATA or len(again) < _HEAD.size:
            return []
        magic, version, size = _HEADER.unpack_from(raw)
        if (magic, version) != (_MAGIC, _VERSION) or not 0 < size <= len(raw) - _DATA:
            return []
        (head,) = _HEAD.unpack_from(raw, _HEAD_AT)
        # What was written while we read has overwritten the oldest.
        oldest = max(0, _HEAD.unpack(again)[0] - size)
        at, data = head % size, raw[_DATA : _DATA + size]
        text = data[at:] + data[:at] if head > size else data[:at]
        text = text[max(0, oldest - max(0, head - size)) :]
        lines = text.split(b"\n")
        return lines[1 if oldest else 0 : -1]
    return []


# -- writing ---------------------------------------------------------------------------------------


class Trace:
    """The events of one device, or of the service. Use `note`; a ring that cannot be is done
    without, and said once.
    """

    def __init__(self, run_dir: Path, name: str, *, size: int = SIZE) -> None:
        self.name = name
        self.serial = 0
        self.generation: Callable[[], int] = lambda: 0
        self._ring: Ring | None = None
        directory = run_dir / DIRECTORY
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            _prune(directory, name)
            self._ring = Ring(directory / name, size)
        except (OSError, ValueError) as error:
            log.warning("%s: there will be no trace of it: %s", name, error)
            return
        for event in _events(name, read_lines(self._ring.path)):
            self.serial = event.serial

    def note(self, kind: Kind, text: str, /, **facts: Any) -> None:
        """See `Note`."""
        if self._ring is None:
            return
        self.serial += 1
        entry = {
            "n": self.serial,
            "t": round(time.time(), 6),
            "c": round(time.clock_gettime(time.CLOCK_BOOTTIME), 6),
            "g": self.generation(),
            "k": str(kind),
            "s": text[:_LONGEST],
        }
        if facts:
            entry["f"] = facts
        # A fact that is no JSON, or much too long, is not worth a disk.
        with contextlib.suppress(TypeError, ValueError):
            self._ring.append(json.dumps(entry, separators=(",", ":")).encode())

    def close(self) -> None:
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()


def _prune(directory: Path, name: str) -> None:
    """Makes room: of `_KEPT` files and more, those go that were opened first."""
    if (directory / name).exists():
        os.utime(directory / name)
        return
    files = [path for path in directory.iterdir() if not path.name.startswith(SERVICE)]
    files.sort(key=lambda path: path.stat().st_mtime)
    for path in files[: max(0, len(files) + 1 - _KEPT)]:
        if not (directory.parent / f"{path.name}.json").exists():  # else it is served
            path.unlink(missing_ok=True)


# -- reading ---------------------------------------------------------------------------------------


def names(run_dir: Path) -> list[str]:
    """Of which devices, and services, there is a trace."""
    with contextlib.suppress(OSError):
        return sorted(path.name for path in (run_dir / DIRECTORY).iterdir())
    return []


def read(run_dir: Path, wanted: Iterable[str]) -> list[Event]:
    """The events of these devices and services that are on record, in order."""
    found = [
        event for name in wanted for event in _events(name, read_lines(run_dir / DIRECTORY / name))
    ]
    return sorted(found, key=lambda event: (event.clock, event.serial))


def _events(name: str, lines: Iterable[bytes]) -> Iterator[Event]:
    last = 0
    for line in lines:
        try:
            entry = json.loads(line)
            event = Event(
                serial=int(entry["n"]),
                time=float(entry["t"]),
                clock=float(entry["c"]),
                device=name,
                generation=int(entry["g"]),
                kind=str(entry["k"]),
                text=str(entry["s"]),
                facts=dict(entry.get("f", {})),
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if event.serial > last:  # else it is of another lap
            last = event.serial
            yield event
