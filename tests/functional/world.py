# SPDX-License-Identifier: BSD-2-Clause
"""What the tests of this directory may ask of the world that they run in.

There are two: the embedded host (embedded_world.py: processes on this machine, users of a disk are
NBD clients on its socket) and the lab (lab_world.py: a guest on a real Xen, users open
/dev/pvfront/NAME). A test knows a `World` only. Where the two differ in what is promised, it is
said here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")

Mode = Literal["w", "r"]


@dataclass(frozen=True)
class Seen:
    """A disk as its users see it; `size` in bytes."""

    size: int
    read_only: bool
    flush: bool
    discard: bool


class Result(Protocol):
    """How a command ended."""

    @property
    def code(self) -> int: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...


class Load(Protocol):
    """fio, writing and verifying until it is told to end."""

    def end(self) -> None:
        """Raises AssertionError if an operation failed, or did not read what was written."""


class Backing(Protocol):
    """Where a disk's bytes are, in the backend's domain."""

    @property
    def size(self) -> int:
        """Bytes."""

    def sha256(self) -> str:
        """Of all of it."""

    def hold(self) -> None:
        """From now on no request is answered before `release`. Needs `slow`."""

    def in_flight(self) -> int:
        """Requests that are held."""

    def release(self) -> None:
        """What is held is done and answered, and nothing is held any more."""

    def resize(self, mib: int) -> None:
        """Makes it larger, under the disk if one is attached."""

    def remove(self) -> None:
        """It must be detached."""


class Disk(Protocol):
    """An attached disk."""

    @property
    def name(self) -> str:
        """As in the xl config: xvdb."""

    @property
    def backing(self) -> Backing: ...

    # -- what is said of it --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the supervisor last wrote about it, {} if nothing. Quick: for waiting."""

    def status(self) -> dict[str, Any]:
        """`pvfront status --json`, with the worker's counters; {} if there is none."""

    def written(self) -> int:
        """Write requests answered so far, of a load that goes on. Quick: for waiting."""

    def served(self) -> bool:
        """Its users can open it, and both ends are Connected."""

    def worker(self) -> int:
        """The pid of its worker."""

    def os_device(self) -> str:
        """What its users open: a device node, or an NBD URI."""

    def backend_keys(self) -> dict[str, str]:
        """The backend's keys in the store, by name."""

    # -- its users -----------------------------------------------------------------------------

    def seen(self) -> Seen: ...

    def sha256(self) -> str:
        """Of the whole disk as a user reads it, past every cache."""

    def fio(
        self,
        *,
        rw: str = "randwrite",
        bs: str = "4k",
        depth: int = 8,
        size: str = "16M",
        extra: str = "",
    ) -> None:
        """Writes, reads back and verifies by checksum. Raises if anything is wrong."""

    def load(self, *, depth: int, size: str = "16M", reconnects: bool = False) -> Load:
        """Starts a load of 4 KiB writes, verified as it goes.

        `reconnects`: it outlives the worker. Behind a device node every program does, since the
        kernel keeps its requests. The client of a socket has to come again and ask again by itself
        when the socket closes: such a client (QEMU's, with reconnect-delay) stands between.
        """

    def discard(self) -> None:
        """All of it, and then all of it is set to zeroes."""

    def can_be_written(self) -> bool:
        """Tries to, with one block."""

    # -- its end -------------------------------------------------------------------------------

    def detach(self) -> None:
        """As `xl block-detach`; raises unless nothing of it is left in the store."""


class World(Protocol):
    """A guest with the disk service running for all disks, none attached."""

    @property
    def kernel_has(self) -> Sequence[str]:
        """Classes of devices of which the kernel has some, and keeps them."""

    @property
    def cycles(self) -> int:
        """How often to attach and detach a disk to see that nothing leaks."""

    @property
    def given_to(self) -> str:
        """The owner of a disk that pvfront gives back: kernel, or none where there is no kernel."""

    @property
    def idle_seconds(self) -> int:
        """How long an idle disk is watched here."""

    # -- the service ---------------------------------------------------------------------------

    def start(self) -> None: ...

    def stop(self) -> None:
        """By SIGTERM; raises if it does not end, or fails."""

    def running(self) -> bool: ...

    def supervisor(self) -> int:
        """Its pid."""

    def kill_supervisor(self) -> None:
        """By SIGKILL. Returns when another one runs, which is systemd's doing where there is one;
        it need not have adopted anything yet.
        """

    def kill(self, pid: int) -> None:
        """By SIGKILL."""

    def pvfront(self, *arguments: str) -> Result:
        """The command."""

    def devices(self) -> list[dict[str, Any]]:
        """`pvfront list --json`."""

    # -- disks ---------------------------------------------------------------------------------

    def backing(self, mib: int = 64, *, discard: bool = True, slow: bool = False) -> Backing:
        """`discard`: it can. `slow`: its requests can be held."""

    def attach(self, backing: Backing, *, mode: Mode = "w", stock: bool = False) -> Disk:
        """As `xl block-attach` of xvdb; returns when it is served.

        `stock`: by xl's own hotplug script, where the world has a quicker one.
        """

    def disk(
        self,
        mib: int = 64,
        *,
        mode: Mode = "w",
        discard: bool = True,
        slow: bool = False,
        stock: bool = False,
    ) -> AbstractContextManager[Disk]:
        """Both; in the end its users are ended, it is detached and its store removed."""

    # -- what is held --------------------------------------------------------------------------

    def held(self) -> dict[str, int]:
        """Counts of what disks take: workers, event channels and what else can be seen."""

    def supervisor_holds(self) -> tuple[int, int]:
        """Its descriptors, and its resident memory in KiB."""

    def grant_every_page(self) -> None:
        """Raises unless all pages that may be granted are free to be."""

    def cpu(self, pids: Sequence[int], seconds: float) -> list[int]:
        """Ticks of 10 ms that processes use in so many seconds from now."""

    # -- waiting -------------------------------------------------------------------------------

    def wait_until(self, what: str, holds: Callable[[], T], deadline: float = ...) -> T:
        """Asks again until the answer is true, and returns it; raises what never came."""

    def assert_no_io_errors(self) -> None:
        """No user was told of an I/O error, as far as it can be seen from outside of them."""
