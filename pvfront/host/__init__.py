# SPDX-License-Identifier: BSD-2-Clause
"""The embedded host: Xen without Xen, for tests, demonstrations and measurements (docs/host.md).

    async with await Host.start() as host:
        await host.create_domain()
        await host.attach_disk(1, "format=raw,vdev=xvdb,access=rw,target=memory:64M")
        # anything run with host.environ now works in domain 1, backends in domain 0

No root, no hypervisor, no kernel module. The store is the real oxenstored.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from pvfront.errors import PvfrontError
from pvfront.host import store as _store
from pvfront.host import toolstack
from pvfront.host.child import Child
from pvfront.host.consparams import ChannelSpec, ChannelSpecError
from pvfront.host.toolstack import DiskSpec, DiskSpecError, ToolstackError
from pvfront.host.vifspec import VifSpec, VifSpecError
from pvfront.platform import HOST_DOMID, HOST_VARIABLE
from pvfront.xenstore import Xenstore

__all__ = [
    "ChannelSpec",
    "ChannelSpecError",
    "DiskSpec",
    "DiskSpecError",
    "Host",
    "ToolstackError",
    "VifSpec",
    "VifSpecError",
]

_SOCKET_PATH_MAX = 107
"""Bytes of sun_path, without its NUL."""

_LONGEST_NAME = "run/vbd-4294967295.sock"
_HUB_SECONDS = 60.0


class Host:
    """A running host, or a connection to one. An async context manager that ends it.

    `directory` is where its sockets are, `store` domain 0's view of the store.
    """

    def __init__(self, directory: Path, store: Xenstore, children: tuple[Child, ...] = ()) -> None:
        self.directory = directory
        self.store = store
        self._children = children
        self._temporary = False

    @classmethod
    async def start(cls, directory: Path | None = None, *, gntalloc_limit: int = 16384) -> Self:
        """Starts a hub and an empty store in `directory`, which is made if need be.

        None: a temporary directory, removed at the end. gntalloc_limit: pages that a domain may
        have granted at a time. The processes end with this one, however it ends. Raises
        PvfrontError: oxenstored is missing, the directory is in use or its path too long.
        """
        temporary = directory is None
        where = _absolute(directory or tempfile.mkdtemp(prefix="pvfront-host-"))
        children: list[Child] = []
        try:
            _prepare(where, gntalloc_limit)
            children.append(await _start_hub(where))
            children.append(await _store.start(where))
            store = await Xenstore.connect(os.fspath(where / _store.SOCKET_NAME))
            try:
                await toolstack.create_domain(store, toolstack.BACKEND_DOMID, "Domain-0")
            except BaseException:
                await store.close()
                raise
        except BaseException:
            for child in children:
                await child.stop()
            if temporary:
                shutil.rmtree(where, ignore_errors=True)
            raise
        host = cls(where, store, tuple(children))
        host._temporary = temporary
        return host

    @classmethod
    async def connect(cls, directory: Path) -> Self:
        """A host that somebody else runs: `stop` leaves it running. Raises XenstoreError."""
        where = _absolute(directory)
        return cls(where, await Xenstore.connect(os.fspath(where / _store.SOCKET_NAME)))

    @property
    def environ(self) -> dict[str, str]:
        """What a command needs in its environment to work in domain 1 of this host."""
        return {HOST_VARIABLE: os.fspath(self.directory)}

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes of the host, if it was started here: hub, oxenstored."""
        return tuple(child.pid for child in self._children)

    def dump(self) -> dict[str, Any]:
        """What the hub has in its books: who holds which `ports` and `grants`, and how many grants
        are `deferred`, freed and still mapped. Raises OSError: no hub answers.
        """
        return books(self.directory)

    async def create_domain(self, domid: int = HOST_DOMID, name: str = "guest") -> None:
        """Makes a domain's nodes as libxl does; one that is there stays as it is."""
        await toolstack.create_domain(self.store, domid, name)

    async def attach_disk(self, domid: int, spec: DiskSpec | str) -> int:
        """Defines a disk, in xl's syntax, as `xl block-attach`; returns its virtual device number.

        Raises DiskSpecError, ToolstackError (no such domain, or it has that disk).
        """
        return await toolstack.attach_disk(self.store, domid, spec)

    async def detach_disk(
        self, domid: int, vdev: int, *, force: bool = False, timeout: float = 10
    ) -> None:
        """Takes a disk away as `xl block-detach`. Raises ToolstackError: who holds on to it."""
        device = toolstack.disk(domid, vdev)
        await toolstack.detach(self.store, device, force=force, timeout=timeout)

    async def attach_vif(self, domid: int, spec: VifSpec | str = "") -> int:
        """Defines a network interface, in xl's syntax (vifspec.py), as `xl network-attach`; returns
        its number. Raises VifSpecError, ToolstackError (no such domain, or it has that one).
        """
        return await toolstack.attach_vif(self.store, domid, spec)

    async def detach_vif(
        self, domid: int, devid: int, *, force: bool = False, timeout: float = 10
    ) -> None:
        """Takes it away as `xl network-detach`. Raises ToolstackError: who holds on to it."""
        device = toolstack.interface(domid, devid)
        await toolstack.detach(self.store, device, force=force, timeout=timeout)

    async def attach_console(self, domid: int, spec: ChannelSpec | str) -> int:
        """Defines a secondary console, in xl's syntax (consparams.py), as `channel=[...]` does;
        returns its number. Raises ChannelSpecError, ToolstackError (no such domain).
        """
        return await toolstack.attach_console(self.store, domid, spec)

    async def detach_console(
        self, domid: int, devid: int, *, force: bool = False, timeout: float = 10
    ) -> None:
        """Takes it away. Raises ToolstackError: who holds on to it."""
        device = toolstack.console(domid, devid)
        await toolstack.detach(self.store, device, force=force, timeout=timeout)

    async def stop(self) -> None:
        """Ends the host. Twice is harmless."""
        await self.store.close()
        for child in reversed(self._children):
            await child.stop()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def __repr__(self) -> str:
        return f"<Host {self.directory}>"


def books(directory: Path) -> dict[str, Any]:
    """`Host.dump` of the host in `directory`, whoever runs it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hub:
        hub.settimeout(_HUB_SECONDS)
        hub.connect(os.fspath(directory / "hub.sock"))
        hub.send(b'{"do": "dump"}')
        answer = json.loads(hub.recv(1 << 22))
    return {name: answer[name] for name in ("ports", "grants", "deferred")}


def _absolute(path: Path | str) -> Path:
    return Path(path).absolute()


def _prepare(where: Path, gntalloc_limit: int) -> None:
    if len(os.fsencode(where / _LONGEST_NAME)) > _SOCKET_PATH_MAX:
        raise PvfrontError(
            f"the path of {where} is too long for the names of Unix sockets",
            hint="use a directory with a shorter path, /tmp/host for instance",
        )
    try:
        (where / "run").mkdir(parents=True, exist_ok=True)
        (where / "limits.json").write_text(json.dumps({"gntalloc": gntalloc_limit}) + "\n")
    except OSError as exc:
        raise PvfrontError(f"cannot write to {where}: {exc.strerror}") from exc


async def _start_hub(where: Path) -> Child:
    # -P: the directory that it is started in is no place for modules.
    command = [sys.executable, "-P", "-m", "pvfront.host.hub", os.fspath(where)]
    child = Child("the hub", command, where / "hub.log")
    try:
        await child.listening(where / "hub.sock", socket.SOCK_SEQPACKET)
    except BaseException:
        with contextlib.suppress(PvfrontError):
            await child.stop()
        raise
    return child
