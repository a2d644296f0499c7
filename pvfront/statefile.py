# SPDX-License-Identifier: BSD-2-Clause
"""What a supervisor leaves in the run directory for `list` and `status`: always whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .device import DeviceLoop, Phase
from .inventory import statistics


def state_of(loop: DeviceLoop) -> dict[str, Any]:
    """A device as ``list``, ``status`` and the state file show it."""
    view = loop.device.view
    return {
        "name": loop.device.name,
        "class": loop.device.klass,
        "id": loop.device.devid,
        "backend": loop.device.backend,
        "backend_id": loop.device.backend_id,
        "phase": loop.phase.value,
        "reason": loop.reason,
        "generation": loop.frontend.generation,
        "reconnects": loop.reconnects,
        "connected_since": loop.connected_since,
        "gave_up_at": loop.gave_up_at,
        "last_trouble_at": loop.last_trouble[0] if loop.last_trouble else None,
        "last_trouble": loop.last_trouble[1] if loop.last_trouble else "",
        "frontend_state": view.frontend.label,
        "backend_state": view.backend.label,
        **loop.frontend.details(),
    }


def counters_of(loop: DeviceLoop | None) -> dict[str, Any]:
    """What its worker counts, for whom the kernel does not let look: the agent in its sandbox.

    "queues": the counters of each queue, None if there are none; "worker_runs".
    """
    details = {} if loop is None else loop.frontend.details()
    pid = details.get("worker_pid")
    queues = None
    if loop is not None:
        queues = statistics(pid, details.get("statistics_file"), loop.device.klass)
    return {"worker_runs": pid is not None, "queues": queues}


def save_state(run_dir: Path, loop: DeviceLoop) -> None:
    """Writes ``/run/pvfront/<name>.json``, whole or not at all; removes it once closed."""
    path = run_dir / f"{loop.device.name}.json"
    if loop.phase is Phase.CLOSED:
        path.unlink(missing_ok=True)
        return
    write_json(path, state_of(loop))


def write_json(path: Path, value: object) -> None:
    """Replaces a file in one step: whoever reads it finds the old text or the new."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1) + "\n")
    new.replace(path)
