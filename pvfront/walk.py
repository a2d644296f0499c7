# SPDX-License-Identifier: BSD-2-Clause
"""The walk: one step of the table (states.py) after another, with what each step takes.

`Walk` holds what one device has towards its backend (`attached`) and knows whether the keys in the
store are of that (`published`). It goes to Connected or to Closed from whatever states it finds, or
raises what kept it: HandshakeTimeout (who is stuck in which state), Refused, DeviceGone, and
whatever the class of devices raises. When it walks, and what becomes of its failures, is the
device loop's (device.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from . import states
from .errors import PvfrontError
from .frontend import Frontend
from .states import Step, XenbusState, next_step
from .trace import Kind, Note
from .xenbus import DeviceGone, HandshakeTimeout, View, XenbusDevice

log = logging.getLogger(__name__)

MOST_STEPS = 40  # of one walk; from any states to Connected takes 12


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that the other end gets for each step."""

    init_wait: float = 30.0  # hotplug scripts in the backend's domain run before it
    connected: float = 30.0
    closing: float = 10.0
    drain: float = 30.0
    detach: float = 6.0  # for requests; the toolstack's own patience with a detach is 10 s
    detach_stalled: float = 1.0  # the same where no answer has come for long
    busy_poll: float = 1.0


class Refused(PvfrontError):
    """The backend went to Closing or Closed instead of Connected."""


