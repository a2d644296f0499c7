# SPDX-License-Identifier: BSD-2-Clause
"""Where a disk of the block backend is, as its `params` key says. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pvfront.errors import PvfrontError

SECTOR = 512
MAX_BYTES = (1 << 63) - 1
MEMORY = "memory:"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a disk's bytes are: a file or block device, or (None) `size` bytes of memory."""

    path: Path | None
    size: int = 0


def parse_size(text: str) -> int:
    """Bytes: a number with K, M, G, T, P or E (powers of 1024). Raises PvfrontError."""
    found = re.fullmatch(r"(\d{1,19})([KMGTPE]?)(i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise PvfrontError(f"{text!r} is no size: a number with K, M, G, T, P or E")
    size = int(found[1]) << (10 * " KMGTPE".index(found[2].upper() or " "))
    if not 0 < size <= MAX_BYTES:
        raise PvfrontError(f"{text!r} is not in 1..2^63-1 bytes")
    return size


def parse_params(params: str) -> Source:
    """The backend's `params` key: `memory:64M`, or a path with or without `aio:` and the like."""
    if params.startswith(MEMORY):
        return Source(None, parse_size(params.removeprefix(MEMORY)) // SECTOR * SECTOR)
    kind, colon, rest = params.partition(":")
    if colon and kind in ("aio", "raw", "file", "phy"):
        return Source(Path(rest))
    return Source(Path(params))
