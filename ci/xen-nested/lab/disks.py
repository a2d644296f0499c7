# SPDX-License-Identifier: BSD-2-Clause
"""Backing stores in dom0: what a vbd can be made of, and what the test does to it underneath.

blkback serves whatever is a block device (RAM, loop, logical volume, dm-delay); QEMU's qdisk serves
image files, and is a backend of its own: other features, other code. What each offers:

    ram      neither                    brd under dm-linear; nothing is ever in flight
    loop     flush, discard             a file in dom0's memory; sectors of 512 or 4096 bytes
    volume   flush, discard             LVM on a loop device
    delayed  flush, discard             dm-delay over a loop device
    qemu     flush, discard             raw or qcow2; grant copy, 11 segments, nothing persistent
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Literal

from .client import Machine
from .guest import disk_spec

MIB = 1 << 20
ImageFormat = Literal["raw", "qcow2"]

# dom0 has no udev: LVM makes its nodes itself and waits for nobody.
LVM_CONFIG = "activation{udev_sync=0 udev_rules=0} global{event_activation=0}"


def device_mapper(dom0: Machine, name: str, table: str) -> str:
    """Make a device-mapper device and return the kernel's node, /dev/dm-N (dom0 has no udev)."""
    dom0.run(["dmsetup", "create", name, "--table", table])
    return node_of(dom0, name)


def node_of(dom0: Machine, name: str) -> str:
    """The kernel's node of a device-mapper device."""
    info = ["dmsetup", "info", "-c", "--noheadings", "-o", "blkdevname", name]
    return f"/dev/{dom0.output(info)}"


class BackingDisk:
    """Something in dom0 that can back a vbd; this one is a block device."""

    def __init__(self, dom0: Machine, device: str, undo: Sequence[str]) -> None:
        """`device`: a path in dom0; `undo`: the commands that remove it."""
        self.dom0 = dom0
        self.device = device
        self._undo = list(undo)

    def spec(self, vdev: str, mode: str = "w", *, stock: bool = False) -> str:
        """For xl; `stock` as in `guest.disk_spec`."""
        return disk_spec(vdev, mode, self.device, stock=stock)

    @property
    def backend(self) -> str:
        """Its class in the store: backend/vbd or backend/qdisk."""
        return "vbd"

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self.dom0.output(["blockdev", "--getsize64", self.device]))

    def sha256(self, timeout: float = 300.0) -> str:
        """Of the whole store, caches flushed first."""
        command = f"blockdev --flushbufs {self.device}; sha256sum {self.device}"
        return self.dom0.output(command, timeout=timeout).split()[0]

    def resize(self, mib: int) -> None:
        """Larger or smaller, also under a vbd. blkback tells with the next request that it gets."""
        raise NotImplementedError(f"{type(self).__name__} cannot be resized")

    def remove(self) -> None:
        """Undo its creation; it must be detached."""
        for command in self._undo:
            self.dom0.run(command)
        self._undo = []


class LoopDisk(BackingDisk):
    """A loop device over a sparse file in dom0's memory."""

    def __init__(self, dom0: Machine, path: str, mib: int, sector_size: int = 512) -> None:
        self.path = path
        loop = f"losetup --sector-size {sector_size} --show -f {path}"
        device = dom0.output(f"truncate -s {mib}M {path} && {loop}")
        super().__init__(dom0, device, [f"losetup -d {device}", f"rm -f {path}"])

    def resize(self, mib: int) -> None:
        self.dom0.run(f"truncate -s {mib}M {self.path} && losetup -c {self.device}")


