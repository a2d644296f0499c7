# SPDX-License-Identifier: BSD-2-Clause
"""A guest: its xl configuration, its life, and commands run inside it.

The emulated CPU now and then triple-faults an HVM or PVH guest, mostly in a start or restore.
`triple_fault` tells how that is recognised; that start or restore is then repeated, once, counted
and printed. Nothing else is ever repeated.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .client import COMMAND_DEADLINE, Machine, Result
from .errors import CommandFailed, DeadlineExceeded, LabError
from .paths import BLOCK_SCRIPT
from .progress import say
from .xen import ADDRESS, Outer

Kind = Literal["hvm", "pvh", "pv", "pvh612"]
KINDS: tuple[Kind, ...] = ("hvm", "pvh", "pv", "pvh612")

IMAGE: dict[Kind, str] = {"hvm": "guest", "pvh": "guest", "pv": "guest", "pvh612": "guest612"}
"""The image a guest starts from. pvh612 is the PVH guest with Debian's packaged 6.12 kernel."""

BRIDGE = "xenbr0"
FILES = "/var/lib/lab"
"""Where dom0 keeps the guests' kernel, initramfs, configurations and saved states."""

BOOT_DISK = f"{FILES}/boot-disk.tar"

CREATE_DEADLINE = 240.0
"""Seconds `xl create` and `xl restore` may take."""

BOOT_DEADLINE = 600.0
"""Seconds from `xl create` to a booted system; 60 is usual."""

OWN_CRASH = re.compile(
    r"Oops|BUG:|kernel BUG at|general protection|Kernel panic|unable to handle|stack guard"
)
"""What a crashing Linux says on its console."""

STEPPED = re.compile(r"WARNING: .* exc_debug_kernel")
"""A kernel that was single-stepped, which nobody asks for here: a guest entry of the emulator's has
added arbitrary bits to its flags, of which TF is the one that Linux speaks of. DF, which makes
string instructions run backwards, came along in the one that was seen: it hung a second later.
"""

LET_GO_OF_CONSOLES = (
    "for one in /sys/bus/xen/drivers/xenconsole/console-[1-9]*; do "
    "test ! -e $one || echo ${one##*/} >${one%/*}/unbind; done"
)
"""Or hvc_xen's resume gives away an interrupt of another device's (docs/lab.md, Traps)."""

CHANNELS = ("login", "files")
"""Names of the secondary consoles of an HVM guest, and of one created with `Guest.channels`."""

Value = str | int | Sequence[str]


def boot_file(kind: Kind, name: str) -> str:
    """Where dom0 has "vmlinuz" or "initrd.img" of a kind's image."""
    return f"{FILES}/{IMAGE[kind]}-{name}"


def disk_spec(vdev: str, mode: str, device: str, *, stock: bool = False) -> str:
    """A vbd for xl: "format=raw,vdev=xvdb,access=w,...,target=/dev/ram0".

    With the lab's own hotplug script (scripts/block-lab) or, if `stock`, xl's: the same keys,
    3 s later.
    """
    script = "" if stock else f"script={BLOCK_SCRIPT.name},"
    return f"format=raw,vdev={vdev},access={mode},{script}target={device}"


@dataclass
class Tally:
    """What happened to guests beyond the plan, for the summary line."""

    triple_faults: list[str] = field(default_factory=list)


def triple_fault(xen: str, guest: str, domids: Collection[int] | None = None) -> bool:
    """Whether a domain (one of `domids`, or any) was triple-faulted by the emulator.

    `xen` is Xen's console, `guest` the guest's, both since the start or restore began. Two marks
    tell it from a crash of the guest's own: addresses of Xen's text (0xffff82d0...) in the dump of
    the guest's context; or a guest that said nothing, for a Linux that crashes reports it first.
    """
    for match in re.finditer(r"\bd(\d+)v\d+ Triple fault", xen):
        if domids is not None and int(match[1]) not in domids:
            continue
        dump = xen[match.start() :].split("Triple fault", 2)[1]
        if re.search(r"\bffff82d[0-9a-f]{9}\b", dump) or not OWN_CRASH.search(guest):
            return True
    return False


