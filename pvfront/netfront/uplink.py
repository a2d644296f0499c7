# SPDX-License-Identifier: BSD-2-Clause
"""Which vifs are relied on, and so are taken with --force only: those of a default route.

At boot the service comes before anybody has made a route. Which interface will have the default
one is known only from before: it is noted, as long as there is one, and counts while there is none.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Collection
from pathlib import Path

from ..errors import PvfrontError
from ..statefile import write_json
from ..sysfs import Roots
from .linkconfig import built_on, default_routes

_noting = threading.Lock()  # several vifs are taken at a time


def note_of(roots: Roots) -> Path:
    """The vifs that were refused for a default route. Outlives a boot."""
    return roots.root / "var/lib/pvfront/default-route.json"


def refuse_if_relied_on(vif: str, ifname: str, note: Path) -> None:
    """Raises PvfrontError if the interface is a default route's, or others are built on it.

    `vif`: "vif-0"; `ifname`: what the kernel's interface of it is called.
    """
    routes = default_routes()
    with _noting:
        noted = _noted(note)
        if routes and (ifname in routes) != (vif in noted):
            _write(note, noted ^ {vif})
    if ifname in routes:
        raise PvfrontError(
            f"it is {ifname}, the interface of the default route",
            hint="--force takes it all the same: its connections pause meanwhile",
        )
    if not routes and vif in noted:
        raise PvfrontError(
            f"it is {ifname}, the interface of the default route when there was one",
            hint=f"--force takes it all the same; or remove {note}",
        )
    if above := built_on(ifname):
        raise PvfrontError(
            f"it is {ifname}, which {', '.join(above)} is built on, and would go with it",
            hint="--force takes it all the same; they are not made again",
        )


def _noted(note: Path) -> set[str]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return {str(vif) for vif in json.loads(note.read_text(encoding="utf-8"))}
    return set()


def _write(note: Path, vifs: Collection[str]) -> None:
    with contextlib.suppress(OSError):  # a read-only system remembers nothing
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, sorted(vifs))
