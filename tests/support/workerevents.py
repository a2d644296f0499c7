# SPDX-License-Identifier: BSD-2-Clause
"""What a worker of this name says unasked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "worker"))

from waiting import eventually

from pvfront.worker import Worker
from pvfront.workermessage import Event

NAME = "vbd-51728"


class Events(list[Event]):
    """Collects what a worker says unasked."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        worker.on_event = self.append

    async def one(self, kind: type[Event]) -> Any:
        found = await eventually(
            f"a {kind.__name__} event (there were {list(self)})",
            lambda: [event for event in self if isinstance(event, kind)],
        )
        return found[0]
