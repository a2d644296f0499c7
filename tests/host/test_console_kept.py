# SPDX-License-Identifier: BSD-2-Clause
"""Terminals outlive the console service where somebody keeps its descriptors, as systemd does."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from consoleworld import ConsoleWorld, numbered
from waiting import eventually

from pvfront.host import Host
from pvfront.host.child import Child
from pvfront.host.consback import ConsBackend
from pvfront.host.service import ConsoleService

LAUNCH = """
import os, sys
fds = [int(fd) for fd in os.environ.pop("FDS").split(",") if fd]
for place, fd in enumerate(fds, 3 + 100):
    os.dup2(fd, place)
for place in range(3, 3 + len(fds)):
    os.dup2(place + 100, place)
os.closerange(3 + len(fds), 256)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(sys.executable, [sys.executable, "-P", "-m", "pvfront", "console", "serve", "--all"])
"""


class Manager:
    """What systemd is to a service: it is told READY, and keeps descriptors."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.kept: dict[str, int] = {}
        self.ready = False
        self.path = host.directory / "manager.notify"
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(os.fspath(self.path))
        self.sock.setblocking(False)
        # All the while: its queue holds ten datagrams, and a service does not wait for room.
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.sock, self.hear)

    def hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                text, ancillary, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(4 * 8))
                said = dict(line.split("=", 1) for line in text.decode().splitlines())
                self.ready |= said.get("READY") == "1"
                if "FDSTORE" in said:
                    (fd,) = array.array("i", ancillary[0][2])
                    self.kept[said["FDNAME"]] = fd
                elif "FDSTOREREMOVE" in said:
                    os.close(self.kept.pop(said["FDNAME"]))

    async def start(self) -> Child:
        """A service that gets what was kept."""
        self.ready = False
        fds: Mapping[str, int] = self.kept
        for fd in fds.values():
            os.set_inheritable(fd, True)
        log = self.host.directory / "console-service.log"
        child = _Child(
            "the console service",
            [sys.executable, "-P", "-c", LAUNCH],
            log,
            {
                **self.host.environ,
                "NOTIFY_SOCKET": os.fspath(self.path),
                "FDS": ",".join(map(str, fds.values())),
                "LISTEN_FDNAMES": ":".join(fds),
            },
        )

        def look() -> bool:
            self.hear()
            return self.ready

        await eventually("READY", look, why=log.read_text)
        return child

    def close(self) -> None:
        self._loop.remove_reader(self.sock)
        self.sock.close()
        for fd in self.kept.values():
            os.close(fd)


class _Child(Child):
    """With the descriptors that can be inherited."""

    def __init__(self, what: str, command: list[str], log: Path, environ: dict[str, str]) -> None:
        import subprocess

        self.what, self.log, self.tell_again = what, log, None
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, env={**os.environ, **environ}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True, close_fds=False,
            )  # fmt: skip


@pytest.mark.asyncio
@pytest.mark.parametrize("worker_dies", [False, True], ids=["adopted", "both-killed"])
async def test_a_session_goes_on_over_a_killed_service_and_no_byte_is_lost(
    worker_dies: bool,
) -> None:
    async with await Host.start() as host:
        await host.create_domain(1)
        manager = Manager(host)
        it = ConsoleWorld(host, await ConsBackend.start(host))
        service = await manager.start()
        try:
            devid = await it.attach("login")
            path = host.directory / "dev" / "console" / "login"
            it.service = ConsoleService(host, service)
            with it.terminal("login") as terminal:
                async with await it.dom0(devid) as dom0:
                    await dom0.send(b"before")
                    assert await terminal.receive(6) == b"before"
                    manager.hear()
                    assert sorted(manager.kept) == [
                        f"console-{devid}.{what}" for what in ("ours", "pty", "theirs")
                    ]
                    was = path.readlink()
                    it.kill(service.pid)
                    await service.stop()
                    if worker_dies:
                        it.kill(it.state(devid)["worker_pid"])
                    # While nobody is there: what the program writes waits in its terminal.
                    await terminal.send(b"meanwhile")
                    service = await manager.start()
                    it.service = ConsoleService(host, service)
                    await it.connected(devid)
                    assert path.readlink() == was
                    assert await dom0.receive(9) == b"meanwhile"
                    data = numbered(200_000)
                    sending = asyncio.create_task(dom0.send(data))
                    assert await terminal.receive(len(data)) == data
                    await sending
            assert os.fspath(was).startswith("/dev/pts/")
        finally:
            await service.stop(signal.SIGTERM)
            manager.hear()
            assert manager.kept == {}, it.log  # given back: nothing is kept any more
            manager.close()
            await it.service.end() if it.service is not None else None
            await it.backend.stop()
        assert "Traceback" not in it.log, it.log
