# SPDX-License-Identifier: BSD-2-Clause
"""XenbusState, and the frontend's walk through it as one pure table.

Each end writes its own `state` key and reads the other's (xen/include/public/io/xenbus.h). The
frontend's walk, whatever the class of the device:

    close cycle   5 → backend 5 or 6 → 6 → backend 6      both ends at rest
    restart       stale keys removed, 1 → backend 2       fresh start
    connect       keys and 3 → backend 4 → 4
                  a network's: keys and 4 → backend 4, since netback acts on nothing before

`next_step` says what comes next from any pair of states: a fresh start, what a crash left behind
(4/4 with nobody behind the keys), a detach, a backend that jumps. It knows no descriptor and no
clock: whoever calls it does the step, waits where it says so with a deadline, and asks again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum, auto


class XenbusState(IntEnum):
    """enum xenbus_state of xen/include/public/io/xenbus.h. UNKNOWN also means: no such key."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8

    @property
    def label(self) -> str:
        """For people, with the number that the store shows: `InitWait (2)`."""
        return f"{self.name.title().replace('_', '')} ({int(self)})"


@dataclass(frozen=True, slots=True)
class StateReading:
    """A state key as it was found; `reason` says why it counts as UNKNOWN, if it does."""

    state: XenbusState
    reason: str | None = None


def read_state(value: str | None) -> StateReading:
    """What the text of a `state` key means; None for a missing key. Never raises."""
    if value is None:
        return StateReading(XenbusState.UNKNOWN, "there is no state key")
    if len(value) == 1 and value in "012345678":
        return StateReading(XenbusState(int(value)))
    return StateReading(XenbusState.UNKNOWN, f"state={value[:40]!a} is no number from 0 to 8")


def parse_state(value: str | None) -> XenbusState:
    """The state alone: UNKNOWN for a missing key and for nonsense."""
    return read_state(value).state


class Goal(Enum):
    """Where the frontend wants to be."""

    CONNECTED = auto()
    CLOSED = auto()


class Step(Enum):
    """What the frontend does next."""

    WRITE_CLOSING = auto()
    """Stop intake, wait until the ring is empty (if there is one), then write Closing (5)."""
    PAUSE_THEN_WRITE_CLOSING = auto()
    """The backend refused to connect: wait a little before going round, then WRITE_CLOSING."""
    WAIT_BACKEND_CLOSING = auto()
    """Wait until the backend is Closing or Closed."""
    WRITE_CLOSED = auto()
    """Write Closed (6)."""
    WAIT_BACKEND_CLOSED = auto()
    """Wait until the backend is Closed; then it has let go of ring, port and grants."""
    RESTART = auto()
    """Free what the old connection held, remove its keys, write Initialising (1)."""
    WAIT_INIT_WAIT = auto()
    """Wait until the backend is in InitWait (2)."""
    ALLOCATE_AND_PUBLISH = auto()
    """Open ring and port; publish them with Initialised (3), or what the class of devices has in
    its place, in one transaction."""
    WAIT_CONNECTED = auto()
    """Wait until the backend is Connected (4)."""
    CONNECT = auto()
    """Read the backend's features now, start the data path, write Connected (4)."""
    DONE = auto()
    """The goal is reached. With Goal.CLOSED: free what is held, remove the keys."""
    DETACHED = auto()
    """The device goes away for good: free what is held; nothing more to write."""


WAITS = frozenset(
    {
        Step.WAIT_BACKEND_CLOSING,
        Step.WAIT_BACKEND_CLOSED,
        Step.WAIT_INIT_WAIT,
        Step.WAIT_CONNECTED,
    }
)
"""Steps that wait for the backend and therefore need a deadline."""

ENDS = frozenset({Step.DONE, Step.DETACHED})

WRITES: dict[Step, XenbusState] = {
    Step.WRITE_CLOSING: XenbusState.CLOSING,
    Step.PAUSE_THEN_WRITE_CLOSING: XenbusState.CLOSING,
    Step.WRITE_CLOSED: XenbusState.CLOSED,
    Step.RESTART: XenbusState.INITIALISING,
    Step.ALLOCATE_AND_PUBLISH: XenbusState.INITIALISED,  # a network's: Connected
    Step.CONNECT: XenbusState.CONNECTED,
}
"""The frontend state that a step ends with."""

AWAITED: dict[Step, frozenset[XenbusState]] = {
    Step.WAIT_BACKEND_CLOSING: frozenset({XenbusState.CLOSING, XenbusState.CLOSED}),
    Step.WAIT_BACKEND_CLOSED: frozenset({XenbusState.CLOSED}),
    Step.WAIT_INIT_WAIT: frozenset({XenbusState.INIT_WAIT}),
    Step.WAIT_CONNECTED: frozenset({XenbusState.CONNECTED}),
}
"""The backend states that a wait is for. Any other change ends it too: ask `next_step` again."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A step and why it is the next one, for the log."""

    step: Step
    reason: str


def next_step(
    frontend: XenbusState,
    backend: XenbusState,
    *,
    online: bool,
    goal: Goal,
    published: bool = False,
    started: bool = True,
) -> Decision:
    """The next step from the states found. Total: every combination has one.

    online: the backend's `online` key is 1; 0 together with a backend that closes is a detach.
    published: the present keys are those of a connection that this frontend holds now. False for
    whatever was found at a start: the ring behind those keys is then nobody's.
    started: the data path of that connection runs. Where keys are published with Initialised, that
    is what Connected says.

    Between any two waits (or pauses) a walk takes a handful of steps, never a cycle.
    """
    if frontend is XenbusState.UNKNOWN and (backend is XenbusState.UNKNOWN or not online):
        return Decision(Step.DETACHED, "the device's nodes are gone")
    return _TABLE[frontend](_Found(backend, online, goal, published, started))


