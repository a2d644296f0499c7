# SPDX-License-Identifier: BSD-2-Clause
"""The kernel's ublk driver, commanded through /dev/ublk-control.

Theory of operation
-------------------
A ublk device is a pair: /dev/ublkcN, which the server (our worker) has open, and the disk
/dev/ublkbN. ADD_DEV makes the first, START_DEV the second, STOP_DEV and DEL_DEV end them in the
reverse order (uapi linux/ublk_cmd.h, Linux 6.12 drivers/block/ublk_drv.c). Callers depend on this:

- Every command is an io_uring command, and may wait: for a server to fetch its requests, for
  requests to end. The C side (native/ublk_control.h) gives each a deadline; callers still run them
  in threads of their own, because a command that is not interruptible outlasts it.
- /dev/ublkcN is opened once at a time. A server that dies closes it, and only then, when the kernel
  has collected all its requests (state QUIESCED), START_USER_RECOVERY accepts a new one.
- `owner` is stored in the device and given back by GET_DEV_INFO: it is how a later supervisor
  finds its disks.
- SET_PARAMS is refused once the device was started: the size of a disk is for its life.
- The kernel scans no partitions of a disk whose server is without CAP_SYS_ADMIN, and refuses
  BLKRRPART too (GD_SUPPRESS_PART_SCAN).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from .. import sysfs
from ..errors import PvfrontError
from ._ublk import ffi, lib
from .blockdisk import modprobe

CONTROL = "ublk-control"
COMMAND_SECONDS = 15.0

DEAD, LIVE, QUIESCED = 0, 1, 2  # UBLK_S_DEV_*


class UblkUnavailable(PvfrontError):
    """The kernel has no ublk driver, or not one that can do what the target wants."""


class UblkError(PvfrontError):
    """The kernel refused a command. `errno` is its positive error number."""

    def __init__(self, operation: str, number: int) -> None:
        late = f"the kernel did not finish it within {COMMAND_SECONDS:.0f} s"
        text = late if number == errno.ETIME else f"{sysfs.errno_name(number)}"
        if number != errno.ETIME:
            text += f" ({os.strerror(number)})"
        super().__init__(
            f"ublk {operation} failed: {text}",
            hint="run it as root (CAP_SYS_ADMIN)" if number == errno.EPERM else None,
        )
        self.operation = operation
        self.errno = number


@dataclass(frozen=True, slots=True)
class UblkInfo:
    """What the kernel says of a device. `id` is N of /dev/ublkcN."""

    id: int
    state: int
    queues: int
    depth: int
    flags: int
    owner: int


@dataclass(frozen=True, slots=True)
class UblkDisk:
    """What a disk is: sizes in bytes but for `sectors`, which counts 512 bytes."""

    sectors: int
    sector_size: int
    physical_sector_size: int
    discard_granularity: int  # 0: no discard
    discard_alignment: int
    read_only: bool
    flush: bool


class UblkControl:
    """/dev/ublk-control, for the length of a `with` block. Every command raises UblkError.

    Entering loads the module if need be; raises UblkUnavailable if there is none.
    """

    def __init__(self, roots: sysfs.Roots = sysfs.SYSTEM) -> None:
        self._path = roots.dev / CONTROL
        self._fd = -1

    def __enter__(self) -> Self:
        if not self._path.exists():
            problem = load_module()
            if not self._path.exists():
                raise UblkUnavailable(
                    f"the kernel has no ublk driver: {problem or f'no {self._path}'}",
                    hint="it came with Linux 6.0; Debian 12's packaged 6.12 has it",
                )
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UblkUnavailable(f"{self._path}: {sysfs.errno_text(error)}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def features(self) -> int:
        """UBLK_F_* that the kernel knows. Kernels before 6.4 refuse the question."""
        out = ffi.new("uint64_t *")
        self._run("features", lib.pvf_ublk_features, out)
        return int(out[0])

    def add(self, *, queues: int, owner: int) -> UblkInfo:
        """A new device, in state DEAD. Raises UblkUnavailable if a wanted feature was refused."""
        out = ffi.new("struct pvf_ublk_info *", {"queues": queues, "owner": owner})
        self._run("add", lib.pvf_ublk_add, out)
        info = _info(out)
        missing = lib.pvf_ublk_wanted() & ~info.flags
        if missing:
            self.delete(info.id)
            raise UblkUnavailable(f"the kernel's ublk lacks features {missing:#x}")
        return info

    def info(self, index: int) -> UblkInfo:
        out = ffi.new("struct pvf_ublk_info *")
        self._run(f"info of ublkc{index}", lib.pvf_ublk_get, index, out)
        return _info(out)

    def set_disk(self, index: int, disk: UblkDisk) -> None:
        out = ffi.new(
            "struct pvf_ublk_disk *",
            {
                "sectors": disk.sectors,
                "sector_size": disk.sector_size,
                "physical_sector_size": disk.physical_sector_size,
                "discard_granularity": disk.discard_granularity,
                "discard_alignment": disk.discard_alignment,
                "read_only": disk.read_only,
                "flush": disk.flush,
            },
        )
        self._run(f"parameters of ublkc{index}", lib.pvf_ublk_params, index, out)

    def start(self, index: int, pid: int) -> None:
        """The disk appears, once process `pid` has fetched every request slot."""
        self._run(f"start of ublkb{index}", lib.pvf_ublk_start, index, pid)

    def recover(self, index: int) -> None:
        """EBUSY: the kernel still has the old server. EINVAL: prepared already, or no state."""
        self._run(f"recovery of ublkb{index}", lib.pvf_ublk_recover, index)

    def recovered(self, index: int, pid: int) -> None:
        """Requests go on, once process `pid` has fetched every request slot."""
        self._run(f"end of recovery of ublkb{index}", lib.pvf_ublk_recovered, index, pid)

    def stop(self, index: int) -> None:
        """The disk disappears. Waits for requests that its server has."""
        self._run(f"stop of ublkb{index}", lib.pvf_ublk_stop, index)

    def delete(self, index: int) -> None:
        """The device goes, as soon as nobody has /dev/ublkcN open."""
        self._run(f"deletion of ublkc{index}", lib.pvf_ublk_delete, index)

    def _run(self, operation: str, command: Callable[..., int], *arguments: Any) -> None:
        if self._fd < 0:
            raise RuntimeError("UblkControl is used outside its with block")
        result = command(self._fd, *arguments, int(COMMAND_SECONDS * 1000))
        if result < 0:
            raise UblkError(operation, -result)


def _info(out: Any) -> UblkInfo:
    return UblkInfo(out.id, out.state, out.queues, out.depth, out.flags, out.owner)


def devices(roots: sysfs.Roots = sysfs.SYSTEM) -> list[int]:
    """N of every /dev/ublkcN."""
    names = sysfs.listdir(roots.sys / "class" / "ublk-char")
    return sorted(int(name[5:]) for name in names if name[:5] == "ublkc" and name[5:].isdigit())


def unusable(roots: sysfs.Roots = sysfs.SYSTEM) -> str | None:
    """Why disks cannot be exported with ublk here; None: they can. Loads the module."""
    disabled = sysfs.read_int(roots.proc / "sys" / "kernel" / "io_uring_disabled")
    if disabled:
        return f"io_uring is disabled (kernel.io_uring_disabled={disabled})"
    try:
        with UblkControl(roots) as control:
            missing = lib.pvf_ublk_wanted() & ~control.features()
    except UblkError as error:
        return f"{error} (it needs Linux 6.5 or newer)"
    except UblkUnavailable as error:
        return str(error)
    return f"the kernel's ublk lacks features {missing:#x}" if missing else None


def load_module() -> str | None:
    """Returns what went wrong, or None."""
    return modprobe("ublk_drv")
