# SPDX-License-Identifier: BSD-2-Clause
"""What engines of all classes share: connections to the hub (docs/host.md), which stand for open
device nodes, and tables of faults.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvfront.errors import PvfrontError
from pvfront.host.faults import FaultError, Rule

HUB_SECONDS = 60.0


class EngineError(PvfrontError):
    """The engine or the hub refused; `errno` says why."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.errno = code


class HubDevice:
    """A connection, standing for one open device node of a domain.

    Raises EngineError.
    """

    def __init__(self, host: Path, device: str, domid: int) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(HUB_SECONDS)
        try:
            self.sock.connect(os.fspath(host / "hub.sock"))
            self.ask(do="open", device=device, domid=domid)
        except OSError as exc:
            self.sock.close()
            raise EngineError(
                f"no {device} from the hub of {host}: {exc}", exc.errno or errno.EIO
            ) from exc
        except BaseException:
            self.sock.close()
            raise

    def ask(self, **request: Any) -> tuple[dict[str, Any], list[int]]:
        self.sock.send(json.dumps(request).encode())
        data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 4)
        answer = json.loads(data) if data else {"ok": False, "errno": "EPIPE", "text": "hub gone"}
        if not answer["ok"]:
            for fd in fds:
                os.close(fd)
            code = getattr(errno, str(answer["errno"]), errno.EIO)
            raise EngineError(f"{request['do']}: {answer['errno']} ({answer['text']})", code)
        return answer, fds

    def close(self) -> None:
        self.sock.close()


class HubUser:
    """An engine's connections to the hub. Raises EngineError."""

    def __init__(self) -> None:
        self._connection: list[HubDevice] = []

    def _map_domain(
        self, host: Path, own_domid: int, domid: int, connect: Callable[..., int]
    ) -> HubDevice:
        """Has the engine `connect` to domain `domid`'s grants: descriptors, both numbers, and one
        more descriptor. Returns what binds its event channels.
        """
        gntdev = self._open(host, "gntdev", own_domid)
        _, fds = gntdev.ask(do="domain", domid=domid)
        try:
            code = connect(*fds, own_domid, domid, gntdev.sock.fileno())
        finally:
            for fd in fds:
                os.close(fd)
        self._check("the domain's grants", code)
        # The engine's alone from here on, and it waits for its answers itself.
        gntdev.sock.setblocking(True)
        return self._open(host, "evtchn", own_domid)

    def _open(self, host: Path, device: str, domid: int) -> HubDevice:
        hub = HubDevice(host, device, domid)
        self._connection.append(hub)
        return hub

    def _drop_connection(self) -> None:
        while self._connection:
            self._connection.pop().close()

    @staticmethod
    def _check(what: str, code: int) -> None:
        if code:
            raise EngineError(f"{what}: {os.strerror(-code)}", -code)


def fault_table(
    ffi: Any, struct: str, kinds: Mapping[str, int], most: int, faults: Sequence[Rule]
) -> Any:
    """`faults` as an engine's array of `struct`, of one at least. Raises FaultError."""
    if len(faults) > most:
        raise FaultError(f"{len(faults)} faults; the table has room for {most}")
    table = ffi.new(f"{struct}[]", max(1, len(faults)))
    for rule, fault in zip(table, faults, strict=False):
        members = fault.encode()
        rule.kind = kinds[members.pop("kind")]
        for name, value in members.items():
            setattr(rule, name, value)
    return table


def counters(found: Any, names: Sequence[str], kinds: Mapping[str, int]) -> dict[str, int]:
    """An engine's statistics; `fired_<kind>` counts faults."""
    return {name: int(getattr(found, name)) for name in names} | {
        f"fired_{name}": int(found.fired[kind]) for name, kind in kinds.items()
    }
