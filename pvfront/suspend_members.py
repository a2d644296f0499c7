# SPDX-License-Identifier: BSD-2-Clause
"""Several services, one owner of suspend.

Theory of operation
    Whichever service takes the lock first (suspend.py) owns suspend, and listens at
    ``/run/pvfront/suspend.sock`` (root only). The others join: the owner has their devices settle,
    close and reopen together with its own. A service that does not own suspend waits for the end of
    the owner's connection and then tries the lock again: one of them is the next owner.

    A line of JSON each way. From a member, first ``{"service": "pvfront-vif", "pid": 7}``; then it
    is asked, and answers with the same ``id``:

      {"id": 1, "do": "settle", "sync": 7.0, "drain": 3.0}  → {"id": 1, "lines": [...]}
      {"id": 2, "do": "close", "timeout": 15.0}             → {"id": 2, "lines": [], "names": [...]}
      {"id": 3, "do": "reopen", "cancelled": null, "timeout": 10} → {"id": 3, "lines": []}
      {"do": "poison"}    {"open": false}                           no answer

    ``open`` says whether ports may be bound; it comes at once after joining and at each change.

    No owner, or none that is known: no port may be bound. A member whose devices were closed when
    the owner went reopens them when it has joined another or owns suspend itself with the veto on:
    the owner may have died with ``suspend`` just written.

    A worker whose service has ended has ports that nobody would unbind. So nothing is suspended
    before every worker that has event channels was put away by some service (`uncovered`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

from .cgroup import own_cgroup
from .holdings import has_event_channels
from .suspend_group import Devices, Group, SuspendError
from .unixserver import LINE, hang_up, listening

log = logging.getLogger(__name__)

SOCKET = "suspend.sock"
SLACK = 2.0
"""Seconds beyond a member's own deadlines after which it is taken for stuck."""
AGAIN = 0.2
"""Seconds between two tries to find an owner."""
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid

Answer = dict[str, Any]


def uncovered(run_dir: Path, names: Collection[str], proc: Path = Path("/proc")) -> list[str]:
    """A line for each worker that has event channels and serves none of the devices `names`.

    A state file may outlive its worker, and the pid in it may be somebody else's by now.
    """
    found = []
    for path in sorted(run_dir.glob("*-*.json")):
        if path.stem in names:
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            pid = json.loads(path.read_text()).get("worker_pid")
            if isinstance(pid, int) and has_event_channels(proc / str(pid)):
                found.append(
                    f"{path.stem}: its worker (pid {pid}) has event channels, "
                    "but no service serves it"
                )
    return found


