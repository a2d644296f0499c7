# SPDX-License-Identifier: BSD-2-Clause
"""What `doctor` judges: facts about this system, gathered and not judged (doctor.py). Reads only.

Text files are read below `Platform.roots`. A fact that cannot be had is one, too: what went wrong
stands in its place, and the rest is gathered all the same.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from . import agent, claimed, config, holdings, inventory, questions, sysfs, workerprogram
from .blkfront import inuse
from .errors import PvfrontError
from .holdings import Holdings
from .hooks import trouble
from .inventory import KERNEL, Device
from .platform import Platform, platform
from .veto import may_block_suspend
from .xenstore import Xenstore
from .xswire import printable

MODULES = ("xen-evtchn", "xen-gntalloc", "nbd", "ublk_drv", "tun")
NODES = ("xen/xenbus", "xen/evtchn", "xen/gntalloc")
SERVICES = ("vbd", "vif", "console")
_ASKING = 5.0
"""Seconds for the agent's answer."""
_UNITS = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")

ModuleState = Literal["loaded", "built in", "there", "missing"]


@dataclass(frozen=True, slots=True)
class Node:
    """A device node. `problem`: why it cannot be opened, "ENOENT"; `mode`: its permission bits."""

    problem: str = ""
    mode: int = 0o600


@dataclass(frozen=True, slots=True)
class Service:
    """`pid`: None if it does not run; `enabled`: at boot, None if its unit is not installed.

    `locked`: bytes of memory that it may lock, `realtime`: the highest priority that it may have;
    None: no limit, or it does not run.
    """

    pid: int | None = None
    enabled: bool | None = None
    locked: int | None = None
    realtime: int | None = None


@dataclass(frozen=True, slots=True)
class Agent:
    """The guest agent. `says`: its `pvfront agent status`, None if it does not run.

    `problem`: why it runs and does not answer; `enabled`: as of any service.
    """

    says: Mapping[str, Any] | None = None
    problem: str = ""
    enabled: bool | None = None


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device, its `pvfront status`, and why it stays with the kernel ("": it need not).

    `fixed`: nothing can be done about it, it is the root disk. `named`: in `claim` of pvfront.toml.
    """

    device: Device
    status: Mapping[str, Any] = field(default_factory=dict)
    used: str = ""
    fixed: bool = False
    named: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is. Of errors: the text, and the hint if there is one; None: no error."""

    embedded: str = ""  # the directory of an embedded host
    root: bool = True
    guest: str = "HVM"  # "PVH", "PV"; "": this is no guest of Xen
    domain0: bool = False
    xen: str = ""  # "4.17.7"
    kernel: str = ""  # "6.1.0-40-amd64"
    modules: Mapping[str, ModuleState] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    tun: Node = field(default_factory=Node)
    limit: int | None = None  # of granted pages
    holdings: Holdings = field(default_factory=Holdings)
    store: tuple[str, str | None] | None = None
    worker: tuple[str, str | None] | None = None
    user: tuple[str, str | None] | None = None
    config_file: str = ""  # "": there is none
    config: Sequence[tuple[str, str | None]] = ()
    can_suspend: bool = True  # the kernel knows of it at all
    may_veto: bool = True  # this process, and so a service that is started like it
    cgroup2: bool = True
    suspend: Mapping[str, Any] | None = None  # what the owner last wrote, if a service runs
    services: Mapping[str, Service] = field(default_factory=dict)
    agent: Agent = field(default_factory=Agent)
    hooks: Sequence[tuple[str, str]] = ()  # hooks.trouble
    absent: tuple[str, str] | None = None  # inventory.without_service
    devices: Sequence[DeviceFacts] = ()


