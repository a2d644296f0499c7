# SPDX-License-Identifier: BSD-2-Clause
"""What status, the log and hooks say of a disk. Pure."""

from __future__ import annotations

from typing import Any

from ..budget import Grant
from .features import DiskGeometry
from .rings import Shape


def geometry(found: DiskGeometry, offered: DiskGeometry, *, by_barrier: bool) -> dict[str, Any]:
    """The disk as its backend describes it, with the features that users are offered of it."""
    return {
        "sectors": found.sectors,
        "size": found.size,
        "sector_size": found.sector_size,
        "physical_sector_size": found.physical_sector_size,
        "read_only": found.read_only,
        "removable": found.removable,
        "flush": offered.flush,
        "barrier": by_barrier,
        "discard": offered.discard,
        "discard_granularity": found.discard_granularity,
        "discard_alignment": found.discard_alignment,
    }


def rings(shape: Shape, grant: Grant | None, *, persistent: bool) -> dict[str, Any]:
    """A generation's queues (all numbers but `queues` are each queue's), and their pages."""
    found: dict[str, Any] = {
        "queues": shape.queues,
        "slots": shape.slots,
        "ring_pages": shape.ring_pages,
        "pool_pages": shape.pool,
        "segments": shape.segments,
        "indirect": shape.indirect,
        "persistent": persistent,
    }
    if grant is not None:
        found["granted"] = {"asked": grant.asked, "got": grant.got, "why": grant.why}
    return found


def lost(before: DiskGeometry, now: DiskGeometry) -> list[str]:
    """What a backend has no more that came back, and what that means for users."""
    found = []
    if now.read_only and not before.read_only:
        found.append("it is read-only: writes fail from now on")
    if (before.flush or before.barrier) and not (now.flush or now.barrier):
        found.append("it has no flush: what was written may be lost with the backend's power")
    if before.discard and not now.discard:
        found.append("it has no discard")
    return found


def size_event(old: int, new: int) -> str:
    """The name of the event of another size, in bytes; 0 is no medium."""
    if old and new:
        return "resize"
    return "insert" if new else "eject"
