# SPDX-License-Identifier: BSD-2-Clause
"""What a guest that hangs is asked first, for whoever presses a hot key in dom0.

Everything is read from /proc and from what supervisors leave in /run/pvfront: no process is
started, nobody is asked who might not answer.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from .. import sysfs
from ..cli.output import printable
from ..errors import PvfrontError

TASKS = 40
"""Of those that wait in the kernel, so many are named."""
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


def _devices(run_dir: Path) -> Iterator[str]:
    for path in sorted(run_dir.glob("*-[0-9]*.json")):
        try:
            state = json.loads(_read(path))
            facts = [f"{key} {state[key]}" for key in _KEYS if state.get(key)]
        except (ValueError, TypeError, AttributeError):
            facts = ["?"]
        yield f"{path.stem}: {', '.join(facts)}"
