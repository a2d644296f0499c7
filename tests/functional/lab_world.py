# SPDX-License-Identifier: BSD-2-Clause
"""The lab as a world: a guest on a real Xen, where users open /dev/pvfront/NAME."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lab.client import Job
from lab.disks import BackingDisk, DelayedDisk
from lab.guest import Guest
from lab.pvf import VDEV, Pvfront, end_fio, fio
from lab.scenario import Lab, wait_until
from world import Backing, Mode, Result, Seen

T = TypeVar("T")

NAME = "xvdb"
NODE = f"/dev/pvfront/{NAME}"

NEVER_MS = 600_000
"""A delay that no test waits for."""


class LabLoad:
    def __init__(self, guest: Guest, job: Job) -> None:
        self.guest = guest
        self.job = job

    def end(self) -> None:
        end_fio(self.guest, self.job)


class LabBacking:
    def __init__(self, disk: BackingDisk) -> None:
        self.disk = disk

    @property
    def size(self) -> int:
        return self.disk.size

    def sha256(self) -> str:
        return self.disk.sha256()

    @property
    def _delayed(self) -> DelayedDisk:
        assert isinstance(self.disk, DelayedDisk), "the backing was not asked to be slow"
        return self.disk

    def hold(self) -> None:
        self._delayed.set_delay(NEVER_MS)

    def in_flight(self) -> int:
        return self._delayed.in_flight()

    def release(self) -> None:
        self._delayed.clear_delay()

    def resize(self, mib: int) -> None:
        self.disk.resize(mib)

    def remove(self) -> None:
        self.disk.remove()


class LabDisk:
    def __init__(self, pvf: Pvfront, backing: LabBacking) -> None:
        self.name = NAME
        self.backing = backing
        self.pvf = pvf
        self.guest = pvf.guest

    def state(self) -> dict[str, Any]:
        return self.pvf.state()

    def status(self) -> dict[str, Any]:
        return self.pvf.status()

    def written(self) -> int:
        return self.pvf.written()

    def served(self) -> bool:
        return self.pvf.served()

    def worker(self) -> int:
        return self.pvf.worker()

    def os_device(self) -> str:
        return self.guest.output(f"readlink -f {NODE}")

    def backend_keys(self) -> dict[str, str]:
        path = f"/local/domain/0/backend/vbd/{self.guest.number}/{VDEV[NAME]}"
        keys = self.pvf.lab.xenstore_ls(path)
        return {key.rsplit("/", 1)[1]: value for key, value in keys.items()}

    def seen(self) -> Seen:
        queue = f"/sys/block/{self.os_device().rsplit('/', 1)[1]}/queue"
        look = f"blockdev --getsize64 --getro {NODE}"
        look += f"; cat {queue}/discard_max_bytes {queue}/write_cache"
        size, read_only, discard, cache = self.guest.output(look).splitlines()
        return Seen(int(size), read_only == "1", cache == "write back", discard != "0")

    def sha256(self) -> str:
        return self.pvf.sha256()

    def fio(
        self,
        *,
        rw: str = "randwrite",
        bs: str = "4k",
        depth: int = 8,
        size: str = "16M",
        extra: str = "",
    ) -> None:
        self.guest.run(fio(rw=rw, bs=bs, depth=depth, size=size, extra=extra), timeout=300)

    def load(self, *, depth: int, size: str = "16M", reconnects: bool = False) -> LabLoad:
        # At a rate that leaves the one processor to what the load goes through.
        extra = "--time_based --runtime=1000 --verify_backlog=64 --rate_iops=50,50"
        return LabLoad(self.guest, self.guest.start(fio(depth=depth, size=size, extra=extra)))

    def discard(self) -> None:
        self.guest.run(f"blkdiscard {NODE} && blkdiscard -z {NODE}")

    def can_be_written(self) -> bool:
        command = f"dd if=/dev/zero of={NODE} bs=4k count=1 oflag=direct"
        return self.guest.run(command, check=False).ok

    def detach(self) -> None:
        self.pvf.detach()


class LabWorld:
    kernel_has: Sequence[str] = ("vbd", "vif")
    cycles = 20 if int(os.environ.get("PVFRONT_REPEATS", "1")) > 1 else 6
    given_to = "kernel"
    idle_seconds = 10

    def __init__(self, lab: Lab, guest: Guest) -> None:
        self.lab = lab
        self.guest = guest
        self.pvf = Pvfront(lab, guest)

    def start(self) -> None:
        self.pvf.start("--all")

    def stop(self) -> None:
        self.pvf.stop()

    def running(self) -> bool:
        return self.pvf.running()

    def supervisor(self) -> int:
        return self.pvf.pid()

    def kill_supervisor(self) -> None:
        old = self.supervisor()
        self.kill(old)
        self.pvf.wait_restarted(old)

    def kill(self, pid: int) -> None:
        self.guest.run(f"kill -KILL {pid}")

    def pvfront(self, *arguments: str) -> Result:
        return self.guest.run(["pvfront", *arguments], check=False)

    def devices(self) -> list[dict[str, Any]]:
        return self.pvf.list()

    def backing(self, mib: int = 64, *, discard: bool = True, slow: bool = False) -> LabBacking:
        if slow:
            return LabBacking(self.lab.delayed_disk(mib))
        return LabBacking(self.lab.loop_disk(mib) if discard else self.lab.ram_disk(mib))

    def attach(self, backing: Backing, *, mode: Mode = "w", stock: bool = False) -> LabDisk:
        assert isinstance(backing, LabBacking)
        self.guest.block_attach(backing.disk.spec(NAME, mode, stock=stock))
        self.pvf.wait_served()
        return LabDisk(self.pvf, backing)

    @contextlib.contextmanager
    def disk(
        self,
        mib: int = 64,
        *,
        mode: Mode = "w",
        discard: bool = True,
        slow: bool = False,
        stock: bool = False,
    ) -> Iterator[LabDisk]:
        backing = self.backing(mib, discard=discard, slow=slow)
        with self.pvf.disk(backing.disk, NAME, mode, stock=stock):
            yield LabDisk(self.pvf, backing)

    def held(self) -> dict[str, int]:
        return {
            "workers": int(self.guest.output("pgrep -c pvfront-worker || true")),
            "event channels": int(
                self.guest.output("grep -c 'xen-dyn.*evtchn' /proc/interrupts || true")
            ),
        }

    def supervisor_holds(self) -> tuple[int, int]:
        pid = self.supervisor()
        return (
            int(self.guest.output(f"ls /proc/{pid}/fd | wc -l")),
            int(self.guest.output(f"awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status")),
        )

    def grant_every_page(self) -> None:
        limit = int(self.guest.output("cat /sys/module/xen_gntalloc/parameters/limit"))
        probe = (
            "from pvfront.gntalloc import GrantAllocator\n"
            f"GrantAllocator.open().alloc(0, min({limit}, 8192))\n"
        )
        self.guest.run(["/opt/pvfront/bin/python", "-W", "ignore", "-c", probe])

    def cpu(self, pids: Sequence[int], seconds: float) -> list[int]:
        look = "cat " + " ".join(f"/proc/{pid}/stat" for pid in pids)
        lines = self.guest.output(f"{look}; sleep {seconds:g}; {look}").splitlines()
        ticks = [sum(map(int, line.rpartition(")")[2].split()[11:13])) for line in lines]
        before, after = ticks[: len(pids)], ticks[len(pids) :]
        return [new - old for old, new in zip(before, after, strict=True)]

    def wait_until(self, what: str, holds: Callable[[], T], deadline: float = 300.0) -> T:
        return wait_until(what, holds, deadline)

    def assert_no_io_errors(self) -> None:
        assert "I/O error" not in self.guest.output("dmesg | tail -n 50")
