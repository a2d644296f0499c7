# SPDX-License-Identifier: BSD-2-Clause
"""One disk of the block backend: the C engine (native/host/blkback.h) and its hub connections.

Nothing here knows the store; vbd.py does the walk and says when to connect. All calls of one
`Engine` come from one thread. None of them waits for a request.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvfront.errors import PvfrontError
from pvfront.host._blkback import ffi, lib
from pvfront.host.faults import Fault, FaultError
from pvfront.host.hubdevice import EngineError, HubDevice, HubUser, counters, fault_table
from pvfront.host.params import Source

_STATS = (
    "requests", "responses", "reads", "writes", "flushes", "barriers", "discards", "indirect",
    "sectors_read", "sectors_written", "sectors_discarded", "rejected", "unsupported", "io_errors",
    "map_errors", "pushes", "notifies", "wakeups", "spurious", "maps", "persistent",
    "persistent_hits", "persistent_twice", "bogus", "in_flight", "canaries",
)  # fmt: skip

_KIND = {
    name.removeprefix("PVF_BB_").lower(): value
    for value, name in ffi.typeof("enum pvf_bb_kind").elements.items()
    if value
}


class Busy(EngineError):
    """Requests of the last connection are still in flight."""


@dataclass(frozen=True, slots=True)
class Features:
    """What a backend offers; the defaults are those of Linux's blkback on a good disk.

    Sizes are in bytes. `indirect`: segments for each request, 0: no indirect requests.
    `ring_order`: the largest ring has 2^order pages. `queues`: how many at most. `populate`: disks
    in memory have all of it from the start, so that a measurement sees no page faults.
    """

    flush: bool = True
    barrier: bool = True
    discard: bool = True
    persistent: bool = True
    indirect: int = 256
    queues: int = min(os.cpu_count() or 1, 16)
    ring_order: int = 4
    sector_size: int = 512
    physical_sector_size: int = 512
    discard_granularity: int = 4096
    discard_alignment: int = 0
    discard_secure: bool = False
    removable: bool = False
    cdrom: bool = False
    populate: bool = False
    max_persistent: int = 1056
    batch: int = 16

    def __post_init__(self) -> None:
        limits = {
            "indirect": (0, lib.PVF_BB_SEGMENTS),
            "queues": (1, lib.PVF_BB_QUEUES),
            "ring_order": (0, 4),
            "sector_size": (512, 4096),
            "physical_sector_size": (512, 1 << 30),
            "discard_granularity": (512, 1 << 30),
            "discard_alignment": (0, 1 << 30),
            "max_persistent": (0, 32768),
            "batch": (1, 512),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise PvfrontError(f"feature {name}={value!r} is not in {low}..{high}")
        for name in ("sector_size", "physical_sector_size"):
            value = getattr(self, name)
            if value & (value - 1):
                raise PvfrontError(f"feature {name}={value} is not a power of two")


@dataclass(frozen=True, slots=True)
class Queue:
    """One ring as its frontend published it."""

    port: int
    grefs: Sequence[int]


class Engine(HubUser):
    """A disk: opened at once, connected to at most one frontend. Raises EngineError."""

    def __init__(self, source: Source, features: Features, *, read_only: bool = False) -> None:
        super().__init__()
        self.source = source
        self.features = features
        self.read_only = read_only
        error = ffi.new("int *")
        path = ffi.NULL if source.path is None else os.fsencode(source.path)
        self._bb = lib.pvf_bb_new(path, source.size, self._encoded(), error)
        if not self._bb:
            where = source.path or f"{source.size} bytes of memory"
            raise EngineError(f"cannot open {where}: {os.strerror(-error[0])}", -error[0])

    def close(self) -> None:
        """Forgets what is in flight. Twice is harmless."""
        if self._bb:
            bb, self._bb = self._bb, None
            lib.pvf_bb_free(bb)
            self._drop_connection()

    @property
    def size(self) -> int:
        """Bytes."""
        return int(lib.pvf_bb_bytes(self._bb))

    def resize(self, size: int) -> None:
        """Smaller: what lies beyond is kept. A block device cannot grow."""
        self._check("resize", lib.pvf_bb_resize(self._bb, size))

    def set_features(self, features: Features) -> None:
        """From the next request on; what was published is another matter."""
        self.features = features
        lib.pvf_bb_set_features(self._bb, self._encoded())

    def set_faults(self, faults: Sequence[Fault], seed: int) -> None:
        """Replaces the table of rules. Raises FaultError."""
        table = fault_table(ffi, "struct pvf_bb_rule", _KIND, lib.PVF_BB_RULES, faults)
        bad = ffi.new("uint32_t *")
        if lib.pvf_bb_set_rules(self._bb, table, len(faults), seed & ((1 << 64) - 1), bad):
            raise FaultError(f"the engine refuses {faults[bad[0]]}")

    def release(self) -> None:
        """Everything that faults hold back goes on."""
        lib.pvf_bb_release(self._bb)

    def stats(self) -> dict[str, int]:
        """All counters; `fired_<kind>` counts faults."""
        found = ffi.new("struct pvf_bb_stats *")
        lib.pvf_bb_get_stats(self._bb, found)
        return counters(found, _STATS, _KIND)

    def connect(
        self, host: Path, own_domid: int, domid: int, queues: Sequence[Queue], *, persistent: bool
    ) -> None:
        """Binds and maps the rings of domain `domid`'s frontend.

        A ring that was used is taken up if it was left in order, else that is an EngineError
        (EBUSY). Raises Busy, EngineError (then nothing is connected).
        """
        self.disconnect()
        try:
            evtchn = self._map_domain(
                host, own_domid, domid,
                lambda *given: lib.pvf_bb_connect(self._bb, *given, persistent),
            )  # fmt: skip
            for queue in queues:
                self._ring(evtchn, domid, queue)
        except BaseException as exc:
            lib.pvf_bb_disconnect(self._bb)
            self._drop_connection()
            if isinstance(exc, OSError | ValueError):
                raise EngineError(f"the hub of {host}: {exc}", errno.EIO) from exc
            raise

    def left(self) -> dict[int, int]:
        """Rings of the last connection that were left in order: rsp_prod by their first reference.

        Whoever has them may take them up there; {} as soon as a new connection has started.
        """
        rings = ffi.new("struct pvf_bb_left[]", lib.PVF_BB_QUEUES)
        return {ring.ref: ring.rsp_prod for ring in rings[0 : lib.pvf_bb_left(self._bb, rings)]}

    def take_up(self, left: Mapping[int, int]) -> None:
        """What `left` was of the process that served the disk before, for the next `connect`."""
        rings = ffi.new("struct pvf_bb_left[]", list(left.items()) or 1)
        self._check("take up", lib.pvf_bb_take_up(self._bb, rings, len(left)))

    def start(self) -> None:
        """Begins to serve what is connected."""
        self._check("threads", lib.pvf_bb_start(self._bb))

    def disconnect(self) -> None:
        """Stops serving. Raises Busy: nothing new is taken, but what is in flight will be done."""
        code = lib.pvf_bb_disconnect(self._bb)
        if code == -errno.EBUSY:
            raise Busy("requests are in flight", errno.EBUSY)
        self._drop_connection()

    def _ring(self, evtchn: HubDevice, domid: int, queue: Queue) -> None:
        answer, fds = evtchn.ask(do="bind_interdomain", remote=domid, remote_port=queue.port)
        why = ffi.new("char[]", lib.PVF_BB_TEXT)
        try:
            channel, own, other = fds
            code = lib.pvf_bb_ring(
                self._bb, list(queue.grefs), len(queue.grefs), channel, answer["side"], own, other,
                why,
            )  # fmt: skip
        finally:
            for fd in fds:
                os.close(fd)
        if code:
            raise EngineError(ffi.string(why).decode(), -code)

    def _encoded(self) -> Any:
        f = self.features
        flags = {
            lib.PVF_BB_FLUSH: f.flush,
            lib.PVF_BB_BARRIER: f.barrier,
            lib.PVF_BB_DISCARD: f.discard,
            lib.PVF_BB_PERSISTENT: f.persistent,
            lib.PVF_BB_READ_ONLY: self.read_only,
            lib.PVF_BB_POPULATE: f.populate and self.source.path is None,
        }
        return ffi.new(
            "struct pvf_bb_features *",
            {
                "flags": sum(flag for flag, on in flags.items() if on),
                "max_indirect": f.indirect,
                "sector_size": f.sector_size,
                "discard_granularity": f.discard_granularity,
                "discard_alignment": f.discard_alignment,
                "max_persistent": f.max_persistent,
                "batch": f.batch,
            },
        )
