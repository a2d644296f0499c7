# SPDX-License-Identifier: BSD-2-Clause
"""The ledger: which device holds which event channels and granted pages, since when, and who.

What a device holds its worker tells: a page of counters that is there as long as the worker is
(abi.py). The control ring of a network is its supervisor's, and gone with that. Since when, and
which ports, stands in the device's timeline (trace.py); of a connection that is older than its
record the ports are those in the store. What processes hold, and what the other domains still have
mapped, is the platform's to know (holdings.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import gntalloc, inventory
from .blkfront.rings import SLOTS
from .holdings import Holder, Holdings
from .netfront.shape import RING_PAGES
from .platform import Platform, platform
from .trace import Kind, read
from .workermessage import State
from .xenstore import Xenstore

USUAL_PORTS = 1023
"""xl.cfg(5): max_event_channels. A guest cannot ask for its own."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one device holds now.

    `since`: seconds since 1970, None: before the record begins. `mapped`: of its pages, those that
    the backend has mapped; None: nobody knows, but `mapped_at_least` are.
    """

    device: str
    name: str
    generation: int
    queues: int
    event_channels: Sequence[int]
    pages: int
    ring_pages: int
    pool_pages: int
    control_pages: int
    asked: int | None
    since: float | None
    pid: int | None
    mapped: int | None
    mapped_at_least: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """All of it. `limit`: of granted pages of all processes; None: nobody knows."""

    devices: Sequence[Entry]
    holdings: Holdings
    roles: Mapping[int, str]
    limit: int | None

    def role(self, holder: Holder) -> str:
        return self.roles.get(holder.pid) or ("parker" if holder.parker else holder.name)

    def as_json(self) -> dict[str, Any]:
        holdings = self.holdings
        return {
            "devices": [asdict(entry) for entry in self.devices],
            "processes": [
                {**asdict(holder), "role": self.role(holder)} for holder in holdings.holders
            ],
            "granted_pages": {
                "held": sum(entry.pages for entry in self.devices),
                "deferred": holdings.deferred,
                "limit": self.limit,
            },
            "event_channels": {
                "held": sum(len(entry.event_channels) for entry in self.devices),
                "of_programs": holdings.ports_of_programs,
                "of_the_guest": holdings.ports,
                "usual_limit": USUAL_PORTS,
            },
        }


async def ledger(store: Xenstore, text: str | None = None, on: Platform | None = None) -> Ledger:
    """The ledger of one device, or of all that are served. Raises NoSuchDevice."""
    on = on or platform()
    found = [await inventory.find(store, text, on)] if text else await inventory.devices(store, on)
    entries, roles = [], dict[int, str]()
    holdings = on.holdings()
    for device in found:
        state = inventory.read_state(device.bus_name, on.run_dir)
        if state is None:
            continue
        pid = state.get("worker_pid")
        if isinstance(pid, int):
            roles[pid] = f"worker of {device.name}"
        supervisor = str(state.get("statistics_file") or "").split("/")
        if len(supervisor) > 2 and supervisor[2].isdigit():
            roles.setdefault(int(supervisor[2]), f"supervisor of {device.klass}")
        entries.append(await _entry(store, device, state, holdings, on))
    return Ledger(entries, holdings, roles, on.grant_limit())


async def _entry(
    store: Xenstore,
    device: inventory.Device,
    state: Mapping[str, Any],
    holdings: Holdings,
    on: Platform,
) -> Entry:
    pid = state.get("worker_pid")
    queues = inventory.statistics(pid, state.get("statistics_file"), device.klass) or []
    held = [queue for queue in queues if queue["state"] != State.IDLE and _holds(queue)]
    generation = held[0]["generation"] if held else int(state.get("generation") or 0)
    ring, pool = (sum(_pages(queue)[which] for queue in held) for which in (0, 1))
    since, ports, refs = None, list[int](), list[int]()
    for event in read(on.run_dir, [device.bus_name]):
        if event.kind == Kind.ATTACHED and event.generation == generation:
            since = event.time
            ports, refs = (list(event.facts.get(what, ())) for what in ("ports", "refs"))
    path = f"device/{device.klass}/{device.id}"
    if held and not ports:
        ports = await _published(store, path, len(held), *_PORT_KEYS)
    control_ports, control = _control(state, on) if held else ([], 0)
    mapped = None
    if held and holdings.mapped is not None:
        refs = refs or await _published(store, path, len(held), *_RING_KEYS)
        if control:
            refs += await _published(store, path, 0, "ctrl-ring-ref")
        mapped = sum(holdings.mapped.get(ref, 0) for ref in refs)
    connected = device.backend_state == "Connected (4)"
    rings = state.get("rings")
    granted = rings.get("granted") if isinstance(rings, Mapping) else None
    return Entry(
        device=device.bus_name,
        name=device.name,
        generation=generation,
        queues=len(held),
        event_channels=[*ports, *control_ports] if held else [],
        pages=ring + pool + control,
        ring_pages=ring,
        pool_pages=pool,
        control_pages=control,
        asked=granted.get("asked") if isinstance(granted, Mapping) and held else None,
        since=since if held else None,
        pid=pid if isinstance(pid, int) and held else None,
        mapped=mapped,
        mapped_at_least=ring + bool(control) if connected else 0,
    )


_PORT_KEYS = ("event-channel", "port", "event-channel-tx", "event-channel-rx")
_RING_KEYS = ("ring-ref", "ring-ref0", "tx-ring-ref")
"""Of each queue: each reference is the first of what was granted at once."""


def _holds(queue: Mapping[str, Any]) -> bool:
    ring, pool = _pages(queue)
    return bool(pool or ("unsent" in queue and ring))


def _pages(queue: Mapping[str, Any]) -> tuple[int, int]:
    """The pages of a queue's rings, and of its pools."""
    if "unsent" in queue:  # a console's
        return queue["queues"], 0
    if "tx_pool_pages" in queue:
        return RING_PAGES, queue["tx_pool_pages"] + queue["rx_pool_pages"]
    return max(1, queue["ring_slots"] // SLOTS), queue["pool_pages"]


def _control(state: Mapping[str, Any], on: Platform) -> tuple[list[int], int]:
    """Port and pages of a network's control ring, while its supervisor lives."""
    control = state.get("control")
    supervisor = str(state.get("statistics_file") or "").split("/")
    if not isinstance(control, Mapping) or len(supervisor) < 3:
        return [], 0
    if not (on.roots.proc / supervisor[2]).exists():
        return [], 0
    return list(control.get("ports", ())), int(control.get("pages", 0))


async def _published(store: Xenstore, path: str, queues: int, *names: str) -> list[int]:
    """The numbers at these keys of one ring, or of each queue."""
    found = []
    for where in (path, *(f"{path}/queue-{number}" for number in range(queues))):
        for name in names:
            with contextlib.suppress(ValueError):
                found.append(int(await store.read_opt(f"{where}/{name}") or ""))
    return found


def limit_path(on: Platform) -> str:
    """Where the limit of granted pages is set."""
    return gntalloc.LIMIT_PATH if on.name == "xen" else str(on.run_dir.parent / "limits.json")
