# SPDX-License-Identifier: BSD-2-Clause
"""One interface of the network backend: the C engine (native/host/netback.h) and its hub.

Nothing here knows the store or the TAP; vif.py does the walk and says when to connect. All calls of
one `Engine` come from one thread, and none of them waits for a packet.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvfront.errors import PvfrontError
from pvfront.host._netback import ffi, lib
from pvfront.host.faults import FaultError
from pvfront.host.hubdevice import EngineError, HubDevice, HubUser, counters, fault_table
from pvfront.host.netfaults import NetFault

_KIND = {
    name.removeprefix("PVF_NB_").lower(): value
    for value, name in ffi.typeof("enum pvf_nb_kind").elements.items()
    if name not in ("PVF_NB_NONE", "PVF_NB_KINDS")
}
_STATS = [name for name, _ in ffi.typeof("struct pvf_nb_stats").fields if name != "fired"]


@dataclass(frozen=True, slots=True)
class Features:
    """What a backend offers; the defaults are those of Linux's netback.

    `queues`: how many at most. `csum`: of IPv4; `ipv6_csum`: of IPv6. `rx_copy`: without it there
    is nothing that a frontend of today could have.
    """

    rx_copy: bool = True
    sg: bool = True
    gso_tcpv4: bool = True
    gso_tcpv6: bool = True
    csum: bool = True
    ipv6_csum: bool = True
    multicast_control: bool = True
    dynamic_multicast_control: bool = True
    split_event_channels: bool = True
    ctrl_ring: bool = True
    xdp_headroom: bool = True
    queues: int = min(os.cpu_count() or 1, 16)
    gref_mapping: int = 1024
    """Grants that each queue keeps mapped if its frontend asks for that; Linux keeps none."""

    def __post_init__(self) -> None:
        limits = {"queues": (1, lib.PVF_NB_QUEUES), "gref_mapping": (0, 32768)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not low <= value <= high:
                raise PvfrontError(f"feature {name}={value!r} is not in {low}..{high}")


@dataclass(frozen=True, slots=True)
class Queue:
    """A pair of rings as its frontend published it; `rx_port`: None, `port` is of both."""

    tx_ref: int
    rx_ref: int
    port: int
    rx_port: int | None = None


@dataclass(frozen=True, slots=True)
class Control:
    """The control ring as its frontend published it."""

    ref: int
    port: int


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a frontend can receive."""

    sg: bool = False
    gso_tcpv4: bool = False
    gso_tcpv6: bool = False

    @property
    def flags(self) -> int:
        flags = {
            lib.PVF_NB_SG: self.sg,
            lib.PVF_NB_GSO4: self.gso_tcpv4,
            lib.PVF_NB_GSO6: self.gso_tcpv6,
        }
        return sum(flag for flag, on in flags.items() if on)


