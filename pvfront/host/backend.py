# SPDX-License-Identifier: BSD-2-Clause
"""A backend of the embedded host, as a process of its own: what is the same for every class.

`Backend` starts such a process and drives it, also into everything that a backend must not do
(faults.py): blkback.py, netback.py. `main` is the process's own beginning.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypedDict, Unpack

from pvfront.cli.output import complain
from pvfront.errors import PvfrontError
from pvfront.host.child import Child
from pvfront.host.faults import Misstep
from pvfront.host.process import LINE_MAX, Process, refuse_second, socket_path
from pvfront.xenstore import Xenstore

ANSWER_SECONDS = 60.0
NOBODY: Mapping[str, Any] = {}


class BackendError(PvfrontError):
    """The backend's process did not start, is gone, or refused."""


class Which(TypedDict, total=False):
    """The device that is meant: its number, and perhaps its frontend's domain."""

    vbd: int | None
    vif: int | None
    console: int | None
    domid: int | None


class HasDirectory(Protocol):
    @property
    def directory(self) -> Path: ...


class Encodes(Protocol):
    """A fault (faults.py, netfaults.py)."""

    def encode(self) -> dict[str, Any]: ...


class Backend:
    """A backend process. Made by `start`; an async context manager that stops it.

    Commands are for all devices, those to come included, unless `vbd`, `vif` or `console` (the
    number, as 51712 for xvda) and perhaps `domid` name one. They raise BackendError.
    """

    NAME: ClassVar[str]
    """Its module, its socket, its log: "blkback"."""
    KLASS: ClassVar[str]
    WHAT: ClassVar[str]
    """For people: "the block backend"."""
    FEATURES: ClassVar[Any]

    def __init__(self, directory: Path, domid: int, child: Child) -> None:
        self.directory = directory
        self.domid = domid
        self._child = child
        self._lock = asyncio.Lock()
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @classmethod
    async def _start(
        cls,
        directory: Path,
        domid: int,
        features: Mapping[str, Any],
        prefix: Sequence[str] = (),
    ) -> Self:
        """Starts it; `prefix`: a command that runs it. Raises PvfrontError."""
        cls.FEATURES(**features)  # complains here, not there
        refuse_second(cls.NAME, directory, domid)  # whose socket would be taken for this one's
        command = [*prefix, sys.executable, "-P", "-m", f"pvfront.host.{cls.NAME}"]
        command += [f"--host={directory}", f"--domid={domid}"]
        for name, value in features.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{option}" if value else f"--no-{option}")
            else:
                command.append(f"--{option}={value}")
        path = directory / f"{cls.NAME}-{domid}.log"
        for number in itertools.count(2):
            if not path.exists():
                break
            path = directory / f"{cls.NAME}-{domid}.{number}.log"
        child = Child(cls.WHAT, command, path)
        try:
            await child.listening(socket_path(cls.NAME, directory, domid), socket.SOCK_STREAM)
        except BaseException:
            await child.stop(signal.SIGKILL)
            raise
        return cls(directory, domid, child)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def log(self) -> Path:
        """What it has to say."""
        return self._child.log

    async def stop(self) -> None:
        """Ends it in order: states stay as they are."""
        self._drop()
        await self._child.stop()

    async def kill(self) -> None:
        """Ends it without its knowledge: everything it held goes, its states in the store stay."""
        self._drop()
        await self._child.stop(signal.SIGKILL)

    async def wait(self, timeout: float = ANSWER_SECONDS) -> int:
        """Waits until it ends by itself (`Fault.die`); its exit status. Raises BackendError."""
        deadline = time.monotonic() + timeout
        while (status := self._child.process.poll()) is None:
            if time.monotonic() > deadline:
                raise BackendError(f"{self.WHAT} did not end in {timeout:g} s")
            await asyncio.sleep(0.01)
        self._drop()
        return status

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    # -- on the ring -----------------------------------------------------------------------------

    async def fault(self, *faults: Encodes, seed: int = 0, **which: Unpack[Which]) -> None:
        """Replaces the faults: from the next request on, these happen. None: honest again."""
        encoded = [fault.encode() for fault in faults]
        await self._do("faults", which, faults=encoded, seed=seed)

    async def release(self, **which: Unpack[Which]) -> None:
        """Lets go of what faults hold back (`stall`, `delay`, `reorder`); they stay in force."""
        await self._do("release", which)

    async def clear(self, **which: Unpack[Which]) -> None:
        """Honest from now on: no faults, missteps, overrides; what was held back is answered."""
        await self._do("clear", which)

    async def stats(self, **which: Unpack[Which]) -> dict[str, int]:
        """Counters, summed over devices; `fired_<kind>` counts faults."""
        found: dict[str, int] = (await self._do("stats", which))["stats"]
        return found

    # -- in the store ----------------------------------------------------------------------------

    async def misstep(self, *missteps: Misstep, **which: Unpack[Which]) -> None:
        """Replaces what goes wrong in the walk."""
        encoded = [misstep.encode() for misstep in missteps]
        await self._do("missteps", which, missteps=encoded)

    async def override(self, keys: Mapping[str, str | None], **which: Unpack[Which]) -> None:
        """Whenever one of these keys is published, this is written, or (None) nothing."""
        await self._do("override", which, keys=dict(keys))

    async def write(self, keys: Mapping[str, str | None], **which: Unpack[Which]) -> None:
        """Writes, or (None) removes, keys of the backend's directory now."""
        await self._do("write", which, keys=dict(keys))

    async def flicker(
        self, keys: Mapping[str, Sequence[str]], *, every_ms: float = 10, **which: Unpack[Which]
    ) -> None:
        """Writes the values of each key in turn, again and again; {} ends it."""
        encoded = {key: list(values) for key, values in keys.items()}
        await self._do("flicker", which, keys=encoded, ms=every_ms)

    async def state(self, state: int, **which: Unpack[Which]) -> None:
        """Writes any number as the backend's state now; the walk goes on from there."""
        await self._do("state", which, state=state)

    async def vanish(self, **which: Unpack[Which]) -> None:
        """The backend's nodes go now."""
        await self._do("vanish", which)

    async def come_back(self, **which: Unpack[Which]) -> None:
        """What vanished returns, as a new device with what the old one had."""
        await self._do("return", which)

    async def features(
        self,
        *,
        vbd: int | None = None,
        vif: int | None = None,
        console: int | None = None,
        domid: int | None = None,
        **changes: Any,
    ) -> None:
        """Switches features: what is published with the next connection. `FEATURES` has them."""
        which = Which(vbd=vbd, vif=vif, console=console, domid=domid)
        await self._do("features", which, features=changes)

    async def devices(self) -> list[dict[str, Any]]:
        """What it serves: domid, vbd or vif, state (as last written), and what its class has."""
        found: list[dict[str, Any]] = (await self._do("list"))["devices"]
        return found

    # -- its process -----------------------------------------------------------------------------

    async def _do(
        self, do: str, which: Mapping[str, Any] = NOBODY, /, **arguments: Any
    ) -> dict[str, Any]:
        if any(which.get(klass) is not None for klass in {"vbd", "vif", "console"} - {self.KLASS}):
            raise BackendError(f"{self.WHAT} has a {self.KLASS} only, not {dict(which)}")
        request = {"do": do, **arguments}
        request |= {key: number for key, number in which.items() if number is not None}
        async with self._lock:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    answer = await self._ask(request)
            except (OSError, ValueError) as exc:  # TimeoutError is one
                self._drop()
                raise BackendError(
                    f"{self.WHAT} does not answer {do}: {exc or type(exc).__name__}",
                    hint=f"its log: {self.log}",
                ) from exc
        if not answer["ok"]:
            raise BackendError(f"{self.WHAT} refuses {do}: {answer['error']}")
        return answer

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._connection is None:
            path = socket_path(self.NAME, self.directory, self.domid)
            self._connection = await asyncio.open_unix_connection(path, limit=LINE_MAX)
        reader, writer = self._connection
        writer.write(json.dumps(request).encode() + b"\n")
        await writer.drain()
        line = await reader.readline()
        if not line:
            raise ConnectionResetError("it is gone")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None


