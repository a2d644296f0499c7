# SPDX-License-Identifier: BSD-2-Clause
"""What an admin sets for consoles: section [console] of pvfront.toml(5), [console.NAME] for one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .. import config
from ..config import Config, Section
from .keys import bus_name

SECTION = "console"

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"
_CARET = re.compile(r"\^([@-_a-z])")
_NO_ESCAPE = "the escape is a control character: ^A to ^Z, ^[, ^\\, ^], ^^, ^_"


@dataclass(frozen=True, slots=True)
class OneConsole:
    """Of one console. Nothing is set unless it is said: what passes over it may be anything."""

    hotkey: str = ""  # its escape, "^^"; "": it has no hot keys
    # What dom0 may have over it by pvfront-channel, if that is started: directories.
    files: str = ""
    writable: bool = False
    commands: str = ""


@dataclass(frozen=True, slots=True)
class ConsoleService:
    """Of the service."""

    claim: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """`consoles`: by name or number, as the file has them; `hotkeys`: what the command line says,
    above the file, by name.
    """

    consoles: Mapping[str, OneConsole] = field(default_factory=dict)
    service: ConsoleService = ConsoleService()
    hotkeys: Mapping[str, int] = field(default_factory=dict)

    def of(self, devid: int, name: str) -> OneConsole:
        """The settings of one console."""
        for known in (name, bus_name(devid), str(devid)):
            if known in self.consoles:
                return self.consoles[known]
        return OneConsole()

    def escape(self, devid: int, name: str) -> int | None:
        """The byte before its hot keys, None if it has none."""
        if name in self.hotkeys:
            return self.hotkeys[name]
        caret = self.of(devid, name).hotkey
        return escape_byte(caret) if caret else None


def escape_byte(caret: str) -> int:
    """Of "^X". Raises ValueError."""
    control = _CARET.fullmatch(caret)
    if control is None:
        raise ValueError(_NO_ESCAPE)
    return ord(control[1].upper()) & 0x1F


def parse_options(texts: Iterable[str]) -> dict[str, int]:
    """`hotkey.NAME=^^` and the like of the command line: the escape's byte by console. Raises
    ValueError with what is wrong.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        named = re.fullmatch(rf"hotkey\.({_NAME})", key)
        if not equals or named is None:
            raise ValueError(f"{text!r} is no hotkey.NAME=^X")
        try:
            found[named[1]] = escape_byte(value)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
    return found


def from_config(file: Config) -> Settings:
    """Raises ConfigError."""
    section = file.section(SECTION)
    names = section.tables()
    service = ConsoleService(**section.values(ConsoleService, tables=names))
    config.check_patterns(section, service.claim)
    consoles = {}
    for name in names:
        if not re.fullmatch(_NAME, name):
            raise section.error(
                name, "no name of a console",
                hint='a channel\'s name with dots is quoted: [console."org.example.login"]',
            )  # fmt: skip
        consoles[name] = _one(section.section(name))
    return Settings(consoles, service)


def _one(section: Section) -> OneConsole:
    found = section.fill(OneConsole)
    if found.hotkey:
        try:
            escape_byte(found.hotkey)
        except ValueError as error:
            raise section.error("hotkey", f"hotkey: {error}") from None
    for key in ("files", "commands"):
        path = getattr(found, key)
        if path and not path.startswith("/"):
            raise section.error(key, f"{key}: the directory's path begins with /")
    if found.writable and not found.files:
        raise section.error("writable", "writable: there are no files", hint='files = "/DIRECTORY"')
    return found
