# SPDX-License-Identifier: BSD-2-Clause
"""The interface of one vif as the system sees it: name, carrier, speed, MTU, what is configured.

Theory of operation
    `Link` has the TAP from the first connection on. Its name is what the system called the
    interface before; whoever renames it later, we follow (by index, and after a restart by alias).
    MAC and MTU are set when it is made; from then on they are the administrator's, as are
    addresses and routes. An MTU above what the backend takes is set back, and said.

    What was configured on the kernel's interface is carried over when the vif is taken
    (`linkconfig.py`): `take_over` reads it into a note, `open` puts it on the TAP that it makes. On
    the way back `close` reads it off the TAP, and `hand_back` puts it on the kernel's interface.
    The note outlives us, so that a crash in between loses nothing.

    The link is up unless somebody says otherwise: the backend (`carrier` 0), or the frontend's
    `disconnect` 1 or `speed` 0, as with Windows' XENVIF. `speed` is a number with K, M or G for
    bits per second; without one it is G.

    After each connection the neighbours are told three times where the address is, as XENVIF does.

Blocking: netlink and sysfs, which wait for no other domain. From a thread (pyroute2 has an event
loop of its own), but for `follow` and what it calls, and `announce`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import sysfs
from ..errors import PvfrontError
from ..negotiate import Keys, Problem
from . import linkconfig, tap
from .linkconfig import LinkConfig
from .tap import Tap, TapError

log = logging.getLogger(__name__)

ANNOUNCE_AFTER = (0.0, 1.0, 1.0)  # seconds between
STATE_KEYS = ("carrier", "disconnect", "speed")
"""The keys of either end that `link_state` reads, and that may change at any time."""

_RTMGRP_LINK = 1  # linux/rtnetlink.h
_SPEED = re.compile(r"([0-9]{1,9})([kKmMgG]?)")
_UNIT = {"k": 1e-3, "m": 1.0, "g": 1e3, "": 1e3}


@dataclass(frozen=True, slots=True)
class LinkState:
    """`speed`: Mbit/s; None: nobody says. `why`: of a link that is down, for people."""

    up: bool
    speed: int | None = None
    why: str = ""


def link_state(
    backend: Mapping[str, str], frontend: Mapping[str, str]
) -> tuple[LinkState, list[Problem]]:
    """What the keys of both ends say of the link. Pure; nonsense is named, and taken as absent."""
    problems: list[Problem] = []
    speed = None
    if (text := frontend.get("speed")) is not None:
        found = _SPEED.fullmatch(text.strip())
        if found is None:
            problems.append(
                Problem("speed", text[:40], "no number with K, M or G (bit/s); not shown")
            )
        else:
            speed = int(int(found[1]) * _UNIT[found[2].lower()])
    if (carrier := backend.get("carrier", "1").strip()) not in ("0", "1"):
        problems.append(Problem("carrier", carrier[:40], "neither 0 nor 1; taken as 1"))
    keys = Keys(frontend)
    off = keys.flag("disconnect")
    problems += keys.problems
    if carrier == "0":
        return LinkState(False, speed, "the backend says carrier 0"), problems
    if off:
        return LinkState(False, speed, "the toolstack says disconnect 1"), problems
    if speed == 0:
        return LinkState(False, None, "the toolstack says speed 0"), problems
    return LinkState(True, speed), problems


class Link:
    """The TAP of the vif `vif` ("vif-0"). `name` is what it is called now, or is to be."""

    def __init__(self, vif: str, name: str, run_dir: Path) -> None:
        self.vif = vif
        self.name = name
        self.index = 0  # while there is one
        self.mtu = 0
        self.most = 0  # the largest MTU that the backend takes
        self.state = LinkState(False)
        self._mtu_key = 0  # what the toolstack's key said when it was last obeyed
        self._note = note_path(vif, run_dir)
        self._announcing: asyncio.Task[None] | None = None

    # -- beginning and end ---------------------------------------------------------------------

    def found(self) -> bool:
        """Whether there is one, left by an earlier supervisor."""
        ours = tap.find(self.vif)
        if ours is not None:
            self.index, self.name = ours
            self._look()
        return ours is not None

    def open(self, queues: int, *, mac: bytes, mtu: int, most: int) -> Tap:
        """The TAP with so many queues. Raises TapError.

        `mtu`: what the toolstack says; `most`: what the backend takes.
        """
        made = Tap.open(self.name, queues, owner=self.vif, mac=mac)
        try:
            self.name, self.most = made.name, most
            obey = made.made or (self._mtu_key and mtu != self._mtu_key)
            made.configure(mtu=mtu if obey else None, most=most)
            self._mtu_key = mtu
            self.index = tap.index_of(self.name)
            if made.made:
                self._put_back()
            self._look()
        except BaseException:
            made.close()
            raise
        return made

    def _put_back(self) -> None:
        config = LinkConfig.load(self._note)
        if config is not None:
            _configure(self.name, config, self.vif)
            self._note.unlink(missing_ok=True)

    def close(self) -> None:
        """The interface goes; what was configured on it is noted. Raises TapError."""
        self.silence()
        if not self.found():
            return
        with contextlib.suppress(PvfrontError):
            config = linkconfig.look(self.name)
            if config is not None:
                config.save(self._note)
        tap.delete(self.name)
        self.index = 0

    # -- while it is there ---------------------------------------------------------------------

    def set_state(self, state: LinkState) -> None:
        """Carrier and speed. Raises TapError."""
        tap.set_speed(self.name, state.speed)
        tap.set_carrier(self.name, state.up)
        if state != self.state:
            if state.why:
                log.info("%s: %s: no link: %s", self.vif, self.name, state.why)
            elif not self.state.up and self.state.why:
                log.info("%s: %s: the link is back", self.vif, self.name)
        self.state = state

    def _look(self) -> None:
        config = linkconfig.look(self.name)
        if config is not None:
            self.mtu = config.mtu

    def changed(self, name: str, mtu: int) -> bool:
        """The kernel says what the interface is called and its MTU is now; whether that is news.

        An MTU that the backend cannot take is set back.
        """
        news = (name, mtu) != (self.name, self.mtu)
        if name != self.name:
            log.info("%s: %s is called %s now", self.vif, self.name, name)
        self.name, self.mtu = name, mtu
        if self.most and mtu > self.most:
            log.warning(
                "%s: %s: an MTU of %d is more than the backend takes: it is %d",
                self.vif, name, mtu, self.most,
            )  # fmt: skip
            asyncio.get_running_loop().run_in_executor(None, _set_mtu, name, self.most)
        return news

    def announce(self) -> None:
        """Tells the neighbours where its addresses are, in a task."""
        self.silence()
        self._announcing = asyncio.create_task(self._announce(), name=f"{self.vif} announce")

    def silence(self) -> None:
        if self._announcing is not None:
            # The task belongs to a loop, which a thread must not touch.
            task, self._announcing = self._announcing, None
            task.get_loop().call_soon_threadsafe(task.cancel)

    async def _announce(self) -> None:
        for pause in ANNOUNCE_AFTER:
            await asyncio.sleep(pause)
            try:
                if self.state.up:
                    await asyncio.to_thread(tap.announce, self.name)
            except TapError as error:
                log.warning("%s: its neighbours are not told: %s", self.vif, error)
                return


def _set_mtu(name: str, mtu: int) -> None:
    with contextlib.suppress(PvfrontError):  # it has gone, or another name again
        tap.set_mtu(name, mtu)


# -- from the kernel and back --------------------------------------------------------------------


def note_path(vif: str, run_dir: Path) -> Path:
    """Where the configuration of an interface lies that is about to change hands."""
    return run_dir / f"{vif}.link"


def kernels_name(vif: str, os_device: str, roots: sysfs.Roots = sysfs.SYSTEM) -> str:
    """What the kernel's interface of this vif is called, once udev has named it."""
    children = roots.sys / "bus" / "xen" / "devices" / vif / "net"
    index = sysfs.read_int(children / os_device / "ifindex")
    if index is not None and linkconfig.settle(index, roots):
        found = sysfs.listdir(children)
        return found[0] if found else os_device
    return os_device


