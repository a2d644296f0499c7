# SPDX-License-Identifier: BSD-2-Clause
"""What follows the death of an embedded host's backend: its frontends notice that it was away."""

from __future__ import annotations

from typing import Any, Protocol

from waiting import eventually

from pvfront.host import Host
from pvfront.host.backend import Backend


class Served(Protocol):
    """A host whose devices of a class a service of ours serves."""

    host: Host

    @property
    def backend(self) -> Backend: ...

    @property
    def log(self) -> str: ...

    def state(self, devid: int) -> dict[str, Any]:
        """What the service has written of a device."""


async def noticed(it: Served, devid: int, generation: int) -> None:
    """Waits until the end of a generation is noticed, whose backend died and has a successor.

    That one connects to the rings that it finds, as Linux's and QEMU's do. If it has done so before
    the frontend looked it was never away, and is told to close.
    """
    klass = it.backend.KLASS
    path = f"/local/domain/0/backend/{klass}/1/{devid}/state"

    async def look() -> bool:
        state = it.state(devid)
        if state["phase"] != "connected" or state["generation"] != generation:
            return True
        if await it.host.store.read_opt(path) == "4":
            await it.backend.state(5, **{klass: devid})
        return False

    await eventually("its end noticed", look, why=lambda: it.log)
