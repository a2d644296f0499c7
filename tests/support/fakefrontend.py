# SPDX-License-Identifier: BSD-2-Clause
"""A frontend that holds nothing, for the tests of the loop around it (pvfront/frontend.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pvfront.errors import PvfrontError
from pvfront.startlimit import Limits
from pvfront.states import XenbusState
from pvfront.trace import Note
from pvfront.xenbus import XenbusDevice


class FakeFrontend:
    """Does what it is asked, with success; `calls`: what it was asked that changes something.

    An event that comes late is one more `update` at any time: `steps` are the calls without those.
    """

    start_limits = Limits()
    publish_state = XenbusState.INITIALISED

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.trouble: str | None = None
        self.pending = False
        self.stalled = 0
        self.generation = 0
        self.os_path = ""
        self.in_use: str | None = None
        self.adopts = False
        self.old_program = False
        self.stays: PvfrontError | None = None
        self.left_behind: str | None = None
        self.poke: Callable[[], None] = lambda: None

    @property
    def steps(self) -> list[str]:
        return [call for call in self.calls if call != "update"]

    def on_poke(self, poke: Callable[[], None]) -> None:
        self.poke = poke

    def on_note(self, note: Note) -> None:
        self.note = note

    def details(self) -> dict[str, Any]:
        return {}

    def in_flight(self) -> int:
        return 0

    def unfenced(self) -> str | None:
        return self.left_behind

    def stale_key(self, key: str) -> bool:
        return key in ("ring-ref", "event-channel")

    def stolen(self) -> bool:
        return False

    def busy(self) -> str | None:
        return self.in_use

    async def adopt(self, device: XenbusDevice) -> bool:
        return self.adopts

    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        self.calls.append("attach")
        self.trouble = None
        self.generation += 1
        return {"ring-ref": str(self.generation), "event-channel": "7"}

    async def start(self, device: XenbusDevice) -> None:
        self.calls.append("start")

    async def update(self, device: XenbusDevice) -> None:
        self.calls.append("update")
        self.pending = False

    def outdated(self) -> bool:
        return self.old_program

    async def upgrade(self) -> str:
        self.calls.append("upgrade")
        if self.stays is not None:
            raise self.stays
        self.old_program = False
        return "worker 2 took over from 1"

    async def packets(self) -> dict[str, Any]:
        return {"file": "/proc/1/fd/9", "renew": 5}

    async def quiesce(self, timeout: float) -> bool:
        self.calls.append("quiesce")
        return True

    async def detach(self, *, keep_target: bool) -> None:
        self.calls.append("detach keep" if keep_target else "detach")

    async def fail_after(self, seconds: float) -> None:
        self.calls.append(f"fail after {seconds:g}")

    async def close(self, *, drain: float = 10.0) -> None:
        self.calls.append("close")

    async def end(self) -> None:
        self.calls.append("end")

    async def poisoned(self) -> None:
        self.calls.append("poisoned")
