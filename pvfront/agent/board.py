# SPDX-License-Identifier: BSD-2-Clause
"""What is to stand in the store, and which writes bring it there. Pure.

Collectors put sections of keys on the board; the publisher (publish.py) writes what differs from
what it has written. A number that only wavers is no change (`TOLERANCE`): dom0's store serves
thousands of guests, and an idle one is to write nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from .keys import MAX_KEYS, Keys

_PERCENT = 5
TOLERANCE = (("data/meminfo_free", "data/meminfo_total"), ("free", "size"))
"""Keys that change all the time, and beside them the whole that they are a part of."""
OWNED = {"attr/vif": "network", "data/volumes": "volumes", "drivers": "drivers"}
"""Directories in which what we did not write is an earlier agent's, and goes: as soon as there is
the section that says what is there now, so that an address does not blink when an agent begins."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Writes, and then removals of nodes with all that is below them."""

    writes: Keys
    removals: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.writes or self.removals)


class Board:
    """Sections of keys, by the name of who put them there; the earlier put, the more important."""

    def __init__(self) -> None:
        self._sections: dict[str, Keys] = {}
        self.changed = asyncio.Event()
        self.left_out = 0
        """Keys that had no place the last time."""

    def put(self, section: str, keys: Keys) -> None:
        """Replaces a section."""
        if self._sections.get(section) != keys:
            self._sections[section] = dict(keys)
            self.changed.set()

    def unknown(self) -> tuple[str, ...]:
        """The directories of which nobody has said yet what is in them."""
        return tuple(path for path, section in OWNED.items() if section not in self._sections)

    def wanted(self) -> Keys:
        """All of it, as far as `MAX_KEYS` goes."""
        found = {path: value for keys in self._sections.values() for path, value in keys.items()}
        self.left_out = max(0, len(found) - MAX_KEYS)
        return dict(list(found.items())[:MAX_KEYS])


def plan(
    published: Mapping[str, str], wanted: Mapping[str, str], unknown: tuple[str, ...] = ()
) -> Plan:
    """The least that makes `published` what is `wanted`; nothing is removed below `unknown`."""
    writes = {
        path: value
        for path, value in wanted.items()
        if published.get(path) != value and not _wavers(path, published, wanted)
    }
    # What is below `control` a guest may not make again: the toolstack made it, and it stays.
    stays = ("control/", *(f"{directory}/" for directory in unknown))
    gone = [path for path in published if path not in wanted and not path.startswith(stays)]
    kept = {parent for path in wanted for parent in _parents(path)} | set(wanted)
    removals: list[str] = []
    for path in sorted(gone):
        top = path
        for parent in _parents(path):
            if parent in kept or parent in OWNED or "/" not in parent:
                break
            top = parent
        if not removals or not f"{top}/".startswith(f"{removals[-1]}/"):
            removals.append(top)
    return Plan(writes, tuple(removals))


def _parents(path: str) -> list[str]:
    """From the nearest up."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _wavers(path: str, published: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    for part, whole in TOLERANCE:
        if path == part or ("/" not in part and path.endswith(f"/{part}")):
            beside = path.removesuffix(part) + whole
            try:
                old, new, most = int(published[path]), int(wanted[path]), int(wanted[beside])
            except (KeyError, ValueError):
                return False
            return abs(new - old) * 100 < most * _PERCENT
    return False
