# SPDX-License-Identifier: BSD-2-Clause
"""Addresses of vifs, as netlink tells of them.

A vif's addresses are those of its interface and of the bridges, bonds and teams that it is a port
of: there they are configured. What VLANs and tunnels on top of it have is of other networks.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import sysfs
from ..hooks import Hooks
from ..netfront.tap import ALIAS
from .board import Board
from .context import Context
from .helper import Command, command, hooks_outside
from .keys import Address, Vif, VifKeys

log = logging.getLogger(__name__)

SETTLE = 0.3  # seconds in which changes are gathered
MOST_ADDRESSES = 4096
"""That are looked at; of the rest none is published anyway."""
_MASTERS = ("bridge", "bond", "team")
_GROUPS = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_HOST = 254  # RT_SCOPE_HOST
_UNUSABLE = 0x08 | 0x40  # IFA_F_DADFAILED, IFA_F_TENTATIVE
_LEVELS = 8  # of a bridge of bonds of …


@dataclass(frozen=True, slots=True)
class Link:
    index: int
    name: str
    mac: str = ""
    kind: str = ""  # IFLA_INFO_KIND: "bridge"
    master: int = 0
    alias: str = ""
    up: bool = True  # has a carrier


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    index: int  # the link's
    address: Address
    usable: bool = True


def vifs(
    links: Collection[Link],
    addresses: Collection[InterfaceAddress],
    devid_of: Callable[[Link], int | None],
) -> list[Vif]:
    """The vifs among the links, with the addresses that belong to each. Pure."""
    by_index = {link.index: link for link in links}
    by_link: dict[int, list[Address]] = {}
    for one in addresses:
        if one.usable:
            by_link.setdefault(one.index, []).append(one.address)
    found: dict[int, Vif] = {}
    for link in sorted(links, key=lambda link: link.index):
        devid = devid_of(link)
        if devid is None or devid in found:
            continue
        gathered = [a for index in _up(link, by_index) for a in by_link.get(index, ())]
        found[devid] = Vif(devid, link.name, link.mac, tuple(gathered), link.up)
    return list(found.values())


def _up(link: Link, by_index: Mapping[int, Link]) -> list[int]:
    """The link, and the bridges and bonds above it."""
    found = [link.index]
    while len(found) <= _LEVELS:
        above = by_index.get(link.master)
        if above is None or above.kind not in _MASTERS or above.index in found:
            break
        found.append(above.index)
        link = above
    return found


def devid_from(sys: Path) -> Callable[[Link], int | None]:
    """Which vif an interface is: the kernel's by its nodename, ours by its alias."""

    def devid(link: Link) -> int | None:
        if link.alias.startswith(f"{ALIAS}vif-"):
            return _number(link.alias.removeprefix(f"{ALIAS}vif-"))
        if not link.name or "/" in link.name or link.name in (".", ".."):
            return None
        node = sysfs.read(sys / "class" / "net" / link.name / "device" / "nodename") or ""
        return _number(node.removeprefix("device/vif/")) if "vif" in node else None

    return devid


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else None


def link_of(message: Any) -> Link:
    """Of a netlink message RTM_NEWLINK."""
    info = message.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info is not None else None
    return Link(
        int(message["index"]),
        str(message.get_attr("IFLA_IFNAME") or ""),
        str(message.get_attr("IFLA_ADDRESS") or ""),
        str(kind or ""),
        int(message.get_attr("IFLA_MASTER") or 0),
        str(message.get_attr("IFLA_IFALIAS") or ""),
        message.get_attr("IFLA_CARRIER") != 0,
    )


def address_of(message: Any) -> InterfaceAddress | None:
    """Of a netlink message RTM_NEWADDR; None: no address that others could use."""
    family = {2: 4, 10: 6}.get(int(message["family"]))
    # IFA_LOCAL is our end where IFA_ADDRESS is the peer's.
    address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    scope = int(message["scope"])
    if family is None or not address or scope == _HOST:
        return None
    flags = int(message.get_attr("IFA_FLAGS") or message["flags"])
    worth = 2 if scope == 0 else 1 if scope < 253 else 0
    return InterfaceAddress(
        int(message["index"]),
        Address(family, str(address), int(message["prefixlen"]), worth),
        not flags & _UNUSABLE,
    )


class Network:
    """Puts `attr/vif` on the board whenever the kernel says that links or addresses changed.

    Has the hooks of `post-link` run when a vif's link has come or gone.
    """

    name = "network"

    def __init__(self, board: Board, keys: VifKeys, *, run: Command = command) -> None:
        self._board = board
        self._keys = keys
        self._run = run
        self._up: dict[int, bool] = {}
        self._vifs: list[Vif] = []
        self._looks = 0

    async def run(self, context: Context) -> None:
        from ..rtnetlink import AsyncIPRoute

        devid_of = devid_from(context.platform.roots.sys)
        async with AsyncIPRoute() as listener, AsyncIPRoute() as asking:
            await listener.bind(groups=_GROUPS)
            news = asyncio.Event()
            news.set()
            listening = asyncio.create_task(_listen(listener, news))
            try:
                while True:
                    waiting = asyncio.create_task(news.wait())
                    await asyncio.wait({waiting, listening}, return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
                    if listening.done():
                        listening.result()
                    await asyncio.sleep(SETTLE)
                    news.clear()
                    self._show(await _look(asking, devid_of))
                    if Hooks(context.platform.config_dir / "hooks.d").programs("post-link.d"):
                        await self._tell_hooks()
                    self._up = {vif.devid: vif.up for vif in self._vifs}
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)

    def _show(self, found: list[Vif]) -> None:
        self._looks += 1
        self._vifs = found
        self._board.put("network", self._keys.keys(found))

    def ifname(self, devid: int) -> str:
        """What vif `devid` is called now; "" if there is none."""
        return next((vif.ifname for vif in self._vifs if vif.devid == devid), "")

    async def _tell_hooks(self) -> None:
        for vif in self._vifs:
            if self._up.get(vif.devid, vif.up) is vif.up:
                continue
            facts = {"NAME": f"vif{vif.devid}", "DEVICE": vif.ifname}
            facts["LINK"] = "up" if vif.up else "down"
            if failure := await hooks_outside("post-link", facts, run=self._run):
                log.warning("hooks of post-link are not run: %s", failure)

    def status(self) -> dict[str, Any]:
        return {
            "vifs": {f"vif{vif.devid}": len(vif.addresses) for vif in self._vifs},
            "looks": self._looks,
        }


async def _listen(netlink: Any, news: asyncio.Event) -> None:
    while True:
        try:
            async for _ in netlink.get():
                news.set()
        except OSError as error:
            # More than the socket holds was told at once, and some is lost: a look tells it all.
            if error.errno != errno.ENOBUFS:
                raise
            news.set()


async def _look(netlink: Any, devid_of: Callable[[Link], int | None]) -> list[Vif]:
    links = [link_of(message) async for message in await netlink.get_links()]
    addresses: list[InterfaceAddress] = []
    async for message in await netlink.get_addr():
        if (one := address_of(message)) is not None and len(addresses) < MOST_ADDRESSES:
            addresses.append(one)
    return vifs(links, addresses, devid_of)
