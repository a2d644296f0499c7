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
    the backend's state ends the pause at once. A connection that ended before it had lasted as long
    as that pause was a failed walk as well: a backend that breaks a rule in each of them must not
    keep us busy for ever.

Limits
    A backend that never answers makes the device `failed`, with the reason in status, and is
    asked again for ever; a clear end after a crash loop is the supervisor's policy, not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from . import states
from .errors import PvfrontError
from .states import Step, XenbusState, next_step
from .xenbus import DeviceGone, HandshakeTimeout, View, XenbusDevice

log = logging.getLogger(__name__)

MOST_STEPS = 40  # of one walk; from any states to Connected takes 12
RETRY_FIRST = 0.5
RETRY_LAST = 10.0


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that the other end gets for each step."""

    init_wait: float = 30.0  # hotplug scripts in the backend's domain run before it
    connected: float = 30.0
    closing: float = 10.0
    drain: float = 30.0
    detach: float = 8.0  # the toolstack's own patience with a detach is 10 s
    busy_poll: float = 1.0


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


class Refused(PvfrontError):
    """The backend went to Closing or Closed instead of Connected."""


class Frontend(Protocol):
    """The half of a device that knows its class: what a disk, a net or a console does.

    Methods are called by one task only, never two at a time; `busy`, `in_flight` and `details`
    by anyone.
    """

    @property
    def trouble(self) -> str | None:
        """None while the data path works; else the reason why this generation is over."""
        ...

    @property
    def pending(self) -> bool:
        """Whether `update` has something to do although the backend wrote nothing."""
        ...

    @property
    def generation(self) -> int:
        """Grows with each attach, also over restarts of the supervisor."""
        ...

    @property
    def os_path(self) -> str:
        """The OS device ("/dev/nbd0"); "" while there is none."""
        ...

    def details(self) -> dict[str, Any]:
        """What status shows beyond the states."""
        ...

    def in_flight(self) -> int:
        """Requests of the OS device's users that are not answered."""
        ...

    def on_poke(self, poke: Callable[[], None]) -> None:
        """`poke` is to be called whenever `trouble` or something else here has changed."""

    def stale_key(self, key: str) -> bool:
        """Whether `key` in the frontend's directory is left over from a connection."""
        ...

    async def adopt(self, device: XenbusDevice) -> bool:
        """True if a living worker already serves this connection and was taken over."""
        ...

    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        """Begins a generation: opens ports and grants; returns the keys to publish."""
        ...

    async def start(self, device: XenbusDevice) -> None:
        """The backend is Connected: read its features, start the data path."""
        ...

    async def update(self, device: XenbusDevice) -> None:
        """The backend wrote Connected once more (a resize), or the worker had something."""
        ...

    async def quiesce(self, timeout: float) -> bool:
        """Stops intake and waits for the ring to empty; False if it did not."""
        ...

    async def detach(self, *, keep_target: bool) -> None:
        """Closes everything this generation holds. Never raises; idempotent."""
        ...

    def busy(self) -> str | None:
        """Why the OS device cannot be taken away from its users now; None if it can."""
        ...

    async def close(self) -> None:
        """Closes the OS device. Never raises; idempotent."""
        ...

    async def end(self) -> None:
        """Ends the worker, which holds nothing any more. Never raises; idempotent."""
        ...

    async def poisoned(self) -> None:
        """The domain slept while attached: lets go of everything but the event channel.

        A port that was bound during a suspend must never be unbound (docs/suspend.md).
        """
        ...

    def stolen(self) -> bool:
        """Whether the kernel's own frontend has bound the device again; undoes that."""
        ...


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
    ) -> None:
        """`may_bind` returns when ports may be bound: not while the domain is put to sleep."""
        self.device = device
        self.frontend = frontend
        self.deadlines = deadlines or Deadlines()
        self.goal = Goal.CONNECTED
        self.phase = Phase.STARTING
        self.reason = ""
        self.last_trouble: tuple[float, str] | None = None  # when (time.time()), and what
        self.reconnects = 0
        self.connected_since: float | None = None
        self._attached = False  # the frontend holds ports and grants
        self._published = False  # the keys in the store are those of what is held
        self._poisoned = False
        self._in_vain: Step | None = None  # the wait that ended without what was waited for
        self._on_change = on_change
        self._may_bind = may_bind
        self._poked = asyncio.Event()
        self._phase_changed = asyncio.Condition()
        frontend.on_poke(self.poke)

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
        self._poisoned = True
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
        if await self.frontend.adopt(self.device):
            self._attached = self._published = True
            await self._enter(Phase.CONNECTED, "adopted")
        while True:
            match self.goal:
                case Goal.CLOSED:
                    await self._close()
                    return
                case Goal.PARKED:
                    await self._park()
                    continue
                case Goal.CONNECTED:
                    pass
            try:
                if self.phase is not Phase.CONNECTED:
                    again = self.frontend.generation > 0
                    await self._enter(Phase.RECONNECTING if again else Phase.CONNECTING)
                    if not await self._unless_goal_changes(self._connect()):
                        continue
                    self.reconnects += again
                    await self._enter(Phase.CONNECTED)
                began = time.monotonic()
                if await self._serve():
                    return
                self._published = False
                if self.goal is not Goal.CONNECTED or self._poisoned:
                    continue
                if time.monotonic() - began >= pause:
                    pause = RETRY_FIRST
                    continue
            except DeviceGone:
                raise
            except (PvfrontError, OSError) as error:
                await self._enter(Phase.FAILED, str(error))
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
        return self.goal, view.backend, view.online, view.moved, self._poisoned

    # -- the walk --------------------------------------------------------------------------

    async def _connect(self) -> None:
        view = await self.device.refresh()
        if view.moved or self._poisoned:
            await self._moved()
        await asyncio.to_thread(self.frontend.stolen)
        await self._walk(states.Goal.CONNECTED)

    async def _disconnect(self, *, drained: bool) -> None:
        """Walks to Closed and lets go of everything towards the backend, whatever it does.

        Raises HandshakeTimeout if the backend is stuck; nothing is held then either, because an
        unplug must not wait for a backend that does not answer (rule 28).
        """
        try:
            await self._walk(states.Goal.CLOSED, drained=drained)
        except (DeviceGone, HandshakeTimeout, Refused) as error:
            await self._let_go(keep_target=drained)
            if (await self.device.refresh()).present:
                # A toolstack must not find a frontend that still claims to be connected.
                await self.device.write_state(XenbusState.CLOSED)
            if not isinstance(error, DeviceGone):
                raise

    async def _walk(self, goal: states.Goal, *, drained: bool = False) -> None:
        """Does one step of the table (states.py) after another until `goal` is reached.

        `drained`: nothing is in flight, so the OS device can keep its socket.
        """
        device = self.device
        for _ in range(MOST_STEPS):
            view = await device.refresh()
            if not view.present:
                raise DeviceGone(f"{device.name}: removed")
            decision = next_step(
                view.frontend,
                view.backend,
                online=view.online,
                goal=goal,
                published=self._published,
            )
            log.debug("%s: %s: %s", device.name, decision.step.name, decision.reason)
            match decision.step:
                case Step.WRITE_CLOSING:
                    await device.write_state(XenbusState.CLOSING)
                case Step.WRITE_CLOSED:
                    await device.write_state(XenbusState.CLOSED)
                case Step.RESTART:
                    await self._let_go(keep_target=drained)
                    await device.write_state(XenbusState.INITIALISING)
                case Step.ALLOCATE_AND_PUBLISH:
                    await self._let_go(keep_target=drained)
                    if self._may_bind is not None:
                        await self._may_bind()
                    self._attached = True
                    keys = await self.frontend.attach(device)
                    await device.publish(dict(keys), XenbusState.INITIALISED)
                    self._published = True
                case Step.CONNECT:
                    await self.frontend.start(device)
                    await device.write_state(XenbusState.CONNECTED)
                case Step.PAUSE_THEN_WRITE_CLOSING:
                    self._published = False
                    raise Refused(f"{device.name}: {decision.reason}" + await self._backend_error())
                case Step.DONE:
                    if goal is states.Goal.CLOSED:
                        await self._let_go(keep_target=drained)
                    return
                case Step.DETACHED:
                    await self._let_go(keep_target=drained)
                    raise DeviceGone(f"{device.name}: {decision.reason}")
                case step:
                    await self._wait(step, view)
        raise Refused(f"{device.name}: the backend changes its state without end")

    async def _wait(self, step: Step, view: View) -> None:
        wait = self.deadlines
        seconds, what = {
            Step.WAIT_INIT_WAIT: (wait.init_wait, "backend InitWait"),
            Step.WAIT_CONNECTED: (wait.connected, "backend Connected"),
            Step.WAIT_BACKEND_CLOSING: (wait.closing, "backend Closing"),
            Step.WAIT_BACKEND_CLOSED: (wait.closing, "backend Closed"),
        }[step]
        if step is self._in_vain or (
            step is Step.WAIT_INIT_WAIT and view.backend is XenbusState.CLOSED
        ):
            # The backend reacts to the write, not to the value: it may have missed the first.
            await self.device.write_state(view.frontend, again=True)
        self._in_vain = step
        await self.device.until(
            lambda v: v.backend is not view.backend or v.online is not view.online,
            what=what,
            timeout=seconds,
        )
        self._in_vain = None

    async def _let_go(self, *, keep_target: bool) -> None:
        """Frees what the generation held, and removes its keys. After the backend has let go."""
        self._published = False
        if self._attached:
            await self.frontend.detach(keep_target=keep_target)
            self._attached = False
        if self.device.view.present:
            await self.device.remove_keys(self.frontend.stale_key)

    async def _moved(self) -> None:
        """The domain is another one than at the attach: nothing of before may be unbound."""
        self._poisoned = False
        self._published = False
        if self._attached:
            await self.frontend.poisoned()
            self._attached = False
        await self.device.reopen()

    async def _backend_error(self) -> str:
        """What xenbus_dev_error left in the store, as a clause; '' if nothing."""
        with contextlib.suppress(OSError):
            head, _, tail = self.device.backend.partition("/backend/")
            text = await self.device.store.read_opt(f"{head}/error/backend/{tail}/error")
            if text:
                return f" (the backend says {text[:200]!r})"
        return ""

    async def _serve(self) -> bool:
        """Stays Connected. True: the device was detached for good; False: walk again."""
        device, frontend = self.device, self.frontend
        seen = device.view.serial
        while True:
            self._poked.clear()
            if self.goal is not Goal.CONNECTED:
                return False
            view = device.view
            # A toolstack that wrote state 1 has built this device anew, which is what a restore
            # looks like from inside: the port may have been bound while the domain slept.
            if view.moved or self._poisoned or view.frontend is XenbusState.INITIALISING:
                self._poisoned = True
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
                await self._enter(
                    Phase.RECONNECTING, f"the backend went to {view.backend.label}"
                )
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
            if view.serial != seen or frontend.pending:
                seen = view.serial
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
            if not device.view.present:
                raise DeviceGone(f"{device.name}: removed by force while in use: {why}")
            if device.view.online:
                await self._enter(Phase.CONNECTED, "detach withdrawn")
                return False
        await self._enter(Phase.CLOSING, "detached by the toolstack")
        drained = await self.frontend.quiesce(self.deadlines.detach)
        await self.frontend.close()
        with contextlib.suppress(PvfrontError):
            await self._disconnect(drained=drained)
        await self.frontend.end()
        await self._enter(Phase.CLOSED, "detached by the toolstack")
        return True

    async def _park(self) -> None:
        """Lets go of everything towards the backend; waits for another goal."""
        try:
            if self._attached:
                drained = False
                if self.frontend.trouble is None:
                    drained = await self.frontend.quiesce(self.deadlines.drain)
                await self._disconnect(drained=drained)
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
        if self._attached and self.frontend.trouble is None:
            await self.frontend.close()
            drained = await self.frontend.quiesce(self.deadlines.drain)
        else:
            await self.frontend.close()
        reason = ""
        try:
            await self._disconnect(drained=drained)
        except (PvfrontError, OSError) as error:
            reason = str(error)
            log.warning("%s: %s", self.device.name, error)
        await self.frontend.end()
        await self._enter(Phase.CLOSED, reason)

    async def _gone(self, why: str) -> None:
        await self._enter(Phase.CLOSING, why)
        await self.frontend.detach(keep_target=False)
        self._attached = False
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
            logging.WARNING if reason and phase in _TROUBLE else logging.INFO,
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
        self._tell()

    def _tell(self) -> None:
        """Something that status shows has changed."""
        if self._on_change is not None:
            self._on_change(self)


_TROUBLE = (Phase.FAILED, Phase.RECONNECTING, Phase.DETACH_REFUSED)
