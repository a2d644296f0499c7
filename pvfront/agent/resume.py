# SPDX-License-Identifier: BSD-2-Clause
"""Notices that the domain goes on as another one.

The watches of a domain fire anew when the kernel sets them in the new domain's store
(drivers/xen/xenbus/xenbus_xs.c, `xs_resume`). `domid` never changes otherwise. A suspend that was
cancelled sets nothing anew, and is none here.

Whoever owns suspend (suspend.py) runs its hooks. Where nobody does, the kernel suspends without
asking, and what is left to tell is told here.

The count is of the guest's boot: it is kept in the run directory, together with the domain's id.
One that nobody saw, because no agent ran, is still seen by another id.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

from ..statefile import write_json
from .context import Context, Resumed
from .helper import Command, command, hooks_outside

log = logging.getLogger(__name__)

SENTINEL = "domid"
FILE = "resumes.json"


class Resumes:
    """Counts resumes, and tells of each."""

    name = "resume"

    def __init__(self, *, run: Command = command) -> None:
        self._run = run
        self._count = 0
        self._watching = False

    async def run(self, context: Context) -> None:
        path = context.platform.run_dir / FILE
        async with context.store.watch(SENTINEL) as fired:
            await anext(fired)  # it is set: from here on none is missed
            domid = await context.store.read(SENTINEL)
            self._count = context.resumes = max(context.resumes, _counted(path, domid))
            _save(path, domid, self._count)
            self._watching = True
            async for _ in fired:
                domid = await context.store.read(SENTINEL)
                context.resumes += 1
                _save(path, domid, context.resumes)
                self._count = context.resumes
                log.info("the domain was resumed (%d since its boot)", context.resumes)
                context.events.publish(Resumed(context.resumes))
                if not owned(context.platform.run_dir):
                    await self._tell_hooks()

    async def _tell_hooks(self) -> None:
        if failure := await hooks_outside("post-resume", run=self._run):
            log.warning("hooks of post-resume are not run: %s", failure)

    def status(self) -> dict[str, Any]:
        return {"watching": self._watching, "count": self._count}


def owned(run_dir: Path) -> bool:
    """Whether some service owns suspend now: it holds a lock."""
    try:
        fd = os.open(run_dir / "suspend.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def _counted(path: Path, domid: str) -> int:
    """What an agent before this one has counted, and the one that it cannot have seen."""
    try:
        saved = json.loads(path.read_text())
        missed = saved["domid"] != domid
        return int(saved["count"]) + int(missed)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _save(path: Path, domid: str, count: int) -> None:
    try:
        write_json(path, {"domid": domid, "count": count})
    except OSError as error:
        log.warning("%s: %s", path, error.strerror)
