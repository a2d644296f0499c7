# SPDX-License-Identifier: BSD-2-Clause
"""A disk's worker, as its frontend has it: the process, what it says, and another in its place.

`WorkerSide` is the half of `DiskFrontend` that knows nothing of the store and of the disk. The
worker may die at any moment, be killed, or be left over from an earlier supervisor; what is known
of it is in the attributes here, and `trouble` says why the present generation is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from ..errors import PvfrontError
from ..platform import Platform
from ..threads import in_daemon_thread
from ..trace import Kind, Note, nothing
from ..upgrade import Upgrade, outdated
from ..worker import Worker, WorkerGone
from ..workermessage import (
    Broken,
    Drained,
    Event,
    Exited,
    FeatureOff,
    Stalled,
    State,
    TargetGone,
)
from .settings import DiskSettings
from .target import Target

log = logging.getLogger(__name__)


class WorkerSide:
    """What a disk's frontend knows of its worker. See `frontend.Frontend` for what is public."""

    def __init__(
        self, name: str, label: str, platform: Platform, target: Target, settings: DiskSettings
    ) -> None:
        self.name = name
        self.label = label
        self.platform = platform
        self.run_dir = platform.run_dir
        self.target = target
        self.settings = settings
        self.off: set[str] = set()
        self.stalled = 0
        self._worker: Worker | None = None
        self._generation = 0
        self._attached = False  # the worker holds what ATTACH gave it
        self._has_socket = False
        self._draining = False  # a client has left requests in the ring
        self._news = False  # a client came or went: status is to show it
        self._broken = False
        self._trouble: str | None = None
        self._wanted_off: list[str] = []
        self._upgrade = Upgrade(name, self.run_dir)
        self._look: asyncio.Task[None] | None = None
        self._poke: Callable[[], None] = lambda: None
        self._note: Note = nothing

    @property
    def trouble(self) -> str | None:
        return self._trouble

    @property
    def generation(self) -> int:
        return self._generation

    def on_poke(self, poke: Callable[[], None]) -> None:
        self._poke = poke

    def on_note(self, note: Note) -> None:
        self._note = note

    # -- the process ------------------------------------------------------------------------

    async def _living_worker(self) -> Worker:
        if self._worker is None or not self._worker.alive:
            self._hold(False)
            try:
                self._use(await self._spawn())
            except WorkerGone as error:
                self._note(Kind.DIED, str(error).removeprefix(f"{self.name}: "))
                raise
            pid = self._need_worker().pid
            self._note(Kind.WORKER, f"started: pid {pid}", pid=pid)
        return self._need_worker()

    async def _spawn(self) -> Worker:
        return await self._new_worker(self._most_queues)

    async def _new_worker(self, queues: int, *, following: bool = False) -> Worker:
        return await Worker.spawn(
            self.name,
            self.run_dir,
            queues=queues,
            following=following,
            change_user=self.platform.name == "xen",
            ublk=self.target.stays,
        )

    @property
    def _most_queues(self) -> int:
        wanted = self.settings.max_queues or self.target.usual_queues
        return max(1, min(wanted, self.target.max_queues))

    def _need_worker(self) -> Worker:
        if self._worker is None:
            raise WorkerGone(f"{self.name}: there is no worker")
        return self._worker

    def _use(self, worker: Worker) -> None:
        self._worker = worker
        self.target.server_pid = worker.pid
        state = worker.hello.state if worker.hello is not None else State.IDLE
        self._attached = state is not State.IDLE
        self._draining = state is State.TARGET_LOST
        worker.on_event = self._on_event

    def _forget(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._attached = self._draining = False

    def _hold(self, socket: bool) -> None:
        """Whether the worker has a socket of the target."""
        self._has_socket = socket
        if self.target.clients is not None:
            self.target.clients.served(socket)
            self._news = True

    def _on_event(self, event: Event) -> None:
        match event:
            case Broken():
                self._broken = True
                self._trouble = str(event)
                self._note(
                    Kind.BROKEN, str(event), rule=event.rule, field=event.field, value=event.value
                )
            case TargetGone() if self.target.clients is not None:
                level = logging.WARNING if event.error else logging.INFO
                log.log(level, "%s: %s", self.name, event)
                self._note(Kind.TARGET, str(event))
                self._draining = True
                self._hold(False)
            case TargetGone():
                self._note(Kind.TARGET, str(event))
                self._hold(False)
                self._trouble = str(event)
            case Drained():
                self._draining = False
            case Exited():
                self._note(Kind.DIED, event.text)
                self._hold(False)
                self._trouble = event.text
                self._forget()
            case FeatureOff():
                if event.feature not in self.off:  # a worker tells it again after HELLO
                    self._wanted_off.append(event.feature)
            case Stalled():
                self.stalled = event.seconds
                if event.seconds:
                    log.warning(
                        "%s: the backend has not answered for %d s, %d requests outstanding",
                        self.name,
                        event.seconds,
                        event.in_flight,
                    )
                    what = f"no answer for {event.seconds} s, {event.in_flight} requests wait"
                else:
                    log.info("%s: the backend answers again", self.name)
                    what = "the backend answers again"
                self._note(Kind.STALL, what, seconds=event.seconds, in_flight=event.in_flight)
        self._poke()

    async def packets(self) -> dict[str, Any]:
        raise PvfrontError(f"{self.label}: it is a disk, which has no packets")

    # -- another one -------------------------------------------------------------------------

    @property
    def _build(self) -> str:
        hello = self._worker.hello if self._worker is not None else None
        return hello.build if hello is not None else ""

    def outdated(self) -> bool:
        return outdated(self._build)

    async def _upgrade_if_outdated(self) -> None:
        # The program's file may lie on this very disk.
        if await in_daemon_thread(f"{self.name} build", self.outdated):
            with contextlib.suppress(WorkerGone):
                self._ask_upgrade()

    async def upgrade(self) -> str:
        """Has a new worker take over from the present one, without a reconnect; says how it went.

        Raises PvfrontError if the present one goes on. To be called while the loop is Connected.
        """
        if self._worker is None:
            raise PvfrontError(f"{self.label}: there is no worker")
        if not self._build:
            raise PvfrontError(f"{self.label}: its worker is none of ours")
        if self.target.stays:
            raise PvfrontError(
                f"{self.label}: a ublk device cannot be handed over; its worker stays",
                hint="end the worker, and a new one takes its place after a pause: "
                f"kill -9 {self._worker.pid}",
            )
        return await asyncio.shield(self._ask_upgrade())

    def _ask_upgrade(self) -> asyncio.Future[str]:
        old = self._need_worker()
        queues = max(old.hello.queues if old.hello is not None else 1, self._most_queues)
        return self._upgrade.ask(
            lambda: self._new_worker(queues, following=True), lambda: self._poke()
        )

    async def _do_upgrade(self) -> None:
        text = await self._upgrade.perform(self._need_worker(), self._use, self._on_event)
        if text is not None:
            self._note(Kind.WORKER, text, pid=self.target.server_pid)
