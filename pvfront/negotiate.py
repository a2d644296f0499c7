# SPDX-License-Identifier: BSD-2-Clause
"""Keys of the other end, parsed and clamped. Pure: text in, values and complaints out.

Everything here was written by somebody who is not trusted. There are two ways to read a key:

* `parse_uint` and its kin return a value or raise BadValue: for keys without which there is no
  device.
* `Keys` reads a whole directory, puts something safe in the place of what is missing or wrong, and
  collects a Problem for each value it did not take: for features and limits.

The keys of one class of devices and their ranges stand in that class's features.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pvfront.errors import PvfrontError

_DIGITS_MAX = 20
"""Digits of 2^64 - 1. More are refused unread: int() of a long text takes long."""

_SHOWN = 40
_WRITTEN = 100
"""Characters of a value in a message, and of what they are written as: one may take ten."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A key whose value was not taken as it stands. `value` None: the key is missing."""

    field: str
    value: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.field}{_shown(self.value)}: {self.reason}"


class BadValue(PvfrontError, ValueError):
    """A key that must be good is not. `field` and `value` (None: missing) say which."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.field = problem.field
        self.value = problem.value
        self.problem = problem


def parse_uint(text: str | None, *, lo: int, hi: int, field: str = "value") -> int:
    """The decimal number `text`, if it is in lo..hi. Raises BadValue, for None (missing) too.

    Digits only: no sign, space, underscore or prefix, at most 20 of them.
    """
    number = _decimal(text, field)
    if not lo <= number <= hi:
        raise BadValue(Problem(field, text, f"not in {lo}..{hi}"))
    return number


def parse_power_of_two(text: str | None, *, lo: int, hi: int, field: str = "value") -> int:
    """Like `parse_uint`, and the number must be a power of two."""
    number = parse_uint(text, lo=lo, hi=hi, field=field)
    if not is_power_of_two(number):
        raise BadValue(Problem(field, text, "not a power of two"))
    return number


def parse_bool(text: str | None, *, field: str = "value") -> bool:
    """The `0` or `1` of a feature key. Raises BadValue for anything else, for None too."""
    return parse_uint(text, lo=0, hi=1, field=field) == 1


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


class Keys:
    """A directory's keys, read leniently; `problems` lists what was not taken, in order."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._keys = keys
        self.problems: list[Problem] = []

    def uint(self, field: str, *, default: int, lo: int, hi: int) -> int:
        """A number clamped into lo..hi; `default` if it is nonsense or missing (no problem)."""
        text = self._keys.get(field)
        if text is None:
            return default
        try:
            number = _decimal(text, field)
        except BadValue as exc:
            self._complain(field, f"{exc.problem.reason}; taken as {default}")
            return default
        clamped = min(max(number, lo), hi)
        if clamped != number:
            self._complain(field, f"not in {lo}..{hi}; taken as {clamped}")
        return clamped

    def power_of_two(self, field: str, *, default: int, lo: int, hi: int) -> int:
        """A power of two in lo..hi; `default` if it is anything else or missing (no problem)."""
        text = self._keys.get(field)
        if text is None:
            return default
        try:
            return parse_power_of_two(text, lo=lo, hi=hi, field=field)
        except BadValue as exc:
            self._complain(field, f"{exc.problem.reason}; taken as {default}")
            return default

    def flag(self, field: str) -> bool:
        """A feature: true for any number but 0, as Linux reads it; false if missing or nonsense."""
        text = self._keys.get(field)
        if text is None:
            return False
        try:
            return _decimal(text, field) != 0
        except BadValue as exc:
            self._complain(field, f"{exc.problem.reason}; taken as 0")
            return False

    def _complain(self, field: str, reason: str) -> None:
        self.problems.append(Problem(field, self._keys[field], reason))


def _decimal(text: str | None, field: str) -> int:
    if text is None:
        raise BadValue(Problem(field, None, "missing"))
    if not (text.isascii() and text.isdigit()):
        raise BadValue(Problem(field, text, "not a decimal number"))
    if len(text) > _DIGITS_MAX:
        raise BadValue(Problem(field, text, f"a number of {len(text)} digits"))
    return int(text)


def _shown(value: str | None) -> str:
    if value is None:
        return ""
    text = ascii(value[:_SHOWN])
    cut = len(value) > _SHOWN or len(text) > _WRITTEN
    return "=" + text[:_WRITTEN] + "…" * cut
