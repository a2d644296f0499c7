# SPDX-License-Identifier: BSD-2-Clause
"""Settings of consoles: what `pvfront console serve -o KEY=VALUE` may say."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_HOTKEY = re.compile(r"hotkey\.([A-Za-z0-9_][A-Za-z0-9_.-]*)")
_CARET = re.compile(r"\^([@-_a-z])")


@dataclass(frozen=True, slots=True)
class ConsoleSettings:
    """`hotkey`: the escape byte of each console, by name, that has hot keys. The others have none:
    what passes over them may be anything.
    """

    hotkey: dict[str, int] = field(default_factory=dict)


def parse_options(texts: Iterable[str]) -> ConsoleSettings:
    """`hotkey.NAME=^^` and the like. Raises ValueError with what is wrong."""
    hotkey = {}
    for text in texts:
        key, equals, value = text.partition("=")
        named = _HOTKEY.fullmatch(key)
        if not equals or named is None:
            raise ValueError(f"{text!r} is no hotkey.NAME=^X")
        control = _CARET.fullmatch(value)
        if control is None:
            raise ValueError(f"{text!r}: the escape is a control character: ^A to ^Z, ^^, ^_, ^\\")
        hotkey[named[1]] = ord(control[1].upper()) & 0x1F
    return ConsoleSettings(hotkey)
