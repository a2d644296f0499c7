# SPDX-License-Identifier: BSD-2-Clause
"""The console backend of the embedded host, as a process of its own.

    python -m pvfront.host.consback --host DIR [--domid 0] [--no-hold]

serves every secondary console below backend/console of its domain as QEMU does (console.py), until
SIGTERM. Who connects to DIR/console-DOMID-DEVID.chardev sits at it, one at a time. `ConsBackend`
starts such a process and drives it, also into what a backend must not do (consfaults.py):

    async with await ConsBackend.start(host) as backend:
        devid = await host.attach_console(1, "connection=socket,name=org.example.login")
        await backend.fault(ConsFault.index("in_prod", 5000, count=1))
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Self

from pvfront.host.backend import Backend, HasDirectory
from pvfront.host.backend import main as run
from pvfront.host.consfaults import ConsFault
from pvfront.host.consparams import ConsFeatures
from pvfront.host.consprocess import ConsProcess
from pvfront.host.faults import Misstep

__all__ = ["ConsBackend", "ConsFault", "ConsFeatures", "Misstep", "main"]


class ConsBackend(Backend):
    """A console backend's process. Made by `start`; an async context manager that stops it.

    Stopped or killed, it leaves states as they are, and the next one begins anew.
    """

    NAME = "consback"
    KLASS = "console"
    WHAT = "the console backend"
    FEATURES = ConsFeatures

    @classmethod
    async def start(cls, host: HasDirectory, *, domid: int = 0, **features: Any) -> Self:
        """Starts a backend in domain `domid` of a host; `features` are those of ConsFeatures.

        It is ready when this returns. Its log is DIR/consback-DOMID.log. It ends with the caller's
        process. Raises PvfrontError.
        """
        return await cls._start(host.directory, domid, features)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(ConsProcess, "consoles", ConsFeatures, argv)


if __name__ == "__main__":
    sys.exit(main())
