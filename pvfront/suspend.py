# SPDX-License-Identifier: BSD-2-Clause
"""Lets a domain suspend (xl save, migration, checkpoint) with devices that user space serves.

Theory of operation
    An event channel that is still bound when the domain suspends crashes the kernel at its later
    close (drivers/xen/evtchn.c), and the kernel freezes all of user space before any program has
    seen the request. So the first request is vetoed (veto.py), everything is put away in order,
    and then we ask the kernel for the same suspend ourselves; the toolstack, which waits for 60 s
    after the kernel's first acknowledgement, sees one suspend. docs/suspend.md has the
    whole story with what was measured.

    `Machine` (suspend_machine.py) is the pure part: events and the time go in, actions come out.
    `Suspend` is the one owner: it feeds the machine and carries the actions out. A domain has one
    owner, whatever the number of services: it holds the lock file, and the others join it.

      WATCHING ──request──▶ FREEZING ─▶ SETTLING ─▶ CLOSING ─▶ SUSPENDING ──end──▶ REARMING
         ▲                     │            │          │            │                 │
         └──────── THAWING ◀───┴────────────┘          └────────────┴─▶ REOPENING ◀───┘
                      ▲                                                     │
                      └─────────────────────────────────────────────────────┘

    FREEZING    every program but ours, by cgroup; devices go on serving
    SETTLING    file systems on our devices are written back, nothing is left in flight
    CLOSING     devices drain, close towards the backend, unbind their ports
    SUSPENDING  the veto is dropped, ``suspend`` written; until the log says that it is over
    REARMING    the veto is put back first: from here on ports may be bound again
    REOPENING   devices reconnect
    THAWING     programs go on

    The veto is on in every state but SUSPENDING: a second request meanwhile is vetoed too.

    When the suspend is over is read from the kernel's log, not from the acknowledgement in
    ``control/shutdown``. The order in which the kernel and we get the event of our own write
    is not fixed (after a resume the kernel registers the watches in reverse), so an empty node may
    mean that the freeze is just about to begin. A line "Restarting tasks" after "suspending
    xenstore" cannot be read before user space runs again.

    While SUSPENDING, nothing may unregister a watch on /dev/xen/xenbus: the kernel does that
    under the mutex that the thread doing the suspend holds, so the task could not be frozen
    (drivers/xen/xenbus/xenbus_xs.c, `unregister_xenbus_watch`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from pathlib import Path
from typing import Any, Protocol

from .cgroup import FreezeFailed, Freezer
from .errors import PvfrontError
from .fssync import sync_devices
from .hooks import Hooks
from .suspend_group import Devices, Group, NotOwner, Participants, SuspendError, Watched
from .suspend_machine import (
    Action,
    Armed,
    Commanded,
    Done,
    Event,
    Limits,
    Machine,
    Overdue,
    Refired,
    Stage,
    Started,
)
from .suspend_mark import DOMID, Mark, Store
from .suspend_members import Hub, uncovered
from .veto import CannotVeto, KernelLog, Line, LogEvent, Veto

log = logging.getLogger(__name__)

REFIRED = 1.0  # seconds for the sentinel to fire in a domain that is the old one by its store
SOON = 1.0  # seconds in which what is written back by quick disks is
SHUTDOWN = "control/shutdown"
SENTINEL = DOMID  # never changes, so its watch fires only when a resume has set it anew
RUN_DIR = Path("/run/pvfront")
FREEZE_TIMEOUT = Path("/sys/power/pm_freeze_timeout")


# -- the owner ---------------------------------------------------------------------------------


class Effects(Protocol):
    """What the owner does to the system; `SystemEffects` is the real one."""

    def start(self) -> None: ...
    def fileno(self) -> int: ...
    def read_log(self) -> list[LogEvent]: ...
    async def arm(self) -> None: ...
    def disarm(self) -> None: ...
    async def freeze(self, timeout: float) -> int: ...
    async def hold(self, mounts: Collection[str], timeout: float) -> None: ...
    def thaw(self) -> None: ...
    def spare(self, cgroups: Collection[str]) -> None: ...
    async def sync(self, devices: Collection[str], timeout: float) -> list[str]: ...
    def set_freeze_timeout(self, seconds: float) -> None: ...
    def restore_freeze_timeout(self) -> None: ...
    def close(self) -> None: ...


class SystemEffects:
    """The kernel's log, the veto, the freezer and the kernel's freeze time-out."""

    def __init__(self, run_dir: Path = RUN_DIR, freeze_timeout: Path = FREEZE_TIMEOUT) -> None:
        """Raises CannotVeto or DeviceUnavailable: this process cannot own suspend."""
        self._veto = Veto()
        self._freezer = Freezer.of_this_process(run_dir / "suspend.frozen")
        self._log = KernelLog()
        self._freeze_timeout = freeze_timeout
        self._usual: str | None = None

    def start(self) -> None:
        self._freezer.start()

    def fileno(self) -> int:
        return self._log.fileno()

    def read_log(self) -> list[LogEvent]:
        return self._log.read()

    async def arm(self) -> None:
        await self._veto.arm()

    def disarm(self) -> None:
        self._veto.disarm()

    async def freeze(self, timeout: float) -> int:
        return await self._freezer.freeze(timeout)

    async def hold(self, mounts: Collection[str], timeout: float) -> None:
        await self._freezer.hold(mounts, timeout)

    def thaw(self) -> None:
        self._freezer.thaw()

    def spare(self, cgroups: Collection[str]) -> None:
        self._freezer.others = cgroups

    async def sync(self, devices: Collection[str], timeout: float) -> list[str]:
        return await sync_devices(devices, timeout)

    def set_freeze_timeout(self, seconds: float) -> None:
        if self._usual is None:
            self._usual = self._freeze_timeout.read_text().strip()
        self._freeze_timeout.write_text(str(int(seconds * 1000)))

    def restore_freeze_timeout(self) -> None:
        if self._usual is not None:
            self._freeze_timeout.write_text(self._usual)
            self._usual = None

    def close(self) -> None:
        """Leaves the veto as it is: see `Veto`."""
        self.restore_freeze_timeout()
        self._freezer.close()
        self._veto.close()
        self._log.close()


class Suspend(Watched):
    """The one owner of suspend in this domain.

    `run` does it all until it is cancelled; other services join it (suspend_members.py). Devices
    that appear ask `may_bind` before they bind a port. When the service stops and no port of ours
    is left bound, `disarm` takes the veto back; otherwise it stands, for the next owner.
    """

    def __init__(
        self,
        store: Store,
        participants: Participants,
        *,
        on_change: Callable[[], None] = lambda: None,
        effects: Effects | None = None,
        limits: Limits | None = None,
        run_dir: Path = RUN_DIR,
        hooks: Hooks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`participants`: every device that has, or may have, a port bound; asked when it matters.
        `on_change` is called when something that `status` says has changed. `hooks`: the admin's
        programs, told before programs are frozen and when all is over (`_step`, `_freeze`).

        Raises CannotVeto or DeviceUnavailable: this process or kernel cannot own suspend.
        """
        super().__init__()
        self._store = store
        self._limits = limits or Limits()
        self._effects = effects or SystemEffects(run_dir)
        self._own = Devices(participants, self._effects.sync, clock=clock)
        self._hub = Hub(run_dir)
        self._was_shared = False
        self._on_change = on_change
        self.owns = False
        """Whether this process owns suspend, and so says when ports may be bound."""
        self._run_dir = run_dir
        self._hooks = hooks or Hooks(Path("/nonexistent"))
        self._hooked = False  # they were told of this request
        self._clock = clock
        self.machine = Machine(limits=self._limits)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._arming: asyncio.Task[None] | None = None
        self._rearm = False
        self._overdue: asyncio.Task[None] | None = None
        self._prepared: list[Group] = []
        self._resumed_anew = asyncio.Event()
        self._mark = Mark(store)
        self._open = asyncio.Event()
        self._open.set()

    # -- for others ------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        return self.machine.stage

    @property
    def armed(self) -> bool:
        return self.machine.armed

    @property
    def open(self) -> bool:
        """Whether ports may be bound now."""
        return self.owns and self._open.is_set()

    @property
    def was_shared(self) -> bool:
        """Whether other services took part when `run` ended."""
        return self._was_shared

    def status(self) -> dict[str, object]:
        """For ``pvfront status``: plain values only."""
        machine = self.machine
        return {
            "stage": machine.stage.value,
            "armed": machine.armed,
            "why_unarmed": "" if machine.armed else machine.why_unarmed,
            **vars(machine.counts),
            "last_refusal": machine.last_refusal,
            "services": self._hub.services,
        }

    async def may_bind(self) -> None:
        """Returns when ports may be bound: not between closing for a suspend and its end."""
        await self._open.wait()

    def disarm(self) -> None:
        """Takes the veto back. Only when `run` has ended and no port of ours is bound."""
        try:
            self._effects.disarm()
        except CannotVeto as error:
            log.warning("the next suspend will be held up once: %s", error)

    # -- life ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Owns suspend until cancelled; then thaws, and leaves the veto standing.

        Raises NotOwner if another process is the owner.
        """
        try:
            with self._lock():
                async with self._hub.listening(self._tell):
                    await self._own_suspend()
        finally:
            self.owns = False
            self._effects.close()

    async def _own_suspend(self) -> None:
        self._effects.start()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._effects.fileno(), self._read_log)
        self._spawn(self._follow(SHUTDOWN, self._on_shutdown))
        self._spawn(self._follow(SENTINEL, self._on_sentinel))
        self.owns = True
        self._tell()
        try:
            self._events.put_nowait(Started())
            while True:
                self._step(await self._events.get())
        finally:
            self._was_shared = bool(self._hub.services)
            loop.remove_reader(self._effects.fileno())
            await self._cancel_all()

    def _tell(self) -> None:
        """Something that `status` says has changed."""
        self._changed.set()
        self._on_change()

    @contextlib.contextmanager
    def _lock(self) -> Any:
        self._run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        path = self._run_dir / "suspend.lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
                raise NotOwner(
                    f"{path}: process {owner or '(unknown)'} owns suspend already"
                ) from None
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
            yield
        finally:
            os.close(fd)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("suspend: %s: %s", type(error).__name__, error, exc_info=error)

    async def _cancel_all(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- events ----------------------------------------------------------------------------

    def _read_log(self) -> None:
        for event in self._effects.read_log():
            self._events.put_nowait(event)

    async def _follow(self, path: str, then: Callable[[], Awaitable[None]]) -> None:
        async with self._store.watch(path) as events:
            first = True
            async for _ in events:
                if not first:  # the first one only says that the watch is set
                    await then()
                first = False

    async def _on_shutdown(self) -> None:
        value = await self._store.read_opt(SHUTDOWN)
        self._events.put_nowait(Commanded(value or ""))

    async def _on_sentinel(self) -> None:
        self._resumed_anew.set()
        self._events.put_nowait(Refired())

    def _step(self, event: Event) -> None:
        before = self.machine.stage
        actions = self.machine.step(event, self._clock())
        after = self.machine.stage
        if isinstance(event, LogEvent):
            log.debug("kernel: %s", event.text)
        if isinstance(event, Done) and event.failure:
            log.error("suspend: %s", event.failure)
        if after is not before:
            log.info("suspend: %s -> %s", before.value, after.value)
            if after is Stage.CLOSING:
                self._set_open(False)
            elif after in (Stage.REOPENING, Stage.THAWING, Stage.WATCHING):
                self._set_open(True)
            if before is Stage.SUSPENDING:
                self._leave_suspending()
            if after is Stage.WATCHING:
                if self.machine.last_refusal:
                    log.error("suspend refused: %s", self.machine.last_refusal)
                self._spawn(self._over())
        self._tell()
        for action in actions:
            self._act(action)

    def _set_open(self, is_open: bool) -> None:
        if is_open:
            self._open.set()
        else:
            self._open.clear()
        self._hub.tell_open(is_open)

    # -- actions ---------------------------------------------------------------------------

    def _act(self, action: Action) -> None:
        match action:
            case Action.ARM:
                self._arm()
            case Action.POISON:
                self._poison()
            case Action.FREEZE:
                self._do(action, self._freeze())
            case Action.SETTLE:
                self._do(action, self._settle())
            case Action.CLOSE:
                self._do(action, self._close())
            case Action.SUSPEND:
                self._do(action, self._suspend())
            case Action.REOPEN:
                self._do(action, self._reopen())
            case Action.THAW:
                self._do(action, self._thaw())

    def _do(self, action: Action, work: Coroutine[Any, Any, None]) -> None:
        async def body() -> None:
            failure = ""
            try:
                await work
            except (PvfrontError, OSError) as error:  # TimeoutError is an OSError
                failure = str(error) or type(error).__name__
            except Exception as error:
                log.exception("suspend: %s", action.value)
                failure = f"{type(error).__name__}: {error}"
            self._events.put_nowait(Done(action, failure))

        self._spawn(body())

    def _arm(self) -> None:
        """Starts arming; one at a time, and once more if asked for meanwhile."""
        if self._arming is not None and not self._arming.done():
            self._rearm = True
            return

        async def body() -> None:
            timer = asyncio.get_running_loop().call_later(
                self._limits.rearm,
                self._events.put_nowait,
                Armed(False, "another wakeup source is active"),
            )
            try:
                while True:
                    self._rearm = False
                    await self._effects.arm()
                    if not self._rearm:
                        break
                armed = Armed(True)
            except (PvfrontError, OSError) as error:
                log.error("suspend cannot be held up: %s", error)
                armed = Armed(False, str(error))
            finally:
                timer.cancel()
            self._events.put_nowait(armed)

        self._arming = self._spawn(body())

    def _poison(self) -> None:
        log.critical(
            "the domain was suspended while event channels were bound; "
            "the old ones are parked for good"
        )
        for group in self._groups():
            group.poison()

    async def _over(self) -> None:
        """Hooks that undo what `pre-suspend` did; programs run again."""
        self._hooked = False
        machine = self.machine
        outcome = "refused" if machine.last_refusal else "resumed"
        if not machine.last_refusal and machine.cancelled:
            outcome = "cancelled"
        facts = {"OUTCOME": outcome, "REASON": machine.last_refusal}
        await self._hooks.run("post-suspend", facts)
        if outcome == "resumed":
            await self._hooks.run("post-resume")

    async def _freeze(self) -> None:
        if not self._hooked:  # else it is another attempt at the same request
            self._hooked = True
            await self._hooks.run("pre-suspend", within=self._limits.hooks)
        self._effects.spare(self._hub.cgroups)
        count = await self._effects.freeze(self._limits.freeze)
        log.info("suspend: %d cgroups frozen", count)

    def _groups(self) -> list[Group]:
        return [self._own, *self._hub.groups()]

    async def _settle(self) -> None:
        limits = self._limits

        def settle(group: Group) -> Awaitable[list[str]]:
            return group.settle(limits.settle - limits.drain, limits.drain)

        began = self._clock()
        if synced := await self._each(self._groups(), settle):
            log.info("suspend: written back: %s", ", ".join(synced))
        # Freezing them writes several times, one after the other. Disks that are too slow for that
        # have it only if it turned out to be needed: a thread that is still at it cannot be frozen.
        if synced and (self._clock() - began < SOON or self.machine.threads_awake):
            await self._effects.hold(synced, limits.settle - limits.drain)
            log.info("suspend: file systems frozen")

    async def _close(self) -> None:
        try:
            # Once more, for what was started since.
            await self._effects.freeze(1.0)
        except FreezeFailed as error:
            log.warning("suspend: %s", error)
        self._prepared = self._groups()
        failures = await self._each(self._prepared, lambda g: g.close(self._limits.close))
        failures += uncovered(self._run_dir, {n for g in self._prepared for n in g.names})
        if failures:
            raise SuspendError("cannot be closed: " + "; ".join(failures))

    async def _suspend(self) -> None:
        self._resumed_anew.clear()
        value = await self._store.read_opt(SHUTDOWN)
        if value:
            raise SuspendError(f"{SHUTDOWN} holds {value[:20]!r}: not ours to overwrite")
        await self._mark.put()
        self._effects.set_freeze_timeout(self._limits.kernel_freeze)
        self._effects.disarm()
        # Had somebody else's suspend slipped in, ours would be one too many.
        events = self._effects.read_log()
        for event in events:
            self._events.put_nowait(event)
        if any(event.line in (Line.XEN_SUSPENDING, Line.REFUSED) for event in events):
            raise SuspendError("another suspend got in between")
        await self._store.write(SHUTDOWN, "suspend")
        self._overdue = self._spawn(self._watch_over())

    async def _watch_over(self) -> None:
        """Takes back what the kernel does not take, and ends the wait for a log that is silent."""
        await asyncio.sleep(self._limits.taken)
        if await self._store.read_opt(SHUTDOWN) == "suspend":
            await self._store.write(SHUTDOWN, "")
            failure = f"the kernel did not take {SHUTDOWN}=suspend"
            self._events.put_nowait(Done(Action.SUSPEND, failure))
            return
        await asyncio.sleep(self._limits.end)
        log.error("suspend: the kernel's log does not say that it is over")
        self._events.put_nowait(Overdue())

    def _leave_suspending(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        self._effects.restore_freeze_timeout()

    async def _reopen(self) -> None:
        moved = await self._mark.moved()
        if self.machine.suspended and not moved:
            # Where the kernel went through a resume its watches all fire, else nothing does.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._resumed_anew.wait(), REFIRED)
                moved = True
        if moved:
            self.machine.cancelled = False
        cancelled = self.machine.cancelled
        groups, self._prepared = self._prepared, []
        for failure in await self._each(
            groups, lambda group: group.reopen(cancelled, self._limits.reopen)
        ):
            log.error("suspend: not connected again yet: %s", failure)

    async def _thaw(self) -> None:
        if self.machine.suspended and self.machine.cancelled is False:
            await self._hooks.run("pre-resume", within=self._limits.hooks)
        self._effects.thaw()

    @staticmethod
    async def _each(
        groups: Collection[Group], call: Callable[[Group], Awaitable[list[str]]]
    ) -> list[str]:
        """What all groups answer, asked side by side, when all have; raises what one has raised."""
        answers = await asyncio.gather(*map(call, groups), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [line for answer in answers if isinstance(answer, list) for line in answer]
