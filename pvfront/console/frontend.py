# SPDX-License-Identifier: BSD-2-Clause
"""A console's half of the device loop: a granted page, a port, the worker, and the PTY.

Theory of operation
    `ConsoleFrontend` is what `DeviceLoop` drives. A generation is an event channel and one page,
    which pass to the worker with one end of a stream socket. The PTY, the other end and what
    readers have not read (hub.py) belong to the console and outlive generations, workers, and by
    systemd's store of descriptors (fdstore.py) this process.

    We keep a copy of the worker's end too. So a worker that dies takes nothing along that was in
    the socket: the next one has the same. What it had in the ring is lost with it, 4 KiB at most;
    what a backend had not taken when a generation ended is the first in the next (native/cons.h).

    A worker is not handed over to one of another program (upgrade.md): a service that is restarted
    adopts it, which loses nothing, and it keeps its program.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import termios
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from fcntl import ioctl
from pathlib import Path
from typing import Any

from ..abi import StatsUnreadable, lib, read_all_cons_stats
from ..budget import Budget, Grant
from ..errors import PvfrontError
from ..platform import Platform
from ..states import XenbusState
from ..trace import Kind
from ..unixserver import listening
from ..worker import Worker
from ..workermessage import Hello, State
from ..workerside import STALL_SECONDS, WorkerSide
from ..xenbus import XenbusDevice
from . import attachserver, fdstore, keys
from .history import History
from .hotkeys import HotKeys
from .hub import Hub
from .pty import Pty

log = logging.getLogger(__name__)

FLUSH_POLL = 0.02
_SIOCOUTQ = termios.TIOCOUTQ  # the same number, linux/sockios.h


def attach_path(run_dir: Path, name: str) -> Path:
    """Where the clients of console-1 attach."""
    return run_dir / f"{name}.attach"


class ConsoleFrontend(WorkerSide):
    """One console. See `frontend.Frontend` for what each method promises."""

    waiting = "bytes"

    def __init__(
        self,
        name: str,
        label: str,
        platform: Platform,
        *,
        kept: dict[str, int],
        hot_keys: HotKeys | None = None,
        pressed: Callable[[ConsoleFrontend, str], None] = lambda console, key: None,
        budget: Budget | None = None,
        stolen: Callable[[], bool] = lambda: False,
    ) -> None:
        """`label`: the console's name; `kept`: descriptors that were kept for this process, of
        which it takes its own. `pressed` is told of hot keys.
        """
        super().__init__(name, label, platform, budget=budget, stolen=stolen)
        self.link = platform.dev_dir / "console" / label
        self.hub: Hub | None = None
        self._hot_keys = hot_keys
        self._pressed = pressed
        self._found = {
            what: kept.pop(f"{name}.{what}")
            for what in ("pty", "ours", "theirs")
            if f"{name}.{what}" in kept
        }
        self._theirs: socket.socket | None = None
        self._server = AsyncExitStack()
        self._news = False

    # -- what the loop asks ----------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        return self._news

    def _changed(self) -> None:
        """Who reads and writes: status is to show it."""
        self._news = True
        self._poke()

    @property
    def publish_state(self) -> XenbusState:
        return XenbusState.INITIALISED

    def stale_key(self, key: str) -> bool:
        return keys.stale_key(key)

    def in_flight(self) -> int:
        if self._worker is not None:
            with contextlib.suppress(OSError, StatsUnreadable):
                return int(read_all_cons_stats(self._worker.stats_fd)[0]["unsent"])
        return 0

    def details(self) -> dict[str, Any]:
        hub = self.hub
        return {
            "label": self.label,
            "target": "pty",
            "os_device": str(self.link) if hub is not None else "",
            **self._worker_details(),
            "pty": str(hub.pty.path) if hub is not None else "",
            "pty_in_use": hub is not None and hub.pty_in_use,
            "clients": [client.who for client in hub.clients] if hub is not None else [],
            "writer": hub.who_writes if hub is not None else "",
        }

    # -- the PTY -----------------------------------------------------------------------------------

    async def _open(self) -> Hub:
        """PTY, stream and history: those of an earlier supervisor, or new. Raises PvfrontError."""
        if self.hub is not None:
            return self.hub
        found, self._found = self._found, {}
        try:
            history = History.open(self.run_dir / f"{self.name}.history")
        except OSError as error:
            raise PvfrontError(f"{self.name}: no memory for its history: {error}") from error
        if {"ours", "theirs"} <= found.keys():
            ours, theirs = (socket.socket(fileno=found[what]) for what in ("ours", "theirs"))
        else:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        pty = Pty(found["pty"], self.link) if "pty" in found else Pty.open(self.link)
        self._theirs = theirs
        for what, fd in (
            ("pty", pty.master), ("ours", ours.fileno()), ("theirs", theirs.fileno()),
        ):  # fmt: skip
            if what not in found:
                fdstore.keep(f"{self.name}.{what}", fd)
        hub = self.hub = Hub(
            self.name, ours, pty, history,
            changed=self._changed, keys=self._hot_keys,
            pressed=lambda key: self._pressed(self, key),
        )  # fmt: skip
        await self._server.enter_async_context(
            listening(
                attach_path(self.run_dir, self.name),
                lambda reader, writer: attachserver.serve(hub, reader, writer),
            )
        )
        return hub

    # -- the walk ----------------------------------------------------------------------------------

    async def _serves(self, hello: Hello) -> bool:
        return hello.state is State.RUNNING

    async def _adopted(self, device: XenbusDevice, worker: Worker) -> bool:
        assert worker.hello is not None
        known = "ours" in self._found
        await self._open()
        if not (known and worker.hello.has_target):
            # What was in the stream of a supervisor that nobody kept it for is lost.
            await self._start()
        self.budget.hold(self.name, Grant(1, 1))
        return True

    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        worker = await self._begin()
        await self._open()
        with (
            self.platform.event_channels() as channels,
            self.platform.grant_allocator() as grants,
        ):
            port = channels.bind_unbound(device.backend_id)
            page = grants.alloc(device.backend_id, 1)
            self._attached = True  # so it is also if the answer never comes
            await worker.attach(
                self._generation,
                device_class=lib.PVF_CLASS_CONS,
                port=port,
                ring_pages=1,
                ring_offset=page.offset,
                pool_offset=0,
                pool_grefs=(),
                scrub=False,
                fds=(channels.hand_over(port), grants.hand_over()),
            )
            # The worker holds both now. Ours are closed without unbinding or freeing anything.
        self.budget.hold(self.name, Grant(1, 1))
        self._note(
            Kind.ATTACHED,
            f"one page, event channel {port}",
            ports=[port],
            refs=list(page.grefs),
            pages=1,
            pid=worker.pid,
        )
        return keys.frontend_keys(page.grefs[0], port)

    async def start(self, device: XenbusDevice) -> None:
        await self._start()

    async def update(self, device: XenbusDevice) -> None:
        self._news = False

    async def _start(self) -> None:
        assert self._theirs is not None
        await self._need_worker().start_cons(
            self._generation, stall_seconds=STALL_SECONDS, stream=self._theirs.fileno()
        )

    # -- the end of a generation, and of all -------------------------------------------------------

    async def _drain(self, worker: Worker, timeout: float) -> bool:
        """What was written is to be in the ring before intake stops."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        # Nobody tells when a worker reads.
        while self._on_its_way() and loop.time() < until - timeout / 2:  # noqa: ASYNC110
            await asyncio.sleep(FLUSH_POLL)
        return await super()._drain(worker, max(0.1, until - loop.time()))

    def _on_its_way(self) -> bool:
        if self.hub is None:
            return False
        try:
            left = ioctl(self.hub.stream.fileno(), _SIOCOUTQ, b"\0" * 4)
        except OSError:
            return False
        return bool(int.from_bytes(left, "little"))

    async def close(self, *, drain: float = 10.0) -> None:
        await self._close(keep=False)

    async def _close(self, *, keep: bool) -> None:
        hub, self.hub = self.hub, None
        if hub is None:
            return
        hub.close()
        await self._server.aclose()
        hub.stream.close()
        hub.history.close(keep=keep)
        if keep:
            hub.pty.close_descriptors()
        else:
            hub.pty.close()
            for what in ("pty", "ours", "theirs"):
                fdstore.forget(f"{self.name}.{what}")
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None

    async def end(self) -> None:
        await super().end()
        for fd in self._found.values():  # of a console that was never opened
            os.close(fd)
        self._found = {}

    # -- its worker --------------------------------------------------------------------------------

    @property
    def _most_queues(self) -> int:
        return 1

    @property
    def _options(self) -> Sequence[str]:
        return ["--console"]

    @property
    def _replaceable(self) -> bool:
        return False

    def outdated(self) -> bool:
        return False  # there is nothing that could be done about it

    async def upgrade(self) -> str:
        raise PvfrontError(
            f"{self.label}: a console's worker is not handed over",
            hint="`kill -9` of its worker brings the installed program; what is in the ring then, "
            "5 KiB at most, is lost",
        )
