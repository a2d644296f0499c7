# SPDX-License-Identifier: BSD-2-Clause
"""The network backend of the embedded host, as a process of its own.

    python -m pvfront.host.netback --host DIR [--domid 0] [--no-gso-tcpv4] [--queues 1] ...

serves every vif below backend/vif of its domain as Linux's netback does (vif.py), until SIGTERM.
The other end of each is a TAP, vif1.0 for interface 0 of domain 1, in the network namespace that
the process runs in. `NetBackend` starts such a process and drives it, also into what a backend must
not do (netfaults.py):

    async with (
        await NetNamespace.start(host.directory, "backend") as network,
        await NetBackend.start(host, network, gso_tcpv6=False) as backend,
    ):
        await host.attach_vif(1, "ip=10.7.0.1/24")
        await backend.fault(NetFault.rx_status(-1, count=1))

It wants CAP_NET_ADMIN in that namespace, and /dev/net/tun.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Self, Unpack

from pvfront.host.backend import Backend, BackendError, HasDirectory, Which
from pvfront.host.backend import main as run
from pvfront.host.faults import Misstep
from pvfront.host.netengine import Features
from pvfront.host.netfaults import NetFault
from pvfront.host.netns import NetNamespace
from pvfront.host.netprocess import NetProcess

__all__ = ["BackendError", "Features", "Misstep", "NetBackend", "NetFault", "main"]


class NetBackend(Backend):
    """A network backend's process. Made by `start`; an async context manager that stops it.

    Stopped or killed, it leaves states as they are, and the next one begins anew: the frontend sees
    InitWait and comes again.
    """

    NAME = "netback"
    KLASS = "vif"
    WHAT = "the network backend"
    FEATURES = Features

    @classmethod
    async def start(
        cls,
        host: HasDirectory,
        network: NetNamespace | None = None,
        *,
        domid: int = 0,
        **features: Any,
    ) -> Self:
        """Starts a backend in domain `domid` of a host, its interfaces in `network` (None: where
        the caller's are); `features` are those of `Features`.

        It is ready when this returns: the interfaces that exist are being probed. Its log is
        DIR/netback-DOMID.log. It ends with the caller's process. Raises PvfrontError.
        """
        prefix = () if network is None else network.prefix()
        return await cls._start(host.directory, domid, features, prefix)

    async def carrier(self, up: bool, **which: Unpack[Which]) -> None:
        """Tells the frontend whether the link is up."""
        await self._do("carrier", which, up=up)

    async def vifs(self) -> list[dict[str, Any]]:
        """What it serves: domid, vif, state (as last written), tap (its name; "": there is none),
        mistake (of the frontend's, that ended it; "": none).
        """
        return await self.devices()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(NetProcess, "network interfaces", Features, argv)


if __name__ == "__main__":
    sys.exit(main())
