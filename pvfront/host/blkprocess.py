# SPDX-License-Identifier: BSD-2-Clause
"""The block backend's process: process.py, for disks."""

from __future__ import annotations

from pvfront.host.faults import Fault
from pvfront.host.process import Process, Request
from pvfront.host.vbd import Vbd


class BlkProcess(Process[Vbd]):
    """Every disk below backend/vbd."""

    NAME = "blkback"
    KLASS = "vbd"
    FAULT = Fault
    device = Vbd

    async def _resize(self, request: Request) -> None:
        for vbd in self._chosen(request):
            await vbd.resize(int(request["size"]))

    COMMANDS = {  # noqa: RUF012
        **Process.COMMANDS,
        "resize": _resize,  # size: bytes
    }
