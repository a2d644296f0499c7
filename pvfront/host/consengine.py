# SPDX-License-Identifier: BSD-2-Clause
"""A console backend's end of the ring (xen/io/console.h), and a Unix socket for whoever sits at it.

Theory of operation. As QEMU's xen_console with a socket chardev: one client at a time; bytes of the
frontend's go to it, its own into the ring. There is nothing in C here: a console needs no speed.
Without a client the frontend's bytes stay in the ring (`hold`), or are dropped, as QEMU does.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pvfront.errors import PvfrontError
from pvfront.host.consfaults import KINDS, ConsFault
from pvfront.host.handles import EmbeddedEventChannels, EmbeddedGrantMapper

IN, OUT = 1024, 2048
_U32 = (1 << 32) - 1
_IN_CONS, _IN_PROD, _OUT_CONS, _OUT_PROD = range(4)
_STORM = 0.001  # seconds
_TICK = 0.05
"""A frontend that breaks the rules may send no event: the ring is looked at so often all the same.
"""


@dataclass
class _Armed:
    fault: ConsFault
    passed: int = 0
    fired: int = 0

    def fires(self) -> bool:
        if self.passed < self.fault.skip:
            self.passed += 1
            return False
        if self.fault.count and self.fired >= self.fault.count:
            return False
        self.fired += 1
        return True


class Engine:
    """One console; the socket at `path` is there from the beginning to `close`."""

    def __init__(self, path: Path, *, hold: bool) -> None:
        self.path = path
        self.hold = hold
        self._armed: list[_Armed] = []
        self._counted = dict.fromkeys(
            (*("in_bytes", "out_bytes", "dropped", "events", "notifies"),
             *(f"fired_{kind}" for kind in KINDS)), 0,
        )  # fmt: skip
        self._channels: EmbeddedEventChannels | None = None
        self._grants: EmbeddedGrantMapper | None = None
        self._page: mmap.mmap | None = None
        self._indices: memoryview | None = None
        self._port = 0
        self._out_cons = self._in_prod = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._client: socket.socket | None = None
        self._unsent = b""  # taken from the ring, not yet by the client
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        self._listener.listen(1)
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())

    # -- what every engine has -------------------------------------------------------------------

    def set_faults(self, faults: Sequence[ConsFault], seed: int) -> None:
        self._armed = [_Armed(fault) for fault in faults]
        self._turn()

    def release(self) -> None:
        self._turn()

    def stats(self) -> dict[str, int]:
        return dict(self._counted)

    def close(self) -> None:
        self.disconnect()
        self._accepting.cancel()
        self._drop_client()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    # -- the connection --------------------------------------------------------------------------

    def connect(self, host: Path, own_domid: int, domid: int, ring_ref: int, port: int) -> None:
        """Raises PvfrontError, OSError."""
        self.disconnect()
        try:
            self._grants = EmbeddedGrantMapper.open(os.fspath(host), own_domid=own_domid)
            self._page = self._grants.map(domid, [ring_ref]).memory
            # Each read or written whole, as `struct` does not: the frontend does so meanwhile.
            self._indices = memoryview(self._page)[IN + OUT : IN + OUT + 16].cast("I")
            self._channels = EmbeddedEventChannels.open(os.fspath(host), domid=own_domid)
            self._port = self._channels.bind_interdomain(domid, port)
        except BaseException:
            self.disconnect()
            raise
        # A new ring begins where the frontend says, as QEMU reads it.
        self._out_cons, self._in_prod = self._at(_OUT_CONS), self._at(_IN_PROD)
        self._tasks = [
            asyncio.create_task(self._events(self._channels)),
            asyncio.create_task(self._tick()),
        ]
        self._turn()

    def disconnect(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        if self._client is not None:
            asyncio.get_running_loop().remove_reader(self._client)
        if self._channels is not None:
            self._channels.close()
        self._channels = None
        if self._indices is not None:
            self._indices.release()
        self._indices = None
        self._page = None  # which unmaps it
        if self._grants is not None:
            self._grants.close()
        self._grants = None

    async def _events(self, channels: EmbeddedEventChannels) -> None:
        with contextlib.suppress(PvfrontError, OSError):
            while True:
                ports = await channels.wait()
                self._counted["events"] += 1
                channels.unmask(*ports)
                self._turn()

    async def _tick(self) -> None:
        while True:
            storm = self._fires("storm")
            if storm:
                self._notify()
            else:
                self._turn()
            await asyncio.sleep(_STORM if storm else _TICK)

    # -- whoever sits at it ----------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._listener)
            self._drop_client()
            self._client = client
            client.setblocking(False)
            self._turn()

    def _drop_client(self) -> None:
        if self._client is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._client)
            loop.remove_writer(self._client)
            self._client.close()
            self._client = None

    # -- the ring --------------------------------------------------------------------------------

    def _at(self, index: int) -> int:
        assert self._indices is not None
        return self._indices[index]

    def _publish(self, index: int, value: int) -> None:
        assert self._indices is not None
        self._indices[index] = value & _U32

    def _fires(self, kind: str) -> ConsFault | None:
        for armed in self._armed:
            if armed.fault.kind == kind and armed.fires():
                self._counted[f"fired_{kind}"] += 1
                return armed.fault
        return None

    def _off(self, kind: str) -> int:
        fault = self._fires(kind)
        return fault.value if fault is not None else 0

    def _notify(self) -> None:
        if self._channels is not None and not self._fires("silent"):
            self._counted["notifies"] += 1
            with contextlib.suppress(OSError):  # the frontend has gone
                self._channels.notify(self._port)

    def _turn(self) -> None:
        """Both ways, as far as it goes now."""
        self._flush()
        if self._page is None:
            return
        told = self._read_out()
        told |= self._write_in()
        if told:
            self._notify()

    def _read_out(self) -> bool:
        assert self._page is not None
        if off := self._off("out_cons"):
            self._publish(_OUT_CONS, self._out_cons + off)
            return True
        if self._unsent or (self._client is None and self.hold) or self._fires("deaf"):
            return False
        count = (self._at(_OUT_PROD) - self._out_cons) & _U32
        if not 0 < count <= OUT:
            return False
        at = self._out_cons % OUT
        data = (self._page[IN + at : IN + OUT] + self._page[IN : IN + at])[:count]
        self._out_cons = (self._out_cons + count) & _U32
        self._publish(_OUT_CONS, self._out_cons)
        if self._fires("scribble"):
            self._page[IN : IN + OUT] = b"\xee" * OUT
            self._publish(_OUT_PROD, 0x77777777)
            self._publish(_IN_CONS, 0x77777777)
        self._counted["out_bytes"] += count
        if self._client is None:
            self._counted["dropped"] += count
        else:
            self._unsent = data
            self._flush()
        return True

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        if self._client is None:
            return
        while self._unsent:
            try:
                sent = self._client.send(self._unsent)
            except BlockingIOError:
                loop.add_writer(self._client, self._turn)
                return
            except OSError:
                self._drop_client()
                return
            self._unsent = self._unsent[sent:]
        loop.remove_writer(self._client)

    def _write_in(self) -> bool:
        assert self._page is not None
        off = self._off("in_prod")
        if off:
            self._publish(_IN_PROD, self._in_prod + off)
            return True
        if self._client is None:
            return False
        loop = asyncio.get_running_loop()
        room = IN - ((self._in_prod - self._at(_IN_CONS)) & _U32)
        if not 0 < room <= IN:
            loop.remove_reader(self._client)  # until the frontend's next event
            return False
        try:
            data = self._client.recv(room)
        except BlockingIOError:
            loop.add_reader(self._client, self._turn)
            return False
        except OSError:
            data = b""
        if not data:
            self._drop_client()
            return False
        at = self._in_prod % IN
        first = data[: IN - at]
        self._page[at : at + len(first)] = first
        self._page[: len(data) - len(first)] = data[len(first) :]
        self._in_prod = (self._in_prod + len(data)) & _U32
        self._publish(_IN_PROD, self._in_prod)
        self._counted["in_bytes"] += len(data)
        loop.add_reader(self._client, self._turn)
        return True
