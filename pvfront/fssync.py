# SPDX-License-Identifier: BSD-2-Clause
"""Writing back the file systems that lie on given block devices.

While a domain is being suspended its disks cannot answer for a moment. Dirty data met then is not
lost, it waits, but a kernel thread that waits for a disk cannot be frozen. So everything is
written back while the disks still answer and their users are already stopped.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import logging
import os
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from .threads import in_daemon_thread

log = logging.getLogger(__name__)

SYS = Path("/sys")
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h


def _unescape(field: str) -> str:
    """Undoes the octal escapes of /proc/self/mountinfo (space, tab, newline, backslash)."""
    for octal, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(octal, char)
    return field


def stacked_on(device: str, sys: Path = SYS) -> Iterator[tuple[str, str]]:
    """Everything that lies on a block device: itself, partitions, dm and md on any of them.

    Yields (``"major:minor"``, name). `device` is a path such as /dev/nbd0, a link is followed;
    yields nothing if there is no such device.
    """
    todo = [Path(device).resolve().name]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        node = sys / "class" / "block" / name
        if name in seen or not node.is_dir():
            continue
        seen.add(name)
        yield (node / "dev").read_text().strip(), name
        todo += [part.parent.name for part in node.glob("*/partition")]
        holders = node / "holders"
        if holders.is_dir():
            todo += [holder.name for holder in holders.iterdir()]


def mounts_on(devices: Collection[str], table: str, sys: Path = SYS) -> dict[str, str]:
    """One mount point for each file system on `devices`: source -> mount point.

    `table` is the text of /proc/self/mountinfo (proc(5)): file systems that are mounted only
    in another mount namespace are not seen. File systems with anonymous device numbers (btrfs)
    are found by their source.
    """
    numbers: set[str] = set()
    names: set[str] = set()
    for device in devices:
        for number, name in stacked_on(device, sys):
            numbers.add(number)
            names.add(name)
    found: dict[str, str] = {}
    for line in table.splitlines():
        left, dash, right = line.partition(" - ")
        if not dash:
            continue
        number, where = left.split(" ")[2], _unescape(left.split(" ")[4])
        source = _unescape(right.split(" ")[1])
        on_device = source.startswith("/dev/") and Path(source).resolve().name in names
        if number in numbers or on_device:
            found.setdefault(source, where)
    return found


def mountinfo() -> str:
    return Path("/proc/self/mountinfo").read_text()


def syncfs(where: str) -> None:
    """syncfs(2) on the file system at `where`. Raises OSError. Blocks as long as the disk takes."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), where)
    finally:
        os.close(fd)


def hold(where: str) -> bool:
    """Freezes the file system at `where` (FIFREEZE): whoever begins to write to it waits, and so do
    the kernel's own threads, without being in the middle of a request.

    False: it cannot be frozen, or somebody else has. Blocks as long as the disk takes.
    """
    return _control(where, FIFREEZE)


def let_go(where: str) -> bool:
    """Undoes `hold`. Writes to the disk, and blocks until that has answered."""
    return _control(where, FITHAW)


def _control(where: str, request: int) -> bool:
    try:
        fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        log.error("%s: %s", where, error.strerror)
        return False
    try:
        fcntl.ioctl(fd, request, 0)
    except OSError as error:
        known = (errno.EBUSY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)
        log.log(
            logging.DEBUG if error.errno in known else logging.ERROR,
            "%s: %s: %s",
            where,
            "FIFREEZE" if request == FIFREEZE else "FITHAW",
            error.strerror,
        )
        return False
    finally:
        os.close(fd)
    return True


async def sync_devices(devices: Collection[str], timeout: float) -> list[str]:
    """Writes back every file system on `devices`, side by side; returns the mount points.

    An error of one (EIO of a broken disk) is logged and counts as done. Raises TimeoutError whose
    message names those that are still being written.
    """
    mounts = mounts_on(devices, mountinfo())
    tasks = {
        asyncio.create_task(in_daemon_thread("pvfront-syncfs", partial(syncfs, where))): where
        for where in mounts.values()
    }
    if not tasks:
        return []
    done, pending = await asyncio.wait(tasks, timeout=timeout)
    for task in done:
        if error := task.exception():
            log.error("%s: cannot be written back: %s", tasks[task], error)
    for task in pending:
        task.cancel()
    if pending:
        still = ", ".join(sorted(tasks[task] for task in pending))
        raise TimeoutError(f"still being written back after {timeout:g} s: {still}")
    return sorted(mounts.values())
