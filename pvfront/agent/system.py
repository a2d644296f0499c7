# SPDX-License-Identifier: BSD-2-Clause
"""What the system is: its name, its memory, what it can be asked for."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from .. import __version__, sysfs
from ..facts import guest_type
from ..sysfs import Roots
from .board import Board
from .context import Context
from .keys import Keys, driver_keys, memory_keys, os_keys, version_keys

MEMORY_EVERY = 60.0  # seconds
_OS_RELEASE = ("etc/os-release", "usr/lib/os-release")
_SERVICES = (("vbd", "XENVBD"), ("vif", "XENVIF"), ("console", "XENCONS"))
_MAX_FILE = 1 << 16


def os_release(root: Path) -> dict[str, str]:
    """The fields of os-release(5); {} if there is none."""
    for name in _OS_RELEASE:
        try:
            with (root / name).open(encoding="utf-8", errors="replace") as file:
                text = file.read(_MAX_FILE)
        except OSError:
            continue
        fields = {}
        for line in text.splitlines():
            key, equals, value = line.strip().partition("=")
            if equals and not key.startswith("#"):
                fields[key] = _unquoted(value)
        return fields
    return {}


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    return value.replace('\\"', '"').replace("\\$", "$").replace("\\\\", "\\")


def meminfo(proc: Path) -> tuple[int, int] | None:
    """KiB: all of it, and what programs could still have."""
    found: dict[str, int] = {}
    for line in (sysfs.read(proc / "meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if name in ("MemTotal", "MemAvailable") and words and words[0].isdigit():
            found[name] = int(words[0])
    if len(found) < 2:
        return None
    return found["MemTotal"], found["MemAvailable"]


def feature_keys(roots: Roots) -> Keys:
    """`control/feature-*` beyond those that the kernel itself writes (drivers/xen/manage.c)."""
    states = (sysfs.read(roots.sys / "power" / "state") or "").split()
    balloon = (roots.sys / "devices" / "system" / "xen_memory").is_dir()
    return {
        "control/feature-balloon": str(int(balloon)),
        "control/feature-s3": str(int("mem" in states)),
        "control/feature-s4": str(int("disk" in states)),
    }


_EMULATED_NICS = {"0x10ec:0x8139", "0x8086:0x100e", "0x8086:0x10d3"}  # rtl8139, e1000, e1000e
_EMULATED_DISKS = {"0x8086:0x7010", "0x8086:0x2922"}  # PIIX3 IDE, ICH9 AHCI


def emulated(roots: Roots) -> dict[str, str]:
    """Emulated disks and networks beside the PV ones: "unplugged", or their names. {}: no HVM.

    The kernel asks QEMU to unplug them before it binds drivers (platform-pci-unplug.c); what it has
    unplugged has no device behind its controller any more.
    """
    if guest_type(roots) != "HVM":
        return {}
    found: dict[str, list[str]] = {"disks": [], "networks": []}
    for kind, directory, known in (
        ("disks", roots.sys / "block", _EMULATED_DISKS),
        ("networks", roots.sys / "class" / "net", _EMULATED_NICS),
    ):
        for name in sysfs.listdir(directory):
            at = (directory / name).resolve()
            if any(_pci_id(parent) in known for parent in at.parents) and not _is_cdrom(at):
                found[kind].append(name)
    return {kind: ", ".join(names) or "unplugged" for kind, names in found.items()}


def _pci_id(device: Path) -> str:
    return f"{sysfs.read(device / 'vendor')}:{sysfs.read(device / 'device')}"


def _is_cdrom(disk: Path) -> bool:
    """Those stay: the unplug protocol leaves them (docs/misc/hvm-emulated-unplug.pandoc of Xen)."""
    return sysfs.read(disk / "device" / "type") == "5"


class System:
    """Puts `attr/PVAddons`, `data/os_*`, `drivers`, `control/feature-*`, `data/meminfo_*`."""

    name = "system"

    def __init__(self, board: Board, *, every: float = MEMORY_EVERY) -> None:
        self._board = board
        self._every = every
        self._memory: tuple[int, int] | None = None
        self._emulated: dict[str, str] = {}

    async def run(self, context: Context) -> None:
        roots = context.platform.roots
        self._emulated = emulated(roots)
        self._board.put("version", version_keys(__version__))
        self._board.put("os", os_keys(os_release(roots.root), os.uname().release))
        self._board.put("features", feature_keys(roots))
        while True:
            drivers = [
                name
                for klass, name in _SERVICES
                if (context.platform.run_dir / f"supervisor-{klass}.sock").exists()
            ]
            self._board.put("drivers", driver_keys(["XENIFACE", *drivers], __version__))
            if (found := meminfo(roots.proc)) is not None:
                self._memory = found
                self._board.put("memory", memory_keys(*found))
            await asyncio.sleep(self._every)

    def status(self) -> dict[str, Any]:
        if self._memory is None:
            return {}
        total, available = self._memory
        found: dict[str, Any] = {"memory_total_kib": total, "memory_available_kib": available}
        if self._emulated:
            found["emulated"] = self._emulated
        return found
