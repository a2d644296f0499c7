# SPDX-License-Identifier: BSD-2-Clause
"""The console backend's process: process.py, for consoles."""

from __future__ import annotations

from pvfront.host.consfaults import ConsFault
from pvfront.host.console import Console
from pvfront.host.process import Process


class ConsProcess(Process[Console]):
    """Every console below backend/console."""

    NAME = "consback"
    KLASS = "console"
    FAULT = ConsFault
    device = Console
