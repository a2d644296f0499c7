# SPDX-License-Identifier: BSD-2-Clause
"""What xl and libxl do to the store: domains and their devices, as nodes and permissions.

The nodes are libxl's (libxl_create.c, libxl_disk.c, libxl_device.c), without its own books below
/libxl and /vm. Disk specifications are those of xl-disk-configuration(5); in addition a target may
be `memory:SIZE`, a disk in the memory of the embedded host's block backend. Those of network
interfaces are read by vifspec.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import posixpath
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pvfront.blkfront.vdev import parse_name, vdev_name
from pvfront.errors import PvfrontError
from pvfront.handle import check_domid
from pvfront.host.consparams import ChannelSpec
from pvfront.host.params import MEMORY, parse_size
from pvfront.host.vifspec import VifSpec
from pvfront.states import XenbusState, parse_state
from pvfront.xenstore import Permission, Transaction, Xenstore, XenstoreError

__all__ = [
    "Device",
    "DiskSpec",
    "DiskSpecError",
    "ToolstackError",
    "attach_console",
    "attach_disk",
    "attach_vif",
    "console",
    "create_domain",
    "detach",
    "disk",
    "interface",
]

BACKEND_DOMID = 0

_FORMATS = ("raw", "qcow", "qcow2", "vhd", "qed")
_ACCESS = {"ro": "r", "r": "r", "rw": "w", "w": "w"}
_BACKENDTYPES = ("phy", "qdisk", "standalone")
_POSITIONAL = ("target", "format", "vdev", "access")
_FLAGS: dict[str, tuple[str, str]] = {
    "cdrom": ("devtype", "cdrom"),
    "direct-io-safe": ("direct-io-safe", "1"),
    "discard": ("discard", "1"),
    "no-discard": ("discard", "0"),
    "trusted": ("trusted", "1"),
    "untrusted": ("trusted", "0"),
}
_KEYS = (*_POSITIONAL, "devtype", "backend", "backendtype", "script", "specification")
_DEPRECATED = re.compile(r"(raw|qcow2?|vhd|qed|phy|file|aio|tap2?|tapdisk):")


class DiskSpecError(PvfrontError, ValueError):
    """A disk specification that xl would not take either; the message names what is wrong."""

    def __init__(self, spec: str, what: str) -> None:
        super().__init__(
            f"disk {spec!r}: {what}",
            hint="for example: format=raw,vdev=xvdb,access=rw,target=/path/to/image",
        )


class ToolstackError(PvfrontError):
    """The domain or the device is not there, or is there already, or does not let go."""


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk of a domain. `vdev` is the virtual device number, 51728 for xvdb."""

    target: str
    vdev: int
    format: str = "raw"
    writable: bool = True
    cdrom: bool = False
    backendtype: str | None = None
    script: str | None = None
    discard: bool = True
    trusted: bool = True
    direct_io_safe: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads xl's syntax. Raises DiskSpecError."""
        found = _parameters(text)
        vdev = found.get("vdev", "")
        if not vdev:
            raise DiskSpecError(text, "vdev is missing: the disk's name in the guest, xvdb")
        number = parse_name(vdev)
        if number is None:
            raise DiskSpecError(text, f"vdev={vdev} is no virtual device (xvdb, sda, hdc, d1p2)")
        format_ = _one_of(text, found, "format", _FORMATS) or "raw"
        devtype = _one_of(text, found, "devtype", ("cdrom",))
        cdrom = devtype is not None
        access = _one_of(text, found, "access", tuple(_ACCESS)) or ("r" if cdrom else "w")
        backendtype = _one_of(text, found, "backendtype", _BACKENDTYPES)
        _one_of(text, found, "specification", ("xen",))
        if found.get("backend", "") not in ("", "0", "Domain-0"):
            raise DiskSpecError(text, f"backend={found['backend']}: there is domain 0 only")
        target = found.get("target", "")
        if not target and not cdrom:
            raise DiskSpecError(text, "target is missing: a block device, a file or memory:SIZE")
        if target and not target.startswith(("/", MEMORY)):
            target = f"/dev/{target}"
        if target.startswith(MEMORY):
            try:
                parse_size(target.removeprefix(MEMORY))
            except PvfrontError as exc:
                last = "; target= takes all that follows: put it last" if "," in target else ""
                raise DiskSpecError(text, f"target={target}: {exc}{last}") from exc
        if backendtype == "phy" and format_ != "raw":
            raise DiskSpecError(text, f"backendtype=phy takes format=raw only, not {format_}")
        return cls(
            target=target,
            vdev=number,
            format=format_,
            writable=_ACCESS[access] == "w",
            cdrom=cdrom,
            backendtype=backendtype,
            script=found.get("script") or None,
            discard=found.get("discard") != "0",
            trusted=found.get("trusted") != "0",
            direct_io_safe="direct-io-safe" in found,
        )

    def frontend_keys(self) -> dict[str, str]:
        """What libxl writes at the frontend of a disk."""
        return {
            "virtual-device": str(self.vdev),
            "device-type": "cdrom" if self.cdrom else "disk",
            "trusted": str(int(self.trusted)),
        }

    def backend_keys(self, domid: int) -> dict[str, str]:
        """What libxl writes at the backend of a disk."""
        kind = self.backendtype or ("phy" if _is_block(self.target) else "qdisk")
        keys = {
            "removable": str(int(self.cdrom)),
            "bootable": "1",
            "dev": vdev_name(self.vdev),
            "type": kind,
            "mode": "w" if self.writable else "r",
            "device-type": "cdrom" if self.cdrom else "disk",
            "discard-enable": str(int(self.discard)),
            "specification": "xen",
        }
        if self.target.startswith(MEMORY) or kind == "phy":
            keys["params"] = self.target
        else:
            keys["params"] = f"{'aio' if self.format == 'raw' else self.format}:{self.target}"
        if kind == "phy":
            keys["script"] = self.script or "/etc/xen/scripts/block"
            if _is_block(self.target):
                device = Path(self.target).stat().st_rdev
                keys["physical-device"] = f"{os.major(device):x}:{os.minor(device):x}"
        if self.direct_io_safe:
            keys["direct-io-safe"] = "1"
        return keys


