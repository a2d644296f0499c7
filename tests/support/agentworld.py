# SPDX-License-Identifier: BSD-2-Clause
"""The agent in a guest whose store is in memory and whose files are a directory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import memstore
from waiting import eventually

from pvfront.agent.context import Component, Context
from pvfront.agent.service import Agent
from pvfront.agent.settings import AgentSettings
from pvfront.platform import Embedded
from pvfront.sysfs import Roots
from pvfront.xenstore import Xenstore

HOME = "/local/domain/5"


class Place(Embedded):
    """A platform whose kernel's and system's files are all below one directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.roots = Roots(directory)

    @property
    def config_dir(self) -> Path:
        return self.directory / "etc" / "pvfront"


@dataclass
class AgentWorld:
    """A guest, domain 5: what toolstack and kernel do to it is done to `mem` and below `root`."""

    root: Path
    mem: memstore.MemStore
    server: memstore.SocketServer
    context: Context

    def set(self, path: str, value: str | None, perms: str = "n5") -> None:
        """The toolstack writes (or, None, removes) a node of the guest's."""
        if value is None:
            where = f"{HOME}/{path}".encode()
            self.mem.generation += 1
            self.mem.tree.drop(where, self.mem.generation)
            self.mem.fire(where)
        else:
            self.mem.set(f"{HOME}/{path}", value.encode(), perms=perms)

    def get(self, path: str) -> str | None:
        node = self.mem.tree.nodes.get(f"{HOME}/{path}".encode())
        return None if node is None else node.value.decode()

    def file(self, path: str, text: str) -> Path:
        """A file below the guest's root."""
        where = self.root / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text)
        return where

    def hook(self, moment: str, body: str) -> None:
        """A program of the admin's."""
        path = self.file(f"etc/pvfront/hooks.d/{moment}.d/hook", f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    @contextlib.asynccontextmanager
    async def running(self, *components: Component) -> AsyncIterator[Agent]:
        """The agent of these components, meanwhile."""
        agent = Agent(self.context, components, pauses=(0.01, 0.02))
        task = asyncio.create_task(agent.run(signals=False))
        socket = self.context.platform.run_dir / "agent.sock"
        await eventually("the agent's socket", lambda: socket.exists() or task.done())
        try:
            yield agent
        finally:
            agent.stop()
            await task


@contextlib.asynccontextmanager
async def agent_world(
    tmp_path: Path, settings: AgentSettings | None = None
) -> AsyncIterator[AgentWorld]:
    mem = memstore.MemStore()
    for name in ("", "/data", "/attr", "/drivers", "/control/shutdown"):
        mem.set(f"{HOME}{name}", perms="n5")
    mem.set(f"{HOME}/domid", b"5", perms="n0,r5")
    server = memstore.SocketServer(mem, domid=5)
    await server.start(str(tmp_path / "store.sock"))
    root = tmp_path / "guest"
    (root / "run").mkdir(parents=True)
    try:
        async with await Xenstore.connect(str(tmp_path / "store.sock")) as store:
            yield AgentWorld(
                root, mem, server, Context(Place(root), store, settings or AgentSettings())
            )
    finally:
        await server.stop()
