# SPDX-License-Identifier: BSD-2-Clause
"""The block backend of the embedded host, as a process of its own.

    python -m pvfront.host.blkback --host DIR [--domid 0] [--no-flush] [--indirect 32] ...

serves every vbd below backend/vbd of its domain as Linux's blkback does (vbd.py), until SIGTERM.
What a disk is says the `params` key that the toolstack wrote: `memory:64M` (gone with the process)
or a file or block device. `BlkBackend` starts such a process and drives it, also into everything
that a backend must not do (faults.py):

    async with await BlkBackend.start(host, indirect=0) as backend:
        await backend.fault(Fault.corrupt("status", "error", op="write", skip=10, count=1))
        ...
        assert (await backend.stats())["fired_corrupt"] == 1
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
from typing import Any, Protocol, Self

from pvfront.cli.output import complain
from pvfront.errors import PvfrontError
from pvfront.host.blkengine import Features
from pvfront.host.blkprocess import LINE_MAX, Process, refuse_second, socket_path
from pvfront.host.child import Child
from pvfront.host.faults import Fault, Misstep
from pvfront.xenstore import Xenstore

__all__ = ["BlkBackend", "BlkBackendError", "Fault", "Features", "Misstep", "main"]

ANSWER_SECONDS = 60.0


class BlkBackendError(PvfrontError):
    """The backend's process did not start, is gone, or refused."""


class _Directory(Protocol):
    @property
    def directory(self) -> Path: ...


