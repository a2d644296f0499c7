# SPDX-License-Identifier: BSD-2-Clause
"""The network backend's process: process.py, for network interfaces."""

from __future__ import annotations

from pvfront.host.netfaults import NetFault
from pvfront.host.process import Process, Request
from pvfront.host.vif import Vif


class NetProcess(Process[Vif]):
    """Every interface below backend/vif."""

    NAME = "netback"
    KLASS = "vif"
    FAULT = NetFault
    device = Vif

    async def _carrier(self, request: Request) -> None:
        for vif in self._chosen(request):
            await vif.carrier(bool(request["up"]))

    COMMANDS = {  # noqa: RUF012
        **Process.COMMANDS,
        "carrier": _carrier,  # up
    }
