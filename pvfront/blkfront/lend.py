# SPDX-License-Identifier: BSD-2-Clause
"""Disks lent to a program, which is then its own worker (docs/direct.md).

Theory of operation
    The supervisor, the device loop and the disk's half of it are those of `pvfront vbd serve`. What
    differs is who speaks the worker's side of the control protocol: the library pvfront/disk.h in
    the process that uses the disk. `_spawn` therefore starts nothing: it waits for HELLO on the
    socket whose other end was lent. There is no target to publish the disk on.

    `Lender` starts a program with the other ends, and stops the supervisor when it has ended, or
    when it has closed them: then the disks are given back. A program may be a script that runs
    one user of the disk after another; each says HELLO anew.

Limits
    One disk service at a time: what is lent cannot be served by `pvfront vbd serve` beside it. One
    queue for each disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Collection, Sequence
from importlib import resources
from typing import Any, Protocol

from ..config import FILE, PerDevice, load
from ..errors import PvfrontError
from ..parking import CannotPark, park
from ..platform import Platform, platform
from ..startlimit import Limits
from ..supervisor import Supervisor
from ..suspend_shared import in_guest
from ..worker import Worker, WorkerGone
from ..workermessage import Event, Exited
from ..xenbus import Bus, XenbusDevice
from .blockdisk import Feature
from .features import DiskGeometry
from .frontend import DiskFrontend
from .service import Disks, find
from .settings import DiskSettings, from_config
from .target import Clients
from .vdev import vdev_name

log = logging.getLogger(__name__)

VARIABLE = "PVFRONT_LENT"
"""PVF_DISK_VARIABLE of pvfront/disk.h: where a program finds what it was lent."""


class Borrower(Protocol):
    """Who uses lent disks."""

    async def worker(self, name: str, label: str) -> Worker:
        """The borrower of disk `label`, once it is there."""
        ...

    def left(self, label: str) -> bool:
        """The worker that there was has ended. True: there will be no other."""
        ...

    def in_use(self, label: str) -> str | None:
        """Why the disk cannot be taken back now; None if it can."""
        ...


class LentTarget:
    """`target.Target` for a disk that nobody finds by a name."""

    clients: Clients | None = None
    kind = "lent"
    stays = resize_waits = False
    server_pid = 0
    name = path = link = ""
    max_queues = usual_queues = 1

    def __init__(self, busy: Callable[[], str | None]) -> None:
        self.busy = busy

    async def adopt(self) -> bool:
        return False

    async def attach(
        self, geometry: DiskGeometry, *, queues: int = 1, deadline: float = 10.0
    ) -> list[int]:
        return []

    async def publish(self, geometry: DiskGeometry) -> None:
        """The borrower has the geometry from START."""

    async def feature_off(self, feature: Feature) -> None:
        """The borrower was the first to know."""

    async def fail_after(self, seconds: float) -> None:
        """The borrower is its own worker."""

    def in_flight(self) -> int:
        return 0

    async def close(self, *, drain: float = 10.0) -> None:
        """Nothing was made."""


class LentFrontend(DiskFrontend):
    """One vbd whose worker is the borrower."""

    def __init__(self, *args: Any, borrower: Borrower, **more: Any) -> None:
        super().__init__(*args, **more)
        self._borrower = borrower

    @property
    def start_limits(self) -> Limits:
        """Programs end, one after another; that is no crash loop."""
        return Limits(start_limit_burst=0)

    def details(self) -> dict[str, Any]:
        return {**super().details(), "os_device": self.busy() or "not lent any more"}

    async def adopt(self, device: XenbusDevice) -> bool:
        return False

    async def fail_after(self, seconds: float) -> None:
        """The borrower is a program like others, and ends as they do."""

    async def _spawn(self) -> Worker:
        worker = await self._borrower.worker(self.name, self.label)
        assert worker.hello is not None
        # Of a program before this one, nothing is left; of an earlier disk of the same number, too.
        self._generation = max(self._generation, worker.hello.generation)
        return worker

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Exited) and self._borrower.left(self.label):
            # Not trouble, but the end, which the loop is told of in its own way.
            self._trouble = event.text
            self._forget()
            return
        super()._on_event(event)

    async def poisoned(self) -> None:
        """As `DiskFrontend.poisoned`, but the borrower goes on: its own copy of the port is closed
        once another process holds one.
        """
        worker = self._worker
        self._trouble = "the domain was suspended while connected"
        if worker is None:
            return
        held = False
        try:
            parker, ports = await park(worker.pid)
        except CannotPark as error:
            log.error("%s: %s", self.name, error)
        else:
            held = True
            log.warning("%s: %d event channel(s) parked in process %d", self.name, ports, parker)
        with contextlib.suppress(PvfrontError):
            await worker.detach(self._generation, keep_target=False, park=not held)
        self._attached = False
        self.budget.release(self.name)


class LentDisks(Disks):
    """Vbds that are lent."""

    def __init__(
        self,
        on: Platform,
        borrower: Borrower,
        *,
        expected: int,
        settings: PerDevice[DiskSettings] | None = None,
    ) -> None:
        """`settings`: None, those of the file that `pvfront vbd serve` reads."""
        settings = settings or from_config(load(on.config_dir / FILE)).disks
        super().__init__(on, settings=settings, expected=expected)
        self.borrower = borrower
        self.lent: list[str] = []

    async def take(self, device: XenbusDevice, *, force: bool) -> None:
        worker = await Worker.adopt(device.name, self.platform.run_dir)
        if worker is not None:
            worker.close()
            raise PvfrontError(
                f"{self.label(device.devid)} is still served by a worker (pid {worker.pid})",
                hint="run `pvfront vbd serve` again, end its use, and release it there",
            )
        await super().take(device, force=force)

    def frontend(self, device: XenbusDevice) -> DiskFrontend:
        label = self.label(device.devid)
        self.lent.append(label)
        return LentFrontend(
            device.name,
            device.devid,
            label,
            self.platform,
            LentTarget(lambda: self.borrower.in_use(label)),
            settings=self.settings.of(device.devid),
            budget=self.budget,
            on_event=self.hooks.tell,
            stolen=lambda: self.stolen(device.name),
            borrower=self.borrower,
        )


def pair() -> tuple[socket.socket, socket.socket]:
    """A control connection: the supervisor's end, which sees who speaks, and the borrower's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


