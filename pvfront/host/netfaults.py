# SPDX-License-Identifier: BSD-2-Clause
"""What a network backend of the embedded host can do wrong on its rings, as data. Pure.

A list of faults is a table of rules that the backend's C engine executes (native/host/netback.h).
A fault is looked at whenever what it is about happens: a response, a packet, an event. It lets
`skip` of them pass, then fires `count` times (0: for ever). For the store there is `Misstep` of
faults.py.

    await backend.fault(NetFault.rx_id(77, skip=100, count=1))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, Unpack

from pvfront.host.faults import FaultError, Rule, Turns, counts, distance, whole

__all__ = ["KINDS", "NetFault"]

KINDS = (
    "rx_id", "rx_offset", "rx_status", "rx_flags", "rx_extra", "rx_rewrite", "rx_producer",
    "rx_headroom",
    "tx_id", "tx_status", "tx_drop", "tx_duplicate", "tx_look", "producer", "silent", "storm",
    "ctrl_id", "ctrl_type", "ctrl_status", "ctrl_data", "ctrl_drop", "ctrl_duplicate", "ctrl_hold",
    "ctrl_scribble", "ctrl_producer", "ctrl_silent", "ctrl_storm",
)  # fmt: skip
"""The kinds of faults, named as in enum pvf_nb_kind."""

FLAGS = {"data_validated": 1, "csum_blank": 2, "more_data": 4, "extra_info": 8}
"""NETRXF_* by name."""

STATUS = {"okay": 0, "error": -1, "dropped": -2, "null": 1}
"""NETIF_RSP_* by name."""

EXTRAS = {"none": 0, "gso": 1, "mcast_add": 2, "mcast_del": 3, "hash": 4, "xdp": 5}
"""XEN_NETIF_EXTRA_TYPE_* by name."""

REQUESTS = {
    "any": 0, "get_hash_flags": 1, "set_hash_flags": 2, "set_hash_key": 3,
    "get_hash_mapping_size": 4, "set_hash_mapping_size": 5, "set_hash_mapping": 6,
    "set_hash_algorithm": 7, "get_gref_mapping_size": 8, "add_gref_mapping": 9,
    "del_gref_mapping": 10,
}  # fmt: skip
"""XEN_NETIF_CTRL_TYPE_* by name."""

_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class NetFault(Rule):
    """One rule of the engine's table; made by the constructors below, which check what they get."""

    kinds = KINDS

    value: int = 0
    only: int = 0
    """Of the control ring: of requests of this type (REQUESTS) only."""
    skip: int = 0
    count: int = 0

    # -- what the frontend receives --------------------------------------------------------------

    @classmethod
    def rx_id(cls, value: int, **when: Unpack[Turns]) -> Self:
        """A received slot's id is `value`."""
        return cls._make("rx_id", whole("value", value, 0, 0xFFFF), when)

    @classmethod
    def rx_offset(cls, value: int, **when: Unpack[Turns]) -> Self:
        """A received slot's offset in its page is `value`."""
        return cls._make("rx_offset", whole("value", value, 0, 0xFFFF), when)

    @classmethod
    def rx_status(cls, value: int, **when: Unpack[Turns]) -> Self:
        """A received slot's status, the number of its bytes, is `value`."""
        return cls._make("rx_status", whole("value", value, -(1 << 15), (1 << 15) - 1), when)

    @classmethod
    def rx_flags(
        cls,
        *flip: Literal["data_validated", "csum_blank", "more_data", "extra_info"],
        **when: Unpack[Turns],
    ) -> Self:
        """These flags of a received slot are turned over."""
        unknown = set(flip) - FLAGS.keys()
        if unknown or not flip:
            raise FaultError(f"flags {sorted(unknown)}: there are {', '.join(FLAGS)}")
        return cls._make("rx_flags", sum(FLAGS[name] for name in set(flip)), when)

    @classmethod
    def rx_extra(
        cls,
        kind: str | int,
        *,
        gso_size: int = 0,
        gso_type: int = 0,
        times: int = 1,
        **when: Unpack[Turns],
    ) -> Self:
        """A received packet has extra info of this kind instead of its own, `times` times."""
        number = EXTRAS[kind] if isinstance(kind, str) else whole("kind", kind, 0, 0xFF)
        value = number | whole("gso_type", gso_type, 0, 0xFF) << 8
        value |= whole("gso_size", gso_size, 0, 0xFFFF) << 16
        return cls._make("rx_extra", value | whole("times", times, 1, 4) << 32, when)

    @classmethod
    def rx_rewrite(cls, **when: Unpack[Turns]) -> Self:
        """The pages of a received packet are overwritten right after it was given."""
        return cls._make("rx_rewrite", 0, when)

    @classmethod
    def rx_headroom(cls, room: int, **when: Unpack[Turns]) -> Self:
        """A received packet has `room` bytes before it in each of its pages, asked for or not."""
        return cls._make("rx_headroom", whole("room", room, 1, 2048), when)

    # -- what it sends ---------------------------------------------------------------------------

    @classmethod
    def tx_id(cls, value: int, **when: Unpack[Turns]) -> Self:
        """The answer to a sent slot has the id `value`."""
        return cls._make("tx_id", whole("value", value, 0, 0xFFFF), when)

    @classmethod
    def tx_status(
        cls, status: Literal["okay", "error", "dropped", "null"] | int, **when: Unpack[Turns]
    ) -> Self:
        """The answer to a sent slot has this status."""
        number = STATUS[status] if isinstance(status, str) else status
        return cls._make("tx_status", whole("status", number, -(1 << 15), (1 << 15) - 1), when)

    @classmethod
    def tx_drop(cls, **when: Unpack[Turns]) -> Self:
        """A sent slot is never answered."""
        return cls._make("tx_drop", 0, when)

    @classmethod
    def tx_duplicate(cls, **when: Unpack[Turns]) -> Self:
        """A sent slot is answered twice."""
        return cls._make("tx_duplicate", 0, when)

    @classmethod
    def look(cls, pattern: int, **when: Unpack[Turns]) -> Self:
        """No fault but a look: counts the 64-bit words `pattern` that lie in the granted pages of a
        sent packet outside of its bytes. The counter is `canaries` of `NetBackend.stats`.
        """
        return cls._make("tx_look", whole("pattern", pattern, 1, _U64), when)

    # -- either ----------------------------------------------------------------------------------

    @classmethod
    def producer(cls, by: int, *, ring: Literal["tx", "rx"] = "tx", **when: Unpack[Turns]) -> Self:
        """A ring's rsp_prod is published off by `by`: forward, or (negative) backward."""
        return cls._make("producer" if ring == "tx" else "rx_producer", distance(by), when)

    @classmethod
    def silent(cls, **when: Unpack[Turns]) -> Self:
        """What was published is followed by no event, though one is due."""
        return cls._make("silent", 0, when)

    @classmethod
    def storm(cls, **when: Unpack[Turns]) -> Self:
        """An event for nothing after each turn of the backend's."""
        return cls._make("storm", 0, when)

    # -- the control ring ------------------------------------------------------------------------

    @classmethod
    def control(
        cls,
        what: Literal["id", "type", "status", "data"],
        value: int,
        *,
        of: str = "any",
        **when: Unpack[Turns],
    ) -> Self:
        """This field of an answer is `value`. `of`: to such requests (REQUESTS) only."""
        most = 0xFFFF if what in ("id", "type") else 0xFFFFFFFF
        if what not in ("id", "type", "status", "data"):
            raise FaultError(f"an answer has no {what!r}: it has id, type, status and data")
        return cls._make(f"ctrl_{what}", whole("value", value, 0, most), when, of)

    @classmethod
    def control_answers(
        cls,
        what: Literal["drop", "duplicate", "hold"],
        *,
        of: str = "any",
        **when: Unpack[Turns],
    ) -> Self:
        """A request is never answered, or twice, or when the faults are replaced."""
        if what not in ("drop", "duplicate", "hold"):
            raise FaultError(f"{what!r}: drop, duplicate or hold")
        return cls._make(f"ctrl_{what}", 0, when, of)

    @classmethod
    def control_scribble(cls, *, of: str = "any", **when: Unpack[Turns]) -> Self:
        """The page with a request's list or key is overwritten before it is answered."""
        return cls._make("ctrl_scribble", 0, when, of)

    @classmethod
    def control_producer(cls, by: int, **when: Unpack[Turns]) -> Self:
        """The ring's rsp_prod is published off by `by`."""
        return cls._make("ctrl_producer", distance(by), when)

    @classmethod
    def control_silent(cls, **when: Unpack[Turns]) -> Self:
        """An answer is followed by no event, though one is due."""
        return cls._make("ctrl_silent", 0, when)

    @classmethod
    def control_storm(cls, **when: Unpack[Turns]) -> Self:
        """An event for nothing each millisecond, from the next request on."""
        return cls._make("ctrl_storm", 0, when)

    # -- the table -------------------------------------------------------------------------------

    @classmethod
    def _make(cls, kind: str, value: int, when: Turns, of: str = "any") -> Self:
        if of not in REQUESTS:
            raise FaultError(f"of={of!r}: there are {', '.join(REQUESTS)}")
        return cls(kind, value & _U64, REQUESTS[of], *counts(kind, when))
