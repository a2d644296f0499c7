# SPDX-License-Identifier: BSD-2-Clause
"""What the parts of the agent share: the store, the settings, and what happens to the domain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ..platform import Platform
from ..xenstore import Xenstore
from .settings import AgentSettings

WAITING = 64
"""Events that one subscriber may have waiting; of more it loses the oldest."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The domain goes on as a new one: restored, migrated. Its store is another."""

    count: int  # of them, since the guest's boot


@dataclass(frozen=True, slots=True)
class ShutdownAsked:
    """The toolstack wants `kind`: poweroff, reboot, halt, suspend, s3, s4, crash."""

    kind: str


Event = Resumed | ShutdownAsked


class Events:
    """Tells every subscriber. Never waits for one."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[Event]] = set()

    def publish(self, event: Event) -> None:
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    @contextlib.contextmanager
    def subscription(self) -> Iterator[asyncio.Queue[Event]]:
        """A queue of what is published meanwhile."""
        queue: asyncio.Queue[Event] = asyncio.Queue(WAITING)
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)


@dataclass
class Context:
    """Handed to `run` of every component. `store` is one connection that all of them share."""

    platform: Platform
    store: Xenstore
    settings: AgentSettings = field(default_factory=AgentSettings)
    events: Events = field(default_factory=Events)
    resumes: int = 0
    status: Callable[[], dict[str, Any]] = dict
    """What every component says of itself."""


class Component(Protocol):
    """One task of the agent."""

    @property
    def name(self) -> str:
        """For the log and for `status`."""

    async def run(self, context: Context) -> None:
        """Works until it is cancelled.

        PvfrontError or OSError: it is begun again after a pause. XenstoreLost ends the agent, and
        so does any other exception: systemd begins it anew.
        """

    def status(self) -> dict[str, Any]:
        """For `pvfront agent status`: plain values only."""


@runtime_checkable
class LastWord(Protocol):
    """A component that has something to say before the agent ends."""

    async def stopping(self, context: Context) -> None:
        """Called once, while all components still run; takes a second or two at most."""
