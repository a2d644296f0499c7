# SPDX-License-Identifier: BSD-2-Clause
"""One device's loop: the walk from whatever states are found to Connected, again and again.

Theory of operation
    `DeviceLoop.run` owns one device from claim to release. It has a *goal*, set from outside:

    CONNECTED  serve the device; whatever goes wrong, walk back to Connected
    PARKED     nothing towards the backend is held: no port, no grant. The OS device stays and its
               clients wait. This is how a domain suspends
    CLOSED     serve no more: the OS device is closed, the keys are removed

    Start, resume, a restarted backend, a dead worker and a restarted supervisor are the same walk:
    *close cycle* (unless both ends are fresh) → InitWait → attach → Initialised → backend
    Connected → start → Connected. Each attach is a new **generation**. What is in flight when a
    generation ends stays with the OS device and is sent again to the next one, which is served
    only after the backend has said Connected: the fence (docs/architecture.md).

    While Connected the loop sleeps until one of these pokes it: a key of either end, a message
    from the worker, a new goal. Nothing runs when nothing happens.

Timers
    Each wait for the backend has a deadline (`Deadlines`), and what did not come is named. A
    failed walk is tried again after `RETRY_FIRST` seconds, doubling up to `RETRY_LAST`; a change of
    the backend's state ends the pause at once. The log has a reason once, however often it is met
    in a row. A connection that ended before it had lasted as long
    as that pause was a failed walk as well: a backend that breaks a rule in each of them must not
    keep us busy for ever.

Limits
    A backend that never answers makes the device `failed`, with the reason in status, and is
    asked again for ever. A worker that dies again and again is started no more (startlimit.py):
    the device is `failed` for good, and in the end its users get errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from .errors import PvfrontError
from .frontend import Frontend
from .startlimit import Deaths
from .states import XenbusState
from .trace import Kind, Note, nothing
from .walk import Deadlines, Walk
from .xenbus import DeviceGone, HandshakeTimeout, View, XenbusDevice

log = logging.getLogger(__name__)

RETRY_FIRST = 0.5
RETRY_LAST = 10.0


class Goal(enum.Enum):
    CONNECTED = "connected"
    PARKED = "parked"
    CLOSED = "closed"


class Phase(enum.Enum):
    """Where the loop stands, for status."""

    STARTING = "starting"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    DETACH_REFUSED = "detach refused"
    PARKED = "parked"
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"


class DeviceLoop:
    """Serves one device until its goal is CLOSED or the device is gone."""

    def __init__(
        self,
        device: XenbusDevice,
        frontend: Frontend,
        *,
        deadlines: Deadlines | None = None,
        on_change: Callable[[DeviceLoop], None] | None = None,
        may_bind: Callable[[], Awaitable[None]] | None = None,
        note: Note = nothing,
    ) -> None:
        """`may_bind`: see `Walk`. `note` gets the device's timeline (trace.py)."""
        self.device = device
        self.frontend = frontend
        self.deadlines = deadlines or Deadlines()
        self.goal = Goal.CONNECTED
        self.phase = Phase.STARTING
        self.reason = ""
        self.last_trouble: tuple[float, str] | None = None  # when (time.time()), and what
        self.reconnects = 0
        self.connected_since: float | None = None
        self.walk = Walk(device, frontend, self.deadlines, may_bind=may_bind, note=note)
        self._on_change = on_change
        self._note = note
        self._deaths = Deaths(frontend.start_limits)
        self.gave_up_at: float | None = None  # time.time(); see `_give_up`
        self._patient_until: float | None = None
        self._verdict = ""
        self._failure_said = ""  # by the log, since it was last connected
        self._poked = asyncio.Event()
        self._phase_changed = asyncio.Condition()
        frontend.on_poke(self.poke)
        frontend.on_note(self._noted)
        device.on_view = self._viewed

    # -- for the outside ------------------------------------------------------------------

    def poke(self) -> None:
        """Makes the loop look again. Safe from any callback of the event loop."""
        self._poked.set()

    def aim(self, goal: Goal) -> None:
        """Sets the goal; use `until_phase` to wait for its effect."""
        self.goal = goal
        self.poke()

    def poison(self) -> None:
        """The domain slept without having asked us: see `Frontend.poisoned`."""
        self.walk.poisoned = True
        self.poke()

    async def until_phase(self, *phases: Phase, timeout: float) -> None:
        """Waits until the loop stands in one of `phases`.

        Raises HandshakeTimeout naming where it stands instead.
        """
        try:
            async with asyncio.timeout(timeout), self._phase_changed:
                await self._phase_changed.wait_for(lambda: self.phase in phases)
        except TimeoutError:
            wanted = " or ".join(p.value for p in phases)
            raise HandshakeTimeout(
                f"{self.device.name}: not {wanted} within {timeout:.0f} s; "
                f"it is {self.phase.value}" + (f": {self.reason}" if self.reason else "")
            ) from None

    # -- the loop --------------------------------------------------------------------------

    async def run(self) -> None:
        """Returns when the device was closed, or is gone."""
        self._viewed(None, self.device.view)
        follow = asyncio.create_task(self._follow_views(), name=f"{self.device.name} views")
        try:
            await self._run()
        except DeviceGone as gone:
            await self._gone(str(gone))
        finally:
            follow.cancel()
            await asyncio.gather(follow, return_exceptions=True)

    async def _follow_views(self) -> None:
        view = self.device.view
        while True:
            view = await self.device.changed(view)
            self.poke()

    async def _run(self) -> None:
        pause = RETRY_FIRST
        self.walk.told = self.device.view.told
        if await self.frontend.adopt(self.device):
            self.walk.attached = self.walk.published = self.walk.told_backend = True
            await self._enter(Phase.CONNECTED, "adopted")
        while True:
            match self.goal:
                case Goal.CLOSED:
                    await self._close()
                    return
                case Goal.PARKED:
                    await self._park()
                    continue
                case Goal.CONNECTED if self._deaths.verdict is not None:
                    if await self._give_up(self._deaths.verdict):
                        return
                    continue
                case Goal.CONNECTED:
                    pass
            try:
                if self.phase is not Phase.CONNECTED:
                    if self.frontend.trouble is not None:
                        # Of a walk that failed: whoever held what the keys name has died.
                        self.walk.published = False
                    again = self.frontend.generation > 0
                    await self._enter(Phase.RECONNECTING if again else Phase.CONNECTING)
                    if not await self._unless_goal_changes(self.walk.connect()):
                        continue
                    self.reconnects += again
                    await self._enter(Phase.CONNECTED)
                began = time.monotonic()
                if await self._serve():
                    return
                self.walk.published = False
                if self.goal is not Goal.CONNECTED or self.walk.poisoned:
                    continue
                if time.monotonic() - began >= pause:
                    pause = RETRY_FIRST
                    continue
            except DeviceGone:
                raise
            except (PvfrontError, OSError) as error:
                await self._enter(Phase.FAILED, str(error))
            if self._deaths.verdict is None:
                await self._pause(pause)
            pause = min(pause * 2, RETRY_LAST)

    async def _unless_goal_changes(self, step: Coroutine[Any, Any, None]) -> bool:
        """Runs `step`; False if it was cancelled because the goal is no longer CONNECTED."""
        task = asyncio.create_task(step)
        try:
            while not task.done():
                self._poked.clear()
                if self.goal is not Goal.CONNECTED:
                    return False
                poked = asyncio.create_task(self._poked.wait())
                await asyncio.wait({task, poked}, return_when=asyncio.FIRST_COMPLETED)
                poked.cancel()
            await task
            return True
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, PvfrontError, OSError):
                    await task

    async def _pause(self, seconds: float) -> None:
        """Waits `seconds`, or until something changes that makes a new try worth while."""
        before = self._worth_a_try()
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._poked.clear()
            if self._worth_a_try() != before:
                return
            if not self.device.view.present and not self.device.view.moved:
                raise DeviceGone(f"{self.device.name}: removed")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), left)

    def _worth_a_try(self) -> tuple[object, ...]:
        view = self.device.view
        return self.goal, view.backend, view.online, view.moved, self.walk.poisoned

    # -- a crash loop ------------------------------------------------------------------------

    async def _give_up(self, why: str) -> bool:
        """Lets go of the backend and starts no worker any more, because they only die.

        Users' requests wait, for a supervisor of another version perhaps; when nobody has helped
        in time the OS device is closed, and they fail. True: the device was detached for good;
        False: the goal has changed.
        """
        device, frontend = self.device, self.frontend
        if self.gave_up_at is None:
            patience = frontend.start_limits.dead_conn_timeout
            self.gave_up_at, self._patient_until = time.time(), time.monotonic() + patience
            self._verdict = f"{why}; requests fail {patience:g} s later unless it is served again"
        await self._enter(Phase.FAILED, self._verdict)
        with contextlib.suppress(PvfrontError, OSError):
            await self.walk.disconnect(drained=False)
        while self.goal is Goal.CONNECTED:
            self._poked.clear()
            if device.view.moved:
                with contextlib.suppress(PvfrontError, OSError):
                    await device.reopen()
            view, left = device.view, None
            if not view.present and not view.moved:
                raise DeviceGone(f"{device.name}: removed")
            if self._patient_until is not None:
                left = self._patient_until - time.monotonic()
                if left < 0.001:  # what a clock can resolve, in any case
                    self._patient_until = None
                    await frontend.close()
                    await frontend.end()
                    self._verdict = f"{why}; given up: its users have got I/O errors"
                    await self._enter(Phase.FAILED, self._verdict)
                    continue
            if view.backend in (XenbusState.CLOSING, XenbusState.CLOSED) and not view.online:
                if await asyncio.to_thread(frontend.busy) is None:
                    # The backend answers a write, and ours was Closed before it was Closing.
                    await device.write_state(XenbusState.CLOSED, again=True)
                    await frontend.close()
                    await self._detach(drained=False)
                    return True
                left = min(left or self.deadlines.busy_poll, self.deadlines.busy_poll)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), left)
        return False

    # -- connected -------------------------------------------------------------------------

    async def _serve(self) -> bool:
        """Stays Connected. True: the device was detached for good; False: walk again."""
        device, frontend = self.device, self.frontend
        seen, told = device.view.serial, self.walk.told
        while True:
            self._poked.clear()
            if self.goal is not Goal.CONNECTED:
                return False
            view = device.view
            if self.walk.poisoned or self.walk.anew(view):
                self.walk.poisoned = True
                why = "the domain was suspended and resumed without us"
                await self._enter(Phase.RECONNECTING, why)
                return False
            if not view.present:
                raise DeviceGone(f"{device.name}: removed")
            if frontend.trouble is not None:
                await self._enter(Phase.RECONNECTING, frontend.trouble)
                return False
            if view.backend in (XenbusState.CLOSING, XenbusState.CLOSED) and not view.online:
                return await self._detach_asked()
            if view.backend is not XenbusState.CONNECTED:
                await self._enter(Phase.RECONNECTING, f"the backend went to {view.backend.label}")
                return False
            # A kernel's frontend that has bound the device walks to Connected as well: the state
            # alone does not tell, but it was written.
            if view.serial != seen and await asyncio.to_thread(frontend.stolen):
                await self._enter(
                    Phase.RECONNECTING, "the kernel's frontend had taken the device back"
                )
                return False
            if view.frontend is not XenbusState.CONNECTED:
                await self._enter(
                    Phase.RECONNECTING,
                    f"someone else wrote the frontend's state: {view.frontend.label}",
                )
                return False
            seen = view.serial
            if view.told != told or frontend.pending:
                told = view.told
                await frontend.update(device)
                self._tell()
            await self._poked.wait()

    async def _detach_asked(self) -> bool:
        """The toolstack wants the device back (online 0, backend Closing)."""
        device = self.device
        while (why := await asyncio.to_thread(self.frontend.busy)) is not None:
            await self._enter(
                Phase.DETACH_REFUSED, f"refused while in use: {why}; completes when that ends"
            )
            self._poked.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), self.deadlines.busy_poll)
            if self.goal is not Goal.CONNECTED or self.frontend.trouble is not None:
                return False
            if self.walk.poisoned or self.walk.anew(device.view):
                return False
            if not device.view.present:
                raise DeviceGone(f"{device.name}: removed by force while in use: {why}")
            if device.view.online:
                await self._enter(Phase.CONNECTED, "detach withdrawn")
                return False
        await self._enter(Phase.CLOSING, "detached by the toolstack")
        # First nobody can begin a request: one that comes while the worker is quiet (udev probes a
        # disk that is new) is not read, and would be waited for until the toolstack gives up.
        clock = asyncio.get_running_loop().time
        stalled, wait = self.frontend.stalled, self.deadlines
        patience = wait.detach_stalled if stalled else wait.detach
        until = clock() + patience
        await self.frontend.close(drain=patience)
        await self._detach(drained=await self.frontend.quiesce(max(0.0, until - clock())))
        return True

    async def _detach(self, *, drained: bool) -> None:
        with contextlib.suppress(PvfrontError):
            await self.walk.disconnect(drained=drained)
        await self.frontend.end()
        await self._enter(Phase.CLOSED, "detached by the toolstack")

    async def _park(self) -> None:
        """Lets go of everything towards the backend; waits for another goal."""
        try:
            if self.walk.attached:
                drained = False
                if self.frontend.trouble is None:
                    drained = await self.frontend.quiesce(self.deadlines.drain)
                await self.walk.disconnect(drained=drained)
        except DeviceGone:
            raise
        except (PvfrontError, OSError) as error:
            # Nothing is held any more (_disconnect detaches first); the backend is left as is
            # and the walk after the resume deals with it.
            log.warning("%s: parked, but the backend did not follow: %s", self.device.name, error)
        await self._enter(Phase.PARKED)
        while self.goal is Goal.PARKED:
            self._poked.clear()
            await self._poked.wait()
        try:
            await self.device.reopen()
        except DeviceGone:
            raise
        except (PvfrontError, OSError) as error:
            # Nothing is lost: the walk looks again, and says what is wrong until it is put right.
            log.warning("%s: %s", self.device.name, error)
        await self._enter(Phase.RECONNECTING, "resumed")

    async def _close(self) -> None:
        await self._enter(Phase.CLOSING)
        drained = False
        if self.walk.attached and self.frontend.trouble is None:
            await self.frontend.close()
            drained = await self.frontend.quiesce(self.deadlines.drain)
        else:
            await self.frontend.close()
        reason = ""
        try:
            await self.walk.disconnect(drained=drained)
        except (PvfrontError, OSError) as error:
            reason = str(error)
            log.warning("%s: %s", self.device.name, error)
        await self.frontend.end()
        await self._enter(Phase.CLOSED, reason)

    async def _gone(self, why: str) -> None:
        await self._enter(Phase.CLOSING, why)
        await self.frontend.detach(keep_target=False)
        self.walk.attached = self.walk.told_backend = False
        await self.frontend.close()
        await self.frontend.end()
        await self._enter(Phase.CLOSED, why)

    async def _enter(self, phase: Phase, reason: str = "") -> None:
        reason = reason.removeprefix(f"{self.device.name}: ")
        if (phase, reason) == (self.phase, self.reason):
            return
        if phase is Phase.CONNECTED and self.phase is not Phase.CONNECTED:
            self.connected_since = time.time()
        log.log(
            self._level(phase, reason),
            "%s: %s%s",
            self.device.name,
            phase.value,
            f": {reason}" if reason else "",
        )
        if reason and phase in _TROUBLE:
            self.last_trouble = time.time(), reason
        async with self._phase_changed:
            self.phase, self.reason = phase, reason
            self._phase_changed.notify_all()
        text = f"{phase.value}: {reason}" if reason else phase.value
        self._note(Kind.PHASE, text, phase=phase.value)
        self._tell()

    def _level(self, phase: Phase, reason: str) -> int:
        """A failed walk is tried again every few seconds, for ever: the log has each reason once,
        and not that it was tried again.
        """
        if phase in (Phase.CONNECTING, Phase.RECONNECTING) and self.phase is Phase.FAILED:
            return logging.DEBUG
        if phase is Phase.FAILED:
            before, self._failure_said = self._failure_said, reason
            if reason == before:
                return logging.DEBUG
        else:
            self._failure_said = ""
        return logging.WARNING if reason and phase in _TROUBLE else logging.INFO

    def _noted(self, kind: Kind, text: str, /, **facts: Any) -> None:
        if kind is Kind.DIED:
            self._deaths.died(time.monotonic(), text)
        self._note(kind, text, **facts)
        if kind is Kind.STALL:
            self._tell()  # no state of either end changes

    def _viewed(self, before: View | None, now: View) -> None:
        """Notes what has changed of both ends."""
        if before is None or before.present != now.present or before.moved != now.moved:
            what = "it names another backend" if now.moved else "there"
            self._note(Kind.NODES, what if now.present or now.moved else "not there")
        if now.present and (before is None or before.online != now.online):
            self._note(Kind.NODES, "online" if now.online else "offline")
        if before is None or before.backend is not now.backend:
            self._note(Kind.BACKEND, now.backend.label, state=int(now.backend))
        if before is None or before.frontend is not now.frontend:
            self._note(Kind.FRONTEND, now.frontend.label, state=int(now.frontend))

    def _tell(self) -> None:
        """Something that status shows has changed."""
        if self._on_change is not None:
            self._on_change(self)


_TROUBLE = (Phase.FAILED, Phase.RECONNECTING, Phase.DETACH_REFUSED)
