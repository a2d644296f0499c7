# SPDX-License-Identifier: BSD-2-Clause
"""What `pvfront console list` has of a console besides what `pvfront list` has. No output here."""

from __future__ import annotations

from typing import Any

from ..inventory import Device, read_state
from ..platform import platform


def more(device: Device) -> dict[str, Any]:
    """What its supervisor says of its terminal, and of who sits at it."""
    state = read_state(device.bus_name, platform().run_dir) or {}
    return {
        "path": str(state.get("os_device") or ""),
        "pty": str(state.get("pty") or ""),
        "pty_in_use": state.get("pty_in_use") is True,
        "clients": [str(who) for who in state.get("clients") or ()],
        "writer": str(state.get("writer") or ""),
    }
