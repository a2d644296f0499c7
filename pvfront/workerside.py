# SPDX-License-Identifier: BSD-2-Clause
"""A device's worker, as its frontend has it: found, started, told to let go, replaced, ended.

`WorkerSide` is what is the same in the frontends of all classes that have workers: it knows the
process, what it says and what it holds, and nothing of keys, rings and the OS device. A class adds
`attach`, `start`, `update` and what it is asked besides, and extends what is said here to be
extended.

The worker may die at any moment, be killed, or be left over from an earlier supervisor. Its death
ends the generation; the next `attach` starts another one. `trouble` says why the present generation
is over. `update` has the worker replaced by another one (`_upgrade_if_asked`), between two steps of
the loop: no generation begins (docs/upgrade.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .budget import Budget, Grant
from .errors import PvfrontError
from .frontend import Frontend
from .parking import CannotPark, park
from .platform import Platform
from .states import XenbusState
from .threads import in_daemon_thread
from .trace import Kind
from .upgrade import Upgrade, outdated
from .worker import Worker, WorkerError, WorkerGone
from .workermessage import Broken, Event, Exited, Hello, Stalled, State
from .xenbus import XenbusDevice

log = logging.getLogger(__name__)

STALL_SECONDS = 10  # without an answer of the backend, until the worker says so
SETTLE = 2.0  # seconds for the end of a worker that was killed


class Sized(Protocol):
    """How large a generation is: its text says it to people."""

    @property
    def pages(self) -> int: ...


class WorkerSide(Frontend):
    """A frontend that has a worker: what it knows of that."""

    waiting = "requests"  # what waits for an answer of the backend

    def __init__(
        self,
        name: str,
        label: str,
        platform: Platform,
        *,
        budget: Budget | None = None,
        stolen: Callable[[], bool] = lambda: False,
    ) -> None:
        """`budget`: that of all devices of this service."""
        super().__init__(name, platform, stolen=stolen)
        self.budget = budget or Budget(platform.grant_limit)
        self._label = label
        self._worker: Worker | None = None
        self._pid = 0  # the latest worker's
        self._attached = False  # the worker holds what ATTACH gave it
        self._broken = False
        self._upgrade = Upgrade(name, self.run_dir)
        self._look: asyncio.Task[None] | None = None
        self.budget.join(name)

    # -- what a class says of itself ---------------------------------------------------------

    @property
    @abstractmethod
    def _most_queues(self) -> int:
        """How many queues a worker is started for."""

    @property
    def _options(self) -> Sequence[str]:
        """What the worker's program is told of the class."""
        return ()

    @property
    def _replaceable(self) -> bool:
        """Whether a living worker can hand everything over to another one."""
        return True

    @abstractmethod
    async def _serves(self, hello: Hello) -> bool:
        """Whether a worker that was found can go on, by what it says and what the system has."""

    @abstractmethod
    async def _adopted(self, device: XenbusDevice, worker: Worker) -> bool:
        """Learns what an earlier supervisor knew of the connection; False if it cannot go on."""

    # -- what the loop asks ------------------------------------------------------------------

    @property
    def label(self) -> str:
        return self._label

    def _worker_details(self) -> dict[str, Any]:
        """What status shows of the worker. `statistics_file`: what only root, or our own user, can
        open: a worker's own descriptors are root's.
        """
        worker, pause = self._worker, self._upgrade.pause
        return {
            "worker_pid": worker.pid if worker is not None else None,
            "worker_build": self._build,
            "upgrades": self._upgrade.count,
            "upgrade_pause_ms": None if pause is None else round(pause * 1e3, 3),
            "stalled_seconds": self.stalled,
            "statistics_file": (
                f"/proc/{os.getpid()}/fd/{worker.stats_fd}"
                if worker is not None and worker.stats_fd >= 0
                else None
            ),
        }

    # -- the process -------------------------------------------------------------------------

    async def adopt(self, device: XenbusDevice) -> bool:
        """A worker that lives but does not serve lets go of what it holds and is kept for the next
        `attach`; its generation is remembered, since it refuses to go back.
        """
        worker = await Worker.adopt(self.name, self.run_dir)
        if worker is None:
            return False
        self._use(worker)
        hello = worker.hello
        assert hello is not None
        self._note(Kind.WORKER, f"found, {hello.state.name}: pid {worker.pid}", pid=worker.pid)
        self._generation = hello.generation
        serves = await self._serves(hello)
        view = device.view
        if not (serves and view.frontend is view.backend is XenbusState.CONNECTED):
            log.warning(
                "%s: found a worker (pid %d, %s) that cannot be adopted as it is (%s)",
                self.name,
                worker.pid,
                hello.state.name,
                view,
            )
            if hello.state is not State.IDLE:
                # Detached as the walk begins at state 1, so there it is a restore's (device.py).
                if view.moved or view.frontend is XenbusState.INITIALISING:
                    await self.poisoned()
                else:
                    await self.detach(keep_target=False)
            return False
        if not await self._adopted(device, worker):
            await self.detach(keep_target=False)
            return False
        log.info("%s: adopted worker %d, generation %d", self.name, worker.pid, hello.generation)
        if self._replaceable:
            self._look = asyncio.create_task(self._upgrade_if_outdated(), name=f"{self.name} build")
        return True

    async def _begin(self) -> Worker:
        """A generation begins, with the worker that it is to have."""
        self._trouble = None
        self._broken = False
        self._generation += 1
        return await self._living_worker()

    async def _living_worker(self) -> Worker:
        if self._worker is None or not self._worker.alive:
            try:
                self._use(await self._spawn())
            except WorkerGone as error:
                self._note(Kind.DIED, str(error).removeprefix(f"{self.name}: "))
                raise
            self._note(Kind.WORKER, f"started: pid {self._pid}", pid=self._pid)
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
            options=self._options,
        )

    def _need_worker(self) -> Worker:
        if self._worker is None:
            raise WorkerGone(f"{self.name}: there is no worker")
        return self._worker

    def _use(self, worker: Worker) -> None:
        """From now on it is this one. To be extended."""
        self._worker = worker
        self._pid = worker.pid
        state = worker.hello.state if worker.hello is not None else State.IDLE
        self._attached = state is not State.IDLE
        worker.on_event = self._on_event

    def _forget(self) -> None:
        """There is no worker any more. To be extended."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._attached = False
        self.stalled = 0

    def _on_event(self, event: Event) -> None:
        """What the worker says unasked, and its end. To be extended: what a class knows, first."""
        match event:
            case Broken():
                self._broken = True
                self._trouble = str(event)
                self._note(
                    Kind.BROKEN, str(event), rule=event.rule, field=event.field, value=event.value
                )
            case Exited():
                self._note(Kind.DIED, event.text)
                self._trouble = event.text
                self._forget()
            case Stalled():
                self.stalled = event.seconds
                if event.seconds:
                    log.warning(
                        "%s: the backend has not answered for %d s, %d %s outstanding",
                        self.name,
                        event.seconds,
                        event.in_flight,
                        self.waiting,
                    )
                    what = f"no answer for {event.seconds} s, {event.in_flight} {self.waiting} wait"
                else:
                    log.info("%s: the backend answers again", self.name)
                    what = "the backend answers again"
                self._note(Kind.STALL, what, seconds=event.seconds, in_flight=event.in_flight)
        self._poke()

    def _hold_pages(
        self, asked: Sized, made: Sized, refused: Sequence[PvfrontError], why: str, *, more: int = 0
    ) -> None:
        """Notes how large the generation is that the worker was given, and says if it was to be
        larger: because of `why`, or what was `refused`. `more`: pages beside, of either.
        """
        if refused:
            why = str(refused[-1])
        elif made.pages == asked.pages:
            why = ""
        self.budget.hold(self.name, Grant(asked.pages + more, made.pages + more, why))
        if why:
            level = logging.WARNING if refused else logging.INFO
            log.log(level, "%s: %s instead of %s: %s", self.name, made, asked, why)

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
        if self._worker is None:
            raise PvfrontError(f"{self.label}: there is no worker")
        if not self._build:
            raise PvfrontError(f"{self.label}: its worker is none of ours")
        return await asyncio.shield(self._ask_upgrade())

    def _ask_upgrade(self) -> asyncio.Future[str]:
        old = self._need_worker()
        queues = max(old.hello.queues if old.hello is not None else 1, self._most_queues)
        return self._upgrade.ask(
            lambda: self._new_worker(queues, following=True), lambda: self._poke()
        )

    async def _upgrade_if_asked(self) -> None:
        if not self._upgrade.ready:
            return
        text = await self._upgrade.perform(self._need_worker(), self._use, self._on_event)
        if text is not None:
            self._note(Kind.WORKER, text, pid=self._pid)

    # -- the end of a generation, and of all -------------------------------------------------

    async def quiesce(self, timeout: float) -> bool:
        worker = self._worker
        if worker is None or self._broken:
            return False
        if not self._attached:
            return True
        return await self._drain(worker, timeout)

    async def _drain(self, worker: Worker, timeout: float) -> bool:
        """Stops intake and waits for the ring to empty. To be extended."""
        try:
            return await worker.quiesce(self._generation, timeout)
        except PvfrontError as error:
            log.warning("%s", error)
            return False

    async def detach(self, *, keep_target: bool) -> None:
        # Of a generation whose attach failed, a worker knows nothing.
        if self._worker is None or self._attached:
            await self._let_go(keep_target=keep_target)
        self.budget.release(self.name)

    async def _let_go(self, *, keep_target: bool) -> bool:
        """The worker, if it lives, lets go of what ATTACH gave it; whether it keeps the target. To
        be extended.
        """
        worker = self._worker
        keep = keep_target and worker is not None
        if worker is not None:
            try:
                await worker.detach(self._generation, keep_target=keep)
            except (WorkerGone, WorkerError) as error:
                # A worker that cannot say that it has let go is ended: the kernel lets go for it.
                log.warning("%s; ending the worker", error)
                self._note(Kind.WORKER, f"killed: {error}", pid=worker.pid)
                worker.kill()
                await worker.ended(SETTLE)
                self._forget()
                keep = False
        if self._attached:
            self._note(Kind.DETACHED, "event channels and granted pages are let go of")
        self._attached = False
        self.stalled = 0  # it was of rings that are gone
        return keep

    async def end(self) -> None:
        """The device is gone or released: the worker, which holds nothing any more, ends. To be
        extended.
        """
        if self._look is not None:
            self._look.cancel()
        self._upgrade.drop("it is served no more")
        if self._worker is not None:
            self._worker.on_event = lambda event: None
            await self._worker.exit()
            self._note(Kind.WORKER, f"ended: pid {self._pid}", pid=self._pid)
            self._forget()
        self.budget.leave(self.name)
        self._unlisted()

    async def poisoned(self) -> None:
        """The domain slept with our port bound: it must never be unbound (suspend.py). To be
        extended.

        The port's descriptor passes to a process that outlives us all (parking.py), and the worker
        ends. Where that cannot be, the worker lets go of everything else and lives on unused.
        """
        worker = self._worker
        self._trouble = "the domain was suspended while connected"
        self.budget.release(self.name)
        if worker is None:
            return
        worker.on_event = lambda event: None
        try:
            parker, ports = await park(worker.pid)
        except CannotPark as error:
            log.error("%s: %s", self.name, error)
            with contextlib.suppress(PvfrontError):
                await worker.detach(self._generation, keep_target=False, park=True)
            # Nobody must find it again: a worker that holds a parked port is never to be ended.
            self._unlisted()
        else:
            log.warning("%s: %d event channel(s) parked in process %d", self.name, ports, parker)
            what = f"killed: pid {worker.pid}; its {ports} ports are kept by process {parker}"
            self._note(Kind.WORKER, what, pid=worker.pid, parker=parker, ports=ports)
            worker.kill()
            await worker.ended(SETTLE)
        self._forget()

    def _unlisted(self) -> None:
        """No supervisor finds the worker from now on."""
        (self.run_dir / f"{self.name}.sock").unlink(missing_ok=True)
