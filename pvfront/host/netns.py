# SPDX-License-Identifier: BSD-2-Clause
"""Network namespaces of the embedded host: each end of a vif has a network of its own.

    async with await NetNamespace.start(host.directory, "guest") as guest:
        await guest.run("ip", "addr")

A process that sleeps keeps the namespace; it ends with whoever made it, and the namespace, its
interfaces included, with the last process in it. root makes one as it is. Anybody else needs a user
namespace around it, whose root the commands in it are, where the kernel lets users have them
(kernel.unprivileged_userns_clone, user.max_user_namespaces).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pvfront.errors import PvfrontError
from pvfront.host.child import Child, said_by

__all__ = ["NetNamespace", "NetNamespaceError"]

START_SECONDS = 60.0

_OPENS = """
import socket, sys
to, family, kind, protocol = map(int, sys.argv[1:])
with socket.socket(fileno=to) as back, socket.socket(family, kind, protocol) as made:
    socket.send_fds(back, [b"!"], [made.fileno()])
"""


class NetNamespaceError(PvfrontError):
    """There can be no network namespace here, or a command in it failed."""


class NetNamespace:
    """A network namespace. An async context manager that ends its keeper."""

    def __init__(self, name: str, child: Child, own_user: bool) -> None:
        self.name = name
        self._child = child
        self._own_user = own_user

    @classmethod
    async def start(cls, directory: Path, name: str) -> Self:
        """Makes one, with its loopback up. Raises NetNamespaceError: what is missing."""
        own_user = os.geteuid() != 0
        for tool, package in {"unshare": "util-linux", "ip": "iproute2"}.items():
            if shutil.which(tool) is None:
                raise NetNamespaceError(
                    f"{tool} is not installed", hint=f"as root: apt-get install {package}"
                )
        user = ["--user", "--map-root-user"] if own_user else []
        child = Child(
            f"network namespace {name}",
            ["unshare", *user, "--net", "--", "sleep", "infinity"],
            directory / f"netns-{name}.log",
        )
        made = cls(name, child, own_user)
        try:
            await made._separate()
            await made.run("ip", "link", "set", "lo", "up")
        except BaseException:
            await made.stop()
            raise
        return made

    async def _separate(self) -> None:
        """Waits until the keeper is where it is to be."""
        ours = _namespace("self")
        deadline = time.monotonic() + START_SECONDS
        while True:
            status = self._child.process.poll()
            if status is not None:
                raise NetNamespaceError(
                    f"no network namespace can be made: {self._child.said()}",
                    hint="run as root, or where users may have user namespaces"
                    if self._own_user
                    else None,
                )
            with contextlib.suppress(OSError):
                keeper = Path("/proc", str(self.pid))
                # With a user namespace, root is mapped after all is unshared: sleep(1) is the sign.
                if _namespace(str(self.pid)) != ours and (
                    (keeper / "comm").read_text().strip() == "sleep"
                ):
                    return
            if time.monotonic() > deadline:
                raise NetNamespaceError(f"no network namespace in {START_SECONDS:.0f} s")
            await asyncio.sleep(0.005)

    @property
    def pid(self) -> int:
        """Of its keeper."""
        return self._child.pid

    def prefix(self) -> list[str]:
        """What stands before a command to run it in there."""
        user = ["--user", "--preserve-credentials"] if self._own_user else []
        return ["nsenter", f"--target={self.pid}", *user, "--net", "--"]

    async def run(self, *command: str, check: bool = True) -> str:
        """Runs a command in there; what it says. Raises NetNamespaceError: it failed (check)."""
        status, text = await said_by(*self.prefix(), *command)
        if status and check:
            raise NetNamespaceError(
                f"{command[0]} failed in namespace {self.name} with status {status}: "
                + (text.strip().splitlines() or ["it said nothing"])[-1],
                hint=text,
            )
        return text

    async def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of that network, for this process. Raises NetNamespaceError."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = await asyncio.create_subprocess_exec(
                *self.prefix(), sys.executable, "-I", "-c", _OPENS,
                *(str(int(number)) for number in (theirs.fileno(), family, kind, protocol)),
                pass_fds=[theirs.fileno()],
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            said, _ = await process.communicate()
            if process.returncode:
                raise NetNamespaceError(f"no socket in namespace {self.name}: {said.decode()}")
            _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        return socket.socket(fileno=fd)

    def start_command(self, what: str, command: Sequence[str], log: Path) -> Child:
        """Starts a command in there that ends with the caller's process. Raises PvfrontError."""
        return Child(what, [*self.prefix(), *command], log)

    async def stop(self) -> None:
        """Ends its keeper. Twice is harmless."""
        await self._child.stop(signal.SIGKILL)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


def _namespace(pid: str) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())
