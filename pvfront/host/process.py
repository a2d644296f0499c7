# SPDX-License-Identifier: BSD-2-Clause
"""A backend's process: every device below backend/CLASS, and the socket that drives it.

Theory of operation. One watch on the whole of backend/CLASS says which directory changed; each
device has a task of its own (busdevice.py). A device is probed when its state is Initialising, as
the kernel's bus does it; those that are there when the process starts are probed in any state, as
after a driver was loaded again.

The control socket DIR/NAME-DOMID.sock takes one JSON object a line and answers each with one:
{"ok": true, ...} or {"ok": false, "error": "..."}. The class's name with a device number (`vbd`,
`vif`) and `domid` say which device is meant, without them all are, those to come included. What
there is to be asked is listed at `Process.COMMANDS`, and what a class adds to it at its own;
`backend.Backend` speaks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pvfront.errors import PvfrontError
from pvfront.host.busdevice import INITIALISING, BusDevice, Plan
from pvfront.host.child import answers
from pvfront.host.faults import Misstep
from pvfront.xenstore import Xenstore, XenstoreError, XenstoreLost

log = logging.getLogger(__name__)

LINE_MAX = 1 << 20

Name = tuple[int, int]
"""domid, devid"""

Request = dict[str, Any]
Answer = dict[str, Any]
Command = Callable[[Any, Request], Awaitable[Answer | None]]
D = TypeVar("D", bound=BusDevice[Any, Any])


class Process(Generic[D]):
    """Everything of one backend process; `run` serves until it is cancelled."""

    NAME: ClassVar[str]
    """Of the backend: "blkback"."""
    KLASS: ClassVar[str]
    FAULT: ClassVar[Any]
    """Its vocabulary of faults: what decodes one of them."""
    device: ClassVar[Any]
    """Makes a `D`, as BusDevice() does."""

    def __init__(self, store: Xenstore, host: Path, domid: int, features: Any) -> None:
        self.store = store
        self.host = host
        self.domid = domid
        self.plan: Plan[Any] = Plan(features)
        self.missteps: list[Misstep] = []
        self.root = f"/local/domain/{domid}/backend/{self.KLASS}"
        self.devices: dict[Name, D] = {}
        self.vanished: dict[Name, D] = {}
        self._tasks: dict[Name, asyncio.Task[None]] = {}
        self._lingering: dict[asyncio.Task[None], D] = {}
        """Devices that are gone but for their requests in flight."""
        self._totals: dict[str, int] = {}
        self._rescan = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # -- devices ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves. When the socket is there, the devices found are on their way.

        Raises XenstoreLost, PvfrontError (another backend serves this domain's devices).
        """
        refuse_second(self.NAME, self.host, self.domid)
        path = socket_path(self.NAME, self.host, self.domid)
        path.unlink(missing_ok=True)
        async with self.store.watch(self.root) as watch:
            await self._scan(first=True)
            server = await asyncio.start_unix_server(self._serve, path, limit=LINE_MAX)
            try:
                path.chmod(0o600)
                await asyncio.gather(self._follow(watch), self._scanner(), self._failed)
            finally:
                server.close()
                path.unlink(missing_ok=True)
                for task in [*self._tasks.values(), *self._lingering]:
                    task.cancel()
                await asyncio.gather(
                    *self._tasks.values(), *self._lingering, return_exceptions=True
                )
                for device in [*self.devices.values(), *self.vanished.values()]:
                    with contextlib.suppress(PvfrontError):  # a store that has gone keeps no mark
                        await device.leave()
                    if device.engine is not None:
                        device.engine.close()

    async def _follow(self, watch: AsyncIterator[str]) -> None:
        async for path in watch:
            found = re.match(r"/(\d+)/(\d+)(/|$)", path.removeprefix(self.root))
            known = found and self.devices.get((int(found[1]), int(found[2])))
            if known:
                known.poke()
                continue
            self._rescan.set()
            if found is None:  # everything may have changed
                for device in self.devices.values():
                    device.poke()

    async def _scanner(self) -> None:
        while True:
            await self._rescan.wait()
            self._rescan.clear()
            await self._scan()

    async def _scan(self, *, first: bool = False) -> None:
        for domid in await self._numbers(self.root):
            for devid in await self._numbers(f"{self.root}/{domid}"):
                name = (domid, devid)
                if name in self.devices:
                    continue
                state = await self.store.read_opt(f"{self.root}/{domid}/{devid}/state")
                # Another scan may have seen it meanwhile.
                if name not in self.devices and (
                    state == str(INITIALISING) or (first and state is not None)
                ):
                    self._probe(name)

    async def _numbers(self, path: str) -> list[int]:
        try:
            names = await self.store.directory(path)
        except XenstoreError as exc:
            if isinstance(exc, XenstoreLost):
                raise
            return []
        return [int(name) for name in names if re.fullmatch(r"\d{1,9}", name)]

    def _probe(self, name: Name) -> None:
        before = self.vanished.pop(name, None)
        engine = before.engine if before is not None else None
        device = self.device(self.store, self.host, self.domid, *name, self.plan, engine)
        device.arm(self.missteps)
        self.devices[name] = device
        self._tasks[name] = asyncio.create_task(self._life(name, device))

    async def _life(self, name: Name, device: D) -> None:
        try:
            await device.run()
        except XenstoreLost as exc:
            if not self._failed.done():
                self._failed.set_exception(exc)
            return
        except PvfrontError as exc:
            log.error("%r: %s", device, exc)
        except Exception as exc:
            log.exception("%r failed", device)
            if not self._failed.done():
                self._failed.set_exception(exc)
        del self.devices[name], self._tasks[name]
        if device.keep_engine:
            self.vanished[name] = device
        elif device.engine is not None:
            linger = asyncio.create_task(self._linger(device, device.engine))
            self._lingering[linger] = device
            linger.add_done_callback(self._lingering.pop)
        self._rescan.set()

    async def _linger(self, device: D, engine: Any) -> None:
        try:
            await device.linger()
        finally:
            if device.engine is not None:
                self._add(engine.stats())
                engine.close()
                device.engine = None

    def _add(self, stats: dict[str, int]) -> None:
        for name, value in stats.items():
            self._totals[name] = self._totals.get(name, 0) + value

    # -- the control socket ----------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ValueError):
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, line: bytes) -> Answer:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise PvfrontError("a request is a JSON object")
            command = self.COMMANDS.get(str(request.get("do")))
            if command is None:
                raise PvfrontError(
                    f"no command {request.get('do')!r}; there are {', '.join(self.COMMANDS)}"
                )
            return {"ok": True, **(await command(self, request) or {})}
        except (PvfrontError, OSError, ValueError, TypeError, KeyError) as exc:
            return {"ok": False, "error": f"{type(exc).__name__}: {exc}"}

    def _chosen(self, request: Request) -> list[D]:
        """The devices that a request is about. Raises PvfrontError if it names one that is not."""
        devices = self._matching(request, self.devices.values())
        if self.KLASS in request and not devices:
            raise PvfrontError(f"no {self.KLASS} {request[self.KLASS]!r} here")
        return devices

    def _matching(self, request: Request, devices: Iterable[D]) -> list[D]:
        return [
            device
            for device in devices
            if request.get(self.KLASS, device.devid) == device.devid
            and request.get("domid", device.domid) == device.domid
        ]

    async def _faults(self, request: Request) -> None:
        faults = [self.FAULT.decode(data) for data in request["faults"]]
        seed = int(request.get("seed", 0))
        for device in self._chosen(request):
            if device.engine is not None:
                device.engine.set_faults(faults, seed)
        if self.KLASS not in request:
            self.plan.faults, self.plan.seed = faults, seed

    async def _missteps(self, request: Request) -> None:
        missteps = [Misstep.decode(data) for data in request["missteps"]]
        for device in self._chosen(request):
            device.arm(missteps)
        if self.KLASS not in request:
            self.missteps = missteps

    async def _release(self, request: Request) -> None:
        held = [*self.devices.values(), *self.vanished.values(), *self._lingering.values()]
        for device in self._matching(request, held):
            if device.engine is not None:
                device.engine.release()

    async def _clear(self, request: Request) -> None:
        await self._faults({**request, "faults": []})
        await self._missteps({**request, "missteps": []})
        await self._override({**request, "keys": {}})
        for device in self._chosen(request):
            device.flicker({}, 1)
        await self._release(request)

    async def _stats(self, request: Request) -> Answer:
        sums = dict(self._totals) if self.KLASS not in request else {}
        for device in self._chosen(request):
            if device.engine is not None:
                for name, value in device.engine.stats().items():
                    sums[name] = sums.get(name, 0) + value
        return {"stats": sums}

    async def _list(self, request: Request) -> Answer:
        return {"devices": [device.describe() for device in self._chosen(request)]}

    async def _features(self, request: Request) -> None:
        changes = dict(request["features"])
        for device in self._chosen(request):
            device.set_features(dataclasses.replace(device.features, **changes))
        if self.KLASS not in request:
            self.plan.features = dataclasses.replace(self.plan.features, **changes)

    async def _override(self, request: Request) -> None:
        keys = _text_keys(request["keys"])
        for device in self._chosen(request):
            device.overrides = keys
        if self.KLASS not in request:
            self.plan.overrides = keys

    async def _write(self, request: Request) -> None:
        for device in self._chosen(request):
            await device.write_keys(_text_keys(request["keys"]))

    async def _flicker(self, request: Request) -> None:
        keys = {str(key): [str(v) for v in values] for key, values in request["keys"].items()}
        if not all(keys.values()):
            raise PvfrontError("a key that flickers needs values")
        for device in self._chosen(request):
            device.flicker(keys, float(request.get("ms", 10)) / 1000)

    async def _state(self, request: Request) -> None:
        for device in self._chosen(request):
            await device.jump(int(request["state"]))

    async def _vanish(self, request: Request) -> None:
        for device in self._chosen(request):
            life = self._tasks[device.domid, device.devid]
            await device.vanish()
            await asyncio.wait([life])

    async def _return(self, request: Request) -> None:
        devices = self._matching(request, self.vanished.values())
        if not devices:
            raise PvfrontError("nothing has vanished")
        for device in devices:
            await device.come_back()
        await self._scan()

    COMMANDS: ClassVar[dict[str, Command]] = {
        "faults": _faults,  # faults: encoded, seed: replaces all
        "missteps": _missteps,  # missteps: encoded: replaces all
        "release": _release,  # what faults hold back goes on
        "clear": _clear,  # honest again: all of the above, overrides, flickering
        "stats": _stats,  # stats: summed
        "list": _list,  # devices: domid, vbd or vif, state, and what its class has
        "features": _features,  # features: those to change
        "override": _override,  # keys: replaces what is published; null: not at all
        "write": _write,  # keys: now; null removes
        "flicker": _flicker,  # keys: lists of values, ms
        "state": _state,  # state: any number, now
        "vanish": _vanish,  # the nodes go
        "return": _return,  # and return
    }


def socket_path(name: str, host: Path, domid: int) -> Path:
    """Where a backend of domain `domid` is driven from."""
    return host / f"{name}-{domid}.sock"


def refuse_second(name: str, host: Path, domid: int) -> None:
    """Raises PvfrontError if that domain has one: two would fight over every device."""
    path = socket_path(name, host, domid)
    if answers(path, socket.SOCK_STREAM):
        raise PvfrontError(
            f"a {name} of domain {domid} runs at {path} already", hint="end that one first"
        )


def _text_keys(keys: dict[str, Any]) -> dict[str, str | None]:
    return {str(key): None if value is None else str(value) for key, value in keys.items()}
