# SPDX-License-Identifier: BSD-2-Clause
"""What the store's keys say about a disk, and what we write there. Pure: text in, values out.

The keys are those of Xen's public header io/blkif.h. Linux's blkback writes its transport limits
before InitWait and the disk's properties and optional features only just before Connected, so
`parse_limits` is for InitWait and `parse_geometry` for Connected; a backend may write either
early or late, therefore both take whatever keys are there.

Units: `sectors` counts 512 bytes whatever `sector-size` says. Older copies of blkif.h say
otherwise and QEMU followed them, but blkback never did and the header has been corrected since.
Without `feature-large-sector-size` (which we do not write) only blkback offers more than 512: a
larger sector size of any other backend is refused, because what it counts in is anyone's guess.

`discard-enable` is between the toolstack and the backend; a frontend neither reads nor writes it.

Backend contents are hostile. A value the disk cannot do without is refused (GeometryError); any
other is replaced by something safe and reported (negotiate.Problem).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ..errors import PvfrontError
from ..negotiate import BadValue, Keys, Problem, parse_uint

SECTOR = 512
VIRTUAL_DEVICE = "virtual-device"  # the toolstack's; we hide it while the disk is ours
PROTOCOL = "x86_64-abi"  # XEN_IO_PROTO_ABI_X86_64 (io/protocols.h)

# blkif.h
VDISK_CDROM = 0x1
VDISK_REMOVABLE = 0x2
VDISK_READONLY = 0x4

DIRECT_SEGMENTS = 11  # BLKIF_MAX_SEGMENTS_PER_REQUEST
MAX_RING_PAGE_ORDER = 4
MAX_INDIRECT_SEGMENTS = 256
MAX_QUEUES = 64

_MAX_BYTES = (1 << 63) - 1  # loff_t
_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1

LIMIT_KEYS = ("feature-max-indirect-segments", "max-ring-page-order", "multi-queue-max-queues")
GEOMETRY_KEYS = (
    "sectors",
    "sector-size",
    "physical-sector-size",
    "info",
    "mode",
    "removable",
    "feature-flush-cache",
    "feature-barrier",
    "feature-persistent",
    "feature-discard",
    "discard-granularity",
    "discard-alignment",
    "discard-secure",
)
BACKEND_KEYS = frozenset((*LIMIT_KEYS, *GEOMETRY_KEYS, "device-type"))
"""All that is read of a backend; toolstacks and hotplug scripts keep as many again there."""

_STALE = re.compile(
    r"ring-ref\d*|event-channel|protocol|ring-page-order|num-ring-pages"
    r"|multi-queue-num-queues|queue-\d+|feature-.+"
)


class GeometryError(PvfrontError):
    """A key without which there is no disk is missing or impossible."""


@dataclass(frozen=True, slots=True)
class RingLimits:
    """What the backend allows for the rings; each is already within our own limits."""

    max_indirect: int = 0  # segments per request with indirect descriptors; 0: none
    max_ring_page_order: int = 0
    max_queues: int = 1


@dataclass(frozen=True, slots=True)
class DiskGeometry:
    """A disk as its backend describes it."""

    sectors: int  # of 512 bytes; a multiple of sector_size / 512; 0: no medium
    sector_size: int = SECTOR  # bytes
    physical_sector_size: int = SECTOR  # bytes, a multiple of sector_size
    read_only: bool = False
    removable: bool = False
    device_type: str = "disk"
    flush: bool = False
    barrier: bool = False
    persistent: bool = False
    discard: bool = False
    discard_granularity: int = SECTOR  # bytes
    discard_alignment: int = 0  # bytes, below the granularity
    discard_secure: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return self.sectors * SECTOR


def parse_limits(backend: Mapping[str, str]) -> tuple[RingLimits, list[Problem]]:
    """The transport limits; a missing or impossible key means its default."""
    keys = Keys(backend)
    indirect = keys.uint("feature-max-indirect-segments", default=0, lo=0, hi=_U32)
    order = keys.uint("max-ring-page-order", default=0, lo=0, hi=_U32)
    queues = keys.uint("multi-queue-max-queues", default=1, lo=1, hi=_U32)
    limits = RingLimits(
        max_indirect=min(indirect, MAX_INDIRECT_SEGMENTS),
        max_ring_page_order=min(order, MAX_RING_PAGE_ORDER),
        max_queues=min(queues, MAX_QUEUES),
    )
    return limits, keys.problems


def parse_geometry(
    backend: Mapping[str, str],
    *,
    device_type: str | None = None,
    blkback: bool = True,
    may_be_empty: bool = False,
) -> tuple[DiskGeometry, list[Problem]]:
    """The disk behind the backend's keys.

    `device_type` is the frontend's key of that name; `blkback` says that the backend is the
    kernel's (its store directory is `backend/vbd`, not `backend/qdisk`). `may_be_empty`: 0 sectors
    are a drive without a medium, else an error.
    Raises GeometryError naming the key and its value.
    """
    keys = Keys(backend)

    def complain(field: str, reason: str) -> None:
        keys.problems.append(Problem(field, backend.get(field), reason))

    def refuse(field: str, reason: str) -> NoReturn:
        raise _refusal(Problem(field, backend.get(field), reason))

    sector_size = _required(backend, "sector-size")
    if sector_size not in (512, 1024, 2048, 4096):
        refuse("sector-size", "must be 512, 1024, 2048 or 4096")
    if sector_size != SECTOR and not blkback:
        refuse("sector-size", "only 512 is supported with this kind of backend")
    sectors = _required(backend, "sectors")
    if sectors == 0 and not may_be_empty:
        refuse("sectors", "the disk is empty (is there a medium?)")
    if sectors * SECTOR > _MAX_BYTES:
        refuse("sectors", "the disk would be larger than 2^63 bytes")
    per_block = sector_size // SECTOR
    if 0 < sectors < per_block:
        refuse("sectors", f"less than one sector of {sector_size} bytes")
    if sectors % per_block:
        complain("sectors", f"not a multiple of sector-size {sector_size}; rounded down")
        sectors -= sectors % per_block
    info = _required(backend, "info")

    physical = keys.power_of_two(
        "physical-sector-size", default=sector_size, lo=sector_size, hi=1 << 31
    )

    discard = keys.flag("feature-discard")
    granularity = keys.uint("discard-granularity", default=0, lo=0, hi=_U32) or sector_size
    alignment = keys.uint("discard-alignment", default=0, lo=0, hi=_U32)
    if granularity % sector_size:
        complain("discard-granularity", f"not a multiple of {sector_size}; discard is off")
        discard, granularity = False, sector_size
    if alignment % sector_size:
        complain("discard-alignment", f"not a multiple of {sector_size}; discard is off")
        discard, alignment = False, 0

    kind = device_type if device_type is not None else backend.get("device-type", "disk")
    if kind not in ("disk", "cdrom", "floppy"):
        keys.problems.append(Problem("device-type", kind, "unknown; taken as disk"))
        kind = "disk"
    if info & VDISK_CDROM:
        kind = "cdrom"
    return DiskGeometry(
        sectors=sectors,
        sector_size=sector_size,
        physical_sector_size=physical,
        read_only=bool(info & VDISK_READONLY) or backend.get("mode", "w").startswith("r"),
        removable=bool(info & VDISK_REMOVABLE) or keys.flag("removable"),
        device_type=kind,
        flush=keys.flag("feature-flush-cache"),
        barrier=keys.flag("feature-barrier"),
        persistent=keys.flag("feature-persistent"),
        discard=discard,
        discard_granularity=granularity,
        discard_alignment=alignment % granularity,
        discard_secure=discard and keys.flag("discard-secure"),
    ), keys.problems


def trusted(frontend: Mapping[str, str]) -> bool:
    """The toolstack's `trusted` key in the frontend's directory; nonsense means no."""
    return frontend.get("trusted", "1").strip() == "1"


def frontend_keys(
    *, port: int, ring_refs: Sequence[int], persistent: bool = False
) -> dict[str, str]:
    """What the frontend publishes with Initialised, for one queue of 1, 2, 4, 8 or 16 pages."""
    return queue_keys([(port, ring_refs)], persistent=persistent)


def queue_keys(
    queues: Sequence[tuple[int, Sequence[int]]], *, persistent: bool = False
) -> dict[str, str]:
    """What the frontend publishes with Initialised: `queues` are ports and references of rings.

    As blkback's connect_ring reads it: one queue stands in the directory itself, and then
    `multi-queue-num-queues` is left out, which a backend of old would not know; several stand in
    queue-0, queue-1 and so on. The order of the rings is one for all, and is not written for
    rings of one page, whose reference is `ring-ref` then.
    """
    pages = len(queues[0][1])
    order = pages.bit_length() - 1
    if pages < 1 or pages != 1 << order or order > MAX_RING_PAGE_ORDER:
        raise ValueError(f"a ring has 1, 2, 4, 8 or 16 pages, not {pages}")
    if any(len(refs) != pages for _, refs in queues):
        raise ValueError("the rings of a disk have the same size")
    keys = {"protocol": PROTOCOL, "feature-persistent": "1" if persistent else "0"}
    if order:
        keys["ring-page-order"] = str(order)
    if len(queues) > 1:
        keys["multi-queue-num-queues"] = str(len(queues))
    for number, (port, refs) in enumerate(queues):
        where = f"queue-{number}/" if len(queues) > 1 else ""
        keys[f"{where}event-channel"] = str(port)
        for page, ref in enumerate(refs):
            keys[f"{where}ring-ref{page if order else ''}"] = str(ref)
    return keys


def stale_key(key: str) -> bool:
    """Whether a key of the frontend's directory is left over from an earlier connection.

    Everything else there belongs to the toolstack and stays.
    """
    return _STALE.fullmatch(key.partition("/")[0]) is not None


def _required(backend: Mapping[str, str], field: str) -> int:
    try:
        return parse_uint(backend.get(field), lo=0, hi=_U64, field=field)
    except BadValue as error:
        raise _refusal(error.problem) from error


def _refusal(problem: Problem) -> GeometryError:
    return GeometryError(f"backend key {problem}", hint="the backend's domain wrote it: look there")
