# SPDX-License-Identifier: BSD-2-Clause
"""What a guest that hangs is asked first, for whoever presses a hot key in dom0.

Everything is read from /proc, /dev/kmsg and what supervisors leave in /run/pvfront: no process is
started, journalctl neither, nobody is asked who might not answer. A program on a disk that hangs
does not begin, and whoever starts it waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from .. import sysfs
from ..cli.output import printable
from ..errors import PvfrontError

TASKS = 40
"""Of those that wait in the kernel, so many are named."""
KERNEL = 40
"""Lines of the kernel's log, the last of its warnings and worse."""
_RECORDS = 100_000  # that are read; more than any kernel keeps
_WARNING = 4  # KERN_WARNING, include/linux/kern_levels.h
_KEYS = ("label", "phase", "reason", "frontend_state", "backend_state", "worker_pid")


def text(name: str, roots: sysfs.Roots, run_dir: Path) -> str:
    """Lines with CR and LF, of plain characters."""
    return "".join(f"{printable(line)}\r\n" for line in _lines(name, roots, run_dir))


def _lines(name: str, roots: sysfs.Roots, run_dir: Path) -> Iterator[str]:
    yield ""
    yield f"--- pvfront: dump for console {name}"
    yield f"load: {_read(roots.proc / 'loadavg') or '?'}"
    memory = _read(roots.proc / "meminfo")
    yield f"memory: {', '.join(re.findall(r'^Mem.*|^Dirty.*|^Writeback:.*', memory, re.M))}"
    yield from _waiting(roots.proc)
    yield from _kernel(roots.dev / "kmsg")
    yield from _devices(run_dir)
    yield "--- end of the dump"


def _read(path: Path) -> str:
    with contextlib.suppress(PvfrontError):
        return sysfs.read(path) or ""
    return ""


def _waiting(proc: Path) -> Iterator[str]:
    found = []
    for stat in proc.glob("[0-9]*/stat"):
        # pid (name) state: a name may have anything in it.
        head, bracket, rest = _read(stat).rpartition(")")
        if bracket and rest.split()[:1] == ["D"]:
            found.append(head.replace(" (", " ", 1))
    yield f"tasks that wait in the kernel (D): {len(found)}"
    yield from (f"    {one}" for one in sorted(found)[:TASKS])


def _kernel(path: Path) -> Iterator[str]:
    """Records as Documentation/ABI/testing/dev-kmsg has them: a read gives one, or EPIPE if it was
    overwritten meanwhile.
    """
    found: deque[str] = deque(maxlen=KERNEL)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        yield f"kernel's log: {error.strerror}"
        return
    try:
        for _ in range(_RECORDS):
            try:
                records = os.read(fd, 8192)
            except BrokenPipeError:
                continue
            if not records:
                break
            found += [line for record in records.splitlines() if (line := _warning(record))]
    except OSError:
        pass  # EAGAIN: that was all
    finally:
        os.close(fd)
    yield f"kernel's warnings, the last {len(found)}:"
    yield from found


def _warning(record: bytes) -> str | None:
    """A line of the kernel's, if it is worth it. What programs write there has another facility."""
    prefix, _, text = record.decode("ascii", "replace").partition(";")
    priority, _, micros, _ = [*prefix.split(",", 3), "", "", "", ""][:4]
    if not (priority.isdigit() and micros.isdigit() and int(priority) <= _WARNING):
        return None
    return f"    [{int(micros) / 1e6:.3f}] {text}"


def _devices(run_dir: Path) -> Iterator[str]:
    for path in sorted(run_dir.glob("*-[0-9]*.json")):
        try:
            state = json.loads(_read(path))
            facts = [f"{key} {state[key]}" for key in _KEYS if state.get(key)]
        except (ValueError, TypeError, AttributeError):
            facts = ["?"]
        yield f"{path.stem}: {', '.join(facts)}"
