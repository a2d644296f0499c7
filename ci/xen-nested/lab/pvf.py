# SPDX-License-Identifier: BSD-2-Clause
"""pvfront in a guest, as a scenario drives it: the service, its status, disks it serves."""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import paths
from .client import Job, Seen
from .disks import BackingDisk
from .guest import Guest
from .scenario import Lab, wait_until

UNIT = "pvfront-vbd"
LETTERS = string.ascii_lowercase
NAMES = [f"xvd{letters}" for letters in (*LETTERS, *(f"a{letter}" for letter in LETTERS))]
VDEV = {
    # xen-vbd-interface(7): 16 disks with minor numbers of 4 bits, the others are extended ones.
    name: 51712 + 16 * number if number < 16 else 1 << 28 | number << 8
    for number, name in enumerate(NAMES)
}
"""xvda to xvdaz, by name."""


END_LOADS = (
    "for n in $(seq 50); do pkill -x fio; pkill -KILL -f /run/[o]verlapping.py; "
    "pgrep -x fio || break; sleep 0.2; done"
)
"""Those that a test which failed has left: a file system that they use cannot be unmounted."""


def start_service(guest: Guest, unit: str, line: str, before: str = ":") -> None:
    """Starts a service with that line as its settings, if it does not run so; first, `before`.

    Most tests want what the one before them wanted: that it runs is seen without a process.
    """
    started, pid = guest.services.get(unit, ("", 0))
    if started == line:
        (seen,) = guest.look(f"/proc/{pid}/cmdline")
        if seen and f"{unit.removeprefix('pvfront-')}\0serve\0" in (seen.text or ""):
            return
    settings = f"/etc/default/{unit}"
    said = guest.output(
        f"{before}; echo '{line}' | cmp -s - {settings} && systemctl is-active -q {unit} || "
        f"{{ echo '{line}' >{settings}; systemctl reset-failed {unit}; "
        f"systemctl restart {unit}; }} && systemctl show -p MainPID --value {unit}",
        timeout=300,
    )
    guest.services[unit] = (line, int(said.split()[-1]))


@dataclass
class Pvfront:
    """The disk service of one guest."""

    lab: Lab
    guest: Guest

    # -- the service -------------------------------------------------------------------------

    def start(self, disks: str = "--all") -> None:
        """Starts the service for these disks (as on its command line), if it does not run so."""
        start_service(self.guest, UNIT, f"PVFRONT_DISKS={disks}")

    def stop(self) -> None:
        self.guest.run(f"systemctl stop {UNIT}", timeout=300)

    def running(self) -> bool:
        return self.guest.run(f"systemctl is-active -q {UNIT}", check=False).ok

    def pid(self) -> int:
        """The supervisor's."""
        return int(self.guest.output(f"systemctl show -p MainPID --value {UNIT}"))

    def wait_restarted(self, old: int) -> None:
        """Waits for the supervisor that systemd starts by itself after `old`, and until it serves.

        Python starts then, on the guest's one processor, and each question is a process that takes
        as much of it: so once there is a start, one command waits for its end.
        """
        wait_until("another supervisor", lambda: self.pid() not in (0, old), every=2)
        self.guest.run(f"systemctl start {UNIT}", check=False)
        wait_until("its word that it serves", self.running, every=2)

    def log(self) -> str:
        return self.guest.journal(UNIT)

    # -- questions -----------------------------------------------------------------------------

    def state(self, name: str = "xvdb") -> dict[str, Any]:
        """What the supervisor last wrote about the disk, {} if nothing. Quick: for waiting."""
        return state_in(self.guest.look(_state_file(name))[0])

    def status(self, name: str = "xvdb") -> dict[str, Any]:
        """`pvfront status --json`, with the worker's counters; {} if there is none."""
        result = self.guest.run(["pvfront", "status", name, "--json"], check=False)
        answer: dict[str, Any] = json.loads(result.stdout) if result.ok else {}
        return answer

    def list(self) -> list[dict[str, Any]]:
        """`pvfront list --json`."""
        answer: list[dict[str, Any]] = json.loads(self.guest.output("pvfront list --json"))
        return answer

    def served(self, name: str = "xvdb") -> bool:
        """The disk is there under its link, and both ends are Connected."""
        node, state = self.guest.look(f"/dev/pvfront/{name}", _state_file(name))
        return node is not None and node.kind == "b" and state_in(state).get("phase") == "connected"

    def wait_served(self, name: str = "xvdb") -> None:
        wait_until(f"/dev/pvfront/{name} served by pvfront", lambda: self.served(name))

    def written(self, name: str = "xvdb") -> int:
        """Write requests that its users had answered since the device was made. Quick: for waiting.

        Counted by the kernel (Documentation/block/stat.rst): the fifth word.
        """
        device = self.state(name).get("os_device", "").rpartition("/")[2]
        seen = self.guest.look(f"/sys/block/{device}/stat")[0] if device else None
        return int((seen.text or "").split()[4]) if seen else 0

    def worker(self, name: str = "xvdb") -> int:
        """The pid of the disk's worker."""
        return int(self.state(name)["worker_pid"])

    # -- disks ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def disk(
        self,
        backing: BackingDisk | None = None,
        name: str = "xvdb",
        mode: str = "w",
        *,
        stock: bool = False,
    ) -> Iterator[BackingDisk]:
        """Attaches a disk, waits until it is served; detaches it at the end.

        `stock`: by xl's own hotplug script, which takes 3 s.
        """
        backing = backing or self.lab.loop_disk(64)
        try:
            self.guest.block_attach(backing.spec(name, mode, stock=stock))
            try:
                self.wait_served(name)
                yield backing
            finally:
                self.guest.run(f"{END_LOADS}; umount -q /mnt/{name}; true", check=False)
                self.detach(name)
        finally:
            backing.remove()

    def detach(self, name: str = "xvdb") -> None:
        self.lab.detach(
            self.guest, "block-detach", name, lambda: not self.guest.has(f"/dev/pvfront/{name}")
        )
        wait_until(
            f"{name} gone from dom0's store",
            lambda: self.lab.vbd_state(self.guest, VDEV[name]) == (None, None),
        )

    def sha256(self, name: str = "xvdb") -> str:
        """Of the whole disk as the guest reads it, past the page cache."""
        return self.guest.output(
            f"dd if=/dev/pvfront/{name} bs=1M iflag=direct status=none | sha256sum", timeout=300
        ).split()[0]