class Remote:
    """The group of another service, as its owner of suspend has it."""

    def __init__(
        self, service: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.service = service
        self.cgroup = _cgroup(writer.get_extra_info("socket"))
        self.names: list[str] = []
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._last = 0

    async def follow(self) -> None:
        """Takes answers until the member has gone."""
        try:
            while line := await self._reader.readline():
                answer = json.loads(line)
                waiting = self._waiting.pop(answer["id"], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("suspend: %s: %s", self.service, error)
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(SuspendError(f"{self.service} has ended"))
            self._waiting.clear()

    def tell(self, **message: Any) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def _ask(self, within: float, **question: Any) -> Answer:
        self._last += 1
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[self._last] = answer
        if self._writer.is_closing():
            raise SuspendError(f"{self.service} has ended")
        self.tell(id=self._last, **question)
        try:
            async with asyncio.timeout(within + SLACK):
                found = await answer
        except TimeoutError:
            raise SuspendError(f"{self.service} does not answer") from None
        if "error" in found:
            raise SuspendError(f"{self.service}: {found['error']}")
        return found

    async def settle(self, sync: float, drain: float) -> list[str]:
        return _lines(await self._ask(sync + drain, do="settle", sync=sync, drain=drain))

    async def close(self, timeout: float) -> list[str]:
        self.names = []
        try:
            answer = await self._ask(timeout, do="close", timeout=timeout)
        except SuspendError as error:
            return [str(error)]
        self.names = [str(name) for name in answer.get("names", ())]
        return _lines(answer)

    async def reopen(self, cancelled: bool | None, timeout: float) -> list[str]:
        try:
            return _lines(
                await self._ask(timeout, do="reopen", cancelled=cancelled, timeout=timeout)
            )
        except SuspendError as error:  # its next process reopens what is there
            return [str(error)]

    def poison(self) -> None:
        self.tell(do="poison")


def _cgroup(connection: socket.socket) -> str:
    """Of the process at the other end; "" if it has none of its own, or has ended."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    with contextlib.suppress(OSError):
        found = own_cgroup(Path(f"/proc/{_PEER.unpack(peer)[0]}/cgroup").read_text())
        return found.strip("/") and found
    return ""


def _lines(answer: Answer) -> list[str]:
    return [str(line) for line in answer.get("lines", ())]


class Hub:
    """The owner's end: the other services."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / SOCKET
        self._members: list[Remote] = []
        self._open = True
        self._on_change: Callable[[], None] = lambda: None

    def groups(self) -> list[Group]:
        return list(self._members)

    @property
    def cgroups(self) -> list[str]:
        """In which they serve their devices: never to be frozen."""
        return [member.cgroup for member in self._members if member.cgroup]

    @property
    def services(self) -> list[str]:
        return [member.service for member in self._members]

    def tell_open(self, is_open: bool) -> None:
        self._open = is_open
        for member in self._members:
            member.tell(open=is_open)

    @contextlib.asynccontextmanager
    async def listening(self, on_change: Callable[[], None]) -> AsyncIterator[None]:
        """Whoever holds the lock listens, in the place of an earlier owner.

        `on_change` is called when a service has joined or gone.
        """
        self._on_change = on_change
        async with listening(self._path, self._joined, grace=0):
            yield

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), SLACK))
            service = str(hello["service"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("suspend: a service that does not say who it is: %s", error)
            return
        member = Remote(service, reader, writer)
        self._members.append(member)
        log.info("suspend: %s takes part", service)
        member.tell(open=self._open)
        self._on_change()
        try:
            await member.follow()
        finally:
            self._members.remove(member)
            log.info("suspend: %s takes part no more", service)
            self._on_change()


class Member:
    """The other end: a service that has joined the owner."""

    def __init__(
        self, run_dir: Path, service: str, devices: Devices, on_open: Callable[[bool], None]
    ) -> None:
        self._path = run_dir / SOCKET
        self._service = service
        self._devices = devices
        self._on_open = on_open
        self._doing: set[asyncio.Task[None]] = set()
        self.closed = False
        """The devices were told to close, and not yet to open again."""

    async def run(self) -> bool:
        """Takes part until the owner has gone. False: there was none to join."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._path), limit=LINE)
        except OSError:
            return False
        try:
            writer.write(
                json.dumps({"service": self._service, "pid": os.getpid()}).encode() + b"\n"
            )
            while line := await reader.readline():
                self._take(json.loads(line), writer)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("suspend: the owner: %s", error)
        finally:
            self._on_open(False)
            for task in self._doing:
                task.cancel()
            await asyncio.gather(*self._doing, return_exceptions=True)
            await hang_up(writer)
        return True

    def _take(self, message: Answer, writer: asyncio.StreamWriter) -> None:
        if "open" in message:
            self._on_open(message["open"] is True)
        elif message["do"] == "poison":
            self._devices.poison()
        else:
            task = asyncio.create_task(self._answer(message, writer))
            self._doing.add(task)
            task.add_done_callback(self._doing.discard)

    async def _answer(self, message: Answer, writer: asyncio.StreamWriter) -> None:
        answer: Answer = {"id": message["id"]}
        try:
            answer |= await self._do(message)
        except Exception as error:  # the owner is to hear of it, whatever it is
            answer["error"] = str(error) or type(error).__name__
        writer.write(json.dumps(answer).encode() + b"\n")

    async def _do(self, message: Answer) -> Answer:
        devices = self._devices
        match message["do"]:
            case "settle":
                lines = await devices.settle(float(message["sync"]), float(message["drain"]))
            case "close":
                self.closed = True
                lines = await devices.close(float(message["timeout"]))
                return {"lines": lines, "names": devices.names}
            case "reopen":
                lines = await devices.reopen(message["cancelled"], float(message["timeout"]))
                self.closed = False
            case other:
                raise SuspendError(f"asked for {other!r}, which is unknown here")
        return {"lines": lines}
