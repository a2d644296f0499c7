# SPDX-License-Identifier: BSD-2-Clause
"""Why a block device is in use: mounts, swap, and the devices that LVM, MD or dm built on it.

The scan explains; the kernel decides: `in_use` ends with an open(O_EXCL), which fails with EBUSY
for whatever claims the disk or one of its partitions, known to us or not. A program that merely
has the device open (a database on a raw disk) is no claim and is not found; `opened_by` finds it.

A mount is found by the device number in /proc/self/mountinfo. File systems with anonymous device
numbers (btrfs) are found by their mount source, which names one of their devices; the others
are caught by the exclusive open, without a mount point in the reason. Mounts in other mount
namespaces (containers) likewise.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from .. import sysfs
from ..errors import PvfrontError


@dataclass(frozen=True, slots=True)
class Use:
    """One reason. `root` means that the running system lives on the device."""

    device: str  # the kernel's name of the disk, partition or holder: "xvdb1", "dm-0"
    reason: str  # "mounted at /srv"
    root: bool = False

    def __str__(self) -> str:
        return f"{self.device} is {self.reason}"


class InUse(PvfrontError):
    """The device must not be taken away from whoever uses it."""

    def __init__(self, name: str, uses: list[Use]) -> None:
        root = any(use.root for use in uses)
        super().__init__(
            f"{name} is in use: {describe(uses)}",
            hint="the running system is on it: it cannot be taken"
            if root
            else "end that use first (umount, swapoff, vgchange -an, mdadm --stop), "
            "or give --force to tear it away",
        )
        self.uses = uses
        self.root = root


def describe(uses: list[Use]) -> str:
    """All reasons in one line, each once."""
    return "; ".join(dict.fromkeys(str(use) for use in uses))


def in_use(name: str, roots: sysfs.Roots = sysfs.SYSTEM) -> str | None:
    """Why the whole disk `name` is in use, or None. May take `claim_probe`'s deadline."""
    uses = find(name, roots)
    if not uses:
        claimed = claim_probe(name, roots)
        uses = [claimed] if claimed else []
    return describe(uses) if uses else None


def find(name: str, roots: sysfs.Roots = sysfs.SYSTEM) -> list[Use]:
    """Every known use of the disk, its partitions, and what is built on them. Never blocks."""
    uses: list[Use] = []
    mounts = list(_mounts(roots))
    swaps = _swaps(roots)
    for device, via in _stack(name, roots):
        number = sysfs.read(roots.block(device) / "dev")
        suffix = f" (on {via})" if via else ""
        for mounted in mounts:
            if (number is not None and mounted.number == number) or mounted.source == device:
                root = mounted.point == "/"
                text = "the root file system" if root else f"mounted at {mounted.point}"
                uses.append(Use(device, text + suffix, root=root))
        if device in swaps:
            uses.append(Use(device, f"swap space{suffix}"))
    for holder, below in _holders(name, roots):
        uses.append(Use(below, f"part of {_holder_text(holder, roots)}"))
    return uses


def claim_probe(
    name: str, roots: sysfs.Roots = sysfs.SYSTEM, *, deadline: float = 5.0
) -> Use | None:
    """The kernel's own word: an exclusive open of the whole disk.

    Whoever has a claim makes it fail at once. Without one, an open may read the partition table,
    and wait as long as the disk does not answer: after `deadline` seconds that counts as use,
    since nothing is known. The open then goes on in a daemon thread.
    """
    answer: list[Use | None] = []

    def probe() -> None:
        flags = os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            os.close(os.open(roots.dev / name, flags))
        except OSError as error:
            # Any other error: no node, no medium, no device any more. Nobody uses it by this name.
            if error.errno == errno.EBUSY:
                answer.append(Use(name, "claimed by the kernel or another program (EBUSY)"))
                return
        answer.append(None)

    thread = threading.Thread(target=probe, name=f"open {name}", daemon=True)
    thread.start()
    thread.join(deadline)
    if answer:
        return answer[0]
    return Use(name, f"not answering: an open did not end within {deadline:.0f} s")


