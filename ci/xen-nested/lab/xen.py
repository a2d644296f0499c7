# SPDX-License-Identifier: BSD-2-Clause
"""QEMU with Xen and dom0 in it: start, wait for each stage, stop.

QEMU 7.2 emulates (TCG) an AMD machine with nested SVM; Xen boots as a multiboot kernel with dom0's
kernel and initramfs as its modules. KVM is used only where the host's processor really offers
nested virtualisation: /dev/kvm alone proves nothing (a para-virtual host offers it without).

No `rdtscp` in the CPU model, ever: TCG raises the RDTSC intercept for RDTSCP, Xen fails to decode
the instruction, and PVH and HVM guests die early.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import paths
from .agent import PORT
from .client import Machine
from .errors import LabError
from .image import Image
from .progress import say

# rdrand: a guest without it waits seconds for its first random number.
TCG_CPU = "qemu64,+svm,+npt,+ssse3,+sse4.1,+sse4.2,+popcnt,+pdpe1gb,+rdrand"
MEMORY = "6G"  # as much as dom0 and five guests
DOM0_MEMORY = "2G"
# spec-ctrl=no: what keeps guests from each other's caches costs each exit, and there is no cache.
XEN_COMMAND_LINE = (
    "console=com1 com1=115200,8n1 loglvl=all guest_loglvl=all noreboot spec-ctrl=no "
    f"dom0_mem={DOM0_MEMORY},max:{DOM0_MEMORY} dom0_max_vcpus=2"
)
DOM0_COMMAND_LINE = (
    "console=hvc0 earlyprintk=xen loglevel=6 net.ifnames=0 mitigations=off "
    "lab.root=/dev/vda lab.init=/bin/busybox lab.initarg=init"
)
BOOT_DEADLINE = 240.0
"""Seconds from power-on to dom0's agent; 20 is usual on an idle 2-core machine."""

ADDRESS = {
    "dom0": "10.0.2.15", "hvm": "10.0.2.21", "pvh": "10.0.2.22", "pv": "10.0.2.23",
    "pvh612": "10.0.2.24",
}  # fmt: skip
"""On the bridge of the control network, which is QEMU's user-mode network."""

# What the Xen console shows once a stage is done, in order.
STAGES = (
    ("xen", "Xen version"),
    ("dom0", "lab: STAGE dom0"),
    ("services", "lab: STAGE services"),
    ("network", "lab: STAGE network"),
)


