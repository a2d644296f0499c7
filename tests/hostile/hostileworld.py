# SPDX-License-Identifier: BSD-2-Clause
"""One host, one backend process that can be told to lie, and one supervisor of ours.

A test gets a `Disk`: attached for it by the toolstack, served by a worker of its own, detached at
the end, which is part of every test: whatever the backend did, the disk can be taken away, and
nothing of it is left. That it takes less than the toolstack's 10 s is shown where time is exact,
in tests/unit/test_device.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from nbdclient import Client, NbdError
from waiting import PATIENCE, eventually

from pvfront.abi import BlkStats, read_stats
from pvfront.errors import PvfrontError
from pvfront.host import Host
from pvfront.host.blkback import BlkBackend, Fault, Misstep
from pvfront.host.handles import EmbeddedGrantMapper

MIB = 1 << 20
SIZE = 8 * MIB

# io/ring.h, as words of the page; io/blkif.h for x86_64
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = range(4)
SLOTS, SLOT = 64, 112
MASK = 0xFFFFFFFF

_NAMES = "bcdefghijklmnop"
_BAD = ("Traceback", "Sanitizer", "assertion", "the device loop failed")


class Ring:
    """A shared ring as an accomplice of the backend maps it, to write what it likes."""

    def __init__(self, host: Host, grefs: list[int]) -> None:
        self._mapper = EmbeddedGrantMapper.open(str(host.directory), own_domid=0)
        self._mapping = self._mapper.map(1, grefs)
        self.page: mmap.mmap = self._mapping.memory
        self.words = memoryview(self.page).cast("I")
        self.slots = 1 << ((len(grefs) * 4096 - SLOTS) // SLOT).bit_length() - 1

    def junk(self, byte: int = 0xFF) -> None:
        """Overwrites every slot."""
        self.page[SLOTS : SLOTS + self.slots * SLOT] = bytes([byte]) * (self.slots * SLOT)

    def close(self) -> None:
        self.words.release()
        self._mapping.unmap()
        self._mapper.close()


class World:
    """Store, hub, backend, supervisor."""

    def __init__(self, host: Host, backend: BlkBackend) -> None:
        self.host = host
        self.backend = backend
        self.run_dir = host.directory / "run"
        self.log = host.directory / "supervisor.log"
        self.supervisor: asyncio.subprocess.Process | None = None
        self._turn = 0
        self._poorer = False  # the backend is not what a test expects

    @classmethod
    async def start(cls) -> World:
        # Not tmp_path: a socket's path has at most 107 bytes.
        host = await Host.start(Path(tempfile.mkdtemp(prefix="pvf-")))
        try:
            world = cls(host, await BlkBackend.start(host))
            await host.create_domain(1)
            await world.serve()
        except BaseException:
            await host.stop()
            raise
        return world

    @contextlib.contextmanager
    def backend_stopped(self) -> Iterator[None]:
        """The backend's process stands still meanwhile, whatever it was about to do."""
        pid = self.backend.pid
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    async def stop(self) -> None:
        try:
            await self.end_supervisor(signal.SIGTERM)
        finally:
            await self.backend.stop()
            await self.host.stop()
            shutil.rmtree(self.host.directory, ignore_errors=True)

    async def serve(self) -> None:
        """Starts a supervisor and waits until it is ready."""
        notify = self.host.directory / "notify"
        notify.unlink(missing_ok=True)
        script = Path(__file__).with_name("serve.py")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, self.log.open("ab") as log:
            sock.bind(str(notify))
            sock.setblocking(False)
            self.supervisor = await asyncio.create_subprocess_exec(
                # Workers are killed here as often as chance will have it.
                sys.executable, "-P", str(script), "vbd", "serve", "--all",
                "-o", "start_limit_burst=0",
                env={**os.environ, **self.host.environ, "NOTIFY_SOCKET": str(notify)},
                stdout=log, stderr=log,
            )  # fmt: skip
            try:
                async with asyncio.timeout(PATIENCE):
                    while b"READY=1" not in await asyncio.get_running_loop().sock_recv(sock, 4096):
                        pass
            except TimeoutError:
                raise AssertionError(f"never READY:\n{self.log.read_text()}") from None

    async def end_supervisor(self, how: signal.Signals) -> None:
        process, self.supervisor = self.supervisor, None
        if process is None or process.returncode is not None:
            return
        process.send_signal(how)
        try:
            await asyncio.wait_for(process.wait(), PATIENCE)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise AssertionError(f"the supervisor did not end:\n{self.log.read_text()}") from None

    async def ensure_alive(self) -> None:
        """After a test that killed something, or was killed by it."""
        if self.supervisor is None or self.supervisor.returncode is not None:
            await self.serve()
        if self.backend._child.process.poll() is not None:
            await self.new_backend()
        if self._poorer:
            await self.backend_dies()

    async def honest(self) -> None:
        """No fault and no misstep any more, for disks to come either."""
        with contextlib.suppress(PvfrontError):
            await self.backend.clear()

    async def new_backend(self, **features: Any) -> None:
        """Another backend process in the place of the one that is gone."""
        self.backend = await BlkBackend.start(self.host, **features)
        self._poorer = bool(features)

    async def backend_dies(self, **features: Any) -> None:
        """Kills the backend and starts another one, which makes every frontend come again."""
        await self.backend.kill()
        await self.new_backend(**features)

    async def attach(self, *options: str, target: str = "memory:8M", wait: bool = True) -> Disk:
        """A new disk, connected unless not waited for."""
        name = f"xvd{_NAMES[self._turn % len(_NAMES)]}"
        self._turn += 1
        marks = self.log.stat().st_size, self.backend.log.stat().st_size
        spec = ",".join(["format=raw", f"vdev={name}", "access=rw", *options])
        vdev = await self.host.attach_disk(1, f"{spec},target={target}")
        disk = Disk(self, name, vdev, *marks)
        if wait:
            try:
                disk.first = (await disk.connected())["generation"]
            except BaseException:
                await disk.remove()
                raise
        return disk


