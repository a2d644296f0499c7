# SPDX-License-Identifier: BSD-2-Clause
"""Which PV devices this guest has, whose they are, and what they are called. No output here.

Everything is read from the store, from sysfs and from what supervisors leave under /run/pvfront;
nothing is changed, and no process is needed to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import sysfs
from .abi import StatsUnreadable, read_all_cons_stats, read_all_net_stats, read_all_stats
from .blkfront.vdev import parse_name, vdev_name
from .claim import Claims
from .console.keys import NAME_KEY, name_of
from .errors import PvfrontError
from .platform import Platform, platform
from .questions import ask
from .states import parse_state
from .workerprogram import STATS_NAME, binary, build_of, stats_path
from .xenstore import Xenstore

KERNEL = "kernel"
PVFRONT = "pvfront"
NONE = "none"

_ANSWER_DEADLINE = 180.0  # a release may drain, close and hand over
MAX_ID_DIGITS = 10
_SOON = 5.0  # seconds for what a supervisor knows at once
_SERVICES = {"vbd": "disk", "vif": "network", "console": "console"}
_UCRED = struct.Struct("=iII")  # pid, uid, gid: unix(7)


class NotAGuest(PvfrontError):
    """There is no Xen under this system."""


class NoSuchDevice(PvfrontError):
    """A device was named that the store does not know; the hint lists those that it does."""


class NotServed(PvfrontError):
    """No supervisor serves the device."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device as `pvfront list` shows it."""

    klass: str  # "vbd"
    id: int  # 51728
    name: str  # "xvdb", "vif0"; "console-0" where a class has no names of its own
    backend_domain: int | None
    frontend_state: str  # "Connected (4)"
    backend_state: str
    owner: str  # KERNEL, PVFRONT or NONE
    os_device: str  # "xvdb", "eth0", "/dev/nbd0"; "" if there is none
    supervisor_pid: int | None = None  # of its class; None if none runs

    @property
    def bus_name(self) -> str:
        """The kernel's name on the xen bus: "vbd-51728"."""
        return f"{self.klass}-{self.id}"

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["class"] = found.pop("klass")
        return found


def require_guest(roots: sysfs.Roots = sysfs.SYSTEM) -> None:
    """Raises NotAGuest unless this kernel runs on Xen, and PvfrontError unless root asks."""
    kind = sysfs.read(roots.sys / "hypervisor" / "type")
    if kind != "xen" and not (roots.proc / "xen").exists():
        raise NotAGuest(
            "this is not a Xen guest (/sys/hypervisor/type does not say xen)",
            hint="run it inside a guest of Xen",
        )
    if os.geteuid() != 0:
        raise PvfrontError(
            "only root may use the store and the devices", hint="run it again with sudo"
        )


async def devices(
    store: Xenstore, on: Platform | None = None, *, only: str | None = None
) -> list[Device]:
    """Every device below `device/`, or those of the class `only`, by class and id.

    `on`, here and below: None is ours.
    """
    on = on or platform()
    claims = on.claims()
    found = []
    for klass in sorted(await _directory(store, "device")):
        if only not in (None, klass):
            continue
        pid = supervisor(klass, on.run_dir)
        for name in await _directory(store, f"device/{klass}"):
            # device/suspend/event-channel and the like are no devices.
            if name.isascii() and name.isdigit() and len(name) <= MAX_ID_DIGITS:
                device = await _device(store, claims, klass, int(name), on.run_dir)
                if device is not None:
                    found.append(replace(device, supervisor_pid=pid))
    return sorted(found, key=lambda device: (device.klass, device.id))


