# SPDX-License-Identifier: BSD-2-Clause
"""What a block backend of the embedded host can do wrong, as data. Pure: nothing is done here.

Two vocabularies, for the two places where a backend speaks:

* `Fault`: on the ring, in the granted pages, with events. A list of faults is a table of rules that
  the backend's C engine executes (native/host/blkback.h). Each request is looked at by every
  rule; one that matches lets `skip` requests pass, then fires with probability `chance`, `count`
  times (0: for ever). Of two faults of one kind that fire for a request the first counts, and no
  more than four fire for one request. With the same seed and the same requests in the same order
  on one ring, the same ones fire.
* `Misstep`: in the store. The backend takes honest steps (`STEPS`); a misstep stands before, after
  or in the place of one.

    await backend.fault(
        Fault.delay(5, op="write", chance=0.1),
        Fault.corrupt("id", stale=True, skip=1000, count=1),
    )
    await backend.misstep(Misstep.state(6, at="connect"))

Times are in milliseconds, sectors have 512 bytes whatever the disk's sector size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, TypedDict, Unpack

from pvfront.errors import PvfrontError

__all__ = [
    "KINDS", "OPERATIONS", "STEPS", "Fault", "FaultError", "Misstep", "Rule", "Selection", "whole",
]  # fmt: skip

OPERATIONS = {"read": 0, "write": 1, "barrier": 2, "flush": 3, "discard": 5}
"""BLKIF_OP_* by name; of an indirect request the operation inside counts."""

Operation = Literal["read", "write", "barrier", "flush", "discard"]

STATUS = {"okay": 0, "error": -1, "eopnotsupp": -2}
"""BLKIF_RSP_* by name."""

KINDS = (
    "delay", "stall", "reorder", "fail", "short", "drop", "duplicate", "corrupt", "producer",
    "lost_event", "storm", "pages", "slots", "outside", "look", "die",
)  # fmt: skip
"""The kinds of faults, named as in enum pvf_bb_kind."""

_WHEN = {"before": 0, "after": 1, "idle": 2}
_FIELDS = {"id": (0, 64), "operation": (1, 8), "status": (2, 16)}
_SET, _XOR, _STALE, _OTHER = range(4)
_U64 = (1 << 64) - 1
_ALWAYS = 0xFFFFFFFF
_SLOTS = 512

When = Literal["before", "after", "idle"]


class FaultError(PvfrontError, ValueError):
    """A fault that makes no sense; the message names the argument."""


class Selection(TypedDict, total=False):
    """Which requests a fault is for; what is left out selects all."""

    op: Operation | Sequence[Operation]
    sectors: tuple[int, int]
    """First and last sector; a request that touches one of them is meant. Flushes have none."""
    skip: int
    """So many matches pass first."""
    count: int
    """Fires so often; 0: for ever."""
    chance: float
    """Probability, 0..1."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of an engine's table; the other members are unsigned numbers."""

    kinds: ClassVar[Sequence[str]]

    kind: str

    def encode(self) -> dict[str, Any]:
        """The members of the engine's struct, for JSON."""
        return asdict(self)

    @classmethod
    def decode(cls, data: object) -> Self:
        """The reverse of `encode`. Raises FaultError."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or not data.keys() <= names or "kind" not in data:
            raise FaultError(f"no fault: {data!r}")
        if data["kind"] not in cls.kinds:
            raise FaultError(
                f"no kind of fault: {data['kind']!r}; there are {', '.join(cls.kinds)}"
            )
        for name, value in data.items():
            if name != "kind" and (not isinstance(value, int) or not 0 <= value <= _U64):
                raise FaultError(f"{name}={value!r} is no unsigned number")
        return cls(**data)


class Turns(TypedDict, total=False):
    """When a fault of a network's or a console's fires; what is left out: always."""

    skip: int
    """So many chances pass first."""
    count: int
    """Fires so often; 0: for ever."""


@dataclass(frozen=True, slots=True)
class Fault(Rule):
    """One rule of the engine's table; made by the constructors below, which check what they get.

    The members are those of struct pvf_bb_rule (native/host/blkback.h), `kind` by its name.
    """

    kinds = KINDS

    ops: int = 0
    first: int = 0
    last: int = _U64
    skip: int = 0
    count: int = 0
    chance: int = _ALWAYS
    mode: int = 0
    field: int = 0
    value: int = 0
    extra: int = 0

    # -- answers that are late, missing, too many ------------------------------------------------

    @classmethod
    def delay(cls, ms: float, to_ms: float | None = None, **which: Unpack[Selection]) -> Self:
        """Done and answered after `ms` milliseconds, or after some time in ms..to_ms."""
        low = _micro("ms", ms)
        high = low if to_ms is None else _micro("to_ms", to_ms)
        if high < low:
            raise FaultError(f"to_ms={to_ms} is less than ms={ms}")
        return cls._make("delay", which, value=low, extra=high)

    @classmethod
    def stall(cls, **which: Unpack[Selection]) -> Self:
        """Neither done nor answered before `BlkBackend.release` or `clear`."""
        return cls._make("stall", which)

    @classmethod
    def reorder(cls, window: int, *, ms: float = 2, **which: Unpack[Selection]) -> Self:
        """Held until `window` (1..512) requests are, `ms` at most; then done in random order."""
        return cls._make(
            "reorder", which, value=whole("window", window, 1, _SLOTS), extra=_micro("ms", ms)
        )

    @classmethod
    def drop(cls, *, done: bool = False, **which: Unpack[Selection]) -> Self:
        """Never answered; done nevertheless or not at all."""
        return cls._make("drop", which, mode=int(done))

    @classmethod
    def duplicate(cls, times: int = 1, **which: Unpack[Selection]) -> Self:
        """Answered `times` times more than once."""
        return cls._make("duplicate", which, value=whole("times", times, 1, _SLOTS))

    # -- answers that are wrong ------------------------------------------------------------------

    @classmethod
    def fail(cls, status: str | int = "error", **which: Unpack[Selection]) -> Self:
        """Not done, answered with `status`: "error", "eopnotsupp", "okay" or any 16-bit number."""
        return cls._make("fail", which, value=_status(status))

    @classmethod
    def short(cls, done: int = 0, **which: Unpack[Selection]) -> Self:
        """Only the first `done` sectors are done, the answer is OKAY: a read leaves the rest of
        the granted pages as they were, a write loses the rest.
        """
        return cls._make("short", which, value=whole("done", done, 0, _U64))

    @classmethod
    def corrupt(
        cls,
        field: Literal["id", "operation", "status"],
        value: int | str | None = None,
        *,
        xor: int | None = None,
        stale: bool = False,
        other: bool = False,
        **which: Unpack[Selection],
    ) -> Self:
        """A field of the response is wrong, in exactly one way: it is `value`; it is xored with
        `xor`; or, for the id, it is that of the request answered before (`stale`) or of another
        one that is in flight (`other`; left alone if there is none: combine it with `delay`).
        """
        if field not in _FIELDS:
            raise FaultError(f"field={field!r}: a response has {', '.join(_FIELDS)}")
        number, bits = _FIELDS[field]
        ways = [value is not None, xor is not None, stale, other]
        if sum(ways) != 1:
            raise FaultError("corrupt takes exactly one of value, xor, stale and other")
        mode = ways.index(True)
        if mode in (_STALE, _OTHER) and field != "id":
            raise FaultError(f"stale and other are for the id, not for {field!r}")
        argument = 0
        if mode == _SET:
            assert value is not None
            if isinstance(value, str):
                argument = _status(value)
            else:
                low = -(1 << 15) if field == "status" else 0
                argument = whole("value", value, low, (1 << bits) - 1)
        elif mode == _XOR:
            assert xor is not None
            argument = whole("xor", xor, 1, (1 << bits) - 1)
        return cls._make("corrupt", which, field=number, mode=mode, value=argument)

    @classmethod
    def producer(cls, by: int, **which: Unpack[Selection]) -> Self:
        """rsp_prod is published off by `by`: forward, or (negative) backward."""
        return cls._make("producer", which, value=distance(by))

    # -- events ----------------------------------------------------------------------------------

    @classmethod
    def lose_event(cls, **which: Unpack[Selection]) -> Self:
        """Answered without an event. As rsp_event stays unmet, none follows for later ones."""
        return cls._make("lost_event", which)

    @classmethod
    def storm(
        cls, per_second: int = 0, *, count: int = 0, chance: float = 1, wakes: bool = False
    ) -> Self:
        """Events without a cause, `per_second` of them, 0: as fast as possible; `count` in all.

        wakes: not events but bare wake-ups of the descriptor, which reach a masked port too.
        """
        return cls._make(
            "storm",
            Selection(count=count, chance=chance),
            mode=int(wakes),
            value=whole("per_second", per_second, 0, 1_000_000),
        )

    # -- memory ----------------------------------------------------------------------------------

    @classmethod
    def rewrite_pages(
        cls,
        when: When,
        *,
        pattern: int = 0,
        every_ms: float = 0.1,
        **which: Unpack[Selection],
    ) -> Self:
        """The request's bytes in the granted pages are overwritten with `pattern` (a 64-bit word;
        0: a random one): right before or after the response is published. "idle": all pages that
        the backend knows of, again and again while nothing is in flight; so the next write may
        bring what the backend itself put there.
        """
        return cls._rewrite("pages", when, pattern, every_ms, which)

    @classmethod
    def rewrite_slots(
        cls,
        when: When,
        *,
        pattern: int = 0,
        every_ms: float = 0.1,
        **which: Unpack[Selection],
    ) -> Self:
        """The response's slot in the ring is overwritten; "idle": the quarter of the ring whose
        responses the frontend has taken last, again and again while nothing is in flight. A
        frontend that has most of a ring of requests written, but not published, has them there
        too: it then gets answers to requests that it never made.
        """
        return cls._rewrite("slots", when, pattern, every_ms, which)

    @classmethod
    def touch_outside(cls, *, pattern: int = 0, **which: Unpack[Selection]) -> Self:
        """Bytes of the request's pages outside its segments are overwritten with `pattern`."""
        return cls._make("outside", which, value=whole("pattern", pattern, 0, _U64))

    @classmethod
    def look(cls, pattern: int, **which: Unpack[Selection]) -> Self:
        """No fault but a look: counts the 64-bit words `pattern` in the granted pages when a
        request is taken: outside of what a write brings, anywhere for a read. The counter is
        `canaries` of `BlkBackend.stats`.
        """
        return cls._make("look", which, value=whole("pattern", pattern, 1, _U64))

    @classmethod
    def die(cls, status: int = 1, **which: Unpack[Selection]) -> Self:
        """The backend's process ends at once, with exit status `status`."""
        return cls._make("die", which, value=whole("status", status, 0, 255))

    # -- the table -------------------------------------------------------------------------------

    @classmethod
    def _rewrite(
        cls, kind: str, when: str, pattern: int, every_ms: float, which: Selection
    ) -> Self:
        if when not in _WHEN:
            raise FaultError(f"when={when!r}: there are {', '.join(_WHEN)}")
        if when == "idle" and (which.keys() & {"op", "sectors", "skip"}):
            raise FaultError("an idle rewriting has no request to be selected by")
        return cls._make(
            kind,
            which,
            mode=_WHEN[when],
            value=whole("pattern", pattern, 0, _U64),
            extra=_micro("every_ms", every_ms),
        )

    @classmethod
    def _make(
        cls,
        kind: str,
        which: Selection,
        *,
        mode: int = 0,
        field: int = 0,
        value: int = 0,
        extra: int = 0,
    ) -> Self:
        unknown = which.keys() - Selection.__annotations__.keys()
        if unknown:
            raise FaultError(f"{kind}: no such argument: {', '.join(sorted(unknown))}")
        chance = which.get("chance", 1)
        if not 0 < chance <= 1:
            raise FaultError(f"chance={chance} is not in 0..1 (and not 0)")
        first, last = which.get("sectors", (0, _U64))
        whole("sectors", first, 0, _U64)
        whole("sectors", last, first, _U64)
        return cls(
            kind=kind,
            ops=_ops(which.get("op", ())),
            first=first,
            last=last,
            skip=whole("skip", which.get("skip", 0), 0, _U64),
            count=whole("count", which.get("count", 0), 0, _U64),
            chance=max(1, int(chance * _ALWAYS)),
            mode=mode,
            field=field,
            value=value & _U64,
            extra=extra,
        )


