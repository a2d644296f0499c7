# SPDX-License-Identifier: BSD-2-Clause
"""The order of a suspend, pure: events and the time go in, actions come out.

The stages, and what each is for, are told in suspend.py, which carries the actions out. Here is
what may follow what, which failure unwinds how far, and when another attempt makes sense.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from .veto import Line, LogEvent


@dataclass(frozen=True)
class Limits:
    """Deadlines in seconds. "Request" is the kernel's first acknowledgement.

    libxl gives up 60 s after the request. A suspend that is carried out after that leaves a domain
    that nobody will resume, so `last_write` plus twice `kernel_freeze` (user space, then kernel
    threads) must stay below it.
    """

    hooks: float = 10.0  # of the admin's programs, before that
    freeze: float = 20.0  # fsync on a slow disk: a task is frozen when its disk has answered
    settle: float = 10.0
    drain: float = 3.0  # of which waiting for nothing in flight
    close: float = 15.0
    last_write: float = 46.0  # since the request
    retry_before: float = 25.0  # since the request: a further attempt may begin
    kernel_freeze: float = 5.0  # pm_freeze_timeout during our own suspend
    taken: float = 5.0  # from writing "suspend" to the kernel's acknowledgement
    end: float = 30.0  # from then on, in which the log must have said that it is over
    rearm: float = 2.0
    reopen: float = 10.0


class Stage(enum.StrEnum):
    WATCHING = "watching"
    FREEZING = "freezing"
    SETTLING = "settling"
    CLOSING = "closing"
    SUSPENDING = "suspending"
    REARMING = "rearming"
    REOPENING = "reopening"
    THAWING = "thawing"


UNTRIED = "not started"
"""Why the veto is not on before it was tried."""

_BEFORE_WRITE = (Stage.FREEZING, Stage.SETTLING, Stage.CLOSING)


class Action(enum.Enum):
    """What the machine wants done. Each but POISON ends in one event, in brackets."""

    ARM = "arm"  # [Armed]; also answers after Limits.rearm if that takes longer, and goes on
    FREEZE = "freeze"  # [Done]
    SETTLE = "settle"  # [Done]
    CLOSE = "close"  # [Done]
    SUSPEND = "suspend"  # [Done when written or not written; Overdue if then nothing ends it]
    REOPEN = "reopen"  # [Done]
    THAW = "thaw"  # [Done]
    POISON = "poison"


@dataclass(frozen=True)
class Started:
    """The owner has begun."""


@dataclass(frozen=True)
class Armed:
    """Whether the veto is on now."""

    armed: bool
    reason: str = ""


@dataclass(frozen=True)
class Done:
    """An action has ended, well if `failure` is empty."""

    action: Action
    failure: str = ""


@dataclass(frozen=True)
class Overdue:
    """``suspend`` was taken by the kernel, but the log never said that it ended."""


@dataclass(frozen=True)
class Commanded:
    """``control/shutdown`` was written; `value` is what it held when we looked."""

    value: str


@dataclass(frozen=True)
class Refired:
    """The sentinel's watch fired: the domain has been resumed as a new one."""


Event = Started | Armed | Done | Overdue | Commanded | Refired | LogEvent


@dataclass
class Counts:
    """For `status`."""

    requests: int = 0
    suspended: int = 0
    cancelled: int = 0
    refused: int = 0
    unprepared: int = 0


