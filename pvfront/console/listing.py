# SPDX-License-Identifier: BSD-2-Clause
"""What `pvfront console list` shows. No output here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..inventory import Device, read_state
from ..platform import Platform, platform
from .service import Consoles


def listed(found: Sequence[Device], on: Platform | None = None) -> list[dict[str, Any]]:
    """Each console of these devices, with what its supervisor says of it."""
    on = on or platform()
    rows = []
    for device in found:
        if device.klass != Consoles.klass:
            continue
        state = read_state(device.bus_name, on.run_dir) or {}
        rows.append(
            {
                **device.as_json(),
                "path": str(state.get("os_device") or ""),
                "pty": str(state.get("pty") or ""),
                "pty_in_use": state.get("pty_in_use") is True,
                "clients": [str(who) for who in state.get("clients") or ()],
                "writer": str(state.get("writer") or ""),
            }
        )
    return rows