# -- the store -----------------------------------------------------------------------------------

STEPS = ("probe", "connect", "closing", "closed", "reconnect")
"""The honest steps of a backend: what it waits for, then what it does (as Linux's blkback).

probe      the toolstack made its nodes: publishes what it offers, InitWait
connect    the frontend is Initialised: maps its rings, publishes the disk's properties, Connected
closing    the frontend is Closing: Closing
closed     the frontend is Closed: lets go of its rings, Closed
reconnect  the frontend is Initialising again: InitWait
"""

Step = Literal["probe", "connect", "closing", "closed", "reconnect"]
Place = Literal["before", "instead", "after"]

ACTIONS = ("state", "keys", "vanish", "pause", "nothing")


@dataclass(frozen=True, slots=True)
class Misstep:
    """Something wrong at a step of the walk, `times` times (0: for ever) after `skip` good ones."""

    action: str
    at: str
    place: str = "instead"
    times: int = 1
    skip: int = 0
    number: int = 0
    keys: Mapping[str, str | None] | None = None

    @classmethod
    def state(
        cls, state: int, *, at: Step, place: Place = "instead", times: int = 1, skip: int = 0
    ) -> Self:
        """Writes `state`, any number, as its own."""
        return cls("state", at, place, times, skip, number=whole("state", state, -1000, 1000))

    @classmethod
    def write(
        cls,
        keys: Mapping[str, str | None],
        *,
        at: Step,
        place: Place = "after",
        times: int = 1,
        skip: int = 0,
    ) -> Self:
        """Writes keys of its own directory; None removes one."""
        if not keys:
            raise FaultError("no keys to write")
        return cls("keys", at, place, times, skip, keys=dict(keys))

    @classmethod
    def vanish(
        cls,
        *,
        at: Step,
        place: Place = "instead",
        back_after_ms: int = 0,
        times: int = 1,
        skip: int = 0,
    ) -> Self:
        """Removes its nodes; they return after some time, as new ones, or (0) never."""
        number = whole("back_after_ms", back_after_ms, 0, 3_600_000)
        return cls("vanish", at, place, times, skip, number=number)

    @classmethod
    def pause(cls, ms: int, *, at: Step, times: int = 1, skip: int = 0) -> Self:
        """The step comes `ms` milliseconds late."""
        return cls("pause", at, "before", times, skip, number=whole("ms", ms, 0, 3_600_000))

    @classmethod
    def silence(cls, *, at: Step, times: int = 0, skip: int = 0) -> Self:
        """The step is not taken: the frontend waits for nothing."""
        return cls("nothing", at, "instead", times, skip)

    def __post_init__(self) -> None:
        if self.at not in STEPS:
            raise FaultError(f"at={self.at!r}: the steps are {', '.join(STEPS)}")
        if self.place not in ("before", "instead", "after"):
            raise FaultError(f"place={self.place!r}: before, instead or after")
        if self.action not in ACTIONS:
            raise FaultError(f"no misstep: {self.action!r}; there are {', '.join(ACTIONS)}")
        whole("times", self.times, 0, _U64)
        whole("skip", self.skip, 0, _U64)

    def encode(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def decode(cls, data: object) -> Self:
        """The reverse of `encode`. Raises FaultError."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or not {"action", "at"} <= data.keys() <= names:
            raise FaultError(f"no misstep: {data!r}")
        return cls(**data)


# -- arguments -----------------------------------------------------------------------------------


def whole(name: str, value: object, low: int, high: int) -> int:
    """`value`, if it is a whole number in low..high. Raises FaultError."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FaultError(f"{name}={value!r} is not a whole number in {low}..{high}")
    return value


def distance(by: object) -> int:
    """How far an index is moved, forward or (negative) backward. Raises FaultError."""
    if not (value := whole("by", by, -(1 << 31), (1 << 31) - 1)):
        raise FaultError("by=0 moves nothing")
    return value


def counts(kind: str, when: Turns) -> tuple[int, int]:
    """`skip` and `count` of a fault. Raises FaultError."""
    if unknown := when.keys() - Turns.__annotations__.keys():
        raise FaultError(f"{kind}: no such argument: {', '.join(sorted(unknown))}")
    return (
        whole("skip", when.get("skip", 0), 0, _U64),
        whole("count", when.get("count", 0), 0, _U64),
    )


def _micro(name: str, ms: float) -> int:
    if not 0 <= ms <= 3_600_000:
        raise FaultError(f"{name}={ms} is not in 0..3600000 milliseconds")
    return round(ms * 1000)


def _status(status: str | int) -> int:
    if isinstance(status, int):
        return whole("status", status, -(1 << 15), (1 << 15) - 1)
    if status not in STATUS:
        raise FaultError(f"status={status!r}: {', '.join(STATUS)}, or a number")
    return STATUS[status]


def _ops(op: str | Sequence[str]) -> int:
    mask = 0
    for name in (op,) if isinstance(op, str) else op:
        if name not in OPERATIONS:
            raise FaultError(f"op={name!r}: the operations are {', '.join(OPERATIONS)}")
        mask |= 1 << OPERATIONS[name]
    return mask