@dataclass
class Machine:
    """The order of a suspend. `step` is all there is to it: it does no I/O and reads no clock."""

    limits: Limits = field(default_factory=Limits)
    stage: Stage = Stage.WATCHING
    armed: bool = False
    why_unarmed: str = UNTRIED
    counts: Counts = field(default_factory=Counts)
    last_refusal: str = ""
    threads_awake: bool = False  # the kernel gave this request up for threads of its own
    # Of the sequence that is going on:
    requested_at: float = 0.0
    suspended: bool = False  # the kernel got past the freeze after our write
    cancelled: bool | None = None  # what participants are told
    _ended: bool = False  # this request is settled: no further attempt
    _again: bool = False  # another request came after the suspend was over
    _failure: str = ""
    _stop: str = ""  # why the sequence must not go on, though no action has failed
    _expected: int = 0  # events of control/shutdown that requests explain
    _elapsed: float = 0.0  # of the latest freeze that was given up
    _lost_at: float | None = None

    def step(self, event: Event, now: float) -> list[Action]:
        """What to do next. `now`: seconds of a monotonic clock that stands still in a suspend."""
        match event:
            case Started():
                return [Action.ARM]
            case Armed():
                return self._on_armed(event)
            case Done():
                return self._on_done(event, now)
            case Overdue():
                if self.stage is Stage.SUSPENDING:
                    self.cancelled = None
                    return self._end()
                return []
            case Commanded():
                self._on_commanded(event)
                return []
            case Refired():
                return self._on_refired(now)
            case LogEvent():
                return self._on_log(event, now)

    # -- events ----------------------------------------------------------------------------

    def _on_armed(self, event: Armed) -> list[Action]:
        self.armed, self.why_unarmed = event.armed, event.reason
        if self.stage is Stage.REARMING:
            self.stage = Stage.REOPENING
            return [Action.REOPEN]
        return []

    def _on_log(self, event: LogEvent, now: float) -> list[Action]:
        match event.line:
            case Line.FREEZE_GIVEN_UP | Line.FREEZE_DONE:
                self._elapsed = event.elapsed
                if self.stage is Stage.SUSPENDING:
                    return []  # the veto is off on purpose
                self.armed, self.why_unarmed = False, "used up"
                return [Action.ARM]
            case Line.LOST:
                self._lost_at = now
                return [] if self.stage is Stage.SUSPENDING else [Action.ARM]
            case Line.XEN_SUSPENDING:
                if self.stage is Stage.SUSPENDING:
                    self.suspended = True
                    return []
                return self._unprepared()
            case Line.THAWED:
                if self.stage is Stage.SUSPENDING and self.suspended:
                    return self._end()
                return []
            case Line.REFUSED:
                return self._on_refused(event, now)

    def _on_refused(self, event: LogEvent, now: float) -> list[Action]:
        """do_suspend gave up: our veto, or the kernel could not freeze."""
        if self.stage is Stage.SUSPENDING:
            self._failure = f"the kernel gave up: {event.text}"
            self.threads_awake = "kernel threads" in event.text
            self._expected += 2  # events of our own write
            self.stage = Stage.REARMING
            return [Action.ARM]
        self.counts.requests += 1
        self.requested_at = now - self._elapsed
        self._elapsed = 0.0
        if self.stage is Stage.WATCHING:
            self.threads_awake = False
            return self._begin()
        if self.stage in _BEFORE_WRITE:
            self._expected += 2
        else:
            self._again = True
        return []

    def _on_commanded(self, event: Commanded) -> None:
        """A poweroff looks like a suspend in the node; what tells it is that no veto fired."""
        if self.stage not in _BEFORE_WRITE:
            return
        self._expected -= 1
        if event.value not in ("", "suspend"):
            self._stop = f"the toolstack asked for {event.value[:20]!r} meanwhile"
        elif self._expected < 0:
            self._stop = "the toolstack asked for something else meanwhile"

    def _on_refired(self, now: float) -> list[Action]:
        if self.stage in (Stage.SUSPENDING, Stage.REARMING, Stage.REOPENING, Stage.THAWING):
            self.cancelled = False
            return []
        # The log normally told of a resume first. If it lost lines, this is how we know.
        if self._lost_at is not None:
            self._lost_at = None
            return self._unprepared()
        return []

    def _unprepared(self) -> list[Action]:
        self.counts.unprepared += 1
        if self.stage in _BEFORE_WRITE:
            self._stop = "the domain was suspended before its devices were closed"
            self._ended = True
        return [Action.POISON]

    # -- the walk --------------------------------------------------------------------------

    def _begin(self) -> list[Action]:
        self.stage = Stage.FREEZING
        self.suspended = False
        self.cancelled = True
        self._ended = self._again = False
        self._failure = self._stop = ""
        self._expected = 2  # the toolstack's write and the kernel's acknowledgement
        return [Action.FREEZE]

    def _end(self) -> list[Action]:
        self._ended = True
        self.stage = Stage.REARMING
        self.armed, self.why_unarmed = False, "used up"
        return [Action.ARM]

    def _on_done(self, event: Done, now: float) -> list[Action]:
        failure = event.failure or self._stop
        late = now - self.requested_at
        if not failure and late > self.limits.last_write:
            failure = f"not ready {late:.0f} s after the request: too late for the toolstack"
        match self.stage, event.action:
            case Stage.FREEZING, Action.FREEZE:
                return self._go(failure, Stage.SETTLING, Action.SETTLE, else_thaw=True)
            case Stage.SETTLING, Action.SETTLE:
                return self._go(failure, Stage.CLOSING, Action.CLOSE, else_thaw=True)
            case Stage.CLOSING, Action.CLOSE:
                if not failure:
                    self.armed, self.why_unarmed = False, "suspending"
                return self._go(failure, Stage.SUSPENDING, Action.SUSPEND, else_thaw=False)
            case Stage.SUSPENDING, Action.SUSPEND:
                if not event.failure:
                    return []  # written: the log says when it is over
                self._failure = event.failure
                self.stage = Stage.REARMING
                return [Action.ARM]
            case Stage.REOPENING, Action.REOPEN:
                self.stage = Stage.THAWING
                return [Action.THAW]
            case Stage.THAWING, Action.THAW:
                return self._settle(now)
        return []  # the stage has moved on without it

    def _go(self, failure: str, stage: Stage, action: Action, *, else_thaw: bool) -> list[Action]:
        if not failure:
            self.stage = stage
            return [action]
        self._failure = failure
        if else_thaw:
            self.stage = Stage.THAWING
            return [Action.THAW]
        self.stage = Stage.REOPENING
        return [Action.REOPEN]

    def _settle(self, now: float) -> list[Action]:
        """Everything is as before the request: count, and try again if that makes sense."""
        if self._ended and not self._stop:
            if self.cancelled:
                self.counts.cancelled += 1
            else:
                self.counts.suspended += 1
            self.last_refusal = ""
        if self._again:
            return self._begin()
        if not self._ended and not self._stop:
            if now - self.requested_at <= self.limits.retry_before:
                return self._begin()
            self.counts.refused += 1
        if self._failure:
            self.last_refusal = self._failure
        self.stage = Stage.WATCHING
        return []