class VolumeDisk(BackingDisk):
    """A logical volume, the only one of a group on a loop device that leaves room to grow."""

    def __init__(self, dom0: Machine, name: str, below: LoopDisk, mib: int) -> None:
        self.name = name
        self.below = below
        self.dom0 = dom0
        # -s 1M: the first extent begins at 1 MiB, so that a group holds all but that.
        self._lvm(f"vgcreate -q -y -s 1M {name} {below.device}")
        self._lvm(f"lvcreate -q -y -Wn -Zn -n disk -L {mib}M {name}")
        device = node_of(dom0, f"{name}-disk")
        super().__init__(dom0, device, [self._command(f"vgremove -q -f -y {name}")])

    @staticmethod
    def _command(words: str) -> str:
        verb, _, rest = words.partition(" ")
        return f"{verb} --config {shlex.quote(LVM_CONFIG)} {rest}"

    def _lvm(self, words: str) -> None:
        self.dom0.run(self._command(words))

    def activate(self, active: bool) -> None:
        """Here, in dom0: not while a guest uses `below`."""
        self._lvm(f"vgchange -q -a{'y' if active else 'n'} {self.name}")
        if active:
            self.device = node_of(self.dom0, f"{self.name}-disk")

    def resize(self, mib: int) -> None:
        self._lvm(f"lvresize -q -f -y -L {mib}M {self.name}/disk")

    def remove(self) -> None:
        super().remove()
        self.below.remove()


class DelayedDisk(BackingDisk):
    """A dm-delay device: requests are held as long as one says, so they are provably in flight."""

    def __init__(self, dom0: Machine, name: str, below: BackingDisk) -> None:
        self.name = name
        self.below = below
        self._sectors = below.size // 512
        device = device_mapper(dom0, name, self._table(0, 0))
        super().__init__(dom0, device, [f"dmsetup remove {name}"])

    def _table(self, read_ms: int, write_ms: int) -> str:
        target = self.below.device
        return f"0 {self._sectors} delay {target} 0 {read_ms} {target} 0 {write_ms}"

    def set_delay(self, read_ms: int, write_ms: int | None = None) -> None:
        """Hold every read and write (and flush) this long, from now on.

        Requests held under the old delay are let go by the change.
        """
        table = shlex.quote(self._table(read_ms, read_ms if write_ms is None else write_ms))
        self.dom0.run(f"dmsetup load {self.name} --table {table} && dmsetup resume {self.name}")

    def clear_delay(self) -> None:
        """No delay; what is held is let go at once."""
        self.set_delay(0)

    def in_flight(self) -> int:
        """Requests that the device holds now: reads, writes and flushes."""
        status = self.dom0.output(["dmsetup", "status", self.name])  # "0 65536 delay 0 1 0"
        return sum(int(word) for word in status.split()[3:6])

    def remove(self) -> None:
        super().remove()
        self.below.remove()


class QemuDisk(BackingDisk):
    """An image file behind QEMU's qdisk.

    An HVM guest's device model serves it; in PVH and PV guests libxl starts a QEMU only where the
    guest was created with such a disk.
    """

    def __init__(self, dom0: Machine, path: str, mib: int, image: ImageFormat) -> None:
        self.image = image
        dom0.run(f"qemu-img create -q -f {image} {path} {mib}M")
        super().__init__(dom0, path, [f"rm -f {path}"])

    def spec(self, vdev: str, mode: str = "w", *, stock: bool = False) -> str:
        del stock  # there is no hotplug script for image files
        return (
            f"format={self.image},vdev={vdev},access={mode},backendtype=qdisk,target={self.device}"
        )

    @property
    def backend(self) -> str:
        return "qdisk"

    @property
    def size(self) -> int:
        # -U: also while it is attached.
        info = self.dom0.output(f"qemu-img info -U --output=json {self.device}")
        return int(json.loads(info)["virtual-size"])

    def sha256(self, timeout: float = 300.0) -> str:
        """Of the disk that the image holds; it must be detached."""
        raw = f"{self.device}.copy"
        command = (
            f"qemu-img convert -f {self.image} -O raw {self.device} {raw} "
            f"&& sha256sum {raw} && rm -f {raw}"
        )
        return self.dom0.output(command, timeout=timeout).split()[0]
