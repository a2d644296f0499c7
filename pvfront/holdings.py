# SPDX-License-Identifier: BSD-2-Clause
"""Which processes hold event channels and granted pages, as far as a guest can know. Read only.

/dev/xen/evtchn and /dev/xen/gntalloc have no query. What there is: who has them open
(/proc/PID/fd), what of gntalloc is mapped (/proc/PID/maps), and the kernel's list of channels,
where those of programs are called ``evtchn:NAME`` after who opened the device (/proc/interrupts).
Nobody says which pages a backend has mapped, nor how many were freed while it had.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .handle import PAGE_SIZE

EVTCHN, GNTALLOC = "/dev/xen/evtchn", "/dev/xen/gntalloc"
_PARKER = "@pvfront-parker"  # parking.py; argv[0]


@dataclass(frozen=True, slots=True)
class Holder:
    """A process. `event_channels`, `grants`: open descriptors; `pages`: granted, and mapped by it.

    On the embedded host it is the one that opened them, whoever has got them since.
    """

    pid: int
    name: str
    event_channels: int
    grants: int
    pages: int
    parker: bool = False


@dataclass(frozen=True, slots=True)
class Holdings:
    """`deferred`: pages that were freed and are still mapped by other domains.

    `ports`: event channels of the guest, `ports_of_programs` of those. `mapped`: of the grants that
    begin with a reference, the pages that another domain has mapped. None: nobody knows.
    """

    holders: Sequence[Holder] = ()
    deferred: int | None = None
    ports: int | None = None
    ports_of_programs: int | None = None
    mapped: Mapping[int, int] | None = None


def of_guest(proc: Path) -> Holdings:
    """What /proc tells; of processes that only root may look into, as root."""
    holders = []
    for process in sorted(proc.iterdir(), key=lambda path: path.name):
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                holder = _holder(process)
                if holder is not None:
                    holders.append(holder)
    ports = of_programs = None
    with contextlib.suppress(OSError):
        ports, of_programs = count_ports((proc / "interrupts").read_text())
    return Holdings(holders, ports=ports, ports_of_programs=of_programs)


def has_event_channels(process: Path) -> bool:
    """Whether a process (its directory below /proc) has /dev/xen/evtchn open.

    One that may not be looked into is said to have: who asks must not believe it has none.
    """
    try:
        return EVTCHN in _open_files(process)
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False
    except OSError:
        return True


def _open_files(process: Path) -> list[str]:
    files = []
    for entry in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            files.append(str(entry.readlink()))
    return files


def _holder(process: Path) -> Holder | None:
    links = _open_files(process)
    event_channels, grants = links.count(EVTCHN), links.count(GNTALLOC)
    pages = count_pages((process / "maps").read_text())
    if not event_channels and not grants and not pages:
        return None
    name = (process / "comm").read_text().strip()
    parker = (process / "cmdline").read_bytes().startswith(_PARKER.encode())
    return Holder(int(process.name), name, event_channels, grants, pages, parker=parker)


def count_pages(maps: str) -> int:
    """Pages of gntalloc in a ``/proc/PID/maps``."""
    size = 0
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == GNTALLOC:
            start, _, end = fields[0].partition("-")
            size += int(end, 16) - int(start, 16)
    return size // PAGE_SIZE


def count_ports(interrupts: str) -> tuple[int, int]:
    """Event channels in ``/proc/interrupts``, and those of them that programs have bound."""
    lines = [line for line in interrupts.splitlines() if re.search(r"\bxen-(dyn|percpu)\b", line)]
    return len(lines), sum(bool(re.search(r"\bevtchn:", line)) for line in lines)


def of_host(books: Mapping[str, Any], domid: int, name: str) -> Holdings:
    """What the books of the embedded host's hub say of a domain. `name`: of its processes."""
    ports = [port for port in books["ports"] if port["domid"] == domid]
    grants = [grant for grant in books["grants"] if grant["domid"] == domid]
    pids = {entry["pid"] for entry in (*ports, *grants) if entry["pid"] is not None}
    holders = []
    for pid in sorted(pids):
        mine = [grant for grant in grants if grant["pid"] == pid]
        holders.append(
            Holder(
                pid,
                name,
                sum(port["pid"] == pid for port in ports),
                len(mine),
                sum(grant["pages"] for grant in mine),
            )
        )
    mapped = {int(grant["first_ref"]): int(grant["mapped"]) for grant in grants}
    return Holdings(holders, int(books["deferred"]), len(ports), len(ports), mapped)