def default_name(
    devid: int, roots: sysfs.Roots = sysfs.SYSTEM, *, taken: Collection[str] = ()
) -> str:
    """What the system would call a vif that the kernel has never had: enX1, or ethN as the kernel
    itself where interfaces are not renamed (net.ifnames=0). `taken`: names that are given already.
    """
    command_line = (sysfs.read(roots.proc / "cmdline") or "").split()
    if "net.ifnames=0" not in command_line:
        return f"enX{devid}"
    there = {*sysfs.listdir(roots.sys / "class" / "net"), *taken}
    return next(name for number in range(1 << 16) if (name := f"eth{number}") not in there)


def take_over(vif: str, name: str, run_dir: Path) -> None:
    """Notes what is configured on the kernel's interface, before it goes. Raises PvfrontError."""
    config = linkconfig.look(name)
    if config is not None:
        config.save(note_path(vif, run_dir))


def hand_back(vif: str, name: str, run_dir: Path) -> str:
    """Configures the kernel's interface `name` as ours was; its name after that."""
    note = note_path(vif, run_dir)
    config = LinkConfig.load(note)
    if config is None:
        return name
    if config.name != name:
        try:
            linkconfig.rename(name, config.name)
            name = config.name
        except PvfrontError as error:
            log.warning("%s: %s keeps its name: %s", vif, name, error)
    _configure(name, config, vif)
    note.unlink(missing_ok=True)
    return name


def _configure(name: str, config: LinkConfig, vif: str) -> None:
    try:
        problems = linkconfig.put_back(name, config)
    except PvfrontError as error:
        problems = [str(error)]
    for problem in problems:
        log.warning("%s: %s: not as it was: %s", vif, name, problem)


async def follow(changed: Callable[[int, str, int], None]) -> None:
    """Tells of every interface, and of each that changes: its index, its name, its MTU. Ends by
    cancellation.
    """
    from ..rtnetlink import AsyncIPRoute

    def tell(message: Any) -> None:
        name, mtu = message.get_attr("IFLA_IFNAME"), message.get_attr("IFLA_MTU")
        if message.get("event") == "RTM_NEWLINK" and name and mtu:
            changed(message["index"], name, mtu)

    while True:
        try:
            async with AsyncIPRoute() as ipr:
                await ipr.bind(groups=_RTMGRP_LINK)
                async for message in await ipr.get_links():  # what changed before
                    tell(message)
                while True:
                    async for message in ipr.get():
                        tell(message)
        except OSError as error:
            log.warning("changes of interfaces are missed: %s", error)
        await asyncio.sleep(1.0)
