# SPDX-License-Identifier: BSD-2-Clause
"""Notices that the domain goes on as another one.

The watches of a domain fire anew when the kernel sets them in the new domain's store
(drivers/xen/xenbus/xenbus_xs.c, `xs_resume`). `domid` never changes otherwise. A suspend that was
cancelled sets nothing anew, and is none here.
"""

from __future__ import annotations

import logging
from typing import Any

from .context import Context, Resumed

log = logging.getLogger(__name__)

SENTINEL = "domid"


class Resumes:
    """Counts resumes, and tells of each."""

    name = "resume"

    def __init__(self) -> None:
        self._count = 0
        self._watching = False

    async def run(self, context: Context) -> None:
        async with context.store.watch(SENTINEL) as fired:
            await anext(fired)  # only says that the watch is set
            self._watching = True
            async for _ in fired:
                context.resumes += 1
                self._count = context.resumes
                log.info("the domain was resumed (%d since the agent's start)", context.resumes)
                context.events.publish(Resumed(context.resumes))

    def status(self) -> dict[str, Any]:
        return {"watching": self._watching, "count": self._count}