class Engine(HubUser):
    """An interface, connected to at most one frontend. Raises EngineError."""

    def __init__(self) -> None:
        super().__init__()
        self._taps: list[int] = []
        self._nb = lib.pvf_nb_new()
        if not self._nb:
            raise EngineError("no memory for an interface", errno.ENOMEM)

    def close(self) -> None:
        """Twice is harmless."""
        if self._nb:
            self.disconnect()
            nb, self._nb = self._nb, None
            lib.pvf_nb_free(nb)

    def set_faults(self, faults: Sequence[NetFault], seed: int = 0) -> None:
        """Replaces the table of rules; nothing of it is random. Raises FaultError."""
        table = fault_table(ffi, "struct pvf_nb_rule", _KIND, lib.PVF_NB_RULES, faults)
        if lib.pvf_nb_set_rules(self._nb, table, len(faults)):
            raise FaultError(f"the engine refuses {list(faults)}")

    def release(self) -> None:
        """No fault holds anything back."""

    def stats(self) -> dict[str, int]:
        """All counters; `fired_<kind>` counts faults."""
        found = ffi.new("struct pvf_nb_stats *")
        lib.pvf_nb_get_stats(self._nb, found)
        return counters(found, _STATS, _KIND)

    def mistake(self) -> str:
        """What the frontend did that ended its vif; "": nothing."""
        why = ffi.new("char[]", lib.PVF_NB_TEXT)
        lib.pvf_nb_fatal(self._nb, why)
        return str(ffi.string(why).decode(errors="replace"))

    def connect(
        self,
        host: Path,
        own_domid: int,
        domid: int,
        queues: Sequence[Queue],
        taps: Sequence[int],
        wishes: Wishes,
        *,
        control: Control | None = None,
        gref_mapping: int = 0,
    ) -> None:
        """Binds and maps the rings of domain `domid`'s frontend; `taps`: a descriptor for each
        queue, the engine's from now on, whatever happens; gref_mapping: grants that each queue may
        keep mapped. Raises EngineError (then nothing is connected).
        """
        self.disconnect()
        self._taps = list(taps)
        try:
            evtchn = self._map_domain(
                host, own_domid, domid,
                lambda *given: lib.pvf_nb_connect(self._nb, *given, wishes.flags, gref_mapping),
            )  # fmt: skip
            for queue, tap in zip(queues, taps, strict=True):
                self._queue(evtchn, domid, queue, tap)
            if control is not None:
                self._control(evtchn, domid, control)
        except BaseException as exc:
            self.disconnect()
            if isinstance(exc, OSError | ValueError):
                raise EngineError(f"the hub of {host}: {exc}", errno.EIO) from exc
            raise

    def set_filter(self, on: bool) -> None:
        """Whether only multicast packets of groups that were added are passed on; at any time."""
        lib.pvf_nb_set_filter(self._nb, on)

    def set_headroom(self, room: int) -> None:
        """Bytes of room that received packets have before them; at any time."""
        lib.pvf_nb_set_headroom(self._nb, room)

    def start(self) -> None:
        """Begins to serve what is connected."""
        self._check("threads", lib.pvf_nb_start(self._nb))

    def disconnect(self) -> None:
        """Nothing is connected, mapped or bound any more when it returns."""
        lib.pvf_nb_disconnect(self._nb)
        self._drop_connection()
        while self._taps:
            os.close(self._taps.pop())

    def _queue(self, evtchn: HubDevice, domid: int, queue: Queue, tap: int) -> None:
        ports = [queue.port] if queue.rx_port is None else [queue.port, queue.rx_port]
        channels = ffi.new("struct pvf_nb_channel[]", len(ports))
        why = ffi.new("char[]", lib.PVF_NB_TEXT)
        opened: list[int] = []
        try:
            for channel, port in zip(channels, ports, strict=True):
                _bind(evtchn, domid, port, channel, opened)
            code = lib.pvf_nb_queue(
                self._nb, queue.tx_ref, queue.rx_ref, channels, len(ports), tap, why
            )
        finally:
            for fd in opened:
                os.close(fd)
        if code:
            raise EngineError(ffi.string(why).decode(), -code)

    def _control(self, evtchn: HubDevice, domid: int, control: Control) -> None:
        channel = ffi.new("struct pvf_nb_channel *")
        why = ffi.new("char[]", lib.PVF_NB_TEXT)
        opened: list[int] = []
        try:
            _bind(evtchn, domid, control.port, channel, opened)
            code = lib.pvf_nb_control(self._nb, control.ref, channel, why)
        finally:
            for fd in opened:
                os.close(fd)
        if code:
            raise EngineError(ffi.string(why).decode(), -code)


def _bind(evtchn: HubDevice, domid: int, port: int, channel: Any, opened: list[int]) -> None:
    """Our end of a port of the frontend's; its descriptors are put into `opened` too."""
    answer, fds = evtchn.ask(do="bind_interdomain", remote=domid, remote_port=port)
    opened += fds
    channel.channel_fd, channel.own_fd, channel.other_fd = fds
    channel.side = answer["side"]