def nested_kvm() -> bool:
    """Whether KVM can give a guest a working SVM or VMX, by CPU flag and module parameter."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    words = set(flags[1].split()) if flags else set()
    for flag, module in (("svm", "kvm_amd"), ("vmx", "kvm_intel")):
        parameter = Path(f"/sys/module/{module}/parameters/nested")
        if flag in words and parameter.exists() and parameter.read_text().strip() in ("1", "Y"):
            return os.access("/dev/kvm", os.R_OK | os.W_OK)
    return False


@dataclass(frozen=True)
class Disk:
    """A disk of the virtual machine, found in dom0 by its serial number.

    Images are never written: `overlay` disks get a qcow2 layer of this run, others are read-only.
    """

    serial: str
    image: Path
    overlay: bool = True


class ConsoleLog:
    """The Xen console (Xen's and dom0's messages), growing in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def position(self) -> int:
        """Where the log ends now, for `since`."""
        return self.path.stat().st_size if self.path.exists() else 0

    def since(self, position: int = 0) -> str:
        """What was logged after `position`."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            file.seek(position)
            return file.read().decode(errors="replace").replace("\r", "")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def _put_first(pid: int) -> None:
    """Gives the session of `pid` nearly all of the CPU that it wants, where we may.

    Deadlines inside the virtual machine run on, whatever else the host computes. Nice values alone
    count only within a session where the kernel groups by session (sched(7), autogroup).
    """
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("-20")


_STARTED: list[subprocess.Popen[bytes]] = []
"""Kept to the end: Python warns of a Popen that goes before its process has ended."""


class Outer:
    """The virtual machine."""

    def __init__(self, run: Path, ports: Mapping[str, int], pid: int) -> None:
        """`ports`: on 127.0.0.1, forwarded to the agents of dom0 and the guests."""
        self.run = run
        self.ports = dict(ports)
        self.pid = pid
        self.console = ConsoleLog(run / "xen-console.log")
        self.commands = run / "commands.log"
        self.dom0 = Machine("dom0", ports["dom0"], self.commands)

    @classmethod
    def start(
        cls, run: Path, dom0: Image, disks: Sequence[Disk], lock: int, die_with_us: bool
    ) -> Outer:
        """Start QEMU in the run directory.

        `lock` is the descriptor of the held lab lock: QEMU inherits it, so the lock is held
        exactly as long as a lab exists. With `die_with_us` the kernel kills QEMU with us.
        """
        qemu = shutil.which("qemu-system-x86_64")
        if not qemu:
            raise LabError("qemu", "not installed: run apt-get install qemu-system-x86 qemu-utils")
        consoles = run / "consoles"
        consoles.mkdir(parents=True, exist_ok=True)
        # Short relative names: QEMU splits its -initrd argument at commas and blanks.
        for name, target in (("vmlinuz", dom0.kernel), ("initrd.img", dom0.initrd)):
            (run / name).symlink_to(target)
        ports = dict(zip(ADDRESS, _free_ports(len(ADDRESS)), strict=True))
        forwards = "".join(
            f",hostfwd=tcp:127.0.0.1:{ports[name]}-{ADDRESS[name]}:{PORT}" for name in ADDRESS
        )
        accelerator = ["-accel", "kvm", "-cpu", "host"] if nested_kvm() else [
            "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", TCG_CPU]  # fmt: skip
        say(f"QEMU with {'KVM (nested)' if nested_kvm() else 'TCG'}, logs in {run}")
        argv = [
            qemu, *accelerator, "-smp", "2", "-m", os.environ.get("PVFRONT_LAB_MEMORY", MEMORY),
            "-name", "pvfront-lab", "-display", "none", "-nodefaults", "-no-reboot",
            "-kernel", str(dom0.xen), "-append", XEN_COMMAND_LINE,
            "-initrd", f"vmlinuz {DOM0_COMMAND_LINE},initrd.img",
            "-chardev", "file,id=com1,path=xen-console.log", "-serial", "chardev:com1",
            "-qmp", "unix:qmp.sock,server=on,wait=off", "-pidfile", "qemu.pid",
            "-netdev", f"user,id=net0,restrict=on{forwards}",
            "-device", "virtio-net-pci,netdev=net0,romfile=",
            "-virtfs", "local,path=consoles,mount_tag=consoles,security_model=none",
        ]  # fmt: skip
        for disk in [Disk("dom0", dom0.root), *disks]:
            argv += cls._disk(run, disk)
        if die_with_us:
            argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        with (run / "qemu.log").open("wb") as log:
            process = subprocess.Popen(
                argv, cwd=run, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(lock,), start_new_session=True,
            )  # fmt: skip
        time.sleep(0.3)
        if process.poll() is not None:
            raise LabError("qemu", f"ended at once: {(run / 'qemu.log').read_text()}")
        _STARTED.append(process)
        _put_first(process.pid)
        return cls(run, ports, process.pid)

    @staticmethod
    def _disk(run: Path, disk: Disk) -> list[str]:
        if disk.overlay:
            layer = run / f"{disk.serial}.qcow2"
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw",
                 "-b", str(disk.image), str(layer)], check=True,
            )  # fmt: skip
            spec = f"file={layer},format=qcow2,cache=unsafe"
        else:
            spec = f"file={disk.image},format=raw,readonly=on"
        return ["-drive", f"{spec},if=none,id={disk.serial}",
                "-device", f"virtio-blk-pci,drive={disk.serial},serial={disk.serial}"]  # fmt: skip

    def alive(self) -> bool:
        """Whether QEMU still runs (also when it is not our child)."""
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                return False
        try:
            return b"qemu" in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return False

    def wait_booted(self, deadline: float = BOOT_DEADLINE) -> None:
        """Wait for every stage up to dom0's agent. Raises LabError naming the stage."""
        begin = time.monotonic()
        pending = list(STAGES)
        while True:
            text = self.console.since()
            failed = re.search(r"lab: FAILED (\w+):? ?(.*)", text)
            if failed:
                raise LabError(failed[1], f"{failed[2]}; console: {self.console.path}")
            while pending and pending[0][1] in text:
                say(f"{pending.pop(0)[0]} up after {time.monotonic() - begin:.1f} s")
            stage = pending[0][0] if pending else "agent"
            if not pending and self.dom0.alive():
                say(f"dom0's agent answers after {time.monotonic() - begin:.1f} s")
                return
            if not self.alive():
                raise LabError(stage, f"QEMU ended: {(self.run / 'qemu.log').read_text()}"
                                      f"; console: {self.console.path}")  # fmt: skip
            if time.monotonic() - begin > deadline:
                raise LabError(
                    stage,
                    f"not reached within {deadline:.0f} s; last lines of "
                    f"{self.console.path}:\n" + "\n".join(text.splitlines()[-10:]),
                )
            time.sleep(0.2)

    def stop(self) -> None:
        """End QEMU. Nothing in the disks' layers is meant to survive."""
        self.dom0.close()
        if self.alive():
            os.kill(self.pid, 15)
            for _ in range(50):
                if not self.alive():
                    break
                time.sleep(0.1)
            else:
                os.kill(self.pid, 9)
        for layer in self.run.glob("*.qcow2"):
            layer.unlink()


KEPT_RUNS = 20


def _tidy(present: Path) -> None:
    """Disk layers of runs whose QEMU is gone, and all but the newest runs: away."""
    runs = sorted(path for path in paths.BUILD.glob("2*-*") if path.is_dir() and path != present)
    for old in runs:
        pid = old / "qemu.pid"
        number = pid.read_text().strip() if pid.exists() else ""
        if number and Path(f"/proc/{number}").exists():
            continue
        for layer in old.glob("*.qcow2"):
            layer.unlink()
        if old in runs[:-KEPT_RUNS]:
            shutil.rmtree(old)


def new_run_directory() -> Path:
    """A fresh directory below build/lab named by the time; build/lab/latest points at it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run = paths.BUILD / stamp
    counter = 1
    while run.exists():
        counter += 1
        run = paths.BUILD / f"{stamp}-{counter}"
    run.mkdir(parents=True)
    _tidy(run)
    latest = paths.BUILD / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(run.name)
    return run
