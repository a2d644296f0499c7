# SPDX-License-Identifier: BSD-2-Clause
"""What a class of devices must do for the loop that serves it (device.py): disk, net, console."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from .errors import PvfrontError
from .platform import Platform
from .startlimit import Limits
from .states import XenbusState
from .trace import Note, nothing
from .xenbus import XenbusDevice


class Frontend(ABC):
    """The half of a device that knows its class: what a disk, a net or a console does.

    Methods are called by one task only, never two at a time; `busy`, `in_flight` and `details`
    by anyone.

    What is not abstract here is right for a class whose users wait for nobody's answer and have
    nothing mounted: for packets and bytes, not for blocks.
    """

    def __init__(
        self, name: str, platform: Platform, *, stolen: Callable[[], bool] = lambda: False
    ) -> None:
        """`name`: "vbd-51728"; `stolen`: what `stolen` is to answer."""
        self.name = name
        self.platform = platform
        self.run_dir = platform.run_dir
        self.stalled = 0  # seconds without an answer of the backend, when they were told; else 0
        self._generation = 0
        self._trouble: str | None = None
        self._poke: Callable[[], None] = lambda: None
        self._note: Note = nothing
        self._stolen = stolen

    # -- what there is to know -----------------------------------------------------------------

    @property
    @abstractmethod
    def label(self) -> str:
        """What users call it ("xvdb")."""

    @property
    def trouble(self) -> str | None:
        """None while the data path works; else the reason why this generation is over."""
        return self._trouble

    @property
    def pending(self) -> bool:
        """Whether `update` has something to do although the backend wrote nothing."""
        return False

    @property
    @abstractmethod
    def publish_state(self) -> XenbusState:
        """What its keys are published with: Initialised, or Connected where backends act on nothing
        before."""

    @property
    def start_limits(self) -> Limits:
        """When workers have died often enough. Asked once."""
        return Limits()

    @property
    def generation(self) -> int:
        """Grows with each attach, also over restarts of the supervisor."""
        return self._generation

    @property
    def os_path(self) -> str:
        """The OS device ("/dev/nbd0") that may hold a file system; "" while there is none."""
        return ""

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """What status shows beyond the states."""

    def in_flight(self) -> int:
        """Requests of the OS device's users that are not answered."""
        return 0

    def unfenced(self) -> str | None:
        """Why the domain must not have another backend yet; None if it may.

        A request that a backend has not answered may be done after this domain has gone on with
        the next one, which knows nothing of it: only Connected, of the same backend, says that it
        was not left behind.
        """
        return None

    def busy(self) -> str | None:
        """Why the OS device cannot be taken away from its users now; None if it can."""
        return None

    @abstractmethod
    def stale_key(self, key: str) -> bool:
        """Whether `key` in the frontend's directory is left over from a connection."""

    def stolen(self) -> bool:
        """Whether the kernel's own frontend has bound the device again; undoes that."""
        return self._stolen()

    def on_poke(self, poke: Callable[[], None]) -> None:
        """`poke` is to be called whenever `trouble` or something else here has changed."""
        self._poke = poke

    def on_note(self, note: Note) -> None:
        """`note` is to be told what becomes of the worker, for the timeline (trace.py).

        Each death of one that nobody asked to end is a Kind.DIED: they are counted.
        """
        self._note = note

    # -- a generation ----------------------------------------------------------------------------

    @abstractmethod
    async def adopt(self, device: XenbusDevice) -> bool:
        """True if a living worker already serves this connection and was taken over."""

    @abstractmethod
    async def attach(self, device: XenbusDevice) -> Mapping[str, str]:
        """Begins a generation: opens ports and grants; returns the keys to publish."""

    @abstractmethod
    async def start(self, device: XenbusDevice) -> None:
        """The backend is Connected: read its features, start the data path."""

    async def update(self, device: XenbusDevice) -> None:
        """The backend wrote Connected once more (a resize), or the worker had something."""
        return

    @abstractmethod
    async def quiesce(self, timeout: float) -> bool:
        """Stops intake and waits for the ring to empty; False if it did not."""

    @abstractmethod
    async def detach(self, *, keep_target: bool) -> None:
        """Closes everything this generation holds. Never raises; idempotent."""

    @abstractmethod
    async def poisoned(self) -> None:
        """The domain slept while attached: lets go of everything but the event channel.

        A port that was bound during a suspend must never be unbound (docs/suspend.md).
        """

    # -- what is asked of a connected one --------------------------------------------------------

    def outdated(self) -> bool:
        """Whether the worker runs another program than the one that is installed.

        Reads that program's file, and so may take as long as a disk: for a thread.
        """
        return False

    async def upgrade(self) -> str:
        """Replaces the worker without a reconnect, in the next `update`; says how it went.

        Raises PvfrontError if the one before goes on. Called by anyone, while Connected.
        """
        raise PvfrontError(f"{self.label}: it has no worker that could be replaced")

    async def packets(self) -> dict[str, Any]:
        """Has the worker note packets for some seconds: "file" and "renew" (packettrace.py).

        Raises PvfrontError if it cannot. Called by anyone, while Connected.
        """
        raise PvfrontError(f"{self.label}: it is no network, and has no packets")

    # -- its end -----------------------------------------------------------------------------

    async def fail_after(self, seconds: float) -> None:
        """The machine is switched off: SIGTERM ends the worker now, and once it has ended, users'
        requests fail after so long, instead of waiting for another. Never raises.
        """
        return

    @abstractmethod
    async def close(self, *, drain: float = 10.0) -> None:
        """Closes the OS device; requests that have not ended within `drain` seconds fail.

        Never raises; idempotent.
        """

    @abstractmethod
    async def end(self) -> None:
        """Ends the worker, which holds nothing any more. Never raises; idempotent."""
