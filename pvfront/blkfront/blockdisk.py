# SPDX-License-Identifier: BSD-2-Clause
"""What a disk of the kernel's is, whichever driver makes it: its names, its link, its queue.

The drivers' own halves are in target.py (nbd) and ublk.py. Features that a backend loses are taken
away through sysfs, which both drivers' queues have; `/run/pvfront/udev/<kernel name>` tells udev's
rules what the device itself cannot say.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

from .. import sysfs
from . import inuse
from .features import DiskGeometry

POLL = 0.05  # seconds between two looks at the kernel

Feature = Literal["flush", "discard"]


class BlockDisk:
    """`identifier` is "pvfront:vbd-51728"; `label` ("xvdb") names the link."""

    prefix: ClassVar[str]
    """Of the kernel's name: "nbd" of nbd0."""

    resize_waits = False

    def __init__(self, identifier: str, label: str, roots: sysfs.Roots) -> None:
        self.identifier = identifier
        self.label = label
        self._roots = roots
        self._index: int | None = None
        self._off: set[Feature] = set()

    # -- names -----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return "" if self._index is None else f"{self.prefix}{self._index}"

    @property
    def path(self) -> str:
        return "" if self._index is None else str(self._roots.dev / self.name)

    @property
    def link(self) -> str:
        return str(self._link)

    @property
    def _link(self) -> Path:
        return self._roots.dev / "pvfront" / self.label

    @property
    def _sys(self) -> Path:
        return self._roots.sys / "block" / self.name

    # -- what users see --------------------------------------------------------------------

    async def feature_off(self, feature: Feature) -> None:
        self._off.add(feature)
        self._apply_off()

    async def fail_after(self, seconds: float) -> None:
        """The device knows no such time."""

    def busy(self) -> str | None:
        """A reason of inuse.py, or None. Opens the device exclusively as the last word."""
        if self._index is None:
            return None
        return inuse.in_use(self.name, self._roots)

    def open_anywhere(self) -> str | None:
        """As `busy`, and who merely has it open counts too."""
        if self._index is None:
            return None
        return self.busy() or inuse.opened_by(self.name, self._roots)

    def in_flight(self) -> int:
        text = sysfs.read(self._sys / "inflight") if self._index is not None else None
        return sum(int(word) for word in (text or "").split() if word.isdigit())

    # -- steps -----------------------------------------------------------------------------

    def _find_off(self) -> None:
        """What an earlier supervisor took away stays away over the next resize."""
        queue = self._sys / "queue"
        if sysfs.read(queue / "write_cache") == "write through":
            self._off.add("flush")
        if sysfs.read_int(queue / "discard_max_bytes") == 0:
            self._off.add("discard")

    @property
    def _properties(self) -> Path:
        return self._roots.run / "udev" / self.name

    def _describe(self, geometry: DiskGeometry) -> bool:
        """What nbd cannot carry, for udev's rules; False if nothing of it is new."""
        lines = {
            "PVFRONT_NAME": self.label,
            "PVFRONT_SERIAL": self.identifier.partition(":")[2],
            "PVFRONT_PHYSICAL_BLOCK_SIZE": geometry.physical_sector_size,
            "PVFRONT_REMOVABLE": int(geometry.removable),
        }
        if geometry.discard:
            lines["PVFRONT_DISCARD_GRANULARITY"] = geometry.discard_granularity
            lines["PVFRONT_DISCARD_ALIGNMENT"] = geometry.discard_alignment
        text = "".join(f"{key}={value}\n" for key, value in lines.items())
        path = self._properties
        if sysfs.read(path) == text.strip():
            return False
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_text(text)
        new.replace(path)
        return True

    def _apply_off(self) -> None:
        """Takes features away; again after each resize, which brings discard back."""
        queue = self._sys / "queue"
        if "flush" in self._off and sysfs.read(queue / "write_cache") == "write back":
            sysfs.write(queue / "write_cache", "write through")
        if "discard" in self._off and sysfs.read_int(queue / "discard_max_bytes"):
            sysfs.write(queue / "discard_max_bytes", 0)

    def _make_link(self) -> None:
        """`/dev/pvfront/xvdb` -> `../nbd0`, replaced in one step."""
        wanted = f"../{self.name}"
        self._link.parent.mkdir(mode=0o755, exist_ok=True)
        with contextlib.suppress(OSError):
            if str(self._link.readlink()) == wanted:
                return
        new = self._link.with_name(f".{self.label}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(wanted)
        new.replace(self._link)

    def _remove_link(self) -> None:
        self._link.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._link.parent.rmdir()


async def within(seconds: float, wanted: Callable[[], bool]) -> bool:
    """Polls what the kernel has no event for; False if it did not come true in time."""
    until = time.monotonic() + seconds
    while not (came := wanted()) and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(POLL)
    return came


def modprobe(module: str, *options: str) -> str | None:
    """Returns what went wrong, or None."""
    try:
        done = subprocess.run(
            ["modprobe", module, *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"modprobe: {error}"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"modprobe {module} ended with {done.returncode}"
