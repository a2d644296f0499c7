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

import sys
from collections.abc import Sequence
from typing import Any, Self, Unpack

from pvfront.host.backend import Backend, BackendError, HasDirectory, Which
from pvfront.host.backend import main as run
from pvfront.host.blkengine import Features
from pvfront.host.blkprocess import BlkProcess
from pvfront.host.faults import Fault, Misstep

__all__ = ["BlkBackend", "BlkBackendError", "Fault", "Features", "Misstep", "main"]

BlkBackendError = BackendError


class BlkBackend(Backend):
    """A block backend's process. Made by `start`; an async context manager that stops it.

    `stop` leaves rings that nothing is under way in to the next one, which goes on with them; after
    requests that a fault holds back, or `kill`, it does not know what was under way: it goes
    Closing, and the frontend comes again with new rings.
    """

    NAME = "blkback"
    KLASS = "vbd"
    WHAT = "the block backend"
    FEATURES = Features

    @classmethod
    async def start(cls, host: HasDirectory, *, domid: int = 0, **features: Any) -> Self:
        """Starts a backend in domain `domid` of a host; `features` are those of `Features`.

        It is ready when this returns: the disks that exist are being probed. Its log is
        DIR/blkback-DOMID.log, of a second one DIR/blkback-DOMID.2.log. It ends with the caller's
        process, however that ends. Raises PvfrontError.
        """
        return await cls._start(host.directory, domid, features)

    async def resize(self, size: int, **which: Unpack[Which]) -> None:
        """Another size, in bytes, as when the device below a blkback is resized."""
        await self._do("resize", which, size=size)

    async def vbds(self) -> list[dict[str, Any]]:
        """What it serves: domid, vbd, state (as last written), size (bytes; None: no disk yet)."""
        return await self.devices()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(BlkProcess, "disks", Features, argv)


if __name__ == "__main__":
    sys.exit(main())
