# SPDX-License-Identifier: BSD-2-Clause
"""The disk service of domain 1, run as the process that a guest runs: `pvfront vbd serve`.

async with await DiskService.start(host, "xvdb") as service:
    subprocess.run(["nbdinfo", service.uri("xvdb")])
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self
from urllib.parse import quote

from pvfront.errors import PvfrontError
from pvfront.host.child import Child
from pvfront.host.netns import NetNamespace

__all__ = ["ConsoleService", "DiskService", "DiskServiceError", "NetService", "Service"]

READY_SECONDS = 90.0
WORKER = "pvfront-worker"


class DiskServiceError(PvfrontError):
    """The service did not become ready, or a command of it failed."""


class _Host(Protocol):
    @property
    def directory(self) -> Path: ...

    @property
    def environ(self) -> dict[str, str]: ...


class Service:
    """A running `pvfront CLASS serve`. Made by `start`; an async context manager that stops it."""

    KLASS: ClassVar[str]
    WHAT: ClassVar[str]
    """For people: "the disk service"."""
    FILES: ClassVar[str]
    """Its socket for READY and its log, without their endings."""

    def __init__(self, host: _Host, child: Child, prefix: Sequence[str] = ()) -> None:
        self.host = host
        self._child = child
        self._prefix = prefix

    @classmethod
    async def _start(
        cls, host: _Host, arguments: Sequence[str], timeout: float, prefix: Sequence[str] = ()
    ) -> Self:
        """`prefix`: a command that runs it. Raises DiskServiceError."""
        notify = host.directory / f"{cls.FILES}.notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(notify))
            sock.setblocking(False)
            child = Child(
                cls.WHAT,
                [*prefix, sys.executable, "-P", "-m", "pvfront", cls.KLASS, "serve", *arguments],
                host.directory / f"{cls.FILES}.log",
                {**host.environ, "NOTIFY_SOCKET": str(notify)},
            )
            try:
                await _ready(sock, child, timeout)
            except BaseException:
                await child.stop()
                raise
            finally:
                notify.unlink(missing_ok=True)
        return cls(host, child, prefix)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def log(self) -> Path:
        return self._child.log

    async def pvfront(self, *arguments: str) -> str:
        """What a command of pvfront says. Raises DiskServiceError."""
        process = await asyncio.create_subprocess_exec(
            *self._prefix, sys.executable, "-P", "-m", "pvfront", *arguments,
            env={**os.environ, **self.host.environ},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, errors = await process.communicate()
        if process.returncode:
            raise DiskServiceError(
                f"pvfront {' '.join(arguments)} failed: {errors.decode().strip()}"
            )
        return out.decode()

    async def status(self, device: str) -> dict[str, Any]:
        """What `pvfront status --json` shows. Raises DiskServiceError."""
        found: dict[str, Any] = json.loads(await self.pvfront("status", "--json", device))
        return found

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends it in order (SIGTERM: every device is given back first); its exit status.

        A disk whose client is still connected keeps its worker, as a mounted one does; see `end`.
        """
        return await self._child.stop(number)

    def workers(self) -> list[int]:
        """The pids of the workers that run, its own and those that it left behind."""
        found = []
        for path in sorted((self.host.directory / "run").glob(f"{self.KLASS}-*.json")):
            with contextlib.suppress(OSError, ValueError):
                pid = json.loads(path.read_text()).get("worker_pid")
                if pid and _name_of(pid) == WORKER:
                    found.append(pid)
        return found

    async def end(self) -> None:
        """Ends it, and then whatever worker it left. Twice is harmless."""
        await self.stop()
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


class DiskService(Service):
    """A running `pvfront vbd serve`. Made by `start`; an async context manager that stops it."""

    KLASS = "vbd"
    WHAT = "the disk service"
    FILES = "service"

    @classmethod
    async def start(cls, host: _Host, *disks: str, timeout: float = READY_SECONDS) -> Self:
        """Serves `disks` by name, or (none named) all there are; returns when it says READY.

        Its log is DIR/service.log. It ends with the caller's process, however that ends; its
        workers do not. Raises DiskServiceError.
        """
        return await cls._start(host, disks or ("--all",), timeout)

    def socket(self, disk: str) -> Path:
        """Where the disk is served; there once the disk is connected."""
        return self.host.directory / "run" / f"{disk}.nbd"

    def uri(self, disk: str) -> str:
        """The same as NBD tools take it."""
        return f"nbd+unix:///?socket={quote(str(self.socket(disk)))}"


class NetService(Service):
    """A running `pvfront vif serve`, its interfaces in a network namespace."""

    KLASS = "vif"
    WHAT = "the network service"
    FILES = "net-service"

    @classmethod
    async def start(
        cls, host: _Host, network: NetNamespace, *arguments: str, timeout: float = READY_SECONDS
    ) -> Self:
        """Serves as `pvfront vif serve ARGUMENTS` does, or (none) all there are; returns when it
        says READY. Its log is DIR/net-service.log. As DiskService otherwise.
        """
        return await cls._start(host, arguments or ("--all",), timeout, network.prefix())


class ConsoleService(Service):
    """A running `pvfront console serve`."""

    KLASS = "console"
    WHAT = "the console service"
    FILES = "console-service"

    @classmethod
    async def start(cls, host: _Host, *arguments: str, timeout: float = READY_SECONDS) -> Self:
        """Serves as `pvfront console serve ARGUMENTS` does, or (none) all there are; returns when
        it says READY. Its log is DIR/console-service.log. As DiskService otherwise.
        """
        return await cls._start(host, arguments or ("--all",), timeout)

    def terminal(self, name: str) -> Path:
        """Where the console's terminal is, while it is served."""
        return self.host.directory / "dev" / "console" / name


async def _ready(sock: socket.socket, child: Child, timeout: float) -> None:
    loop = asyncio.get_running_loop()
    said = loop.create_task(_said_ready(sock))
    end = loop.time() + timeout
    try:
        while not said.done():
            status = child.process.poll()
            if status is not None:
                raise DiskServiceError(f"{child.what} ended: status {status}: {child.said()}")
            if loop.time() > end:
                raise DiskServiceError(
                    f"{child.what} was not ready in {timeout:g} s: {child.said()}",
                    hint=f"its log: {child.log}",
                )
            await asyncio.wait([said], timeout=0.05)
    finally:
        said.cancel()


async def _said_ready(sock: socket.socket) -> None:
    """sd_notify(3)."""
    while b"READY=1" not in await asyncio.get_running_loop().sock_recv(sock, 4096):
        pass


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
