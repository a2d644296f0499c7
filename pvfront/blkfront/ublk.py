# SPDX-License-Identifier: BSD-2-Clause
"""The kernel's ublk device as a disk's target.

Theory of operation
-------------------
`attach` makes the device and opens /dev/ublkcN for the worker; `publish` starts it, which
is when the disk /dev/ublkbN appears, once the worker has fetched every request slot. Until then
there is nothing that a user could read from.

- **The worker keeps its end** (`stays`). A generation that ends leaves unanswered requests with the
  worker, which brings them to the next one; the kernel hears nothing of it, and nothing is opened
  or recovered.
- **The worker dies**: the kernel closes /dev/ublkcN, collects the requests that were on their way
  and holds all others (UBLK_F_USER_RECOVERY, _REISSUE). `attach` then prepares the device for a new
  server, trying again as long as the kernel is still collecting (EBUSY), and `publish` ends the
  recovery. If every slot was on its way the kernel notices only when a request's timer
  expires: `queue/io_timeout` bounds that.
- It carries what NBD cannot: the physical sector size, discard granularity and alignment.
- Its size is for life. A resize of a disk that nobody has open makes a new device; as long as
  somebody has, be it without a claim, it is said and waits (`resize_waits`): what he has open would
  fail. A read past the end of a disk that shrank fails in the worker.
- The kernel does not look for partitions of a disk whose server has no CAP_SYS_ADMIN, as our
  workers have none, and refuses BLKRRPART too. They could have it: for one fetch io_uring would
  take the credentials of before (IORING_REGISTER_PERSONALITY). But START_DEV then reads the table
  while it holds the device's mutex, which the kernel wants to collect a dead worker's requests: a
  worker that dies at that moment hangs both for ever. So `publish` does it with partx(8), and
  udev's rule whenever a program that wrote to the disk has closed it.
- STOP_DEV waits for requests that the worker has. `close` lets it answer them first; where it does
  not, TargetError asks the caller to end the worker and to close again.
- Only one queue, whatever the backend offers: a device keeps the number of its queues, and a
  backend may come back with fewer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

from .. import sysfs
from .blockdisk import POLL, BlockDisk, within
from .features import DiskGeometry
from .target import Clients, TargetError, command
from .ublkcontrol import (
    COMMAND_SECONDS,
    DEAD,
    LIVE,
    QUIESCED,
    UblkControl,
    UblkDisk,
    UblkError,
    devices,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

OWNER = 0x70766672 << 32  # "pvfr", and the vbd's number below it
OWNER_MASK = 0xFFFFFFFF << 32
IO_TIMEOUT_MS = 2000
MAX_SECTORS_KB = 1024
LAST_CLOSE = 1.0  # seconds for udev to let go of a disk before it counts as a user

_PARTX_SECONDS = 10.0
_DEATH = 10.0  # seconds in which the kernel collects a dead worker's requests


class UblkTarget(BlockDisk):
    """One ublk device.

    `vdev` is what a later supervisor finds it by; `label` ("xvdb") names the link.
    """

    clients: Clients | None = None
    kind = "ublk"
    prefix = "ublkb"
    stays = True
    max_queues = usual_queues = 1

    def __init__(self, vdev: int, label: str, *, roots: sysfs.Roots = sysfs.SYSTEM) -> None:
        super().__init__(f"pvfront:vbd-{vdev}", label, roots)
        self.owner = OWNER | vdev
        self.server_pid = 0

    # -- life ------------------------------------------------------------------------------

    async def adopt(self) -> bool:
        """Also ends what is left of our devices that were never started, or are stopped already."""
        self._index = await _command(self._find, "ublk devices")
        if self._index is None:
            return False
        self._find_off()
        return True

    def _find(self) -> int | None:
        found = None
        if not (self._roots.dev / "ublk-control").exists():
            return None
        with UblkControl(self._roots) as control:
            for index in devices(self._roots):
                try:
                    info = control.info(index)
                except UblkError:
                    continue  # it went just now
                if info.owner != self.owner:
                    continue
                if info.state == DEAD:
                    with contextlib.suppress(UblkError):
                        control.delete(index)
                else:
                    found = index
        return found

    async def attach(
        self, geometry: DiskGeometry, *, queues: int = 1, deadline: float = 10.0
    ) -> list[int]:
        """/dev/ublkcN, once.

        Raises UblkUnavailable, UblkError, or TargetError if the kernel keeps the former worker.
        """
        if self._index is not None or await self.adopt():
            index = self._need_device()
            if await self._recover(index, deadline):
                return [self._open(index)]
        return [await self._make(geometry)]

    async def _make(self, geometry: DiskGeometry) -> int:
        disk = UblkDisk(
            sectors=geometry.sectors,
            sector_size=geometry.sector_size,
            physical_sector_size=geometry.physical_sector_size,
            discard_granularity=(
                max(geometry.discard_granularity, geometry.sector_size) if geometry.discard else 0
            ),
            discard_alignment=geometry.discard_alignment,
            read_only=geometry.read_only,
            flush=geometry.flush,
        )

        def make() -> tuple[int, int]:
            with UblkControl(self._roots) as control:
                info = control.add(queues=1, owner=self.owner)
                try:
                    control.set_disk(info.id, disk)
                    return info.id, self._open(info.id)
                except BaseException:
                    with contextlib.suppress(UblkError):
                        control.delete(info.id)
                    raise

        self._index, fd = await _command(make, "ublk add")
        self._off.clear()
        self.resize_waits = False
        return fd

    async def _recover(self, index: int, deadline: float) -> bool:
        """Prepares the device for a new server; False: it is not there, or not ours, any more."""
        until = time.monotonic() + deadline

        def prepare() -> bool:
            with UblkControl(self._roots) as control:
                info = control.info(index)
                if info.owner != self.owner or info.state == DEAD:
                    raise UblkError(f"recovery of ublkb{index}", errno.ENODEV)
                try:
                    control.recover(index)
                except UblkError as error:
                    if error.errno == errno.EBUSY:
                        return False
                    # Prepared before, for a worker that died before it fetched anything.
                    if error.errno != errno.EINVAL or info.state != QUIESCED:
                        raise
                return True

        while True:
            try:
                if await _command(prepare, "ublk recovery"):
                    return True
            except UblkError as error:
                if error.errno not in (errno.ENODEV, errno.EINVAL):
                    raise
                log.warning("%s: it was stopped by somebody else; making a new device", self.name)
                await self._delete(index)
                self._index = None
                return False
            if time.monotonic() > until:
                raise TargetError(
                    f"{self.name}: the kernel did not let go of its former worker within "
                    f"{deadline:.0f} s",
                    hint="the worker that served it must have ended",
                )
            await asyncio.sleep(POLL)

    def _open(self, index: int) -> int:
        try:
            return os.open(self._roots.dev / f"ublkc{index}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TargetError(f"ublkc{index}: {sysfs.errno_text(error)}") from error

    async def publish(self, geometry: DiskGeometry) -> None:
        """Raises TargetError if the sector size of a disk in use would change."""
        index = self._need_device()
        pid = self.server_pid

        def start() -> bool:
            with UblkControl(self._roots) as control:
                state = control.info(index).state
                if state == DEAD:
                    control.start(index, pid)
                elif state == QUIESCED:
                    control.recovered(index, pid)
                return state == DEAD

        changed = self._describe(geometry)  # before the disk appears, and udev looks
        new = await _command(start, "ublk start")
        if changed and not new:
            sysfs.write(self._sys / "uevent", "change")
        if new:
            self._tune()
            await self._partitions()
        self._make_link()
        sectors = sysfs.read_int(self._sys / "size")
        block = sysfs.read_int(self._sys / "queue" / "logical_block_size")
        if sectors != geometry.sectors or block != geometry.sector_size:
            await self._other_size(geometry, sectors or 0, block or 0)
            return
        self.resize_waits = False
        if not geometry.flush:
            self._off.add("flush")
        if not geometry.discard:
            self._off.add("discard")
        self._apply_off()

    async def _other_size(self, geometry: DiskGeometry, sectors: int, block: int) -> None:
        until = time.monotonic() + (0 if self.resize_waits else LAST_CLOSE)
        while (why := await asyncio.to_thread(self.open_anywhere)) is not None:
            if time.monotonic() > until:
                break
            await asyncio.sleep(POLL)
        if why is not None:
            if block != geometry.sector_size:
                raise TargetError(
                    f"{self.name}: the sector size changed from {block} to "
                    f"{geometry.sector_size} bytes while connected",
                    hint=f"release {self.label} and serve it again",
                )
            if not self.resize_waits:
                log.warning(
                    "%s: %d sectors, now %d; ublk cannot resize a disk in use (%s): users see the "
                    "new size when they have closed it",
                    self.name,
                    sectors,
                    geometry.sectors,
                    why,
                )
            self.resize_waits = True
            return
        log.info(
            "%s: %d sectors, now %d: making the device anew", self.name, sectors, geometry.sectors
        )
        # The worker reports the end of its device, which begins a generation with a new one.
        await self.close()

    async def close(self, *, drain: float = 10.0) -> None:
        """Raises TargetError if the worker does not answer what it has: end it, then again.

        Idempotent. Requests that no worker answers any more fail with EIO.
        """
        if self._index is None and not await self.adopt():
            self._remove_link()
            return
        index = self._need_device()
        drained = await within(drain, lambda: self.in_flight() == 0)
        if not drained:
            state = await self._state(index)
            if state == LIVE and self._served():
                raise TargetError(
                    f"{self.name}: {self.in_flight()} requests did not end within {drain:.0f} s",
                    hint="its worker must be ended first",
                )
            await self._collected(index)
            log.warning("%s: %d requests fail now", self.name, self.in_flight())

        def stop() -> None:
            with UblkControl(self._roots) as control:
                control.stop(index)

        with contextlib.suppress(UblkError):
            await _command(stop, "ublk stop")
        await self._delete(index)
        self._remove_link()
        self._properties.unlink(missing_ok=True)
        self._index = None
        self._off.clear()
        self.resize_waits = False

    # -- steps -----------------------------------------------------------------------------

    def _served(self) -> bool:
        return self.server_pid > 0 and (self._roots.proc / str(self.server_pid)).exists()

    async def _collected(self, index: int) -> None:
        """Waits until the kernel has noticed that the worker has died."""
        until = time.monotonic() + _DEATH
        while await self._state(index) == LIVE and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(POLL)

    async def _state(self, index: int) -> int:
        def look() -> int:
            with UblkControl(self._roots) as control:
                return control.info(index).state

        try:
            return await _command(look, "ublk state")
        except UblkError:
            return DEAD

    async def _delete(self, index: int) -> None:
        def delete() -> None:
            with UblkControl(self._roots) as control:
                control.delete(index)

        with contextlib.suppress(UblkError):
            await _command(delete, "ublk delete")

    async def _partitions(self) -> None:
        def scan() -> None:
            command = ["partx", "--update", self.path]
            try:
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_PARTX_SECONDS,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                log.warning("%s: partitions were not looked for: %s", self.name, error)

        await _command(scan, "partx")

    def _need_device(self) -> int:
        if self._index is None:
            raise TargetError(f"{self.label}: there is no device yet", hint="attach it first")
        return self._index

    def _tune(self) -> None:
        queue = self._sys / "queue"
        sysfs.write(queue / "io_timeout", IO_TIMEOUT_MS)
        most = sysfs.read_int(queue / "max_hw_sectors_kb") or MAX_SECTORS_KB
        sysfs.write(queue / "max_sectors_kb", min(most, MAX_SECTORS_KB))


def present(roots: sysfs.Roots = sysfs.SYSTEM) -> frozenset[int]:
    """Numbers of the vbds that have a disk on ublk, by whatever supervisor."""
    found = set()
    if not devices(roots):
        return frozenset()
    with UblkControl(roots) as control:
        for index in devices(roots):
            with contextlib.suppress(UblkError):
                info = control.info(index)
                if info.owner & OWNER_MASK == OWNER and info.state != DEAD:
                    found.add(info.owner & ~OWNER_MASK)
    return frozenset(found)


async def _command(work: Callable[[], T], what: str) -> T:
    return await command(work, what, COMMAND_SECONDS + 5.0, "the kernel waits for the worker")
