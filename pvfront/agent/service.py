# SPDX-License-Identifier: BSD-2-Clause
"""The agent as a service: its components, each a task; what it tells systemd and `status`.

A component that fails for a reason outside of it (no D-Bus, no netlink) is begun again after a
pause that doubles; the others go on. Without the store nothing is left to do: the agent ends, and
systemd begins it anew.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..errors import PvfrontError
from ..platform import platform
from ..questions import answering, ask
from ..service import keep_watchdog, sd_notify
from ..xenstore import XenstoreLost
from . import SOCKET
from .board import Board
from .clock import Clock
from .context import Component, Context, LastWord
from .control import Control
from .debug import Debug
from .keys import VifKeys, VolumeKeys
from .memory import Memory
from .network import Network
from .publish import Publisher
from .requests import HostName, StaticAddresses
from .resume import Resumes
from .settings import AgentSettings
from .suspendable import Suspendable
from .system import System
from .volumes import Volumes
from .xeniface.component import Xeniface

log = logging.getLogger(__name__)

PAUSES = (1.0, 60.0)  # seconds before a component that failed is begun again: first, most


def guest_data() -> list[Component]:
    """What is published: collectors put keys on a board, one publisher writes them.

    With them what has something to say on the toolstack's requests.
    """
    board, vifs, volumes = Board(), VifKeys(), VolumeKeys()
    return [
        Publisher(board, vifs, volumes),
        System(board),
        network := Network(board, vifs),
        Volumes(board, volumes),
        Control(board),
        Suspendable(board),
        StaticAddresses(board, network.ifname),
        HostName(board),
    ]


COMPONENTS: list[Callable[[], list[Component]]] = [
    lambda: [Resumes(), Xeniface()],
    guest_data,
    lambda: [Clock(), Memory(), Debug()],
]
"""What the agent consists of, in the order in which it is begun."""


class Agent:
    """Runs components side by side until `stop`."""

    def __init__(
        self,
        context: Context,
        components: Collection[Component],
        *,
        pauses: tuple[float, float] = PAUSES,
    ) -> None:
        self._context = context
        context.status = self.status
        self._components = list(components)
        self._pauses = pauses
        self._failed: dict[str, str] = {}
        self._stop = asyncio.Event()

    def stop(self) -> None:
        self._stop.set()

    async def run(self, *, signals: bool = True) -> None:
        """Raises what ended it, if that was not `stop`, SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
            loop.add_signal_handler(number, self.stop)
        run_dir = self._context.platform.run_dir
        run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        async with answering(run_dir / SOCKET, "agent", {"status": self._do_status}):
            tasks: list[asyncio.Task[Any]] = [asyncio.create_task(self._stop.wait(), name="stop")]
            tasks += [
                asyncio.create_task(self._keep(component), name=component.name)
                for component in self._components
            ]
            tasks.append(asyncio.create_task(keep_watchdog(), name="watchdog"))
            sd_notify("READY=1", "STATUS=running")
            try:
                # The watchdog's ends at once where nobody asks for it.
                done, _ = await asyncio.wait(tasks[:-1], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                await self._last_words()
            finally:
                sd_notify("STOPPING=1")
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _last_words(self) -> None:
        for component in self._components:
            if isinstance(component, LastWord):
                await component.stopping(self._context)

    async def _keep(self, component: Component) -> None:
        loop = asyncio.get_running_loop()
        first, most = self._pauses
        pause = first
        while True:
            # What has run for as long as it would have paused is well again.
            well = loop.call_later(pause, self._failed.pop, component.name, None)
            begun = loop.time()
            try:
                await component.run(self._context)
                await asyncio.Event().wait()  # it has nothing to do in this guest
            except XenstoreLost:
                raise
            except (PvfrontError, OSError) as error:
                if loop.time() - begun > pause:
                    pause = first
                if self._failed.get(component.name) != str(error):
                    log.warning("%s: %s", component.name, error)
                self._failed[component.name] = str(error)
            finally:
                well.cancel()
            await asyncio.sleep(pause)
            pause = min(2 * pause, most)

    def status(self) -> dict[str, Any]:
        """Of every component, by name; `failed` says why one does not work now."""
        found: dict[str, Any] = {}
        for component in self._components:
            found[component.name] = component.status()
            if component.name in self._failed:
                found[component.name]["failed"] = self._failed[component.name]
        return found

    async def _do_status(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"ok": True, "agent": self.status()}


async def serve(settings: AgentSettings) -> None:
    """The agent until SIGTERM."""
    on = platform()
    on.require()
    async with await on.store() as store:
        context = Context(on, store, settings)
        await Agent(context, [one for make in COMPONENTS for one in make()]).run()


async def ask_status(run_dir: Path) -> dict[str, Any]:
    """What the running agent says of itself. Raises PvfrontError if none runs."""
    try:
        answer = await ask(run_dir / SOCKET, {"verb": "status"})
    except (FileNotFoundError, ConnectionRefusedError):
        raise PvfrontError(
            "the agent does not run", hint="systemctl start pvfront-agent; or: pvfront agent run"
        ) from None
    except PermissionError:
        raise PvfrontError("the agent answers root only", hint="run it as root") from None
    found = answer.get("agent")
    return found if isinstance(found, dict) else {}