def supervisor(
    store: Any, disks: LentDisks, named: Collection[int], *, force: bool = False
) -> Supervisor:
    """A supervisor of the disks `named`, and of no other."""
    on = disks.platform
    return Supervisor(
        store,
        disks,
        lambda devid: devid in named,
        run_dir=on.run_dir,
        named=named,
        force=force,
        suspend=in_guest(on, store, "pvfront vbd lend"),
    )


class NotStarted(PvfrontError):
    """The program cannot be started; `status` is what a shell would end with."""

    def __init__(self, program: str, error: OSError) -> None:
        super().__init__(f"{program} cannot be started: {error.strerror}")
        self.status = 127 if isinstance(error, FileNotFoundError) else 126


class Lender:
    """Starts a program that finds disks in its environment; `Borrower` as long as it runs."""

    def __init__(self, command: Sequence[str], labels: Sequence[str]) -> None:
        self.command = list(command)
        self.status = 0
        """What a shell would say: 128 and the signal's number if one ended the program."""
        self.over: Callable[[], None] = lambda: None
        """Called when the program has ended, or has given back all of its disks."""
        self._pairs = {label: pair() for label in labels}
        self._given_back: set[str] = set()
        self._process: asyncio.subprocess.Process | None = None
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Starts the program and waits for its end. Raises NotStarted."""
        try:
            ends = {label: theirs.fileno() for label, (_, theirs) in self._pairs.items()}
            environ = {
                **os.environ,
                VARIABLE: ",".join(f"{label}={fd}" for label, fd in ends.items()),
                # The example, pvfront-disk-bench, is found by its name.
                "PATH": f"{os.environ.get('PATH', os.defpath)}:{resources.files('pvfront')}",
            }
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self.command, env=environ, pass_fds=list(ends.values())
                )
            except OSError as error:
                raise NotStarted(self.command[0], error) from error
            finally:
                for _, theirs in self._pairs.values():
                    theirs.close()
            log.info("%s: started, pid %d", self.command[0], self._process.pid)
            code = await self._process.wait()
            self.status = code if code >= 0 else 128 - code
        finally:
            self._ended.set()
            self.over()

    def signal(self, number: signal.Signals) -> None:
        """Passes a signal on; without a program it is the end."""
        if self._process is None or self._ended.is_set():
            self.over()
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def close(self) -> None:
        for ours, theirs in self._pairs.values():
            ours.close()
            theirs.close()

    # -- Borrower ----------------------------------------------------------------------------------

    async def worker(self, name: str, label: str) -> Worker:
        """Once nobody will come any more this only waits: the loop's goal is about to change."""
        hello = asyncio.create_task(Worker.over(name, self._pairs[label][0].dup()))
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait({hello, ended}, return_when=asyncio.FIRST_COMPLETED)
            if hello.done():
                with contextlib.suppress(WorkerGone):
                    return hello.result()
            self._give_back(label)
            await asyncio.Event().wait()
            raise WorkerGone(f"{self.command[0]} has given {label} back")
        finally:
            for task in (hello, ended):
                task.cancel()
            await asyncio.gather(hello, ended, return_exceptions=True)

    def left(self, label: str) -> bool:
        sock = self._pairs[label][0]
        with contextlib.suppress(BlockingIOError):
            if not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                self._give_back(label)
        return label in self._given_back

    def _give_back(self, label: str) -> None:
        """Nobody has the other end any more."""
        self._given_back.add(label)
        if len(self._given_back) == len(self._pairs):
            self.over()

    def in_use(self, label: str) -> str | None:
        if self._ended.is_set() or label in self._given_back:
            return None
        pid = f" (pid {self._process.pid})" if self._process is not None else ""
        return f"lent to {self.command[0]}{pid}"


