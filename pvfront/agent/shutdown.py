# SPDX-License-Identifier: BSD-2-Clause
"""Hooks around the end of the machine.

They are run by units that are stopped first and (nearly) last of all, not by the agent when it
sees a request: an administrator's shutdown is one too, and what stops the services must wait.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ..hooks import Hooks
from ..service import shutdown_kind

log = logging.getLogger(__name__)


async def run_hooks(moment: str, directory: Path) -> list[str]:
    """Runs the hooks of `moment`; a line for each that failed.

    Those of a shutdown only if the machine is on its way down.
    """
    if not moment.endswith("-shutdown"):
        return await Hooks(directory).run(moment)
    kind = await shutdown_kind()
    if not kind:
        log.info("%s: nothing is run: the machine is not on its way down", moment)
        return []
    return await Hooks(directory).run(moment, {"KIND": kind})
