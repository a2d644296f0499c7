# SPDX-License-Identifier: BSD-2-Clause
"""What this process runs on: Xen, or the embedded host that $PVFRONT_HOST names (docs/host.md).

Everything that differs between the two is asked here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from . import holdings, sysfs
from .claim import Claims, Taken
from .errors import PvfrontError
from .evtchn import EventChannels
from .gntalloc import GrantAllocator, grant_limit
from .gntdev import GrantMapper
from .holdings import Holdings
from .xenstore import Xenstore

__all__ = ["HOST_DOMID", "HOST_VARIABLE", "Embedded", "Platform", "Source", "Xen", "platform"]

HOST_VARIABLE = "PVFRONT_HOST"
HOST_DOMID = 1
"""The domain that commands run in on an embedded host."""


class Source(Protocol):
    """Where a generation's ports and pages are from. Both raise DeviceUnavailable."""

    def event_channels(self) -> EventChannels: ...

    def grant_allocator(self) -> GrantAllocator: ...


class Platform(Source, Protocol):
    """Where a service runs. Every method raises PvfrontError with what is missing."""

    @property
    def name(self) -> Literal["xen", "embedded"]: ...

    @property
    def roots(self) -> sysfs.Roots:
        """`roots.run` is `run_dir`; the kernel's directories are the machine's."""

    @property
    def run_dir(self) -> Path:
        """Where state files and control sockets are."""

    @property
    def config_dir(self) -> Path:
        """Where settings and hooks are."""

    @property
    def dev_dir(self) -> Path:
        """Where what we make in /dev has its names."""

    @property
    def default_target(self) -> Literal["auto", "socket"]:
        """How a disk is exported unless somebody says otherwise."""

    def require(self) -> None:
        """Raises PvfrontError with a clear line if this is no guest, or the host is not there."""

    async def store(self) -> Xenstore:
        """A connection to the store; relative paths are this domain's. Raises XenstoreError."""

    def grant_mapper(self, own_domid: int) -> GrantMapper:
        """Maps what other domains granted. Raises DeviceUnavailable."""

    def grant_limit(self) -> int | None:
        """Pages that all processes together may have granted now; None: nobody knows."""

    def holdings(self) -> Holdings:
        """Who holds event channels and granted pages now, of all processes of this domain."""

    def claims(self) -> Claims: ...


class Xen:
    """A guest of Xen: device nodes, the kernel's drivers, /run/pvfront."""

    name: Literal["xen"] = "xen"
    default_target: Literal["auto"] = "auto"
    roots = sysfs.SYSTEM

    @property
    def run_dir(self) -> Path:
        return self.roots.run

    @property
    def config_dir(self) -> Path:
        return self.roots.root / "etc" / "pvfront"

    @property
    def dev_dir(self) -> Path:
        return self.roots.dev / "pvfront"

    def require(self) -> None:
        from .inventory import require_guest

        require_guest(self.roots)

    async def store(self) -> Xenstore:
        return await Xenstore.connect()

    def event_channels(self) -> EventChannels:
        return EventChannels.open()

    def grant_allocator(self) -> GrantAllocator:
        return GrantAllocator.open()

    def grant_mapper(self, own_domid: int) -> GrantMapper:
        return GrantMapper.open(own_domid=own_domid)

    def grant_limit(self) -> int | None:
        return grant_limit()

    def holdings(self) -> Holdings:
        return holdings.of_guest(self.roots.proc)

    def claims(self) -> Claims:
        return Claims(self.roots)


@dataclass(frozen=True)
class _HostRoots(sysfs.Roots):
    directory: Path = Path()

    @property
    def run(self) -> Path:
        return self.directory / "run"


class Embedded:
    """Domain `domid` of the embedded host whose directory is `directory`."""

    name: Literal["embedded"] = "embedded"
    default_target: Literal["socket"] = "socket"

    def __init__(self, directory: Path, domid: int = HOST_DOMID) -> None:
        self.directory = directory
        self.domid = domid
        self.roots = _HostRoots(directory=directory)

    @property
    def run_dir(self) -> Path:
        return self.roots.run

    @property
    def config_dir(self) -> Path:
        return self.directory / "etc"

    @property
    def dev_dir(self) -> Path:
        return self.directory / "dev"

    def require(self) -> None:
        for what in ("store.sock", "hub.sock"):
            path = self.directory / what
            kind = socket.SOCK_SEQPACKET if what == "hub.sock" else socket.SOCK_STREAM
            try:
                with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
                    probe.connect(os.fspath(path))
            except BlockingIOError:
                pass  # many are connecting just now
            except OSError as exc:
                code = errno.errorcode.get(exc.errno or 0, str(exc))
                raise PvfrontError(
                    f"${HOST_VARIABLE} is {self.directory}, but no embedded host runs there "
                    f"({what}: {code})",
                    hint=f"start one: pvfront-host {self.directory}; or unset {HOST_VARIABLE}",
                ) from exc
        self.run_dir.mkdir(mode=0o755, exist_ok=True)

    async def store(self) -> Xenstore:
        return await Xenstore.connect(
            os.fspath(self.directory / "store.sock"), home=f"/local/domain/{self.domid}"
        )

    def event_channels(self) -> EventChannels:
        from .host.handles import EmbeddedEventChannels

        return EmbeddedEventChannels.open(os.fspath(self.directory), domid=self.domid)

    def grant_allocator(self) -> GrantAllocator:
        from .host.handles import EmbeddedGrantAllocator

        return EmbeddedGrantAllocator.open(os.fspath(self.directory), domid=self.domid)

    def grant_mapper(self, own_domid: int) -> GrantMapper:
        from .host.handles import EmbeddedGrantMapper

        return EmbeddedGrantMapper.open(os.fspath(self.directory), own_domid=own_domid)

    def grant_limit(self) -> int | None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            limits = json.loads((self.directory / "limits.json").read_bytes())
            return int(limits["gntalloc"])
        return None

    def holdings(self) -> Holdings:
        from .host import books

        return holdings.of_host(books(self.directory), self.domid, "pvfront")

    def claims(self) -> Claims:
        return _NoKernelClaims(self.roots)


class _NoKernelClaims(Claims):
    """Claims where no kernel has a frontend of its own: only notes of what is ours."""

    def hold_autoprobe(self, holder: str) -> None:
        pass

    def release_autoprobe(self, holder: str) -> None:
        pass

    def probe(self, name: str) -> None:
        pass

    def probe_others(self, keep: object) -> list[str]:
        return []

    def driver_of(self, name: str) -> str | None:
        return None

    def os_device(self, name: str) -> str:
        return ""

    def taken(self, name: str) -> Taken | None:
        if not self._claim(name).exists():
            return None
        return Taken(name, kernel_had_bound=False)

    def take(self, name: str, *, force: bool = False) -> Taken:
        claim = Taken(name, kernel_had_bound=False)
        self._write(self._claim(name), json.dumps({"kernel_had_bound": False}) + "\n")
        return claim

    def undo(self, name: str) -> None:
        pass

    def give_back(self, name: str) -> str:
        self.forget(name)
        return f"{name}: released; the embedded host has no kernel to take it"


def platform(environ: Mapping[str, str] = os.environ) -> Platform:
    """Xen, unless $PVFRONT_HOST names the directory of an embedded host."""
    directory = environ.get(HOST_VARIABLE)
    return Embedded(Path(directory).absolute()) if directory else Xen()