def opened_by(name: str, roots: sysfs.Roots = sysfs.SYSTEM) -> str | None:
    """The programs that have the disk or a partition open, which is no claim; None if none has.

    Those of other PID namespaces are found as far as they are seen from here.
    """
    numbers = {
        sysfs.read(roots.block(device) / "dev") for device in (name, *partitions(name, roots))
    }
    found = set()
    for entry in roots.proc.glob("[0-9]*/fd/*"):
        try:
            status = entry.stat()
        except OSError:
            continue  # it went just now
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        if stat.S_ISBLK(status.st_mode) and number in numbers:
            process = entry.parents[1]
            found.add(f"{sysfs.read(process / 'comm')} ({process.name})")
    return f"{name} is open in {', '.join(sorted(found))}" if found else None


@dataclass(frozen=True, slots=True)
class _Mount:
    number: str  # "202:16"
    point: str
    source: str  # the kernel's name of the source device, or ""


def _mounts(roots: sysfs.Roots) -> Iterator[_Mount]:
    """proc_pid_mountinfo(5): id parent major:minor root point options [tags] - type source ..."""
    for line in (sysfs.read(roots.proc / "self" / "mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 5 or len(rest) < 2:
            continue
        yield _Mount(fields[2], _unescape(fields[4]), _kernel_name(_unescape(rest[1]), roots))


def _swaps(roots: sysfs.Roots) -> set[str]:
    lines = (sysfs.read(roots.proc / "swaps") or "").splitlines()[1:]
    return {_kernel_name(_unescape(line.split()[0]), roots) for line in lines if line.split()}


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _kernel_name(path: str, roots: sysfs.Roots) -> str:
    """`dm-0` for /dev/mapper/vg-root, `xvdb1` for /dev/xvdb1; "" for what is no device."""
    if not path.startswith("/dev/"):
        return ""
    return (roots.dev / path.removeprefix("/dev/")).resolve().name


def partitions(name: str, roots: sysfs.Roots = sysfs.SYSTEM) -> list[str]:
    """The kernel's names of the disk's partitions."""
    disk = roots.block(name)
    return [entry for entry in sysfs.listdir(disk) if (disk / entry / "partition").exists()]


def _stack(name: str, roots: sysfs.Roots) -> Iterator[tuple[str, str]]:
    """(device, what of ours it is built on, or "") for the disk and everything above it."""
    yield name, ""
    for partition in partitions(name, roots):
        yield partition, ""
    for holder, below in _holders(name, roots):
        yield holder, below
        for partition in partitions(holder, roots):
            yield partition, below


def _holders(name: str, roots: sysfs.Roots) -> Iterator[tuple[str, str]]:
    """(holder, the device below it), recursively; each holder once."""
    seen: set[str] = set()
    below = [name, *partitions(name, roots)]
    while below:
        device = below.pop(0)
        for holder in sysfs.listdir(roots.block(device) / "holders"):
            if holder not in seen:
                seen.add(holder)
                yield holder, device
                below += [holder, *partitions(holder, roots)]


def _holder_text(holder: str, roots: sysfs.Roots) -> str:
    """`LVM volume vg-root (dm-0)`, `MD array md0`, `device-mapper crypt_home (dm-1)`."""
    directory = roots.block(holder)
    if holder.startswith("dm-"):
        name = sysfs.read(directory / "dm" / "name") or holder
        uuid = sysfs.read(directory / "dm" / "uuid") or ""
        kind = {"LVM": "LVM volume", "CRYPT": "encrypted device"}.get(
            uuid.partition("-")[0], "device-mapper device"
        )
        return f"{kind} {name} ({holder})"
    if holder.startswith("md"):
        return f"MD array {holder}"
    return holder