def _parameters(text: str) -> dict[str, str]:
    """Parameters by name. Each once; an empty value counts as not given."""
    found: dict[str, str] = {}
    rest: str | None = text
    position = 0

    def put(name: str, value: str) -> None:
        # An empty positional target may still be named later.
        if found.get(name):
            raise DiskSpecError(text, f"{name} is given twice")
        found[name] = value

    while rest is not None:
        rest = rest.lstrip()
        key, equals, value = rest.partition("=")
        if equals and key == "target":
            put("target", value.rstrip())
            break
        word, comma, after = rest.partition(",")
        word = word.rstrip()
        rest = after if comma else None
        key, equals, value = word.partition("=")
        if equals and re.fullmatch(r"[a-z][a-z0-9_-]*", key):
            if key not in _KEYS:
                raise DiskSpecError(text, f"{key} is no parameter ({', '.join(_KEYS)})")
            put(key, value)
        elif word in _FLAGS:
            put(*_FLAGS[word])
        else:
            while position < len(_POSITIONAL) and _POSITIONAL[position] in found:
                position += 1
            if position == len(_POSITIONAL):
                if not word:
                    continue
                raise DiskSpecError(text, f"{word!r} is neither a flag nor key=value")
            deprecated = _DEPRECATED.match(word)
            if position == 0 and deprecated:
                raise DiskSpecError(
                    text, f"the prefix {deprecated[0]} is deprecated: write format=, target="
                )
            put(_POSITIONAL[position], word)
            position += 1
    return found


def _one_of(text: str, found: Mapping[str, str], name: str, values: tuple[str, ...]) -> str | None:
    value = found.get(name, "")
    if value and value not in values:
        raise DiskSpecError(text, f"{name}={value} is not one of {', '.join(values)}")
    return value or None


def _is_block(target: str) -> bool:
    try:
        return stat.S_ISBLK(Path(target).stat().st_mode)
    except OSError:
        return False


