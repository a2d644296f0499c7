# SPDX-License-Identifier: BSD-2-Clause
"""An embedded host with a console backend and the console service.

async with console_world() as it:
    login = await it.attach("login")
    async with await it.dom0(login) as dom0, it.terminal("login") as terminal:
        await dom0.send(b"hello")
        assert await terminal.receive(5) == b"hello"
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import termios
import tty
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from backendgone import noticed
from waiting import PATIENCE, eventually

from pvfront.host import Host
from pvfront.host.consback import ConsBackend
from pvfront.host.service import ConsoleService


def numbered(count: int, start: int = 0) -> bytes:
    """`count` bytes that follow from their place: no two stretches of them are alike."""
    lines = b"".join(b"%015d\n" % number for number in range(start, start + count // 16 + 1))
    return lines[:count]


class End:
    """One end of a console: bytes in, bytes out."""

    def __init__(self, what: str, why: Callable[[], object]) -> None:
        self.what = what
        self.why = why
        self.heard = b""

    def _read(self) -> bytes:
        """What there is now; BlockingIOError: nothing."""
        raise NotImplementedError

    def _write(self, data: bytes) -> int:
        raise NotImplementedError

    async def send(self, data: bytes) -> None:
        """Waits until all of it was taken."""
        end = asyncio.get_running_loop().time() + PATIENCE
        while data:
            with contextlib.suppress(BlockingIOError):
                data = data[self._write(data) :]
                end = asyncio.get_running_loop().time() + PATIENCE
                continue
            assert asyncio.get_running_loop().time() < end, f"{self.what} takes nothing"
            await asyncio.sleep(0.002)

    async def receive(self, count: int) -> bytes:
        """Exactly so many bytes."""

        def look() -> bool:
            self.listen()
            return len(self.heard) >= count

        await eventually(
            f"{count} bytes at {self.what}", look,
            why=lambda: f"{len(self.heard)}: ...{self.heard[-200:]!r}\n{self.why()}",
        )  # fmt: skip
        data, self.heard = self.heard[:count], self.heard[count:]
        return data

    def listen(self) -> bytes:
        """All that came and was not received yet."""
        with contextlib.suppress(BlockingIOError):
            while data := self._read():
                self.heard += data
        return self.heard


class Dom0(End):
    """Whoever sits at the console in domain 0."""

    def __init__(self, sock: Any, why: Callable[[], object]) -> None:
        super().__init__("dom0", why)
        self.sock = sock

    def _read(self) -> bytes:
        return bytes(self.sock.recv(1 << 16))

    def _write(self, data: bytes) -> int:
        return int(self.sock.send(data))

    def close(self) -> None:
        self.sock.close()

    async def __aenter__(self) -> Dom0:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


class Terminal(End):
    """A program that has the terminal open, raw unless it is said."""

    def __init__(self, path: Path, why: Callable[[], object], *, raw: bool = True) -> None:
        super().__init__(str(path), why)
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        if raw:
            tty.setraw(self.fd, termios.TCSANOW)

    def _read(self) -> bytes:
        return os.read(self.fd, 1 << 16)

    def _write(self, data: bytes) -> int:
        return os.write(self.fd, data)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ConsoleWorld:
    """Store, hub, console backend, console service."""

    def __init__(self, host: Host, backend: ConsBackend) -> None:
        self.host = host
        self.backend = backend
        self.service: ConsoleService | None = None

    async def serve(self, *arguments: str) -> ConsoleService:
        self.service = await ConsoleService.start(self.host, *arguments)
        return self.service

    @property
    def log(self) -> str:
        return (self.host.directory / "console-service.log").read_text(errors="replace")

    def state(self, devid: int) -> dict[str, Any]:
        """What the service has written of a console; {}: nothing."""
        path = self.host.directory / "run" / f"console-{devid}.json"
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        return {}

    async def until(
        self, what: str, devid: int, holds: Callable[[dict[str, Any]], Any]
    ) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            state = self.state(devid)
            return state if state and holds(state) else None

        found: dict[str, Any] = await eventually(
            what, look, why=lambda: f"{self.state(devid)}\n{self.log}"
        )
        return found

    async def connected(self, devid: int, *, after: int = 0) -> dict[str, Any]:
        """Waits until it is connected in a generation later than `after`."""
        return await self.until(
            f"connected after generation {after}",
            devid,
            lambda s: s["phase"] == "connected" and s["generation"] > after,
        )

    async def attach(self, name: str) -> int:
        devid = await self.host.attach_console(1, f"connection=socket,name={name}")
        await self.connected(devid)
        return devid

    async def dom0(self, devid: int) -> Dom0:
        import socket

        path = self.host.directory / f"console-1-{devid}.chardev"
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(path))
        sock.setblocking(False)
        return Dom0(sock, lambda: self.log)

    def terminal(self, name: str, *, raw: bool = True) -> Terminal:
        assert self.service is not None
        return Terminal(self.service.terminal(name), lambda: self.log, raw=raw)

    async def stats(self, devid: int) -> dict[str, Any]:
        assert self.service is not None
        found: dict[str, Any] = (await self.service.status(f"console-{devid}"))["statistics"]
        return found

    async def backend_dies(self, devid: int) -> None:
        """Kills the backend and starts another one, to which the frontend comes again."""
        generation = self.state(devid)["generation"]
        await self.backend.kill()
        self.backend = await ConsBackend.start(self.host)
        await noticed(self, devid, generation)
        await self.connected(devid, after=generation)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def console_world(*arguments: str, **features: Any) -> AsyncIterator[ConsoleWorld]:
    """At the end nothing is left: no process, port or page; no traceback in the log."""
    async with await Host.start() as host:
        await host.create_domain(1)
        it = ConsoleWorld(host, await ConsBackend.start(host, **features))
        try:
            await it.serve(*arguments)
            yield it
        finally:
            if it.service is not None:
                await it.service.end()
            await it.backend.stop()
        assert "Traceback" not in it.log, it.log
        left = {"ports": [], "grants": [], "deferred": 0}
        await eventually(
            "nothing is left", lambda: _of(host.dump(), 1) == left, why=lambda: host.dump()
        )


def _of(books: dict[str, Any], domid: int) -> dict[str, Any]:
    """What a domain holds."""
    return {
        "ports": [one for one in books["ports"] if one.get("domid") == domid],
        "grants": [one for one in books["grants"] if one.get("domid") == domid],
        "deferred": books["deferred"],
    }