class BlkBackend:
    """A backend process. Made by `start`; an async context manager that stops it.

    Commands are for all disks, those to come included, unless `vbd` (the device number, as 51712
    for xvda) and perhaps `domid` name one. They raise BlkBackendError.
    """

    def __init__(self, directory: Path, domid: int, child: Child) -> None:
        self.directory = directory
        self.domid = domid
        self._child = child
        self._lock = asyncio.Lock()
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @classmethod
    async def start(cls, host: _Directory, *, domid: int = 0, **features: Any) -> Self:
        """Starts a backend in domain `domid` of a host; `features` are those of `Features`.

        It is ready when this returns: the disks that exist are being probed. Its log is
        DIR/blkback-DOMID.log, of a second one DIR/blkback-DOMID.2.log. It ends with the caller's
        process, however that ends. Raises PvfrontError.
        """
        Features(**features)  # complains here, not there
        directory = host.directory
        refuse_second(directory, domid)  # whose socket would be taken for this one's
        command = [sys.executable, "-P", "-m", "pvfront.host.blkback", f"--host={directory}"]
        command.append(f"--domid={domid}")
        for name, value in features.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{option}" if value else f"--no-{option}")
            else:
                command.append(f"--{option}={value}")
        path = directory / f"blkback-{domid}.log"
        for number in itertools.count(2):
            if not path.exists():
                break
            path = directory / f"blkback-{domid}.{number}.log"
        child = Child("the block backend", command, path)
        try:
            await child.listening(socket_path(directory, domid), socket.SOCK_STREAM)
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
        """Ends it in order: states stay as they are, and the next one goes on with its rings.

        Requests that a fault holds back are forgotten; the next one then makes the frontend leave
        their ring, as after `kill`.
        """
        self._drop()
        await self._child.stop()

    async def kill(self) -> None:
        """Ends it without its knowledge: everything it held goes, its states in the store stay.

        The next one does not know what was under way: it goes Closing, and the frontend comes
        again with new rings.
        """
        self._drop()
        await self._child.stop(signal.SIGKILL)

    async def wait(self, timeout: float = ANSWER_SECONDS) -> int:
        """Waits until it ends by itself (`Fault.die`); its exit status. Raises BlkBackendError."""
        deadline = time.monotonic() + timeout
        while (status := self._child.process.poll()) is None:
            if time.monotonic() > deadline:
                raise BlkBackendError(f"the block backend did not end in {timeout:g} s")
            await asyncio.sleep(0.01)
        self._drop()
        return status

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    # -- on the ring -----------------------------------------------------------------------------

    async def fault(
        self, *faults: Fault, seed: int = 0, vbd: int | None = None, domid: int | None = None
    ) -> None:
        """Replaces the faults: from the next request on, these happen. None: honest again."""
        encoded = [fault.encode() for fault in faults]
        await self._do("faults", vbd, domid, faults=encoded, seed=seed)

    async def release(self, *, vbd: int | None = None, domid: int | None = None) -> None:
        """Lets go of what faults hold back (`stall`, `delay`, `reorder`); they stay in force."""
        await self._do("release", vbd, domid)

    async def clear(self, *, vbd: int | None = None, domid: int | None = None) -> None:
        """Honest from now on: no faults, missteps, overrides; what was held back is answered."""
        await self._do("clear", vbd, domid)

    async def stats(self, *, vbd: int | None = None, domid: int | None = None) -> dict[str, int]:
        """Counters, summed over disks (struct pvf_bb_stats); `fired_<kind>` counts faults."""
        found: dict[str, int] = (await self._do("stats", vbd, domid))["stats"]
        return found

    # -- in the store ----------------------------------------------------------------------------

    async def misstep(
        self, *missteps: Misstep, vbd: int | None = None, domid: int | None = None
    ) -> None:
        """Replaces what goes wrong in the walk."""
        encoded = [misstep.encode() for misstep in missteps]
        await self._do("missteps", vbd, domid, missteps=encoded)

    async def override(
        self, keys: Mapping[str, str | None], *, vbd: int | None = None, domid: int | None = None
    ) -> None:
        """Whenever one of these keys is published, this is written, or (None) nothing."""
        await self._do("override", vbd, domid, keys=dict(keys))

    async def write(
        self, keys: Mapping[str, str | None], *, vbd: int | None = None, domid: int | None = None
    ) -> None:
        """Writes, or (None) removes, keys of the backend's directory now."""
        await self._do("write", vbd, domid, keys=dict(keys))

    async def flicker(
        self,
        keys: Mapping[str, Sequence[str]],
        *,
        every_ms: float = 10,
        vbd: int | None = None,
        domid: int | None = None,
    ) -> None:
        """Writes the values of each key in turn, again and again; {} ends it."""
        encoded = {key: list(values) for key, values in keys.items()}
        await self._do("flicker", vbd, domid, keys=encoded, ms=every_ms)

    async def state(self, state: int, *, vbd: int | None = None, domid: int | None = None) -> None:
        """Writes any number as the backend's state now; the walk goes on from there."""
        await self._do("state", vbd, domid, state=state)

    async def vanish(self, *, vbd: int | None = None, domid: int | None = None) -> None:
        """The backend's nodes go now."""
        await self._do("vanish", vbd, domid)

    async def come_back(self, *, vbd: int | None = None, domid: int | None = None) -> None:
        """What vanished returns, as a new device with the old disk."""
        await self._do("return", vbd, domid)

    async def resize(self, size: int, *, vbd: int | None = None, domid: int | None = None) -> None:
        """Another size, in bytes, as when the device below a blkback is resized."""
        await self._do("resize", vbd, domid, size=size)

    async def features(
        self, *, vbd: int | None = None, domid: int | None = None, **changes: Any
    ) -> None:
        """Switches features: at once for requests, in the store with the next connection."""
        await self._do("features", vbd, domid, features=changes)

    async def vbds(self) -> list[dict[str, int]]:
        """What it serves: domid, vbd, state (as last written), size (bytes; None: no disk yet)."""
        found: list[dict[str, int]] = (await self._do("list", None, None))["vbds"]
        return found

    # -- its process -----------------------------------------------------------------------------

    async def _do(
        self, do: str, vbd: int | None, domid: int | None, **arguments: Any
    ) -> dict[str, Any]:
        request = {"do": do, **arguments}
        request |= {k: v for k, v in (("vbd", vbd), ("domid", domid)) if v is not None}
        async with self._lock:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    answer = await self._ask(request)
            except (OSError, ValueError) as exc:  # TimeoutError is one
                self._drop()
                raise BlkBackendError(
                    f"the block backend does not answer {do}: {exc or type(exc).__name__}",
                    hint=f"its log: {self.log}",
                ) from exc
        if not answer["ok"]:
            raise BlkBackendError(f"the block backend refuses {do}: {answer['error']}")
        return answer

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._connection is None:
            path = socket_path(self.directory, self.domid)
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


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pvfront.host.blkback",
        description="Serves the disks of an embedded host as Linux's blkback does.",
    )
    parser.add_argument("--host", type=Path, required=True, help="the host's directory")
    parser.add_argument("--domid", type=int, default=0, help="the backend's domain (default 0)")
    parser.add_argument("--verbose", action="store_true", help="log every step")
    group = parser.add_argument_group("features", "defaults as the kernel's; sizes in bytes")
    for feature in dataclasses.fields(Features):
        option = f"--{feature.name.replace('_', '-')}"
        if isinstance(feature.default, bool):
            group.add_argument(
                option, action=argparse.BooleanOptionalAction, default=feature.default
            )
        else:
            group.add_argument(
                option, type=int, default=feature.default, metavar="N", help="default %(default)s"
            )
    return parser.parse_args(argv)


async def _run(options: argparse.Namespace, features: Features) -> None:
    store = await Xenstore.connect(os.fspath(options.host / "store.sock"))
    async with store:
        task = asyncio.ensure_future(Process(store, options.host, options.domid, features).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _arguments(argv)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s blkback %(levelname)s %(message)s",
    )
    try:
        names = [feature.name for feature in dataclasses.fields(Features)]
        asyncio.run(_run(options, Features(**{name: getattr(options, name) for name in names})))
    except PvfrontError as exc:
        complain(exc, "blkback")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
