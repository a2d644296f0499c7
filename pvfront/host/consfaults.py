# SPDX-License-Identifier: BSD-2-Clause
"""What a console backend of the embedded host can do wrong on its ring, as data. Pure.

A fault is looked at at each turn of the backend's, and for the indices when it publishes them. It
lets `skip` of these pass, then fires `count` times (0: for ever). For the store there is `Misstep`
of faults.py.

    await backend.fault(ConsFault.index("in_prod", 5000, count=1))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, Unpack

from pvfront.host.faults import FaultError, Rule, Turns, counts, distance

__all__ = ["KINDS", "ConsFault"]

KINDS = ("in_prod", "out_cons", "scribble", "silent", "storm", "deaf")

_U32 = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class ConsFault(Rule):
    """Made by the constructors below, which check what they get."""

    kinds = KINDS

    value: int = 0
    skip: int = 0
    count: int = 0

    @classmethod
    def index(cls, which: Literal["in_prod", "out_cons"], by: int, **when: Unpack[Turns]) -> Self:
        """An index of the backend's is published off by `by`: forward, or (negative) backward."""
        if which not in ("in_prod", "out_cons"):
            raise FaultError(f"{which!r}: a backend has in_prod and out_cons")
        return cls._make(which, distance(by) & _U32, when)

    @classmethod
    def scribble(cls, **when: Unpack[Turns]) -> Self:
        """It writes over the frontend's indices and bytes, after it has read them."""
        return cls._make("scribble", 0, when)

    @classmethod
    def silent(cls, **when: Unpack[Turns]) -> Self:
        """What was published is followed by no event."""
        return cls._make("silent", 0, when)

    @classmethod
    def storm(cls, **when: Unpack[Turns]) -> Self:
        """An event for nothing each millisecond."""
        return cls._make("storm", 0, when)

    @classmethod
    def deaf(cls, **when: Unpack[Turns]) -> Self:
        """It takes nothing of what the frontend publishes."""
        return cls._make("deaf", 0, when)

    @classmethod
    def _make(cls, kind: str, value: int, when: Turns) -> Self:
        return cls(kind, value, *counts(kind, when))