class Disk:
    """One disk of the world and what the tests do with it."""

    def __init__(self, world: World, label: str, vdev: int, mark: int, backend_mark: int) -> None:
        self.world = world
        self.label = label
        self.vdev = vdev
        self.name = f"vbd-{vdev}"
        self.front = f"/local/domain/1/device/vbd/{vdev}"
        self.back = f"/local/domain/0/backend/vbd/1/{vdev}"
        self.gone = False
        self.first = 0
        """The generation that a test begins with: on a slow machine a walk may take several."""
        self._mark = mark
        self._backend_mark = backend_mark
        self._clients: list[Client] = []
        self._rings: list[Ring] = []

    # -- what can be seen ----------------------------------------------------------------------

    @property
    def log(self) -> str:
        """The supervisor's lines since the disk was attached."""
        with self.world.log.open("rb") as file:
            file.seek(self._mark)
            return file.read().decode(errors="replace")

    async def shown(self) -> dict[str, Any]:
        """The disk as the supervisor's list shows it now; {}: it serves no such disk."""
        reader, writer = await asyncio.open_unix_connection(
            self.world.run_dir / "supervisor-vbd.sock", limit=1 << 20
        )
        try:
            writer.write(b'{"verb": "list"}\n')
            answer = json.loads(await asyncio.wait_for(reader.readline(), PATIENCE))
        finally:
            writer.close()
        for device in answer["devices"]:
            if device["name"] == self.name:
                found: dict[str, Any] = device
                return found
        return {}

    async def until(
        self, what: str, holds: Callable[[dict[str, Any]], Any], *, seconds: float = PATIENCE
    ) -> dict[str, Any]:
        """Waits for something that the list shows."""
        shown: dict[str, Any] = {}

        async def look() -> Any:
            nonlocal shown
            shown = await self.shown()
            return holds(shown)

        await eventually(what, look, seconds=seconds, why=lambda: f"{shown}\n{self.log}")
        return shown

    async def logged(self, text: str, *, seconds: float = PATIENCE) -> None:
        async def look() -> bool:
            return text in self.log

        await eventually(f"{text!r} in the log", look, seconds=seconds, why=lambda: self.log)

    async def connected(self, *, after: int = 0) -> dict[str, Any]:
        """Waits until it is served by a generation later than `after`."""
        return await self.until(
            f"connected after generation {after}",
            lambda s: s and s["phase"] == "connected" and s["generation"] > after,
        )

    async def stats(self) -> BlkStats:
        """The worker's counters."""
        fd = os.open((await self.shown())["statistics_file"], os.O_RDONLY)
        try:
            return read_stats(fd)
        finally:
            os.close(fd)

    async def counted(self, what: str, holds: Callable[[BlkStats], Any]) -> BlkStats:
        """Waits for something in the worker's counters."""
        found: BlkStats

        async def look() -> bool:
            nonlocal found
            found = await self.stats()
            return bool(holds(found))

        await eventually(what, look, why=lambda: f"{found}\n{self.log}")
        return found

    async def served(self, name: str) -> int:
        """A counter of the backend's for this disk."""
        return (await self.world.backend.stats(vbd=self.vdev))[name]

    async def fired(self, kind: str, times: int = 1) -> None:
        """Waits until a fault has fired so often."""

        async def look() -> bool:
            return await self.served(f"fired_{kind}") >= times

        await eventually(f"{kind} fired {times} times", look, why=lambda: self.log)

    async def misstepped(self, what: str) -> None:
        """Waits until the backend has gone wrong in its walk, as it logs."""
        text = f"vbd 1/{self.vdev}: misstep {what}"

        async def look() -> bool:
            with self.world.backend.log.open("rb") as file:
                file.seek(self._backend_mark)
                return text.encode() in file.read()

        await eventually(text, look, why=lambda: self.log)

    # -- clients -------------------------------------------------------------------------------

    async def client(self) -> Client:
        """A client in transmission, as soon as the disk takes one."""
        path = self.world.run_dir / f"{self.label}.nbd"

        async def taken() -> Client | None:
            with contextlib.suppress(OSError, TimeoutError):
                return await Client.connect(path)
            return None

        client: Client = await eventually("a client is taken", taken, why=lambda: self.log)
        self._clients.append(client)
        return client

    async def leave(self) -> None:
        """Every client goes."""
        clients, self._clients = self._clients, []
        for client in clients:
            await client.close()

    async def works(self) -> None:
        """A new client writes, flushes and reads back; another, where the first one is cut off.

        Connected may be what it was before the trouble was seen.
        """

        async def tried() -> bool:
            try:
                await self._works()
            except ConnectionError:
                return False
            return True

        await eventually("a client for which it works", tried, why=lambda: self.log)

    async def _works(self) -> None:
        await self.leave()
        client = await self.client()
        for size in (512, 4096, 65536):
            data = os.urandom(size)
            await client.write(MIB, data)
            await client.flush()
            assert await client.read(MIB, size) == data
        await client.close()
        self._clients.remove(client)

    # -- what the backend does -------------------------------------------------------------------

    async def fault(self, *faults: Fault, seed: int = 1) -> None:
        await self.world.backend.fault(*faults, seed=seed, vbd=self.vdev)

    async def misstep(self, *missteps: Misstep) -> None:
        await self.world.backend.misstep(*missteps, vbd=self.vdev)

    async def state(self, state: int) -> None:
        await self.world.backend.state(state, vbd=self.vdev)

    async def release(self) -> None:
        await self.world.backend.release(vbd=self.vdev)

    async def ring_refs(self) -> list[int]:
        """What the frontend has published; one queue."""
        store = self.world.host.store
        order = await store.read_opt(f"{self.front}/ring-page-order")
        names = ["ring-ref"] if order is None else [f"ring-ref{i}" for i in range(1 << int(order))]
        found = [await store.read_opt(f"{self.front}/{name}") for name in names]
        return [int(text) for text in found if text is not None]

    async def ring(self) -> Ring:
        """The ring of the present generation, mapped."""
        ring = Ring(self.world.host, await self.ring_refs())
        self._rings.append(ring)
        return ring

    async def breaks(
        self, rule: int, field: str, act: Callable[[Client], Awaitable[None]], *faults: Fault
    ) -> None:
        """`act` meets the faults: the rule is named, with field and value; then all is well.

        Nothing else may be said to be broken, no worker may end, and a client's requests have ended
        one way or the other.
        """
        before = (await self.shown())["generation"]
        client = await self.client()
        worker = (await self.shown())["worker_pid"]
        await self.fault(*faults)
        with contextlib.suppress(NbdError, ConnectionError):
            await act(client)
        await self.logged("reconnecting: the backend broke rule")
        told = self.log.partition("the backend broke rule ")[2].splitlines()[0]
        assert told.startswith(f"{rule}: {field}=0x"), told
        await self.world.backend.clear(vbd=self.vdev)
        await client.gone()
        assert (await self.connected(after=before))["worker_pid"] == worker, self.log
        await self.works()

    # -- the end -----------------------------------------------------------------------------------

    async def end(self) -> None:
        """The backend is honest and the disk is detached; nothing of it is left."""
        self._unmap()
        await self.leave()
        world = self.world
        if not self.gone:
            await world.host.detach_disk(1, self.vdev, timeout=PATIENCE)

        async def forgotten() -> bool:
            return not await self.shown() and not self._left()

        await eventually(
            "nothing is left of the disk", forgotten, why=lambda: f"{self._left()}\n{self.log}"
        )
        for path in (self.front, self.back):
            assert await world.host.store.read_opt(path) is None, f"a ghost: {path}"
        bad = [line for line in self.log.splitlines() if any(word in line for word in _BAD)]
        assert not bad, self.log

    async def remove(self) -> None:
        """Takes it away by force, after a failed test."""
        self._unmap()
        await self.leave()
        await self.world.honest()
        with contextlib.suppress(PvfrontError):
            await self.world.host.detach_disk(1, self.vdev, force=True, timeout=2)

    def _unmap(self) -> None:
        while self._rings:
            self._rings.pop().close()

    def _left(self) -> list[str]:
        """Files of it; ports and grants of the whole guest, since tests run one by one."""
        run, dump = self.world.run_dir, self.world.host.dump()
        left = [path.name for path in run.glob(f"{self.name}.*")]
        left += [path.name for path in run.glob(f"{self.label}.*")]
        left += [f"port {port}" for port in dump["ports"]]
        left += [f"grant {grant}" for grant in dump["grants"]]
        return [*left, "deferred"] if dump["deferred"] else left


Attach = Callable[..., Awaitable[Disk]]
"""The fixture `attach`."""
