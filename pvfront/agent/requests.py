# SPDX-License-Identifier: BSD-2-Clause
"""What XAPI may ask a guest to set, if its administrator allows: an address, a name.

Off by default (`static_ip`, `set_hostname`). The keys are those that the Windows agent obeys:

    xenserver/device/vif/N/static-ip-setting/{enabled,address,gateway} and with a 6 at the end
    control/setcomputername/{action,name}, answered by state and error

A request is done when its `enabled` or `action` is removed. Every value is hostile until parsed:
what reaches a command line is an address, a name of an interface that we have found ourselves, or
labels of letters, digits and hyphens.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import PvfrontError
from ..statefile import write_json
from ..xenstore import Xenstore
from ..xswire import printable
from .board import Board
from .context import Context
from .helper import Command, command
from .keys import MAX_VIFS

log = logging.getLogger(__name__)

FEATURE_IP = "control/feature-static-ip-setting"
FEATURE_NAME = "control/feature-setcomputername"
SET = "static-ip.json"
"""In the run directory: what is set, for an agent that begins while it is."""
VIFS = "xenserver/device/vif"
NAME = "control/setcomputername"
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_OUTSIDE = ("systemd-run", "--quiet", "--collect", "--wait", "--pipe", "--")

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
Gateway = Ip | None


def parse_address(family: int, address: str, gateway: str) -> tuple[Interface, Gateway]:
    """An address with its prefix, and the gateway if one is named. Raises PvfrontError."""
    try:
        found = ipaddress.ip_interface(address)
        way = ipaddress.ip_address(gateway) if gateway else None
    except ValueError as error:
        raise PvfrontError(printable(str(error)[:100])) from None
    if found.version != family or (way is not None and way.version != family):
        raise PvfrontError(f"no address of IPv{family}")
    if getattr(found, "scope_id", None) or getattr(way, "scope_id", None):
        raise PvfrontError("an address with a scope")
    if "/" not in address or found.is_multicast or found.is_unspecified or found.is_loopback:
        raise PvfrontError(f"{found} is no address for an interface, or has no prefix")
    return found, way


def parse_name(name: str) -> str:
    """A host name: labels with dots between. Raises PvfrontError."""
    if len(name) > 64 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise PvfrontError(f"no host name: {printable(name[:40])!r}")
    return name


class StaticAddresses:
    """`static-ip-setting` of every vif, where the administrator allows it."""

    name = "static-ip"

    def __init__(
        self,
        board: Board,
        ifname_of: Callable[[int], str],
        *,
        run: Command = command,
        patience: float = 10.0,
    ) -> None:
        """`ifname_of`: the interface of a vif, "" if it has none; a vif that is there gets one
        within `patience` seconds, or has none."""
        self._board = board
        self._ifname_of = ifname_of
        self._run = run
        self._patience = patience
        self._set: dict[tuple[int, int], tuple[Interface, Gateway]] = {}
        self._file = Path()

    async def run(self, context: Context) -> None:
        if not context.settings.static_ip:
            await _withdraw(context.store, self._board, self.name, FEATURE_IP)
            return
        self._file = context.platform.run_dir / SET
        self._set = _saved(self._file)
        self._board.put(self.name, {FEATURE_IP: "1"})
        async with context.store.watch(VIFS) as events:
            async for _ in events:
                for devid in (await _children(context.store, VIFS))[:MAX_VIFS]:
                    for family, end in ((4, ""), (6, "6")):
                        await self._one(context.store, devid, family, end)

    async def _one(self, store: Xenstore, devid: str, family: int, end: str) -> None:
        base = f"{VIFS}/{devid}/static-ip-setting"
        enabled = await store.read_opt(f"{base}/enabled{end}")
        if enabled is None or not (devid.isascii() and devid.isdigit() and len(devid) < 6):
            return
        problem = ""
        try:
            if enabled == "1":
                address = await store.read_opt(f"{base}/address{end}") or ""
                gateway = await store.read_opt(f"{base}/gateway{end}") or ""
                wanted = parse_address(family, address, gateway)
                await self._apply(int(devid), await self._interface(store, devid), *wanted)
            elif (int(devid), family) in self._set:
                await self._undo(int(devid), await self._interface(store, devid), family)
        except PvfrontError as error:
            problem = str(error)
            log.warning("static-ip-setting of vif%s: %s", devid, problem)
        await store.write(f"{base}/error-code", "1" if problem else "0")
        await store.write(f"{base}/error-msg", problem)
        await store.remove(f"{base}/enabled{end}", missing_ok=True)

    async def _apply(self, devid: int, ifname: str, address: Interface, gateway: Gateway) -> None:
        if self._set.get((devid, address.version)) not in (None, (address, gateway)):
            await self._undo(devid, ifname, address.version)
        # A vif that nothing in the guest configures is down, where no route can lead over it.
        await self._ip(address.version, "link", "set", "dev", ifname, "up")
        await self._ip(address.version, "address", "replace", str(address), "dev", ifname)
        self._set[devid, address.version] = address, gateway
        self._save()
        if gateway is not None:
            await self._no_way(gateway, ifname)
            await self._ip(address.version, *_way(gateway, ifname, "prepend"))
        log.warning("vif%d (%s): %s set on the toolstack's word", devid, ifname, address)

    async def _undo(self, devid: int, ifname: str, family: int) -> None:
        """Takes back what was set here; what the guest's own configuration says is not touched."""
        address, gateway = self._set.pop((devid, family))
        self._save()
        if gateway is not None:
            await self._no_way(gateway, ifname)
        await self._ip(family, "address", "delete", str(address), "dev", ifname)

    async def _no_way(self, gateway: Ip, ifname: str) -> None:
        """Takes our default route away, if it is there."""
        way = _way(gateway, ifname, "delete")
        await _outside(self._run, "ip", f"-{gateway.version}", *way)

    def _save(self) -> None:
        lines = [[devid, str(a), str(way or "")] for (devid, _), (a, way) in self._set.items()]
        try:
            write_json(self._file, {"set": lines})
        except OSError as error:
            log.warning("%s: %s", self._file, error.strerror)

    async def _interface(self, store: Xenstore, devid: str) -> str:
        """A request may stand before the vif is connected, at the boot and when one is attached."""
        loop = asyncio.get_running_loop()
        there = await store.read_opt(f"device/vif/{devid}/backend") is not None
        deadline = loop.time() + (self._patience if there else 0.0)
        while not (ifname := self._ifname_of(int(devid))):
            if loop.time() >= deadline:
                raise PvfrontError(f"vif{devid} has no interface here")
            await asyncio.sleep(0.1)
        return ifname

    async def _ip(self, family: int, *words: str) -> None:
        if failure := await _outside(self._run, "ip", f"-{family}", *words):
            raise PvfrontError(f"ip {' '.join(words)}: {failure}")

    def status(self) -> dict[str, Any]:
        return {f"vif{devid} IPv{v}": str(held[0]) for (devid, v), held in self._set.items()}


