# SPDX-License-Identifier: BSD-2-Clause
"""A dump of everything on the toolstack's word: `data/pvfront/debug`.

As XENBUS_DEBUG's trigger: each part says what it knows, to the log and to the PV console, which is
read from outside when nothing else of the guest is reachable. Not `control/sysrq`: that is the
kernel's. The node is emptied when the dump is done.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..xswire import printable
from .context import Context

log = logging.getLogger(__name__)

REQUEST = "data/pvfront/debug"
CONSOLE = "hvc0"
APART = 5.0  # seconds between two dumps: whoever asks in a loop fills no journal
_MOST_LINES = 400
_MOST_BYTES = 1 << 16  # of one state file
_WIDTH = 400


def lines(found: dict[str, Any], run_dir: Path) -> list[str]:
    """What is known: of the agent, and of every service that leaves state files."""
    text = [f"agent: {line}" for line in _flat(found)]
    for path in sorted(run_dir.glob("*.json")):
        try:
            with path.open("rb") as file:
                state = json.loads(file.read(_MOST_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            text.append(f"{path.stem}: cannot be read: {type(error).__name__}")
            continue
        text += [f"{path.stem}: {line}" for line in _flat(state)]
    if len(text) > _MOST_LINES:
        text = [*text[:_MOST_LINES], f"{len(text) - _MOST_LINES} lines more"]
    return [printable(line[:_WIDTH]) for line in text]


def _flat(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name} {key}".strip())
    else:
        yield f"{name} {value}"


class Debug:
    """Dumps when it is asked to."""

    name = "debug"

    def __init__(self, *, apart: float = APART) -> None:
        self._apart = apart
        self._dumps = 0

    async def run(self, context: Context) -> None:
        async with context.store.watch(REQUEST) as events:
            async for _ in events:
                if not await context.store.read_opt(REQUEST):
                    continue
                text = lines(context.status(), context.platform.run_dir)
                self._dumps += 1
                for line in text:
                    log.info("debug: %s", line)
                _to_console(context.platform.roots.dev / CONSOLE, text)
                await context.store.write(REQUEST, "")
                await asyncio.sleep(self._apart)

    def status(self) -> dict[str, Any]:
        return {"dumps": self._dumps}


def _to_console(path: Path, text: list[str]) -> None:
    """As much as it takes at once: a console that nobody reads must not hold us up."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # there is none
    try:
        for line in text:
            os.write(fd, f"pvfront: {line}\r\n".encode())
    except OSError:
        pass  # it is full
    finally:
        os.close(fd)