# -- domains -----------------------------------------------------------------------------------


async def create_domain(store: Xenstore, domid: int, name: str) -> None:
    """Makes the directory of a domain; one that is there stays as it is. Raises XenstoreError."""
    home = f"/local/domain/{check_domid(domid)}"
    if await store.read_opt(f"{home}/domid") is not None:
        return
    # The guest reads everything of its own, and writes where libxl lets it.
    readable = [Permission(0), Permission(domid, read=True)]
    own = [Permission(domid)]
    async for txn in store.transaction():
        async with txn:
            await txn.mkdir(home)
            await txn.set_permissions(home, readable if domid else own)
            for key, value in {"name": name, "domid": str(domid)}.items():
                await txn.write(f"{home}/{key}", value)
                await txn.set_permissions(f"{home}/{key}", readable if domid else own)
            if not domid:
                continue
            for directory in ("control", "device", "memory"):
                await txn.mkdir(f"{home}/{directory}")
                await txn.set_permissions(f"{home}/{directory}", readable)
            for node in (
                *("control/shutdown", "control/sysrq", "control/feature-suspend"),
                *("control/feature-poweroff", "control/feature-reboot"),
                *("data", "attr", "drivers", "feature", "error"),
            ):
                await txn.write(f"{home}/{node}", "")
                await txn.set_permissions(f"{home}/{node}", own)


# -- devices -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Device:
    """A device of a domain as its nodes have it; `label` is what people call it."""

    klass: str
    domid: int
    devid: int
    label: str

    @property
    def front(self) -> str:
        return f"/local/domain/{self.domid}/device/{self.klass}/{self.devid}"

    @property
    def back(self) -> str:
        return f"/local/domain/{BACKEND_DOMID}/backend/{self.klass}/{self.domid}/{self.devid}"


def disk(domid: int, vdev: int) -> Device:
    return Device("vbd", domid, vdev, f"disk {vdev_name(vdev)}")


def interface(domid: int, devid: int) -> Device:
    return Device("vif", domid, devid, f"network interface vif{devid}")


def console(domid: int, devid: int) -> Device:
    return Device("console", domid, devid, f"console {devid}")


async def attach_disk(store: Xenstore, domid: int, spec: DiskSpec | str) -> int:
    """Defines a disk as `xl block-attach`: both ends' nodes in one transaction; returns its vdev.

    It does not wait for the two ends to connect, as libxl does not. Raises DiskSpecError,
    ToolstackError, XenstoreError.
    """
    found = DiskSpec.parse(spec) if isinstance(spec, str) else spec
    device = disk(domid, found.vdev)
    await _attach(store, device, found.frontend_keys(), found.backend_keys(domid))
    return found.vdev


async def attach_vif(store: Xenstore, domid: int, spec: VifSpec | str) -> int:
    """Defines a network interface as `xl network-attach`; returns its number, the first that is
    free unless the specification has one. As `attach_disk`. Raises VifSpecError too.
    """
    found = VifSpec.parse(spec) if isinstance(spec, str) else spec
    devid = found.devid
    if devid is None:
        devid = await _free_number(store, domid, "vif", 0)
    device = interface(domid, devid)
    await _attach(store, device, found.frontend_keys(devid), found.backend_keys(devid))
    return devid


async def attach_console(store: Xenstore, domid: int, spec: ChannelSpec | str) -> int:
    """Defines a secondary console as a domain's `channel=[...]` does; returns its number, the first
    that is free from 1 on: 0 is the primary console's. Raises ChannelSpecError, ToolstackError.
    """
    found = ChannelSpec.parse(spec) if isinstance(spec, str) else spec
    devid = await _free_number(store, domid, "console", 1)
    await _attach(store, console(domid, devid), found.frontend_keys(devid), found.backend_keys())
    return devid


async def _free_number(store: Xenstore, domid: int, klass: str, first: int) -> int:
    taken = []
    with contextlib.suppress(XenstoreError):
        taken = await store.directory(f"/local/domain/{domid}/device/{klass}")
    return next(n for n in itertools.count(first) if str(n) not in taken)