async def gather(
    on: Platform | None = None,
    *,
    relied_on: Callable[[str], str] | None = None,
    try_worker: Callable[[bool], None] | None = None,
) -> Facts:
    """`on`: None is ours. `relied_on`: why an interface should not be taken, "" if it may be.

    `try_worker` raises PvfrontError if no worker can be started; told whether as another user.
    """
    on = on or platform()
    roots = on.roots
    embedded = on.name != "xen"
    guest = "" if embedded else guest_type(roots)
    root = os.geteuid() == 0
    kernel = sysfs.read(roots.proc / "sys/kernel/osrelease") or ""
    services = {klass: _service(klass, on) for klass in SERVICES}
    found, store = list[DeviceFacts](), None
    if embedded or (guest and root):
        found, store = await _devices(on, relied_on or _relied_on)
    file = on.config_dir / config.FILE
    suspend = inventory.read_state("suspend", on.run_dir)
    running = any(service.pid is not None for service in services.values())
    return Facts(
        embedded=str(on.run_dir.parent) if embedded else "",
        root=root,
        guest=guest,
        domain0="control_d" in (sysfs.read(roots.proc / "xen/capabilities") or ""),
        xen=xen_version(roots),
        kernel=kernel,
        modules={name: module_state(name, kernel, roots) for name in MODULES},
        nodes={name: _node(roots.dev / name) for name in NODES} if guest else {},
        tun=_node(roots.dev / "net/tun"),
        limit=on.grant_limit(),
        holdings=_holdings(on),
        store=store,
        worker=_problem(lambda: (try_worker or _try_worker)(not embedded)),
        user=_problem(workerprogram.worker_ids) if root and not embedded else None,
        config_file=str(file) if file.exists() else "",
        config=[(str(error), error.hint) for error in config.problems(file)],
        can_suspend=(roots.sys / "power/wakeup_count").exists(),
        may_veto=may_block_suspend(sysfs.read(roots.proc / "self/status") or ""),
        cgroup2=(roots.sys / "fs/cgroup/cgroup.controllers").exists(),
        suspend=suspend if running else None,
        services=services,
        agent=await _agent(on),
        hooks=[
            (printable(text), printable(fix)) for text, fix in trouble(on.config_dir / "hooks.d")
        ],
        absent=inventory.without_service([one.device for one in found], on),
        devices=found,
    )


def guest_type(roots: sysfs.Roots = sysfs.SYSTEM) -> str:
    """HVM, PVH or PV (Documentation/ABI/stable/sysfs-hypervisor-xen); "": this is no guest."""
    if sysfs.read(roots.sys / "hypervisor/type") != "xen":
        return ""
    return sysfs.read(roots.sys / "hypervisor/guest_type") or "unknown"


def xen_version(roots: sysfs.Roots = sysfs.SYSTEM) -> str:
    """4.17.7, as a text; "" if it is not told."""
    parts = [sysfs.read(roots.sys / "hypervisor/version" / what) for what in ("major", "minor")]
    if None in parts:
        return ""
    return f"{parts[0]}.{parts[1]}{sysfs.read(roots.sys / 'hypervisor/version/extra') or ''}"


def module_state(name: str, kernel: str, roots: sysfs.Roots = sysfs.SYSTEM) -> ModuleState:
    """Of a module of the release `kernel`: loaded, or whether it could be (modules.dep)."""
    if (roots.sys / "module" / name.replace("-", "_")).exists():
        return "loaded"
    modules = roots.root / "lib/modules" / kernel
    if lists(sysfs.read(modules / "modules.builtin") or "", name):
        return "built in"
    return "there" if lists(sysfs.read(modules / "modules.dep") or "", name) else "missing"


def lists(text: str, name: str) -> bool:
    """Whether a list of modules (a path first in each line) has one; `-` and `_` are the same."""
    wanted = name.replace("-", "_")
    for line in text.splitlines():
        file = line.partition(":")[0].rpartition("/")[2]
        if file.partition(".ko")[0].replace("-", "_") == wanted:
            return True
    return False