@dataclass(frozen=True, slots=True)
class _Found:
    backend: XenbusState
    online: bool
    goal: Goal
    published: bool
    started: bool

    @property
    def leave(self) -> bool:
        """Whether the walk ends in Closed. An offline device is not connected again."""
        return self.goal is Goal.CLOSED or not self.online

    @property
    def why_leave(self) -> str:
        return "the goal is Closed" if self.goal is Goal.CLOSED else "the device is detached"


def _initialising(found: _Found) -> Decision:
    backend = found.backend
    if found.leave:
        # A toolstack fails to detach a device that is left in 1: answer it.
        return Decision(Step.WRITE_CLOSING, found.why_leave)
    if backend is XenbusState.INIT_WAIT:
        return Decision(Step.ALLOCATE_AND_PUBLISH, "both ends are at a fresh start")
    if backend in (XenbusState.UNKNOWN, XenbusState.INITIALISING):
        return Decision(Step.WAIT_INIT_WAIT, "the backend is still starting")
    if backend is XenbusState.CLOSED:
        return Decision(Step.WAIT_INIT_WAIT, "the backend answers Initialising with InitWait")
    return Decision(
        Step.WRITE_CLOSING,
        f"a backend in {backend.label} does not react to Initialising: close first",
    )


def _initialised(found: _Found) -> Decision:
    backend = found.backend
    if not found.published:
        return Decision(Step.WRITE_CLOSING, "the published ring is left over, nobody holds it")
    if found.leave:
        return Decision(Step.WRITE_CLOSING, found.why_leave)
    if backend is XenbusState.CONNECTED:
        return Decision(Step.CONNECT, "the backend has mapped the ring")
    if backend in (XenbusState.INITIALISING, XenbusState.INIT_WAIT, XenbusState.INITIALISED):
        return Decision(Step.WAIT_CONNECTED, "the backend has not mapped the ring yet")
    # blkback with requests of the old connection still in flight ("pending I/O") ends here.
    return Decision(
        Step.PAUSE_THEN_WRITE_CLOSING,
        f"the backend went to {backend.label} instead of Connected: go round again after a pause",
    )


def _connected(found: _Found) -> Decision:
    backend = found.backend
    if not found.published:
        return Decision(Step.WRITE_CLOSING, "the connection is left over, nobody holds its ring")
    if not found.started:
        return _initialised(found)
    if found.goal is Goal.CLOSED:
        return Decision(Step.WRITE_CLOSING, found.why_leave)
    if backend is XenbusState.CONNECTED:
        # online=0 alone asks for nothing: a detach also sets the backend to Closing.
        return Decision(Step.DONE, "both ends are connected")
    if backend is XenbusState.CLOSING and not found.online:
        return Decision(Step.WRITE_CLOSING, found.why_leave)
    return Decision(Step.WRITE_CLOSING, f"the backend left Connected for {backend.label}")


def _closing(found: _Found) -> Decision:
    backend = found.backend
    if backend in AWAITED[Step.WAIT_BACKEND_CLOSING]:
        return Decision(Step.WRITE_CLOSED, "the backend has seen Closing")
    if backend is XenbusState.UNKNOWN and not found.online:
        return Decision(Step.WRITE_CLOSED, "there is no backend any more to wait for")
    return Decision(Step.WAIT_BACKEND_CLOSING, f"the backend is still in {backend.label}")


def _closed(found: _Found) -> Decision:
    backend = found.backend
    if not found.online and backend in (XenbusState.CLOSED, XenbusState.UNKNOWN):
        return Decision(Step.DETACHED, "both ends are closed and the device is offline")
    if backend is XenbusState.CLOSED:
        if found.goal is Goal.CLOSED:
            return Decision(Step.DONE, "both ends are closed")
        return Decision(Step.RESTART, "both ends are closed: start afresh")
    if backend in (XenbusState.INITIALISING, XenbusState.INIT_WAIT) and not found.leave:
        return Decision(Step.RESTART, "the backend is new and waits for a fresh start")
    return Decision(Step.WAIT_BACKEND_CLOSED, f"the backend is still in {backend.label}")


def _odd(state: XenbusState) -> Callable[[_Found], Decision]:
    def row(found: _Found) -> Decision:
        return Decision(
            Step.WRITE_CLOSING, f"a frontend of ours is never in {state.label}: close first"
        )

    return row


_TABLE: dict[XenbusState, Callable[[_Found], Decision]] = {
    XenbusState.UNKNOWN: _odd(XenbusState.UNKNOWN),
    XenbusState.INITIALISING: _initialising,
    XenbusState.INIT_WAIT: _odd(XenbusState.INIT_WAIT),
    XenbusState.INITIALISED: _initialised,
    XenbusState.CONNECTED: _connected,
    XenbusState.CLOSING: _closing,
    XenbusState.CLOSED: _closed,
    XenbusState.RECONFIGURING: _odd(XenbusState.RECONFIGURING),
    XenbusState.RECONFIGURED: _odd(XenbusState.RECONFIGURED),
}