class Walk:
    """One device's way to Connected and back."""

    def __init__(
        self,
        device: XenbusDevice,
        frontend: Frontend,
        deadlines: Deadlines,
        *,
        may_bind: Callable[[], Awaitable[None]] | None = None,
        note: Note,
    ) -> None:
        """`may_bind` returns when ports may be bound: not while the domain is put to sleep."""
        self.device = device
        self.frontend = frontend
        self.deadlines = deadlines
        self.attached = False  # the frontend holds ports and grants
        self.published = False  # the keys in the store are those of what is held
        self.poisoned = False  # the domain slept while attached
        self.told_backend = False  # what is held was published: state 1 is now another's word
        self.told = 0  # `View.told` before the backend's keys were read to serve it
        self._started = True  # the data path runs, or did when the supervisor before us ended
        self._in_vain: Step | None = None  # the wait that ended without what was waited for
        self._may_bind = may_bind
        self._note = note

    def anew(self, view: View) -> bool:
        """Whether a toolstack has built this device anew while something was held towards its
        backend: what a restore looks like from inside. Its port may have been bound in the sleep.
        """
        return view.moved or (self.told_backend and view.frontend is XenbusState.INITIALISING)

    async def connect(self) -> None:
        """Walks to Connected."""
        await asyncio.to_thread(self.frontend.stolen)
        await self._walk(states.Goal.CONNECTED)

    async def disconnect(self, *, drained: bool) -> None:
        """Walks to Closed and lets go of everything towards the backend, whatever it does.

        Raises HandshakeTimeout if the backend is stuck; nothing is held then either, because an
        unplug must not wait for a backend that does not answer (rule 28).
        """
        try:
            await self._walk(states.Goal.CLOSED, drained=drained)
        except (DeviceGone, HandshakeTimeout, Refused) as error:
            await self.let_go(keep_target=drained)
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
            if self.poisoned or self.anew(view):
                # Whichever of both ends' events came first, and however far the walk was.
                await self._moved()
                continue
            if not view.present:
                raise DeviceGone(f"{device.name}: removed")
            if goal is states.Goal.CONNECTED and self.published and _is_asked_to_detach(view):
                return  # of a connection that stands: its users are asked first (device.py)
            decision = next_step(
                view.frontend,
                view.backend,
                online=view.online,
                goal=goal,
                published=self.published,
                started=self._started,
            )
            log.debug("%s: %s: %s", device.name, decision.step.name, decision.reason)
            if decision.step is not Step.DONE:
                self._note(Kind.STEP, f"{_NAMES[decision.step]}: {decision.reason}")
            match decision.step:
                case Step.WRITE_CLOSING:
                    await device.write_state(XenbusState.CLOSING)
                case Step.WRITE_CLOSED:
                    await device.write_state(XenbusState.CLOSED)
                case Step.RESTART:
                    await self.let_go(keep_target=drained)
                    await device.write_state(XenbusState.INITIALISING)
                case Step.ALLOCATE_AND_PUBLISH:
                    await self.let_go(keep_target=drained)
                    if self._may_bind is not None:
                        await self._may_bind()
                    self.attached = True
                    keys = await self.frontend.attach(device)
                    self._started = False
                    await device.publish(dict(keys), self.frontend.publish_state)
                    self.published = self.told_backend = True
                case Step.CONNECT:
                    self.told = view.told
                    await self.frontend.start(device)
                    self._started = True
                    await device.write_state(XenbusState.CONNECTED)
                case Step.PAUSE_THEN_WRITE_CLOSING:
                    self.published = False
                    raise Refused(f"{device.name}: {decision.reason}" + await self._backend_error())
                case Step.DONE:
                    if goal is states.Goal.CLOSED:
                        await self.let_go(keep_target=drained)
                    return
                case Step.DETACHED:
                    await self.let_go(keep_target=drained)
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
        began = time.monotonic()
        try:
            await self.device.until(
                lambda v: (
                    (v.frontend, v.backend, v.online) != (view.frontend, view.backend, view.online)
                    or v.moved
                ),
                what=what,
                timeout=seconds,
            )
        finally:
            waited = time.monotonic() - began
            found = self.device.view.backend
            self._note(
                Kind.WAITED,
                f"{waited:.3f} s for {what}: it is {found.label}",
                seconds=round(waited, 6),
                patience=seconds,
                came=found in states.AWAITED[step],
            )
        self._in_vain = None

    async def let_go(self, *, keep_target: bool) -> None:
        """Frees what the generation held, and removes its keys. After the backend has let go."""
        self.published = False
        if self.attached:
            await self.frontend.detach(keep_target=keep_target)
            self.attached = self.told_backend = False
        if self.device.view.present:
            await self.device.remove_keys(self.frontend.stale_key)

    async def _moved(self) -> None:
        """The domain is another one than at the attach: nothing of before may be unbound."""
        self.poisoned = False
        self.published = False
        if self.attached:
            await self.frontend.poisoned()
            self.attached = self.told_backend = False
        await self.device.reopen()

    async def _backend_error(self) -> str:
        """What xenbus_dev_error left in the store, as a clause; '' if nothing."""
        with contextlib.suppress(OSError):
            head, _, tail = self.device.backend.partition("/backend/")
            text = await self.device.store.read_opt(f"{head}/error/backend/{tail}/error")
            if text:
                return f" (the backend says {text[:200]!r})"
        return ""


def _is_asked_to_detach(view: View) -> bool:
    ends = view.frontend, view.backend
    closes = ((XenbusState.CONNECTED, end) for end in (XenbusState.CLOSING, XenbusState.CLOSED))
    return not view.online and ends in closes


_NAMES: dict[Step, str] = {
    Step.WRITE_CLOSING: "closing",
    Step.PAUSE_THEN_WRITE_CLOSING: "refused",
    Step.WAIT_BACKEND_CLOSING: "waiting for backend Closing",
    Step.WRITE_CLOSED: "closed",
    Step.WAIT_BACKEND_CLOSED: "waiting for backend Closed",
    Step.RESTART: "starting afresh",
    Step.WAIT_INIT_WAIT: "waiting for backend InitWait",
    Step.ALLOCATE_AND_PUBLISH: "opening ring and port",
    Step.WAIT_CONNECTED: "waiting for backend Connected",
    Step.CONNECT: "starting the data path",
    Step.DONE: "done",
    Step.DETACHED: "detached",
}