async def lend(
    names: Sequence[str],
    command: Sequence[str],
    *,
    force: bool = False,
    settings: PerDevice[DiskSettings] | None = None,
) -> int:
    """Runs `command` with the named disks, gives them back when it has ended; its status."""
    on = platform()
    on.require()
    store = await on.store()
    lender: Lender | None = None
    disks: LentDisks | None = None
    try:
        present = await Bus(store, "vbd").ids()
        named = list(dict.fromkeys(find(name, present) for name in names))
        lender = Lender(command, [vdev_name(devid) for devid in named])
        disks = LentDisks(on, lender, expected=len(named), settings=settings)
        serving = supervisor(store, disks, named, force=force)
        lender.over = serving.stop
        return await _run(lender, disks, serving, len(named))
    finally:
        if lender is not None:
            lender.close()
        if disks is not None:
            await disks.hooks.close()
        await store.close()


async def _run(lender: Lender, disks: LentDisks, serving: Supervisor, count: int) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, lender.signal, number)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the terminal's goes to both
    program: asyncio.Task[None] | None = None

    async def start_when_taken() -> None:
        # The disks are claimed first: a program that cannot have them is not started.
        while len(disks.lent) < count:  # noqa: ASYNC110 - at most a moment, and nobody tells
            await asyncio.sleep(0.02)
        await lender.run()

    program = asyncio.create_task(start_when_taken(), name="program")
    try:
        status = await serving.run(signals=False)
        if program.done():
            program.result()
        else:  # it has given the disks back, and goes on without
            await program
        return lender.status or status
    finally:
        if not program.done():
            program.cancel()
            await asyncio.gather(program, return_exceptions=True)