def _node(path: Path) -> Node:
    """Opened and closed: a mode says nothing of what a container or a unit may open."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return Node(sysfs.errno_name(error.errno))
    return Node("", mode)


def _problem(work: Callable[[], object]) -> tuple[str, str | None] | None:
    try:
        work()
    except PvfrontError as error:
        return str(error), error.hint
    except OSError as error:
        return f"{error.filename or 'it'}: {sysfs.errno_text(error)}", None
    return None


def _try_worker(change_user: bool) -> None:
    workerprogram.try_start(change_user=change_user)


def _holdings(on: Platform) -> Holdings:
    try:
        return on.holdings()
    except (OSError, PvfrontError):
        return holdings.Holdings()


def _service(klass: str, on: Platform) -> Service:
    pid = inventory.supervisor(klass, on.run_dir)
    enabled = _enabled(f"pvfront-{klass}.service", on)
    if pid is None:
        return Service(None, enabled)
    limits = sysfs.read(on.roots.proc / str(pid) / "limits") or ""
    return Service(
        pid, enabled, limit(limits, "Max locked memory"), limit(limits, "Max realtime priority")
    )


def _enabled(unit: str, on: Platform) -> bool | None:
    """Whether something wants a unit at boot; None: it is not installed, or this is no guest."""
    units = [on.roots.root / directory for directory in _UNITS]
    if on.name != "xen" or not any((directory / unit).exists() for directory in units):
        return None
    return any(list(directory.glob(f"*.wants/{unit}")) for directory in units)


async def _agent(on: Platform) -> Agent:
    enabled = _enabled("pvfront-agent.service", on)
    try:
        async with asyncio.timeout(_ASKING):
            answer = await questions.ask(on.run_dir / agent.SOCKET, {"verb": "status"})
    except (FileNotFoundError, ConnectionRefusedError):
        return Agent(enabled=enabled)
    except TimeoutError:
        return Agent(None, f"no answer within {_ASKING:g} s", enabled)
    except (OSError, PvfrontError) as error:
        return Agent(None, str(error), enabled)
    found = answer.get("agent")
    return Agent(found if isinstance(found, dict) else {}, "", enabled)


def limit(limits: str, name: str) -> int | None:
    """The soft limit in a /proc/PID/limits; None: there is none, or it is not told."""
    for line in limits.splitlines():
        if line.startswith(name):
            soft = (line.removeprefix(name).split() or [""])[0]
            return int(soft) if soft.isascii() and soft.isdigit() else None
    return None


async def _devices(
    on: Platform, relied_on: Callable[[str], str]
) -> tuple[list[DeviceFacts], tuple[str, str | None] | None]:
    """The devices, or why the store does not tell."""

    async def look() -> list[DeviceFacts]:
        async with await on.store() as store:
            there = await inventory.devices(store, on)
            is_named = named(on)
            return [
                replace(await _device(store, device, on, relied_on), named=is_named(device))
                for device in there
            ]

    try:
        on.require()
        # Each answer has its time; how many there are depends on the guest, and on its processor.
        return await look(), None
    except PvfrontError as error:
        return [], (str(error), error.hint)
    except OSError as error:
        return [], (f"the store: {sysfs.errno_text(error)}", None)


def named(on: Platform) -> Callable[[Device], bool]:
    """Whether the settings name a device; no device if there is something wrong with them."""
    try:
        file = config.load(on.config_dir / config.FILE)
        disks, vifs, consoles = (
            file.section(name).strings("claim") for name in ("disk", "vif", "console")
        )
    except PvfrontError:
        return lambda device: False

    def of(device: Device) -> bool:
        if device.klass == "vbd":
            return claimed.names_disk(disks, device.id)
        if device.klass == "console":
            return claimed.names_console(consoles, device.id, device.name)
        return device.klass == "vif" and claimed.names_vif(vifs, device.id, [device.os_device])

    return of


async def _device(
    store: Xenstore, device: Device, on: Platform, relied_on: Callable[[str], str]
) -> DeviceFacts:
    status = inventory.status(device, on)
    used, fixed = "", False
    if device.klass == "vbd":
        kind = await store.read_opt(f"device/vbd/{device.id}/device-type")
        if kind not in (None, "disk"):
            return DeviceFacts(device, status, f"it is a {kind}, not a disk", True)
    if device.owner == KERNEL and device.klass == "vbd" and device.os_device:
        uses = inuse.find(device.os_device, on.roots)
        used, fixed = inuse.describe(uses), any(use.root for use in uses)
    elif device.owner == KERNEL and device.klass == "vif" and device.os_device:
        used = await asyncio.to_thread(relied_on, device.os_device)
    return DeviceFacts(device, status, used, fixed)


def _relied_on(ifname: str) -> str:
    from .netfront import linkconfig  # netlink takes its time to import

    try:
        if ifname in linkconfig.default_routes():
            return f"the default route goes through {ifname}"
        above = linkconfig.built_on(ifname)
    except (OSError, PvfrontError) as error:
        return f"nothing is known of {ifname}: {error}"
    return f"{', '.join(above)} is built on {ifname}" if above else ""
