# SPDX-License-Identifier: BSD-2-Clause
"""Taking a device from the kernel's own frontend, or before it, and giving it back.

Theory of operation
-------------------
The kernel binds a PV device to its frontend driver when the device appears, when the driver is
loaded, and when told to (/sys/bus/xen/drivers_probe). There is no driver_override. So:

- Hot-plugged devices: `hold_autoprobe` writes 0 to /sys/bus/xen/drivers_autoprobe, and devices
  that are not ours are handed on one by one (`probe`). This is global, therefore noted in
  /run/pvfront/autoprobe and undone by `release_autoprobe`, by `repair` (ExecStopPost), or by
  the next start, which finds the note and keeps it. It may be wanted by several services, each
  of which has a file of its name in /run/pvfront/hot-plug: the last to go undoes it, and none
  hands on devices of a class whose service has one.
- Present devices: `take` loads the kernel's frontend module first, because its later load would
  bind the device behind our back; with autoprobe off meanwhile, because a vbd that the kernel has
  bound once is lost to it. Then it unbinds the device. A disk in use is refused.
- `take` notes in /run/pvfront/NAME.claim whether the kernel had bound the device. It decides
  about the way back: a vif can always be bound again, a vbd only if the kernel had never bound it,
  or it stays dead until it is detached and attached again, or the guest is restarted (the
  kernel keeps the state of the first connection in its xenbus_device, and blkfront waits for
  InitWait only in Initialising; measured on 6.1). A claim that is there already, from a
  supervisor that died, keeps what it says; one about an earlier device of the same name, told
  apart by its inode in sysfs, is void.
- The claim on a vbd that the kernel cannot have again outlives our release of it, marked as
  released: nobody's, never handed to the kernel, and remembered by the next `take`. Bound all the
  same, such a device sits in Initialising, and the toolstack cannot detach it.

Driver names on the xen bus are the class names: vbd, vif, console.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import sysfs
from .blkfront import inuse
from .blkfront.inuse import InUse
from .errors import PvfrontError

__all__ = ["CannotTake", "Claims", "InUse", "Taken"]

MODULES = {"vbd": "xen-blkfront", "vif": "xen-netfront"}

_UNBINDS = 3  # the kernel may be in the middle of binding


class CannotTake(PvfrontError):
    """The device is not there, or the kernel does not let go of it."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A claim. `kernel_had_bound` decides whether the kernel can have the device back."""

    name: str
    kernel_had_bound: bool
    os_device: str = ""  # what the kernel called it: "xvdb"
    released: bool = False


