# SPDX-License-Identifier: BSD-2-Clause
"""What a vif's frontend does with its control ring, from one connection to the next.

Nothing here fails a vif: without a control ring, or with a backend that refuses or does not answer,
packets flow as they would without it, and the reason is said once and shown by status.

The ring is the supervisor's (control.py). One that finds a worker serving has none until the next
connection; what its predecessor had asked for holds on in the backend (`lost`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from ..errors import PvfrontError
from ..parking import CannotPark, park_own
from ..platform import Source
from .control import PAGES, Control, ControlGone, Refused
from .hashing import Hashing, set_up
from .staticgrants import StaticGrants

log = logging.getLogger(__name__)

TAKE_BACK = 1.0  # seconds for each message, while a connection ends
LOST = "its supervisor has ended; there is none until the next connection"

Pools = tuple[Sequence[int], Sequence[int]]


class ControlSide:
    """The control ring of the present connection, if there is one, and what came of it."""

    def __init__(self, name: str, *, hashes: bool = True) -> None:
        """`hashes`: whether the backend is to spread packets over several queues by one."""
        self.name = name
        self.hashes = hashes
        self.hashing: Hashing | None = None
        self.static = StaticGrants()
        self._control: Control | None = None
        self._pools: list[Pools] = []
        self._why_not = "not connected"
        self._no_hashing = self._no_static = ""

    # -- a connection ------------------------------------------------------------------------

    def open(self, source: Source, domid: int, *, offered: bool) -> tuple[int, int] | None:
        """Opens a ring if the backend has offered to serve one; its reference and its port.

        None: there is none, and `details` says why.
        """
        self.close("it was opened anew")
        if not offered:
            self._why_not = "the backend offers none"
            return None
        try:
            self._control = control = Control.open(source, domid)
        except (PvfrontError, OSError) as error:
            self._why_not = str(error)
            log.warning("%s: without a control ring: %s", self.name, error)
            return None
        return control.ring_ref, control.port

    def has_pools(self, pools: Sequence[Pools]) -> None:
        """The references of each queue's pools, TX's and RX's."""
        self._pools = list(pools)

    async def set_up(self) -> None:
        """The backend is Connected: asks it for all that it can. Never raises for its answers."""
        control = self._control
        if control is None:
            return
        queues = len(self._pools)
        if self.hashes and queues > 1 and self.hashing is None:
            try:
                self.hashing = await set_up(control, queues)
            except (Refused, ControlGone) as error:
                self._no_hashing = str(error)
                log.warning(
                    "%s: the backend spreads packets over the queues as it likes: %s",
                    self.name,
                    error,
                )
        for queue, (tx, rx) in enumerate(self._pools):
            try:
                await self.static.give(control, queue, tx, rx)
            except (Refused, ControlGone) as error:
                self._no_static = str(error)
                known = error.unsupported if isinstance(error, Refused) else bool(self._no_hashing)
                if not known:
                    log.warning("%s: no pages are mapped for good: %s", self.name, error)
                break

    async def take_back(self, seconds: float) -> None:
        """What the backend keeps mapped it is asked to unmap. The rings are at rest."""
        control, self._pools = self._control, []
        if control is None or not self.static.pages:
            return
        try:
            async with asyncio.timeout(seconds):
                kept = await self.static.take_back(control, within=TAKE_BACK)
        except (Refused, ControlGone, TimeoutError) as error:
            log.info("%s: pages stay mapped until the backend closes: %s", self.name, error)
        else:
            if kept:
                log.info("%s: %d pages stay mapped until the backend closes", self.name, kept)

    # -- its end -----------------------------------------------------------------------------

    def lost(self) -> None:
        """A worker was adopted: the ring was its former supervisor's."""
        self.close(LOST)

    def close(self, why: str = "not connected") -> None:
        """Unbinds the port, frees the pages. Never raises; idempotent."""
        control = self._forget(why)
        if control is not None:
            control.close()

    async def poisoned(self) -> None:
        """The domain slept with the port bound: it must never be unbound (suspend.md)."""
        control = self._forget("the domain was suspended while connected")
        if control is None:
            return
        try:
            parker = await park_own(control.give_port())
        except CannotPark as error:
            log.error("%s: %s", self.name, error)
        else:
            log.warning("%s: the control ring's port is parked in process %d", self.name, parker)

    def _forget(self, why: str) -> Control | None:
        control, self._control = self._control, None
        self.hashing, self.static, self._pools = None, StaticGrants(), []
        self._no_hashing = self._no_static = ""
        self._why_not = why
        return control

    # -- for status --------------------------------------------------------------------------

    @property
    def ports(self) -> list[int]:
        return [] if self._control is None else [self._control.port]

    @property
    def pages(self) -> int:
        return 0 if self._control is None else PAGES

    def details(self) -> dict[str, Any]:
        """`state`: "in use", or why not; `hash`, `static`: what came of it, or why nothing."""
        control, hashing = self._control, self.hashing
        return {
            "state": self._why_not if control is None else control.gone or "in use",
            "ports": self.ports,
            "pages": self.pages,
            "hash": self._no_hashing or None
            if hashing is None
            else {"algorithm": "toeplitz", "kinds": hashing.kinds, "table": hashing.entries},
            "static": {
                "pages": self.static.pages,
                "queues": len(self.static.given),
                "why": self._no_static,
            },
        }
