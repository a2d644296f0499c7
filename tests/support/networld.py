# SPDX-License-Identifier: BSD-2-Clause
"""An embedded host with a network at each end of a vif: the backend's, and the guest's.

    async with network() as it:
        await it.attach()
        await it.guest.run("ping", "-c1", it.theirs)

Wants root, or a kernel that lets its users have user namespaces; `require` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from backendgone import noticed
from waiting import PATIENCE, eventually

from pvfront.host import Host
from pvfront.host.child import Child
from pvfront.host.netback import NetBackend
from pvfront.host.netns import NetNamespace, NetNamespaceError
from pvfront.host.service import NetService

THEIRS4, OURS4 = "10.7.0.1", "10.7.0.2"
THEIRS6, OURS6 = "fd07::1", "fd07::2"
SPEC = f"mac=00:16:3e:07:00:02,ip={THEIRS4}/24 {THEIRS6}/64"
PYTHON = [sys.executable, "-P", "-c"]


@functools.cache
def why_not() -> str:
    """Why there can be no networks here; "": there can."""
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    with tempfile.TemporaryDirectory() as directory:

        async def tried() -> str:
            try:
                async with await NetNamespace.start(Path(directory), "try") as network:
                    await network.run("ip", "tuntap", "add", "dev", "try", "mode", "tap")
            except NetNamespaceError as error:
                return str(error)
            return ""

        # Its own loop: this is asked while tests are collected.
        return asyncio.run(tried())


networks = pytest.mark.skipif(bool(why_not()), reason=f"no networks of one's own here: {why_not()}")


def require(*tools: str) -> None:
    """Skips the test where it cannot run, with the reason."""
    if missing := [tool for tool in ("ip", *tools) if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)} not installed (tools/apt-demo.txt)")


class Network:
    """Store, hub, network backend, network service, and the two networks."""

    def __init__(
        self, host: Host, net: NetNamespace, guest: NetNamespace, backend: NetBackend
    ) -> None:
        self.host = host
        self.net = net
        self.guest = guest
        self.backend = backend
        self.service: NetService | None = None
        self.ifname = "enX0"

    async def serve(self, *arguments: str) -> NetService:
        """Starts the service."""
        self.service = await NetService.start(self.host, self.guest, *arguments)
        return self.service

    def serve_soon(self) -> asyncio.Task[NetService]:
        """Starts it without waiting until it is ready."""
        return asyncio.create_task(self.serve())

    @property
    def log(self) -> str:
        if self.service is None:
            return (self.host.directory / "net-service.log").read_text()
        return self.service.log.read_text()

    def state(self, devid: int = 0) -> dict[str, Any]:
        """What the service has written of an interface; {}: nothing."""
        path = self.host.directory / "run" / f"vif-{devid}.json"
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        return {}

    async def until(
        self, what: str, holds: Callable[[dict[str, Any]], Any], devid: int = 0
    ) -> dict[str, Any]:
        """Waits for something that the service shows of an interface."""

        async def look() -> dict[str, Any] | None:
            state = self.state(devid)
            return state if state and holds(state) else None

        found: dict[str, Any] = await eventually(
            what, look, why=lambda: f"{self.state(devid)}\n{self.log}"
        )
        return found

    async def connected(self, devid: int = 0, *, after: int = 0) -> dict[str, Any]:
        """Waits until both ends are Connected in a generation later than `after`."""
        found = await self.until(
            f"connected after generation {after}",
            lambda s: s["phase"] == "connected" and s["generation"] > after,
            devid,
        )

        async def both() -> bool:
            at = f"/local/domain/0/backend/vif/1/{devid}/state"
            return await self.host.store.read_opt(at) == "4"

        await eventually("the backend Connected", both, why=lambda: self.log)
        return found

    async def attach(self, spec: str = SPEC) -> int:
        """Attaches an interface and waits until it is connected."""
        devid = await self.host.attach_vif(1, spec)
        await self.connected(devid)
        return devid

    async def configure(self, ifname: str = "enX0") -> None:
        """The guest's addresses."""
        run = self.guest.run
        await run("ip", "addr", "replace", f"{OURS4}/24", "dev", ifname)
        await run("ip", "addr", "replace", f"{OURS6}/64", "dev", ifname, "nodad")
        await run("ip", "link", "set", ifname, "up")

        async def answered() -> bool:
            said = await run("ping", "-c1", "-W1", THEIRS4, check=False)
            return "1 received" in said

        await eventually("an answer to the first ping", answered, why=lambda: self.log)

    async def queue_statistics(self, devid: int = 0) -> list[dict[str, Any]]:
        """The worker's counters, of each queue."""
        from pvfront.abi import read_all_net_stats

        fd = os.open(self.state(devid)["statistics_file"], os.O_RDONLY)
        try:
            found: list[dict[str, Any]] = read_all_net_stats(fd)
        finally:
            os.close(fd)
        return found

    async def python(self, network: NetNamespace, program: str, *arguments: str) -> str:
        """Runs a program in one of the networks; what it says."""
        return await asyncio.wait_for(network.run(*PYTHON, program, *arguments), PATIENCE)

    async def backend_dies(self, **features: Any) -> None:
        """Kills the backend and starts another one, which makes every frontend come again."""
        before = {
            devid: state["generation"]
            for devid in map(int, await self.host.store.directory("/local/domain/1/device/vif"))
            if (state := self.state(devid)) and state["phase"] == "connected"
        }
        await self.backend.kill()
        self.backend = await NetBackend.start(self.host, self.net, **features)
        for devid, generation in before.items():
            await noticed(self, devid, generation)

    async def detach(self, devid: int = 0) -> None:
        """Detaches an interface; nothing of it is left at either end."""
        state = self.state(devid)
        await self.host.detach_vif(1, devid, timeout=PATIENCE)

        async def gone() -> bool:
            there = await self.guest.run("ip", "link") + await self.net.run("ip", "link")
            return not (
                self.state(devid)
                or f" {state['os_device']}:" in there
                or f" vif1.{devid}:" in there
            )

        await eventually(f"nothing left of vif {devid}", gone, why=lambda: self.log)

    async def nothing_left(self) -> None:
        """Neither ports nor grants of the guest's."""

        async def look() -> bool:
            return not any(self.host.dump().values())

        await eventually("nothing is held", look, why=lambda: f"{self.host.dump()}\n{self.log}")