def _state_file(name: str) -> str:
    return f"/run/pvfront/vbd-{VDEV[name]}.json"


def state_in(seen: Seen | None) -> dict[str, Any]:
    """What a state file says, {} if it is not there."""
    answer: dict[str, Any] = json.loads(seen.text) if seen and seen.text else {}
    return answer


def fio(
    name: str = "xvdb",
    *,
    rw: str = "randwrite",
    bs: str = "4k",
    depth: int = 8,
    size: str = "16M",
    extra: str = "",
) -> str:
    """A fio command that writes, reads back and verifies by checksum.

    With io_uring: fio 3.33's libaio waits for ever if a signal, or the freezer before a suspend,
    comes while it waits for the last requests of a pass (its libaio engine, io_getevents).
    """
    return (
        f"fio --name=verify --filename=/dev/pvfront/{name} --rw={rw} --bs={bs} "
        f"--iodepth={depth} --ioengine=io_uring --direct=1 --size={size} --verify=crc32c "
        f"--verify_fatal=1 --randrepeat=0 --output-format=terse {extra}"
    )


def end_fio(guest: Guest, *loads: Job, timeout: float = 300.0) -> None:
    """Ends fio jobs that would run on; raises AssertionError if one of them had an error.

    For loads that must last as long as something else takes, however slow the machine is.
    """
    # fio itself tells its job to end: a signal to that one too may come while it waits (see `fio`).
    guest.run("for p in $(pgrep -x fio); do pgrep -x fio -P $p >/dev/null && kill -INT $p; done; :")
    for load in loads:
        result = load.wait(timeout=timeout)
        assert result.code in (0, 128), result  # 128: ended by a signal, having finished in order
        lines = [line for line in result.stdout.splitlines() if line.startswith("3;")]
        errors = [line.split(";")[4] for line in lines]
        assert errors, result
        assert set(errors) == {"0"}, result


class Overlapping:
    """Threads whose writes overlap all the time (scripts/overlapping.py), until `end`."""

    def __init__(
        self, guest: Guest, path: str, offset: int = 0, *, blocks: int = 8, writers: int = 20,
        readers: int = 12,
    ) -> None:  # fmt: skip
        program = "/run/overlapping.py"
        guest.push(paths.LAB / "scripts" / "overlapping.py", program)
        numbers = map(str, (offset, blocks, writers, readers))
        self.job = guest.start(["/usr/bin/python3", program, path, *numbers], unit="overlapping")

    def measure(self) -> None:
        """From now on."""
        self.job.kill(10)

    def end(self) -> dict[str, float]:
        """The longest times in which nothing was answered, in seconds: "pause" by the guest's
        CLOCK_MONOTONIC, "away" by its CLOCK_BOOTTIME. Raises AssertionError if a read was wrong.
        """
        self.job.kill(2)
        result = self.job.wait()
        assert result.ok, result
        figures: dict[str, Any] = json.loads(result.stdout)
        assert figures["overlaps"] > 100, figures
        return figures