async def find(
    store: Xenstore, text: str, on: Platform | None = None, *, only: str | None = None
) -> Device:
    """The device that `text` means: xvdb, /dev/xvdb, 51728, vbd-51728, vif0, or its OS device.

    `only`: of that class. Raises NoSuchDevice, also for a number that several classes have.
    """
    all_of_them = await devices(store, on, only=only)
    wanted = text.replace("/", "-") if not text.startswith("/") else text
    named = [device for device in all_of_them if text in (device.os_device, device.name)]
    if len(named) == 1:
        return named[0]
    matches = [
        device
        for device in all_of_them
        if wanted in (device.name, device.bus_name, str(device.id))
        or (device.os_device and _short(text) == _short(device.os_device))
    ]
    if not matches:
        number = parse_name(text)
        matches = [d for d in all_of_them if d.klass == "vbd" and d.id == number]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise NoSuchDevice(
            f"{text!r} is more than one device",
            hint=f"say which: {', '.join(d.bus_name for d in matches)}",
        )
    there = ", ".join(d.name for d in all_of_them) or "none"
    raise NoSuchDevice(f"there is no {only or 'device'} {text!r}", hint=f"there are: {there}")


def status(device: Device, on: Platform | None = None) -> dict[str, Any]:
    """One device in full: its line of the list, its supervisor's state, its worker's counters."""
    on = on or platform()
    found: dict[str, Any] = {}
    state = read_state(device.bus_name, on.run_dir)
    if state is not None:
        file = state.pop("statistics_file", None)
        found.update(state)
        if state.get("worker_build"):
            with contextlib.suppress(OSError, PvfrontError):
                found["worker_outdated"] = state["worker_build"] != build_of(binary())
        queues = statistics(state.get("worker_pid"), file, device.klass)
        found["statistics"] = None if queues is None else total(queues)
        found["statistics_queues"] = queues
        found["worker_runs"] = _runs(state.get("worker_pid"), on)
    found.update(device.as_json())
    refused = read_state(f"refused-{device.klass}", on.run_dir) or {}
    if state is None and str(device.id) in refused:
        found["refused"] = str(refused[str(device.id)])
    claim = on.claims().taken(device.bus_name)
    if claim is not None:
        found["kernel_had_bound"] = claim.kernel_had_bound
    return found


def supervisor(klass: str, run_dir: Path) -> int | None:
    """The pid of the supervisor of a class of devices; None if none runs. Asks it nothing."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        sock.connect(str(run_dir / f"supervisor-{klass}.sock"))
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return int(_UCRED.unpack(credentials)[0])
    return None


def without_service(found: Sequence[Device], on: Platform | None = None) -> tuple[str, str] | None:
    """What it means that nobody serves devices that are there for it, and what to do about it.

    That is every disk, and of networks those that pvfront has: the kernel's own serves the others
    as well. None if a supervisor runs, or there is no such device.
    """
    on = on or platform()
    for klass in _SERVICES:
        there = [device for device in found if device.klass == klass]
        ours = [device for device in there if _has_worker(device, on)]
        if not (there if klass == "vbd" else ours):
            continue
        if any(device.supervisor_pid is not None for device in there):
            continue
        text = _absent(klass)
        if ours:
            text += (
                f": {', '.join(device.name for device in ours)}: served by what it has left, "
                "which nobody connects again"
            )
        return text, _start(klass, on)
    return None


def _absent(klass: str) -> str:
    return f"the {_SERVICES.get(klass, klass)} service does not run"


def _start(klass: str, on: Platform) -> str:
    """The command that starts a service."""
    if on.name == "xen":
        return f"systemctl start pvfront-{klass}"
    return f"pvfront {klass} serve --all"


def _has_worker(device: Device, on: Platform) -> bool:
    state = read_state(device.bus_name, on.run_dir)
    return state is not None and _runs(state.get("worker_pid"), on)


def _runs(pid: object, on: Platform) -> bool:
    return isinstance(pid, int) and pid > 0 and (on.roots.proc / str(pid)).exists()


def read_state(bus_name: str, run_dir: Path) -> dict[str, Any] | None:
    """What the supervisor last wrote about a device; None if it serves none of that name."""
    text = sysfs.read(run_dir / f"{bus_name}.json")
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        state = json.loads(text)
        if isinstance(state, dict):
            return state
    return None


def statistics(pid: object, file: object = None, klass: str = "vbd") -> list[dict[str, Any]] | None:
    """The counters of a worker, a dictionary for each queue; None if there is no such worker.

    `file`: the pages as the supervisor has it open. Where that has ended, only root finds the page.
    """
    fd = _open_statistics(file) if isinstance(file, str) else None
    if fd is None and isinstance(pid, int) and pid > 0:
        fd = _open_statistics(stats_path(pid))
    if fd is None:
        return None
    try:
        if klass in ("vif", "console"):
            read = read_all_net_stats if klass == "vif" else read_all_cons_stats
            return [
                {key: value for key, value in queue.items() if key not in _OF_THE_PAGE}
                for queue in read(fd)
            ]
        return [asdict(queue) for queue in read_all_stats(fd)]
    except StatsUnreadable:
        return None
    finally:
        os.close(fd)


async def status_from_outside(device: Device, on: Platform | None = None) -> dict[str, Any]:
    """`status` for a process that may not look into those of others: the supervisor tells."""
    on = on or platform()
    found = status(device, on)
    if found.get("worker_pid") is None or found["statistics"] is not None:
        return found
    path = on.run_dir / f"supervisor-{device.klass}.sock"
    with contextlib.suppress(OSError, PvfrontError):  # it does not run, or is another version
        request = {"verb": "statistics", "id": device.id}
        answer = await asyncio.wait_for(ask(path, request), _SOON)
        if isinstance(queues := answer.get("queues"), list):
            found |= {"statistics": total(queues), "statistics_queues": queues}
        found["worker_runs"] = answer.get("worker_runs") is True
    return found


_OF_THE_PAGE = ("magic", "version", "sequence", "reserved")
_OF_THE_WORKER = ("state", "generation", "queues")


def total(queues: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counters of a worker's queues in one: sums, also of the peaks."""
    found = {key: _sum([queue[key] for queue in queues]) for key in queues[0] if key != "queue"}
    return found | {key: queues[0][key] for key in _OF_THE_WORKER}