def xl_value(value: Value) -> str:
    """A Python value in the syntax of xl.cfg."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, int):
        return str(value)
    return "[" + ", ".join(f'"{item}"' for item in value) + "]"


class Guest(Machine):
    """One domU. Commands run through its agent; the toolstack's side is in the methods below."""

    def __init__(self, kind: Kind, outer: Outer, root: str, payload: str | None, tally: Tally):
        """`root`, `payload`: dom0's block devices for xvda and xvdz."""
        super().__init__(kind, outer.ports[kind], outer.commands)
        self.kind: Kind = kind
        self.type = "pvh" if kind == "pvh612" else kind
        """What xl calls it: "hvm", "pvh" or "pv"."""
        self.outer = outer
        self.dom0 = outer.dom0
        self.address = ADDRESS[kind]
        self.mac = f"00:16:3e:77:00:{int(self.address.rsplit('.', 1)[1]):02x}"
        self.root = root
        self.payload = payload
        self.tally = tally
        self.create_seconds: float | None = None
        """From the start of `xl create` to a booted system, of the last start."""
        self.domids: list[int] = []
        """Of all its domains so far; the last is the present one's, if there is one."""
        self.services: dict[str, tuple[str, int]] = {}
        """By unit, the settings and the process that a service of ours was last seen with."""
        self.dirty = False
        """Not in the standard configuration or state: later tests start it afresh."""

    # -- configuration ----------------------------------------------------------------------

    def config(
        self,
        disks: Sequence[str] = (),
        vifs: Sequence[str] = (),
        options: Mapping[str, Value] | None = None,
        cmdline: str = "",
    ) -> dict[str, Value]:
        """The xl configuration.

        disks: further disk specifications ("phy:/dev/ram0,xvdb,w"); vifs: further ones after the
        control vif; options: xl.cfg settings that replace or join the default ones.
        """
        config: dict[str, Value] = {
            "name": self.kind,
            "type": self.type,
            "kernel": boot_file(self.kind, "vmlinuz"),
            "ramdisk": boot_file(self.kind, "initrd.img"),
            "cmdline": self._command_line(cmdline),
            "memory": 512,
            "vcpus": 1,
            "disk": [disk_spec("xvda", "w", self.root)]
            + ([disk_spec("xvdz", "r", self.payload)] if self.payload else [])
            + list(disks),
            "vif": [f"mac={self.mac},bridge={BRIDGE},type=vif", *vifs],
            "on_poweroff": "destroy",
            "on_reboot": "destroy",
            "on_crash": "destroy",
        }
        if self.kind != "pv":
            config["tsc_mode"] = "native"
        if self.kind == "hvm":
            # GRUB as the kernel; it finds the real one on a disk that only the firmware sees (no
            # vbd belongs to it, and the guest has no AHCI driver). Why: image.py, _grub.
            del config["ramdisk"], config["cmdline"]
            config |= {
                "kernel": f"{FILES}/grub.lnx",
                "device_model_args_hvm": [
                    "-device", "ahci,id=firmware-disk",
                    "-drive", f"if=none,id=boot,format=raw,snapshot=on,file={BOOT_DISK}",
                    "-device", "ide-hd,drive=boot,bus=firmware-disk.0,bootindex=1",
                ],
                "vnc": 0, "usb": 0, "vga": "none", "serial": "none",
                "channel": self.channels(),  # which in the others cost a QEMU
            }  # fmt: skip
        return config | dict(options or {})

    def channels(self) -> list[str]:
        """The xl configuration's `channel`, for CHANNELS as sockets in dom0."""
        # xl 4.17 gives the first one the primary console's number, and libxl leaves it out.
        return ["connection=pty,name=dummy"] + [
            f"connection=socket,path={self.channel_path(name)},name={name}" for name in CHANNELS
        ]

    def channel_path(self, name: str) -> str:
        """The socket in dom0 of one of CHANNELS."""
        return f"/run/xen/{self.kind}-{name}.sock"

    def _command_line(self, more: str) -> str:
        return (
            "console=hvc0 loglevel=6 net.ifnames=0 mitigations=off audit=0 apparmor=0 "
            "random.trust_cpu=on systemd.show_status=0 cryptomgr.notests "
            "lab.root=/dev/xvda lab.init=/lib/systemd/systemd "
            f"lab.ip={self.address} lab.mac={self.mac} "
            # nox2apic: the emulator triple-faults at an intercepted write of the x2APIC's EOI
            # register (wrmsr 0x80b, six of seven dumps seen): about once in 15 minutes.
            f"{'' if self.kind == 'pv' else 'nox2apic '}"
            # pci=noearly: the early PCI scan looks for an AGP bridge, at one exit an access, 7 s.
            # i8042: the kernel probes keyboard and mouse at each restore (docs/lab.md, Traps).
            f"{'pci=noearly i8042.nokbd i8042.noaux ' if self.kind == 'hvm' else ''}"
            f"{'lab.payload=/dev/xvdz ' if self.payload else ''}{more}"
        ).strip()

    def _write_boot_disk(self, more: str) -> None:
        """The tar archive from which GRUB starts an HVM guest."""
        menu = f"linux /vmlinuz {self._command_line(more)}\ninitrd /initrd.img\nboot\n"
        self.dom0.write(f"{FILES}/grub.cfg", menu)
        for name in ("vmlinuz", "initrd.img"):
            self.dom0.run(["ln", "-sf", boot_file(self.kind, name), f"{FILES}/{name}"])
        names = "grub.cfg vmlinuz initrd.img"
        self.dom0.run(f"tar --format=ustar -h -C {FILES} -cf {BOOT_DISK} {names}")

    # -- life -------------------------------------------------------------------------------

    def create(
        self,
        disks: Sequence[str] = (),
        vifs: Sequence[str] = (),
        options: Mapping[str, Value] | None = None,
        cmdline: str = "",
    ) -> None:
        """`xl create`, then wait until systemd has booted. See `config` for the arguments."""
        self.dirty = bool(disks or vifs or options or cmdline)
        text = "".join(
            f"{key}={xl_value(value)}\n"
            for key, value in self.config(disks, vifs, options, cmdline).items()
        )
        self.dom0.write(f"{FILES}/{self.kind}.cfg", text)
        if self.kind == "hvm":
            self._write_boot_disk(cmdline)
        begin = time.monotonic()
        self._begin_twice_if_tcg_faults(
            "start",
            lambda: self.dom0.run(
                ["xl", "create", f"{FILES}/{self.kind}.cfg"], timeout=CREATE_DEADLINE
            ),
        )
        self._wait_systemd()
        self.create_seconds = time.monotonic() - begin
        say(f"{self.kind} guest booted in {self.create_seconds:.1f} s")

    def _begin_twice_if_tcg_faults(self, what: str, begin: Callable[[], object]) -> None:
        """Begin, wait for the agent; once more if the emulator triple-faulted the guest."""
        for attempt in (1, 2):
            xen, own = self.outer.console.position(), len(self.console())
            started = time.monotonic()

            def faulted(
                xen: int = xen, own: int = own, former: frozenset[int] = frozenset(self.domids)
            ) -> bool:
                ours = set(self.domids) - former or None
                said = self.console()[own:]
                if STEPPED.search(said):
                    return True
                return triple_fault(self.outer.console.since(xen), said, ours) and not (
                    self.running()
                )

            try:
                begin()
            except (CommandFailed, DeadlineExceeded) as error:
                trouble = LabError("create", str(error))
            else:
                self.domid()
                say(f"{self.kind}: {what}ed by xl in {time.monotonic() - started:.1f} s")
                try:
                    self.wait_agent(faulted=faulted)
                    return
                except LabError as error:
                    trouble = error
            if attempt == 1 and not self.running() and faulted():
                self.tally.triple_faults.append(f"{self.kind} {what}")
                say(f"{self.kind}: the emulator triple-faulted this {what}; once more")
                self.close()
                continue
            raise trouble

    def wait_agent(
        self, deadline: float = BOOT_DEADLINE, faulted: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait until the agent answers. Raises LabError(boot) saying what was seen last.

        `faulted`: true once the emulator has ended or broken the domain, which ends the wait.
        """
        begin = looked = time.monotonic()
        while not self.alive():
            time.sleep(0.5)
            if faulted():
                raise LabError("boot", f"{self.kind}: broken by the emulator (docs/lab.md, Traps)")
            if not self.outer.alive():
                raise LabError("qemu", f"ended while the {self.kind} guest booted")
            if time.monotonic() - looked > 5:
                looked = time.monotonic()
                if self.running():
                    continue
                raise LabError("boot", f"the {self.kind} domain is gone; {self._console_tail()}")
            if time.monotonic() - begin > deadline:
                raise LabError(
                    "agent",
                    f"{self.kind}: no agent within {deadline:.0f} s; {self._console_tail()}",
                )

    def _wait_systemd(self) -> None:
        """Wait until the boot transaction has ended; a failed unit breaks the lab."""
        state = self.run(
            "systemctl is-system-running --wait", timeout=BOOT_DEADLINE, check=False
        ).stdout.strip()
        if state != "running":
            units = self.run("systemctl --failed --no-legend; systemctl list-jobs", check=False)
            raise LabError("boot", f"{self.kind}: systemd is {state}\n{units.stdout}")

    def _console_tail(self) -> str:
        text = self.console()
        return f"end of its console ({self.console_path}):\n" + "\n".join(text.splitlines()[-12:])

    @property
    def console_path(self) -> str:
        """The guest console's log on the host."""
        return str(self.outer.run / "consoles" / f"guest-{self.kind}.log")

    def console(self) -> str:
        """What the guest wrote on its console so far."""
        try:
            text = Path(self.console_path).read_bytes()
            return text.decode(errors="replace").replace("\r", "")
        except FileNotFoundError:
            return ""

    def domid(self) -> int | None:
        """The domain's number, None if there is no such domain. Asks xl."""
        result = self.dom0.run(["xl", "domid", self.kind], check=False)
        if not result.ok:
            return None
        number = int(result.stdout)
        if number not in self.domids:
            self.domids.append(number)
        return number

    @property
    def number(self) -> int:
        """The domain's number as it was last seen: nobody is asked. There must have been one."""
        if not self.domids and self.domid() is None:
            raise LabError("create", f"there is no {self.kind} domain")
        return self.domids[-1]

    def running(self) -> bool:
        if self.domids:  # a tenth of what xl costs dom0
            known = ["xenstore-exists", f"/local/domain/{self.domids[-1]}"]
            if self.dom0.run(known, check=False).ok:
                return True
        return self.domid() is not None

    def lost(self) -> str | None:
        return None if self.running() else "the domain is gone (see Xen's console)"

    def destroy(self) -> None:
        """`xl destroy`, if it exists."""
        if self.running():
            self.dom0.run(["xl", "destroy", self.kind], timeout=CREATE_DEADLINE)
        self.close()

    def shutdown(self, timeout: float = 300.0) -> None:
        """`xl shutdown -w`: an orderly end. Then the domain is gone, and its name is free."""
        until = time.monotonic() + timeout
        self.dom0.run(["xl", "shutdown", "-w", self.kind], timeout=timeout)
        self.close()
        while self.running():  # halted, and not yet destroyed by xl's daemon
            if time.monotonic() > until:
                raise DeadlineExceeded(f"{self.kind}: halted, but not gone within {timeout:.0f} s")
            time.sleep(0.5)

    def save(self, path: str = "", timeout: float = 300.0) -> str:
        """`xl save`; the domain is gone afterwards. Returns the path in dom0."""
        path = path or f"{FILES}/{self.kind}.save"
        self.run(LET_GO_OF_CONSOLES)
        begin = time.monotonic()
        self.dom0.run(["xl", "save", self.kind, path], timeout=timeout)
        self.close()
        say(f"{self.kind}: saved in {time.monotonic() - begin:.1f} s")
        return path

    def restore(self, path: str = "") -> None:
        """`xl restore`, then wait for the agent."""
        path = path or f"{FILES}/{self.kind}.save"
        self._begin_twice_if_tcg_faults(
            "restor", lambda: self.dom0.run(["xl", "restore", path], timeout=CREATE_DEADLINE)
        )

    @contextlib.contextmanager
    def root_in_dom0(self) -> Iterator[str]:
        """Where dom0 has the root file system of a guest that is down."""
        where = f"/tmp/root-{self.kind}"
        self.dom0.run(f"mkdir -p {where} && mount {self.root} {where}")
        try:
            yield where
        finally:
            self.dom0.run(f"umount {where} && blockdev --flushbufs {self.root}")

    # -- devices ----------------------------------------------------------------------------

    def block_attach(self, spec: str, timeout: float = COMMAND_DEADLINE) -> None:
        """`xl block-attach`: spec as in `config`'s disks."""
        self.dom0.run(["xl", "block-attach", self.kind, spec], timeout=timeout)

    def block_detach(
        self, vdev: str, *, force: bool = False, timeout: float = COMMAND_DEADLINE
    ) -> None:
        """`xl block-detach` of "xvdb"."""
        argv = ["xl", "block-detach", self.kind, vdev, *(["--force"] if force else [])]
        self.dom0.run(argv, timeout=timeout)

    def vdevs(self, klass: str = "vbd") -> list[int]:
        """Numbers of the vbds (or vifs) that it has now, as libxl keeps them in the store."""
        path = f"/libxl/{self.number}/device/{klass}"
        listing = self.dom0.run(["xenstore-list", path], check=False).stdout
        return [int(word) for word in listing.split()]

    def detach_extras(self) -> None:
        """Detach every vif but the control vif, and every vbd but the root and the payload; one
        that will not go, by force."""
        for number in self.vdevs("vif"):
            if number:
                self.dom0.run(["xl", "network-detach", self.kind, str(number)], check=False)
        for number in self.vdevs():
            if number not in (51712, (1 << 28) + (25 << 8)):
                if self.dom0.run(["xl", "block-detach", self.kind, str(number)], check=False).ok:
                    continue
                self.dom0.run(["xl", "block-detach", self.kind, str(number), "--force"])

    def pytest(self, *arguments: str, timeout: float = 900.0) -> Result:
        """Run the suite of tests/guest inside, with pytest's arguments. Raises CommandFailed.

        Paths are relative to tests/guest.
        """
        argv = ["/opt/pvfront/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        return self.run([*argv, *arguments], cwd="/opt/pvfront/lab/tests", timeout=timeout)

    # -- inside -----------------------------------------------------------------------------

    def xenstore_read(self, path: str) -> str | None:
        """A key as the guest reads it; None where it does not exist. Relative paths are its own."""
        result = self.run(["xenstore-read", path], check=False)
        return result.stdout.rstrip("\n") if result.ok else None

    def journal(self, *units: str) -> str:
        """The guest's journal of this boot, of the given units or all."""
        selected = " ".join(f"-u {unit}" for unit in units)
        return self.run(f"journalctl -b --no-pager -o short-monotonic {selected}").stdout