async def _attach(
    store: Xenstore, device: Device, ours: Mapping[str, str], theirs: Mapping[str, str]
) -> None:
    domid, front, back = device.domid, device.front, device.back
    reads = [Permission(domid), Permission(BACKEND_DOMID, read=True)]
    read_back = [Permission(BACKEND_DOMID), Permission(domid, read=True)]
    async for txn in store.transaction():
        async with txn:
            if await txn.read_opt(f"/local/domain/{domid}/domid") is None:
                raise ToolstackError(f"there is no domain {domid}", hint="create it first")
            if await txn.read_opt(f"{front}/backend") is not None:
                raise ToolstackError(
                    f"domain {domid} has a {device.label} already",
                    hint="detach it first, or use another "
                    + ("vdev" if device.klass == "vbd" else "devid"),
                )
            await txn.remove(front, missing_ok=True)
            await txn.remove(back, missing_ok=True)
            at = {"backend-id": str(BACKEND_DOMID), "state": str(int(XenbusState.INITIALISING))}
            await _put(txn, front, {**at, **ours, "backend": back}, reads)
            at = {
                "frontend-id": str(domid),
                "online": "1",
                "state": str(int(XenbusState.INITIALISING)),
            }
            await _put(txn, back, {**at, **theirs, "frontend": front}, read_back)


async def detach(
    store: Xenstore, device: Device, *, force: bool = False, timeout: float = 10
) -> None:
    """Takes a device away as `xl block-detach` and `xl network-detach` do.

    The backend is told that it goes (online 0, state Closing); when it is Closed, both ends' nodes
    are removed. If that does not come in `timeout` seconds, ToolstackError says who is stuck, and
    the device stays. force: the frontend's nodes go at once and the backend's at the end, whatever
    it does.
    """
    front, back = device.front, device.back
    async for txn in store.transaction():
        async with txn:
            state = await txn.read_opt(f"{back}/state")
            if state is None and await txn.read_opt(f"{front}/backend") is None:
                raise ToolstackError(f"domain {device.domid} has no {device.label}")
            if force:
                await _clean_up(txn, front)
            if state is not None:
                await txn.write(f"{back}/online", "0")
                if parse_state(state) is not XenbusState.CLOSED:
                    await txn.write(f"{back}/state", str(int(XenbusState.CLOSING)))
    if not await _closed(store, back, timeout) and not force:
        ends = [
            f"{end} {parse_state(await store.read_opt(f'{path}/state')).label}"
            for end, path in (("frontend", front), ("backend", back))
        ]
        raise ToolstackError(
            f"{device.label} of domain {device.domid} was not released in {timeout:g} s: "
            + ", ".join(ends),
            hint="the guest uses it, or its frontend or backend is stuck; force takes it away",
        )
    async for txn in store.transaction():
        async with txn:
            await _clean_up(txn, front)
            await _clean_up(txn, back)


async def _closed(store: Xenstore, back: str, timeout: float) -> bool:
    """Waits until the backend is Closed or gone; False if it never was."""
    async with store.watch(f"{back}/state") as watch:
        try:
            async with asyncio.timeout(timeout):
                async for _ in watch:
                    state = await store.read_opt(f"{back}/state")
                    if state is None or parse_state(state) is XenbusState.CLOSED:
                        return True
        except TimeoutError:
            pass
    return False


async def _put(
    txn: Transaction, path: str, keys: Mapping[str, str], permissions: list[Permission]
) -> None:
    await txn.mkdir(path)
    await txn.set_permissions(path, permissions)
    for key, value in keys.items():
        await txn.write(f"{path}/{key}", value)
        await txn.set_permissions(f"{path}/{key}", permissions)


async def _clean_up(txn: Transaction, path: str) -> None:
    """Removes a device's directory, and those above it that are empty then, up to the class."""
    await txn.remove(path, missing_ok=True)
    parent = posixpath.dirname(path)
    while posixpath.basename(parent) not in ("device", "backend"):
        if await txn.read_opt(parent) is None or await txn.directory(parent):
            return
        await txn.remove(parent)
        parent = posixpath.dirname(parent)