@contextlib.asynccontextmanager
async def network(*serve: str, start: bool = True, **features: Any) -> AsyncIterator[Network]:
    """A host with a backend and, unless told otherwise, a service; all of it ends at the end."""
    directory = Path(tempfile.mkdtemp(prefix="pvf-"))  # a socket's path has at most 107 bytes
    try:
        async with (
            await Host.start(directory) as host,
            await NetNamespace.start(directory, "backend") as net,
            await NetNamespace.start(directory, "guest") as guest,
        ):
            await host.create_domain()
            made = Network(host, net, guest, await NetBackend.start(host, net, **features))
            try:
                if start:
                    await made.serve(*serve)
                yield made
            finally:
                if made.service is not None:
                    await made.service.end()
                await made.backend.stop()
                said = _logs(directory)
                assert "Traceback" not in said, said
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _logs(directory: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(directory.glob("net*.log")))


_TCPEND = str(Path(__file__).with_name("tcpend.py"))
_ports = itertools.count(20001)


class Transfer:
    """Bytes that go from one network to the other over one TCP connection."""

    def __init__(self, sender: Child, receiver: Child) -> None:
        self.sender = sender
        self.receiver = receiver

    @classmethod
    async def start(
        cls, it: Network, source: NetNamespace, address: str, size: int, *, pause_ms: int = 0
    ) -> Transfer:
        """`source` sends to `address`, which is the other network's."""
        target = it.guest if source is it.net else it.net
        port = next(_ports)

        def end(where: NetNamespace, how: str, way: str) -> Child:
            rest = [how, way, address, str(port), str(size), str(pause_ms)]
            log = it.host.directory / f"tcp-{port}-{way}.log"
            return where.start_command(f"the {way}er", [sys.executable, "-P", _TCPEND, *rest], log)

        receiver = end(target, "listen", "receive")
        await cls._said(receiver, "ready")
        return cls(end(source, "connect", "send"), receiver)

    @staticmethod
    async def _said(end: Child, word: str) -> None:
        def look() -> bool:
            assert end.process.poll() in (None, 0), f"{end.what}: {end.log.read_text()}"
            return word in end.log.read_text().split()

        await eventually(f"{word} of {end.what}", look, why=end.said)

    async def begun(self) -> None:
        """Waits until bytes have come."""
        await self._said(self.receiver, "begun")

    async def ended(self) -> int:
        """Waits for both ends: as many bytes, and the same, have come as were sent."""
        for end in (self.sender, self.receiver):
            await eventually(
                f"the end of {end.what}",
                lambda end=end: end.process.poll() is not None,
                why=lambda end=end: end.log.read_text(),
                seconds=2 * PATIENCE,
            )
            assert end.process.returncode == 0, end.log.read_text()
        sent, came = (end.log.read_text().splitlines()[-1] for end in (self.sender, self.receiver))
        assert came == sent
        return int(came.split()[0])