def arguments(
    name: str, what: str, features: Any, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, Any]:
    """What the command was told, and the features among it. Raises PvfrontError: nonsense."""
    parser = argparse.ArgumentParser(
        prog=f"python -m pvfront.host.{name}",
        description=f"Serves the {what} of an embedded host as Linux's {name} does.",
    )
    parser.add_argument("--host", type=Path, required=True, help="the host's directory")
    parser.add_argument("--domid", type=int, default=0, help="the backend's domain (default 0)")
    parser.add_argument("--verbose", action="store_true", help="log every step")
    group = parser.add_argument_group("features", "defaults as the kernel's; sizes in bytes")
    for feature in dataclasses.fields(features):
        option = f"--{feature.name.replace('_', '-')}"
        if isinstance(feature.default, bool):
            group.add_argument(
                option, action=argparse.BooleanOptionalAction, default=feature.default
            )
        else:
            group.add_argument(
                option, type=int, default=feature.default, metavar="N", help="default %(default)s"
            )
    options = parser.parse_args(argv)
    names = [feature.name for feature in dataclasses.fields(features)]
    return options, features(**{name: getattr(options, name) for name in names})


async def _run(kind: type[Process[Any]], options: argparse.Namespace, features: Any) -> None:
    store = await Xenstore.connect(os.fspath(options.host / "store.sock"))
    async with store:
        task = asyncio.ensure_future(kind(store, options.host, options.domid, features).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task


def main(
    kind: type[Process[Any]], what: str, features: Any, argv: Sequence[str] | None = None
) -> int:
    """The command; returns its exit status."""
    try:
        options, chosen = arguments(kind.NAME, what, features, argv)
        logging.basicConfig(
            level=logging.DEBUG if options.verbose else logging.INFO,
            format=f"%(asctime)s {kind.NAME} %(levelname)s %(message)s",
        )
        asyncio.run(_run(kind, options, chosen))
    except PvfrontError as exc:
        complain(exc, kind.NAME)
        return 1
    return 0
