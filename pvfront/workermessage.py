# SPDX-License-Identifier: BSD-2-Clause
"""What a worker says, decoded (native/include/pvf_ctl.h). Pure.

Nothing of it is believed: a message that is too short or of no known type has no body (`body_of`),
a state that does not exist is no HELLO.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from typing import Any

from .abi import ffi, lib


class State(enum.IntEnum):
    """enum pvf_worker_state."""

    IDLE = lib.PVF_IDLE
    ATTACHED = lib.PVF_ATTACHED
    RUNNING = lib.PVF_RUNNING
    DRAINING = lib.PVF_DRAINING
    DRAINED = lib.PVF_DRAINED
    BROKEN = lib.PVF_BROKEN
    TARGET_LOST = lib.PVF_TARGET_LOST


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker says of itself to every new supervisor."""

    state: State
    generation: int
    name: str
    pid: int
    in_flight: int
    targets: int  # bit i: queue i has an NBD socket
    queues: int  # that it was started with
    attached: int  # queues that are attached now
    build: str = ""  # `build_of` the program that it runs, as it was told

    @property
    def has_target(self) -> bool:
        """Whether each attached queue has its NBD socket."""
        return self.attached > 0 and self.targets.bit_count() >= self.attached


@dataclass(frozen=True, slots=True)
class Broken:
    """The backend broke a rule of the ring."""

    rule: int
    field: str
    value: int
    text: str
    queue: int = 0

    def __str__(self) -> str:
        return f"the backend broke rule {self.rule}: {self.field}={self.value:#x}: {self.text}"


@dataclass(frozen=True, slots=True)
class TargetGone:
    """The NBD socket ended (error 0) or broke its protocol."""

    error: int
    text: str
    queue: int = 0

    def __str__(self) -> str:
        why = errno.errorcode.get(self.error, str(self.error)) if self.error else "closed"
        return f"the NBD socket is gone ({why}{': ' + self.text if self.text else ''})"


@dataclass(frozen=True, slots=True)
class FeatureOff:
    """The backend answered EOPNOTSUPP: 'flush' or 'discard' is offered no more."""

    feature: str
    queue: int = 0


@dataclass(frozen=True, slots=True)
class Stalled:
    """No response for `seconds` with requests outstanding; 0: the stall has ended."""

    seconds: int
    in_flight: int
    queue: int = 0


@dataclass(frozen=True, slots=True)
class Exited:
    """The process has ended, or closed its control connection."""

    text: str


@dataclass(frozen=True, slots=True)
class Drained:
    """The ring is empty. Comes unasked when the requests of a client that has gone have left it."""


@dataclass(frozen=True, slots=True)
class Taken:
    """How a worker took over: for how long nobody served, and what was in the rings."""

    pause: float  # seconds
    in_flight: int


Event = Broken | TargetGone | FeatureOff | Stalled | Drained | Exited

BODIES = {
    lib.PVF_CTL_ATTACHED: "pvf_ctl_simple",
    lib.PVF_CTL_STARTED: "pvf_ctl_simple",
    lib.PVF_CTL_DRAINED: "pvf_ctl_simple",
    lib.PVF_CTL_DETACHED: "pvf_ctl_simple",
    lib.PVF_CTL_HANDED_OVER: "pvf_ctl_simple",
    lib.PVF_CTL_TRACING: "pvf_ctl_simple",
    lib.PVF_CTL_NOTED: "pvf_ctl_simple",
    lib.PVF_CTL_TAKEN_OVER: "pvf_ctl_taken_over",
    lib.PVF_CTL_ERROR: "pvf_ctl_error",
    lib.PVF_CTL_HELLO: "pvf_ctl_hello",
    lib.PVF_CTL_BROKEN: "pvf_ctl_broken",
    lib.PVF_CTL_TARGET_GONE: "pvf_ctl_target_gone",
    lib.PVF_CTL_FEATURE_OFF: "pvf_ctl_feature_off",
    lib.PVF_CTL_STALLED: "pvf_ctl_stalled",
    lib.PVF_CTL_LOG: "pvf_ctl_log",
}
"""What a worker says, by type: the structure of pvf_ctl.h that it is."""


def body_of(kind: int, data: bytes) -> Any:
    """The struct of a message of type `kind`, which lies in `data`; None: it is none."""
    name = BODIES.get(kind)
    if name is None or len(data) < ffi.sizeof(f"struct {name}"):
        return None
    return ffi.from_buffer(f"struct {name} *", data)


def hello_of(body: Any, generation: int) -> Hello | None:
    """HELLO; None: its state is unknown."""
    try:
        state = State(body.state)
    except ValueError:
        return None
    return Hello(
        state=state,
        generation=generation,
        name=text_of(body.name),
        pid=int(body.pid),
        in_flight=int(body.in_flight),
        targets=int(body.targets),
        queues=int(body.queues),
        attached=int(body.attached),
        build=text_of(body.build),
    )


def taken_of(body: Any) -> Taken:
    """TAKEN_OVER."""
    return Taken(int(body.pause_us) / 1e6, int(body.in_flight))


def event_of(kind: int, body: Any) -> Event:
    """BROKEN, TARGET_GONE, FEATURE_OFF or STALLED."""
    queue = int(body.queue)
    if kind == lib.PVF_CTL_BROKEN:
        field, text = text_of(body.field), text_of(body.text)
        return Broken(int(body.rule), field, int(body.value), text, queue)
    if kind == lib.PVF_CTL_TARGET_GONE:
        return TargetGone(int(body.error), text_of(body.text), queue)
    if kind == lib.PVF_CTL_FEATURE_OFF:
        # A barrier is how a backend without flush is flushed.
        discard = body.feature == lib.PVF_BLK_DISCARD
        return FeatureOff("discard" if discard else "flush", queue)
    return Stalled(int(body.seconds), int(body.in_flight), queue)


def text_of(field: Any) -> str:
    raw: bytes = ffi.string(field)
    return raw.decode("utf-8", "replace")