def load_module(module: str) -> str | None:
    """modprobe; returns what went wrong, or None. A built-in module is fine."""
    try:
        done = subprocess.run(
            ["modprobe", module],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"exit {done.returncode}"


class Claims:
    """Whose a device is: the kernel's, ours, nobody's.

    Every method is synchronous and may take as long as a driver's probe or removal: call from a
    thread. Raises PvfrontError.
    """

    def __init__(
        self,
        roots: sysfs.Roots = sysfs.SYSTEM,
        *,
        load: Callable[[str], str | None] = load_module,
    ) -> None:
        self._roots = roots
        self._load = load

    @property
    def _bus(self) -> Path:
        return self._roots.sys / "bus" / "xen"

    def _device(self, name: str) -> Path:
        return self._bus / "devices" / name

    def _claim(self, name: str) -> Path:
        return self._roots.run / f"{name}.claim"

    @property
    def _autoprobe_note(self) -> Path:
        return self._roots.run / "autoprobe"

    @property
    def _holders(self) -> Path:
        return self._roots.run / "hot-plug"

    # -- hot plug --------------------------------------------------------------------------

    def hold_autoprobe(self, holder: str) -> None:
        """From now on the kernel binds no device by itself. Idempotent, also over a crash.

        `holder`: who wants that, a service by the class of its devices.
        """
        with self._autoprobe_lock():
            if not self._autoprobe_note.exists():
                before = sysfs.read(self._bus / "drivers_autoprobe")
                if before is None:
                    raise PvfrontError(
                        f"{self._bus}/drivers_autoprobe is missing",
                        hint="is this a Xen guest with the xenbus driver?",
                    )
                # The note goes first: a crash in between then restores what was there anyway.
                self._write(self._autoprobe_note, before + "\n")
            self._holders.mkdir(mode=0o755, parents=True, exist_ok=True)
            (self._holders / holder).touch()
            sysfs.write(self._bus / "drivers_autoprobe", 0)

    def release_autoprobe(self, holder: str) -> None:
        """Undoes `hold_autoprobe` once nobody else holds it; nothing if it was not in force.

        Devices that appeared meanwhile and are nobody's stay unbound: `probe_others` first.
        """
        with self._autoprobe_lock():
            (self._holders / holder).unlink(missing_ok=True)
            before = sysfs.read(self._autoprobe_note)
            if before is None or self._holding():
                return
            sysfs.write(self._bus / "drivers_autoprobe", 0 if before == "0" else 1)
            self._autoprobe_note.unlink(missing_ok=True)

    def repair(self, holder: str) -> None:
        """After a crash (ExecStopPost): autoprobe is restored. Claims stay, workers may live."""
        self.release_autoprobe(holder)

    def _holding(self) -> list[str]:
        """Who holds autoprobe; of the loads of a module (MODULE.PID) those that go on."""
        found = sysfs.listdir(self._holders)
        return [
            name
            for name in found
            if not (pid := name.partition(".")[2]) or (self._roots.proc / pid).exists()
        ]

    @contextlib.contextmanager
    def _autoprobe_lock(self) -> Iterator[None]:
        """Services that start at the same time must not take each other's 0 for what was there."""
        self._roots.run.mkdir(mode=0o755, parents=True, exist_ok=True)
        with (self._roots.run / "autoprobe.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def probe(self, name: str) -> None:
        """Lets the kernel have a device, if it has a driver for it and does not have it already.

        Not a vbd that it had before: it would bind it, and never serve it.
        """
        if self._lost(name):
            return
        if self.driver_of(name) is None and self._device(name).exists():
            sysfs.write(self._bus / "drivers_probe", name)

    def probe_others(self, keep: Callable[[str], bool]) -> list[str]:
        """`probe` for every device that nobody has or takes, and that `keep` does not want; their
        names.
        """
        taken = self._holding()
        others = [
            name
            for name in sysfs.listdir(self._bus / "devices")
            if self.driver_of(name) is None
            and name.partition("-")[0] not in taken
            and not keep(name)
            and self._noted(name) is None
        ]
        for name in others:
            self.probe(name)
        return others

    # -- one device ------------------------------------------------------------------------

    def driver_of(self, name: str) -> str | None:
        """The kernel driver that has the device bound ("vbd"), or None."""
        with contextlib.suppress(OSError):
            return (self._device(name) / "driver").readlink().name
        return None

    def os_device(self, name: str) -> str:
        """What the kernel's driver made of it: "xvdb", "eth0"; "" if nothing."""
        for kind in ("block", "net"):
            children = sysfs.listdir(self._device(name) / kind)
            if children:
                return children[0]
        return ""

    def taken(self, name: str) -> Taken | None:
        """The claim on the device, of this or an earlier supervisor, that was not released."""
        found = self._noted(name)
        return None if found is None or found.released else found

    def take(self, name: str, *, force: bool = False) -> Taken:
        """Makes the device ours; nothing is bound to it afterwards.

        Raises InUse for a disk that is mounted, swap, a part of LVM, MD or dm, or holds the root
        file system; `force` overrides all but the last. Raises CannotTake if there is no such
        device or the kernel keeps it. Taking what is ours already is fine.
        """
        klass = name.partition("-")[0]
        # Without the bus nothing is known; with it, an absent device has never been announced.
        if not self._device(name).exists():
            there = [d for d in sysfs.listdir(self._bus / "devices") if d.startswith(f"{klass}-")]
            raise CannotTake(
                f"{name}: the kernel knows no such device",
                hint=f"there are: {', '.join(there) or 'none'}",
            )
        before = self._noted(name)
        if before is not None and self.driver_of(name) is None:
            if before.released:
                before = replace(before, released=False)
                self._note(before)
            return before
        driver = self.driver_of(name)
        if driver is None and klass in MODULES:
            self._load_frontend(MODULES[klass])
            driver = self.driver_of(name)  # the load may have bound it
        disk = self.os_device(name)
        if driver is not None and klass == "vbd" and disk:
            self._refuse_if_in_use(disk, force)
        claim = Taken(
            name,
            kernel_had_bound=driver is not None or (before is not None and before.kernel_had_bound),
            os_device=disk,
        )
        # Noted first: a crash between note and unbind must not forget that the kernel had it.
        self._note(claim)
        if driver is not None:
            try:
                self._unbind(name)
            except PvfrontError:
                if before is None or before.released:
                    self._claim(name).unlink(missing_ok=True)
                raise
        return claim

    def stolen_back(self, name: str) -> bool:
        """Whether the kernel has bound a device that we had taken."""
        return self.taken(name) is not None and self.driver_of(name) is not None

    def undo(self, name: str) -> None:
        """Unbinds a device that was stolen back, and notes that the kernel has had it now.

        Raises InUse if someone has begun to use the kernel's disk meanwhile.
        """
        disk = self.os_device(name)
        if disk and name.startswith("vbd-"):
            self._refuse_if_in_use(disk, force=False)
        self._note(Taken(name, kernel_had_bound=True, os_device=disk))
        self._unbind(name)

    def forget(self, name: str) -> None:
        """The device is gone for good (detached): its claim ends with it."""
        self._claim(name).unlink(missing_ok=True)

    def give_back(self, name: str) -> str:
        """Lets the kernel have the device again where it can; says what became of it.

        Both ends must be at a fresh start (frontend 1, backend 2) for a vbd.
        """
        claim = self.taken(name)
        if not self._device(name).exists():
            self.forget(name)
            return f"{name}: released; the device is gone"
        if claim is not None and claim.kernel_had_bound and name.startswith("vbd-"):
            self._note(replace(claim, released=True))
            return (
                f"{name}: released, but the kernel cannot use it again: its driver had it before. "
                "Detach and attach it (xl block-detach, xl block-attach) or restart the guest; "
                "pvfront can serve it again at any time"
            )
        try:
            self.probe(name)
        finally:
            self.forget(name)
        driver = self.driver_of(name)
        if driver is None:
            return (
                f"{name}: released; no driver of the kernel has taken it "
                f"(try `echo {name} > /sys/bus/xen/drivers_probe`)"
            )
        disk = self.os_device(name)
        return f"{name}: given back to the kernel" + (f" as {disk}" if disk else "")

    # -- steps -----------------------------------------------------------------------------

    def _load_frontend(self, module: str) -> None:
        """A module that is not installed can never bind anything: that is no error."""
        if (self._roots.sys / "module" / module.replace("-", "_")).exists():
            return
        holder = f"{module}.{os.getpid()}"
        self.hold_autoprobe(holder)
        try:
            self._load(module)
        finally:
            self.release_autoprobe(holder)

    def _inode(self, name: str) -> int:
        """Changes with each device that gets the name; 0 if there is none."""
        try:
            return self._device(name).stat().st_ino
        except OSError:
            return 0

    def _noted(self, name: str) -> Taken | None:
        """What is noted about the present device of this name."""
        text = sysfs.read(self._claim(name))
        if text is None:
            return None
        with contextlib.suppress(ValueError):
            found = json.loads(text)
            if isinstance(found, dict):
                if found.get("inode") != self._inode(name):
                    return None
                return Taken(
                    name,
                    kernel_had_bound=found.get("kernel_had_bound") is not False,
                    os_device=str(found.get("os_device", "")),
                    released=found.get("released") is True,
                )
        return Taken(name, kernel_had_bound=True)  # damaged: the careful answer

    def _lost(self, name: str) -> bool:
        """Whether the kernel can never serve the device again: we had it from the kernel."""
        noted = self._noted(name)
        return noted is not None and noted.released

    def _note(self, claim: Taken) -> None:
        note = {
            "kernel_had_bound": claim.kernel_had_bound,
            "os_device": claim.os_device,
            "released": claim.released,
            "inode": self._inode(claim.name),
        }
        self._write(self._claim(claim.name), json.dumps(note) + "\n")

    def _refuse_if_in_use(self, disk: str, force: bool) -> None:
        uses = inuse.find(disk, self._roots)
        if not uses:
            claimed = inuse.claim_probe(disk, self._roots)
            uses = [claimed] if claimed else []
        if uses and (not force or any(use.root for use in uses)):
            raise InUse(disk, uses)

    def _unbind(self, name: str) -> None:
        for _ in range(_UNBINDS):
            driver = self.driver_of(name)
            if driver is None:
                return
            sysfs.write(self._bus / "drivers" / driver / "unbind", name)
        if self.driver_of(name) is not None:
            raise CannotTake(
                f"{name}: the kernel binds it again after each unbind",
                hint="something writes /sys/bus/xen/drivers_probe or loads its module again",
            )

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        new.write_text(text, encoding="utf-8")
        new.replace(path)