def _way(gateway: Ip, ifname: str, verb: str) -> tuple[str, ...]:
    """A default route beside the guest's own, and before it: that one holds again afterwards."""
    way = ("default", "via", str(gateway), "dev", ifname)
    if gateway.version == 4:
        return ("route", verb, *way)  # the first of one metric counts
    return ("route", "replace" if verb == "prepend" else verb, *way, "metric", "1")


def _saved(path: Path) -> dict[tuple[int, int], tuple[Interface, Gateway]]:
    """What an agent before this one has set since the boot."""
    found: dict[tuple[int, int], tuple[Interface, Gateway]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for devid, address, gateway in json.loads(path.read_text())["set"]:
            way = ipaddress.ip_address(gateway) if gateway else None
            held = ipaddress.ip_interface(address)
            found[int(devid), held.version] = held, way
    return found


class HostName:
    """`control/setcomputername`, where the administrator allows it."""

    name = "hostname"

    def __init__(self, board: Board, *, run: Command = command) -> None:
        self._board = board
        self._run = run
        self._last = ""

    async def run(self, context: Context) -> None:
        if not context.settings.set_hostname:
            await _withdraw(context.store, self._board, self.name, FEATURE_NAME)
            return
        self._board.put(self.name, {FEATURE_NAME: "1"})
        async with context.store.watch(NAME) as events:
            async for _ in events:
                if await context.store.read_opt(f"{NAME}/action") == "set":
                    await self._set(context.store)

    async def _set(self, store: Xenstore) -> None:
        problem = ""
        try:
            name = parse_name(await store.read_opt(f"{NAME}/name") or "")
            if failure := await _outside(self._run, "hostnamectl", "set-hostname", name):
                raise PvfrontError(f"hostnamectl: {failure}")
            self._last = name
            log.warning("host name %s set on the toolstack's word", name)
        except PvfrontError as error:
            problem = str(error)
            log.warning("setcomputername: %s", problem)
        await store.write(f"{NAME}/error", problem)
        await store.write(f"{NAME}/state", "Failed" if problem else "Succeeded")
        await store.remove(f"{NAME}/action", missing_ok=True)

    def status(self) -> dict[str, Any]:
        return {"last": self._last}


async def _outside(run: Command, *words: str) -> str:
    """What systemd is to run for us; "" or what the program said."""
    failure = await run(*_OUTSIDE, *words)
    return printable(failure.removeprefix(f"{_OUTSIDE[0]}: "))


async def _withdraw(store: Xenstore, board: Board, section: str, feature: str) -> None:
    """What an earlier agent has offered, and this one may not, is offered no more."""
    with contextlib.suppress(PermissionError):
        if await store.read_opt(feature) == "1":
            board.put(section, {feature: "0"})


async def _children(store: Xenstore, path: str) -> list[str]:
    try:
        return sorted(await store.directory(path))
    except (FileNotFoundError, PermissionError):
        return []
