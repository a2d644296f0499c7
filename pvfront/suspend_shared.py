# SPDX-License-Identifier: BSD-2-Clause
"""One service's part in suspend: its owner, or a member of another service that is.

`SharedSuspend` stands where `Suspend` would in a guest with one service. What is decided where:
suspend_members.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from .fssync import sync_devices
from .hooks import Hooks
from .platform import Platform
from .suspend import RUN_DIR, Suspend
from .suspend_group import Devices, NotOwner, Participants, Watched
from .suspend_machine import UNTRIED, Limits
from .suspend_mark import Store
from .suspend_members import AGAIN, Member

log = logging.getLogger(__name__)

_REOPEN = 3600.0  # nobody waits for it


class SharedSuspend(Watched):
    """Owns suspend if no other service does, and takes its place when that ends."""

    def __init__(
        self,
        store: Store,
        participants: Participants,
        service: str,
        *,
        make: Callable[..., Suspend] = Suspend,
        limits: Limits | None = None,
        run_dir: Path = RUN_DIR,
        hooks: Hooks | None = None,
    ) -> None:
        """`service`: for messages, "pvfront-vbd". Raises CannotVeto or DeviceUnavailable."""
        super().__init__()
        self._limits = limits or Limits()

        def new() -> Suspend:
            return make(
                store,
                participants,
                on_change=self._tell,
                limits=self._limits,
                run_dir=run_dir,
                hooks=hooks,
            )

        self._new = new
        self._own: Suspend | None = new()
        self._devices = Devices(participants, sync_devices)
        self._member = Member(run_dir, service, self._devices, self._on_open)
        self._member_open = False
        self._reopening: asyncio.Task[None] | None = None

    # -- for others ------------------------------------------------------------------------

    @property
    def owns(self) -> bool:
        return self._own is not None and self._own.owns

    @property
    def _open(self) -> bool:
        return self._own.open if self._own is not None else self._member_open

    def status(self) -> dict[str, object]:
        """As `Suspend.status`; {} where another service owns suspend and tells of it."""
        return self._own.status() if self._own is not None and self._own.owns else {}

    async def may_bind(self) -> None:
        """Returns when ports may be bound: somebody owns suspend, and no suspend is going on."""
        await self.until(lambda s: s._open, None)

    def disarm(self) -> None:
        """Takes the veto back, unless it is another's. Only when `run` has ended."""
        if self._own is not None and not self._own.was_shared:
            self._own.disarm()

    # -- life ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                await self._own_or_join()
        finally:
            if self._reopening is not None:
                self._reopening.cancel()

    async def _own_or_join(self) -> None:
        own = self._own = self._own or self._new()
        if self._member.closed:
            # A veto that cannot be put up is no reason to leave them closed.
            machine = own.machine
            self._reopen_when(lambda s: s.owns and (own.armed or machine.why_unarmed != UNTRIED))
        try:
            await own.run()
        except NotOwner as error:
            log.debug("suspend: %s", error)
        self._own = None
        self._tell()
        if self._member.closed:
            self._reopen_when(lambda s: s._member_open)
        if not await self._member.run():
            await asyncio.sleep(AGAIN)  # the owner is about to listen, or to end

    def _on_open(self, is_open: bool) -> None:
        self._member_open = is_open
        self._tell()

    def _tell(self) -> None:
        self._changed.set()

    def _reopen_when(self, condition: Callable[[SharedSuspend], bool]) -> None:
        """The devices that the owner had closed when it went come back under the next one."""
        if self._reopening is not None:
            self._reopening.cancel()

        async def reopen() -> None:
            await self.until(condition, None)
            self._member.closed = False
            for failure in await self._devices.reopen(None, _REOPEN):
                log.error("suspend: not connected again: %s", failure)

        self._reopening = asyncio.create_task(reopen())


def in_guest(
    on: Platform, store: Store, service: str
) -> Callable[[Participants], SharedSuspend] | None:
    """What a supervisor needs to take part in suspends, as `service`; None: there are none here."""
    if on.name != "xen":
        return None
    hooks = Hooks(on.config_dir / "hooks.d")
    return lambda devices: SharedSuspend(store, devices, service, hooks=hooks)