def _sum(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {key: _sum([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], Sequence):
        return [sum(column) for column in zip(*values, strict=True)]
    return sum(values)


def _open_statistics(path: Path | str | None) -> int | None:
    """A descriptor that is a worker's statistics; the number may be something else's by now."""
    if path is None:
        return None
    with contextlib.suppress(OSError):
        if str(Path(path).readlink()).startswith(STATS_NAME):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return None


async def upgrade(device: Device, on: Platform | None = None) -> str:
    """Has the device's supervisor replace its worker without a reconnect; returns how it went.

    Raises NotServed if no supervisor runs, PvfrontError with the reason if the worker stays.
    """
    on = on or platform()
    path = on.run_dir / f"supervisor-{device.klass}.sock"
    try:
        answer = await _asked(path, {"verb": "upgrade", "id": device.id}, device.name)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotServed(
            f"{device.name}: {_absent(device.klass)}",
            hint=f"{_start(device.klass, on)}; it replaces workers of another version by itself",
        ) from None
    return str(answer.get("text", f"{device.name}: upgraded"))


async def packets(device: Device, on: Platform | None = None) -> dict[str, Any]:
    """Has the device's worker note packets for some seconds (packettrace.py).

    Returns the "file" to read them from, and within how many seconds to "renew" this. Raises
    NotServed, and PvfrontError for a device that has no packets or is not connected.
    """
    on = on or platform()
    path = on.run_dir / f"supervisor-{device.klass}.sock"
    try:
        return await _asked(path, {"verb": "packets", "id": device.id}, device.name)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotServed(
            f"{device.name}: {_absent(device.klass)}",
            hint=f"its owner: {device.owner}; `pvfront list` shows who has what",
        ) from None


async def release(device: Device, on: Platform | None = None) -> str:
    """Has the device's supervisor close it and give it back; returns what became of it.

    Raises NotServed if no supervisor runs, PvfrontError with the supervisor's reason.
    """
    on = on or platform()
    path = on.run_dir / f"supervisor-{device.klass}.sock"
    try:
        answer = await _asked(path, {"verb": "release", "id": device.id}, device.name)
    except (FileNotFoundError, ConnectionRefusedError):
        return await _release_unserved(device, on)
    return str(answer.get("text", f"{device.name}: released"))


async def _asked(path: Path, request: dict[str, Any], name: str) -> dict[str, Any]:
    """A supervisor's answer that is no refusal; its refusal as PvfrontError."""
    klass = path.stem.rpartition("-")[2]
    try:
        answer = await asyncio.wait_for(ask(path, request), _ANSWER_DEADLINE)
    except TimeoutError:
        raise PvfrontError(
            f"{name}: the supervisor did not answer within {_ANSWER_DEADLINE:.0f} s",
            hint=f"see its log: journalctl -u pvfront-{klass}",
        ) from None
    if not answer.get("ok"):
        hint = answer.get("hint")
        raise PvfrontError(
            str(answer.get("error", "the supervisor gave no reason")),
            hint=str(hint) if hint else None,
        )
    return answer


async def _release_unserved(device: Device, on: Platform) -> str:
    """Nobody serves it: an old claim can end here, a living worker cannot."""
    state = read_state(device.bus_name, on.run_dir)
    pid = state.get("worker_pid") if state is not None else None
    if _runs(pid, on):
        raise NotServed(
            f"{device.name}: {_absent(device.klass)}, but its worker (pid {pid}) does",
            hint=f"{_start(device.klass, on)}; it adopts the worker; then release",
        )
    claims = on.claims()
    if claims.taken(device.bus_name) is None:
        raise NotServed(
            f"{device.name}: pvfront does not have it (its owner: {device.owner})",
            hint="`pvfront list` shows who has what",
        )
    return await asyncio.to_thread(claims.give_back, device.bus_name)


async def _device(
    store: Xenstore, claims: Claims, klass: str, devid: int, run_dir: Path
) -> Device | None:
    """None if it was removed since it was listed."""
    path = f"device/{klass}/{devid}"
    backend = await store.read_opt(f"{path}/backend")
    domain = await store.read_opt(f"{path}/backend-id")
    backend_state = None
    with contextlib.suppress(PermissionError):  # of what is gone, in a directory not ours to read
        backend_state = await store.read_opt(f"{backend}/state") if backend else None
    frontend_state = await store.read_opt(f"{path}/state")
    if backend is frontend_state is None and str(devid) not in await _directory(
        store, f"device/{klass}"
    ):
        return None
    bus_name = f"{klass}-{devid}"
    os_device = claims.os_device(bus_name)
    owner = NONE
    state = read_state(bus_name, run_dir)
    if claims.driver_of(bus_name) is not None:
        owner = KERNEL
    elif state is not None:
        owner = PVFRONT
        os_device = str(state.get("os_device") or "")
    elif claims.taken(bus_name) is not None:
        owner = PVFRONT
    return Device(
        klass=klass,
        id=devid,
        name=await _name(store, path, klass, devid),
        backend_domain=int(domain) if domain and domain.isdigit() and len(domain) < 6 else None,
        frontend_state=parse_state(frontend_state).label,
        backend_state=parse_state(backend_state).label,
        owner=owner,
        os_device=os_device,
    )


async def _name(store: Xenstore, path: str, klass: str, devid: int) -> str:
    """What people call it: a console as its channel is called in the xl config."""
    if klass == "console":
        return name_of(await store.read_opt(f"{path}/{NAME_KEY}"), devid)[0]
    return label(klass, devid)


def label(klass: str, devid: int) -> str:
    """What people call a device: "xvdb", "vif0"."""
    return vdev_name(devid) if klass == "vbd" else f"{klass}{'' if klass == 'vif' else '-'}{devid}"


async def _directory(store: Xenstore, path: str) -> list[str]:
    try:
        return await store.directory(path)
    except FileNotFoundError:
        return []


def _short(os_device: str) -> str:
    return os_device.removeprefix("/dev/")
