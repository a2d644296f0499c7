# SPDX-License-Identifier: BSD-2-Clause
"""The lab as a scenario sees it: dom0, guests, xl, both sides of xenstore, disks, waits.

A scenario is a test function that reads as a story::

    def test_a_disk_hot_plugged_appears(lab, guest):
        disk = lab.ram_disk(64)
        guest.block_attach(disk.spec("xvdb"))
        wait_until("xvdb in the guest", lambda: guest.run("test -b /dev/xvdb", check=False).ok)
        ...
        guest.block_detach("xvdb")

Every wait has a deadline and says what never came.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from . import image, paths
from .client import COMMAND_DEADLINE, Machine, Result
from .disks import (
    BackingDisk,
    DelayedDisk,
    ImageFormat,
    LoopDisk,
    QemuDisk,
    VolumeDisk,
    node_of,
)
from .errors import CommandFailed, DeadlineExceeded, LabError
from .guest import FILES, IMAGE, KINDS, Guest, Kind, Tally, boot_file
from .progress import say, step
from .xen import Disk, Outer, new_run_directory

T = TypeVar("T")

LOCK_DEADLINE = 1800.0
"""Seconds a second lab waits for the first one to end."""


def wait_until(
    what: str, predicate: Callable[[], T], deadline: float = 300.0, every: float = 0.3
) -> T:
    """Call `predicate` until it gives something true, and return that.

    Raises DeadlineExceeded("... never came") after `deadline` s, with the last value or error.
    """
    begin = time.monotonic()
    last: object = None
    while True:
        try:
            value = predicate()
            if value:
                return value
            last = value
        except (CommandFailed, DeadlineExceeded, OSError) as error:
            last = error
        if time.monotonic() - begin > deadline:
            raise DeadlineExceeded(f"within {deadline:.0f} s never came: {what}; last: {last!r}")
        time.sleep(every)


Record = Callable[[str, object], None]
"""Keeps a figure that a test has measured, by name: the fixture `record`."""

GAVE_UP = re.compile(r"timed out|unable to remove device")
"""What xl says of a detach that took longer than libxl waits."""

D = TypeVar("D", bound=BackingDisk)


# -- the lab --------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What a running lab left for those who attach to it: cache/lab.json."""

    pid: int
    ports: dict[str, int]
    run: str
    payload: bool
    owner: str

    @staticmethod
    def path() -> Path:
        return paths.cache() / "lab.json"

    @classmethod
    def load(cls) -> State | None:
        """The running lab's, None if none runs."""
        try:
            state = cls(**json.loads(cls.path().read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return state if Outer(Path(state.run), state.ports, state.pid).alive() else None

    def store(self) -> None:
        new = self.path().with_suffix(".new")
        new.write_text(json.dumps(self.__dict__, indent=1) + "\n")
        new.rename(self.path())


def acquire_lock(deadline: float) -> int:
    """The machine's lab lock as a descriptor. Waits, saying so. Raises LabError(lock)."""
    path = paths.cache() / "lab.lock"
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    begin, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            state = State.load()
            who = f"{state.owner} (QEMU pid {state.pid}, {state.run})" if state else "starting"
            if time.monotonic() - begin >= deadline:
                os.close(lock)
                raise LabError(
                    "lock",
                    f"another lab runs: {who}. Use it (exec, pytest --lab-attach) or end it "
                    "(python -m lab down)",
                ) from None
            if not told:
                say(f"another lab runs: {who}; waiting for it up to {deadline:.0f} s")
                told = True
            time.sleep(1)


class Lab:
    """A running virtual machine with Xen, its dom0 and its guests."""

    def __init__(self, outer: Outer, payload: bool, tally: Tally | None = None) -> None:
        self.outer = outer
        self.dom0 = outer.dom0
        self.run = outer.run
        self.tally = tally or Tally()
        self.has_payload = payload
        self._guests: dict[Kind, Guest] = {}
        self._disks: dict[str, str] = {}
        self._made: list[BackingDisk] = []
        self._counter = 0
        self._daemons: dict[str, str] = {}

    # -- life -------------------------------------------------------------------------------

    @classmethod
    def up(
        cls,
        payload: Path | None = None,
        *,
        owner: str,
        wait: float = 0.0,
        keep: bool = False,
        kinds: Collection[Kind] = (),
    ) -> Lab:
        """Build what is missing, boot Xen and dom0. `keep`: it outlives this process.

        payload: an ext4 image for the guests' /opt/pvfront, None for a lab without.
        kinds: guests that are wanted; those of the common image can always be had.
        """
        dom0 = image.build("dom0")
        images = {name: image.build(name) for name in {"guest", *(IMAGE[kind] for kind in kinds)}}
        lock = acquire_lock(wait)
        try:
            run = new_run_directory()
            available = [kind for kind in KINDS if IMAGE[kind] in images]
            disks = [Disk(kind, images[IMAGE[kind]].root) for kind in available]
            if payload:
                disks.append(Disk("payload", payload, overlay=False))
            outer = Outer.start(run, dom0, disks, lock, die_with_us=not keep)
        finally:
            os.close(lock)  # QEMU holds its own copy
        State(outer.pid, outer.ports, str(run), payload is not None, owner).store()
        try:
            with step("booting Xen and dom0"):
                outer.wait_booted()
                for kind in {IMAGE[kind]: kind for kind in available}.values():
                    built = images[IMAGE[kind]]
                    outer.dom0.push(built.kernel, boot_file(kind, "vmlinuz"))
                    outer.dom0.push(built.initrd, boot_file(kind, "initrd.img"))
                outer.dom0.push(images["guest"].grub, f"{FILES}/grub.lnx")
                for script in (paths.BLOCK_SCRIPT, paths.VIF_SCRIPT):
                    outer.dom0.push(script, f"/etc/xen/scripts/{script.name}")
        except BaseException:
            outer.stop()
            raise
        return cls(outer, payload is not None)

    @classmethod
    def attach(cls) -> Lab:
        """The lab that runs already. Raises LabError(lock) if none does."""
        state = State.load()
        if state is None:
            raise LabError("lock", "no lab runs: start one with python -m lab up --guest hvm")
        return cls(Outer(Path(state.run), state.ports, state.pid), state.payload)

    def down(self) -> None:
        """End the virtual machine."""
        self.outer.stop()
        State.path().unlink(missing_ok=True)

    # -- guests -----------------------------------------------------------------------------

    def guest(self, kind: Kind) -> Guest:
        """The guest of that kind, running or not."""
        if kind not in self._guests:
            if not self.has_guest(kind):
                raise LabError("image", f"this lab began without {kind}: up --guest {kind}")
            self._guests[kind] = Guest(
                kind, self.outer, self.disk_device(kind),
                self.disk_device("payload") if self.has_payload else None, self.tally,
            )  # fmt: skip
        return self._guests[kind]

    def has_guest(self, kind: Kind) -> bool:
        """Whether the lab was started with that guest's root disk."""
        return kind in self._all_disks()

    def disk_device(self, serial: str) -> str:
        """dom0's device of one of the virtual machine's disks."""
        return self._all_disks()[serial]

    def _all_disks(self) -> dict[str, str]:
        if not self._disks:
            command = "cd /sys/block; for d in vd*; do echo $d $(cat $d/serial); done"
            listing = self.dom0.output(command)
            self._disks = {ln.split()[1]: f"/dev/{ln.split()[0]}" for ln in listing.splitlines()}
        return self._disks

    # -- the toolstack ----------------------------------------------------------------------

    def xl(self, *arguments: str, timeout: float = COMMAND_DEADLINE, check: bool = True) -> Result:
        """`xl ARGUMENTS` in dom0."""
        return self.dom0.run(["xl", *arguments], timeout=timeout, check=check)

    def xenstore_read(self, path: str) -> str | None:
        """A key, None where it does not exist."""
        result = self.dom0.run(["xenstore-read", path], check=False)
        return result.stdout.rstrip("\n") if result.ok else None

    def xenstore_write(self, path: str, value: str) -> None:
        self.dom0.run(["xenstore-write", path, value])

    def xenstore_ls(self, path: str = "/") -> dict[str, str]:
        """Every key below `path`, by full path."""
        text = self.dom0.output(["xenstore-ls", "-f", path])
        pairs = (re.match(r'(\S+) = "(.*?)"', line) for line in text.splitlines())
        return {pair[1]: pair[2] for pair in pairs if pair}

    def vbd_state(self, guest: Guest, vdev: int = 51728) -> tuple[str | None, str | None]:
        """(frontend's, backend's) XenbusState of a vbd, 51728 being xvdb; None: no such key."""
        front = f"/local/domain/{guest.number}/device/vbd/{vdev}/state"
        back = f"/local/domain/0/backend/vbd/{guest.number}/{vdev}/state"
        read = f"for k in {front} {back}; do xenstore-read $k 2>/dev/null || echo; done"
        states = self.dom0.run(read).stdout.split("\n")
        return states[0] or None, states[1] or None

    def detach(self, guest: Guest, verb: str, device: str, gone: Callable[[], bool]) -> None:
        """`xl block-detach` or `network-detach` (`verb`); once more if libxl has given up.

        It waits 10 s for the guest, which may pass on a machine that is busy elsewhere, and then
        leaves the device's nodes behind. `gone`: whether the guest has let go of it.
        """
        ended = self.xl(verb, guest.kind, device, check=False)
        if ended.ok:
            return
        if not GAVE_UP.search(ended.stderr):
            raise CommandFailed(f"{guest.kind}: xl {verb} {device}: {ended}")
        say(f"{guest.kind}: xl gave up on {verb} {device}; once more")
        wait_until(f"{device} gone in the guest", gone)
        self.xl(verb, guest.kind, device)

    def check_services(self) -> None:
        """Raise LabError(services) if one of Xen's daemons in dom0 has died."""
        if not self.outer.alive():
            raise LabError("qemu", f"ended; see {self.run}")
        if not self._daemons:
            listed = self.dom0.run("pgrep -l -x 'xenstored|xenconsoled'", check=False).stdout
            self._daemons = dict(line.split()[::-1] for line in listed.splitlines())
        for daemon in ("xenstored", "xenconsoled"):
            number = self._daemons.get(daemon)
            (seen,) = self.dom0.look(f"/proc/{number}/comm") if number else (None,)
            if seen is None or (seen.text or "").strip() != daemon:
                raise LabError("services", f"{daemon} died in dom0; see {self.run}/consoles")

    # -- disks ------------------------------------------------------------------------------

    def _unique(self, prefix: str) -> str:
        """A name in dom0 that nobody else has, who may use the same lab."""
        self._counter += 1
        return f"{prefix}{os.getpid()}x{self._counter}"

    def ram_disk(self, mib: int = 64) -> BackingDisk:
        """A disk in dom0's memory (brd under dm-linear): neither flush nor discard."""
        name = self._unique("ram")
        # One at a time: another test run may want one in the same dom0.
        take = (
            "test -b /dev/ram0 || modprobe brd rd_nr=8 rd_size=524288; cd /sys/block; "
            'for r in ram?; do [ -z "$(ls $r/holders)" ] || continue; '
            f"dmsetup create {name} --table '0 {mib * 2048} linear /dev/'$r' 0' && echo /dev/$r; "
            "break; done"
        )
        ram = self.dom0.output(["flock", "/run/lab/ram.lock", "bash", "-c", take])
        if not ram:
            raise LabError("dom0", "all 8 RAM disks are in use: remove() some")
        undo = [f"dmsetup remove {name}", f"blockdev --flushbufs {ram}"]
        return self._keep(BackingDisk(self.dom0, node_of(self.dom0, name), undo))

    def loop_disk(self, mib: int = 64, *, sector_size: int = 512) -> LoopDisk:
        """A loop device over a sparse file in dom0's memory: flush and discard."""
        path = f"/tmp/{self._unique('loop')}.img"
        return self._keep(LoopDisk(self.dom0, path, mib, sector_size))

    def volume(self, mib: int = 64, *, most: int = 0) -> VolumeDisk:
        """A logical volume that may grow up to `most` MiB: flush and discard."""
        name = self._unique("vg")
        below = LoopDisk(self.dom0, f"/tmp/{name}.img", max(mib, most) + 2)
        return self._keep(VolumeDisk(self.dom0, name, below, mib))

    def qemu_disk(self, mib: int = 64, image: ImageFormat = "raw") -> QemuDisk:
        """An image file in dom0's memory, served by QEMU."""
        path = f"/tmp/{self._unique('image')}.{image}"
        return self._keep(QemuDisk(self.dom0, path, mib, image))

    def delayed_disk(self, mib: int = 64) -> DelayedDisk:
        """A loop_disk under dm-delay, without delay at first."""
        below = self.loop_disk(mib)
        self._made.remove(below)
        return self._keep(DelayedDisk(self.dom0, self._unique("delay"), below))

    def _keep(self, disk: D) -> D:
        self._made.append(disk)
        return disk

    def release_disks(self) -> None:
        """Let every held request go."""
        for disk in self._made:
            if isinstance(disk, DelayedDisk):
                with suppress(CommandFailed, DeadlineExceeded):
                    disk.clear_delay()

    def remove_disks(self) -> None:
        """Remove the disks that nothing uses any more; the others are tried again next time."""
        for disk in list(self._made):
            with suppress(CommandFailed, DeadlineExceeded):
                disk.remove()
                self._made.remove(disk)

    # -- evidence ---------------------------------------------------------------------------

    def keep_evidence(self, directory: Path, kind: Kind | None = None) -> None:
        """What is needed to understand a failure, as files in `directory`. Never raises."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "xen-console.log").write_text(self.outer.console.since())
        for log in (self.run / "consoles").glob("*"):
            (directory / log.name).write_bytes(log.read_bytes())
        dom0 = {
            "xenstore.txt": "xenstore-ls -f",
            "xl-dmesg.txt": "xl dmesg",
            "xl-list.txt": "xl list -v; xl vcpu-list",
            "dom0-dmesg.txt": "dmesg",
            "dom0-networks.txt": "ip -s link; ip address; ip route; ip neigh; nstat -az",
            "dom0-processes.txt": "ps axo pid,ppid,stat,time,wchan:24,args",
            "xl-logs.txt": "tail -n +1 /var/log/xen/*.log",
        }
        guests = [self.guest(kind)] if kind and self.outer.alive() else []
        inside = {
            "journal.txt": "journalctl -b --no-pager -o short-monotonic",
            "processes.txt": "ps axo pid,ppid,stat,wchan:24,cgroup:40,args",
            "blocks.txt": "lsblk -a; cat /proc/interrupts; ls -la /sys/bus/xen/drivers/*/",
            "networks.txt": "ip -s link; ip address; ip route; ip neigh; nstat -az",
        }
        commands: list[tuple[Machine, str, str]] = [(self.dom0, n, c) for n, c in dom0.items()]
        commands += [(g, f"{g.kind}-{n}", c) for g in guests for n, c in inside.items()]
        dead: set[str] = set()
        for machine, name, command in commands:
            if machine.name in dead or not machine.alive():
                dead.add(machine.name)
                continue
            with suppress(Exception):
                result = machine.run(command, timeout=30, check=False)
                (directory / name).write_text(result.stdout + result.stderr)
        for name in dead:
            (directory / f"{name}-SILENT.txt").write_text("the agent did not answer\n")


def end_running_lab() -> bool:
    """End the lab that runs, whoever owns it; False if none does."""
    state = State.load()
    if state is None:
        return False
    outer = Outer(Path(state.run), state.ports, state.pid)
    outer.stop()
    with suppress(ProcessLookupError):
        os.kill(state.pid, signal.SIGKILL)
    State.path().unlink(missing_ok=True)
    return True
