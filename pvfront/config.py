# SPDX-License-Identifier: BSD-2-Clause
"""The file of settings, pvfront.toml(5): read, checked, and what is wrong in it said with its line.

A section is a dataclass: its fields are the keys, their types what a value must be, their defaults
what holds without the key:

    @dataclass(frozen=True, slots=True)
    class DiskSettings:
        max_queues: Annotated[int, Between(0, 16)] = 0
        target: Literal["auto", "nbd"] = "auto"
        claim: tuple[str, ...] = ()

    load(path).section("disk").fill(DiskSettings)

Types: bool, int with Between, str, Literal of strings, tuple[str, ...] for a list of strings, and a
dataclass for a section of its own. A missing file is an empty one. Anything that is not understood
is an error with file, line and key, because a setting that is silently not applied is worse than
none. A service reads its own section and no other: what is wrong elsewhere is not its trouble, but
a section that nobody knows is everybody's. `pvfront config check` reads them all.
"""

from __future__ import annotations

import configparser
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from .errors import PvfrontError

FILE = "pvfront.toml"
SECTIONS = {
    "disk": "pvfront.blkfront.settings",
    "vif": "pvfront.netfront.settings",
    "console": "pvfront.console.settings",
    "agent": "pvfront.agent.settings",
}
"""Every section, and the module whose `from_config(Config)` reads it."""

LONGEST = 1 << 20  # bytes of the file
_SHOWN = 40  # characters of a value that an error repeats

S = TypeVar("S")
T = TypeVar("T")


class ConfigError(PvfrontError):
    """A file that cannot be read or makes no sense: `path`, `line` (0: the whole file), and `key`
    with its section before it ("disk.max_queues"; "": none).
    """

    def __init__(
        self, path: Path, line: int, text: str, *, key: str = "", hint: str | None = None
    ) -> None:
        super().__init__(f"{path}:{line}: {text}" if line else f"{path}: {text}", hint=hint)
        self.path = path
        self.line = line
        self.key = key
        self.text = text


@dataclass(frozen=True, slots=True)
class Between:
    """Of a number: from `lo` to `hi`, both allowed."""

    lo: int
    hi: int


# -- values ----------------------------------------------------------------------------------------


def check(kind: Any, value: object) -> Any:
    """The value as the field's type has it. Raises ValueError with what it must be."""
    if get_origin(kind) is Annotated:
        kind, bounds = get_args(kind)
        if type(value) is not int or not bounds.lo <= value <= bounds.hi:
            raise ValueError(f"must be a number from {bounds.lo} to {bounds.hi}")
        return value
    if kind is bool:
        if type(value) is not bool:
            raise ValueError("must be true or false")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise ValueError('must be a string: "..."')
        return value
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"must be one of {', '.join(get_args(kind))}")
        return value
    assert kind == tuple[str, ...], kind
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError('must be a list of strings: ["...", "..."]')
    return tuple(value)


def parse_option(cls: type[Any], text: str) -> tuple[str, Any]:
    """`KEY=VALUE` as the command line has it, of a number or a switch. Raises ValueError."""
    kinds = get_type_hints(cls, include_extras=True)
    known = [f.name for f in fields(cls) if kinds[f.name] is bool or _is_number(kinds[f.name])]
    key, equals, word = text.partition("=")
    if not equals or key not in known:
        raise ValueError(f"{text!r} is no KEY=VALUE with KEY one of {', '.join(known)}")
    value: object
    if kinds[key] is bool:
        value = configparser.RawConfigParser.BOOLEAN_STATES.get(word.strip().lower())
        if value is None:
            raise ValueError(f"{key} = {word!r}: must be yes or no")
    else:
        value = int(word) if re.fullmatch(r"[0-9]{1,9}", word.strip()) else word
    try:
        return key, check(kinds[key], value)
    except ValueError as error:
        raise ValueError(f"{key} = {word!r}: {error}") from None


def _is_number(kind: Any) -> bool:
    return get_origin(kind) is Annotated


# -- the file --------------------------------------------------------------------------------------


class Section:
    """A table of the file; `name` is ("disk",), or ("disk", "xvdc") for a table in a table."""

    def __init__(self, config: Config, name: tuple[str, ...], table: Mapping[str, Any]) -> None:
        self.config = config
        self.name = name
        self.table = table

    def error(self, key: str, text: str, hint: str | None = None) -> ConfigError:
        """An error at that key of this section ("": at its beginning)."""
        full = (*self.name, key) if key else self.name
        return self.config.error(full, text, hint)

    def tables(self) -> list[str]:
        """The names of the tables in it: those of single devices."""
        return [key for key, value in self.table.items() if isinstance(value, dict)]

    def section(self, key: str) -> Section:
        """A table in it; an empty one if it is not there."""
        value = self.table.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"must be a section: [{'.'.join((*self.name, key))}]")
        return Section(self.config, (*self.name, key), value)

    def values(self, *classes: type[Any], tables: Collection[str] = ()) -> dict[str, Any]:
        """What is set, checked: every key must be a field of one of the classes, or one of
        `tables`, which are left out. Raises ConfigError.
        """
        kinds: dict[str, Any] = {}
        for cls in classes:
            hints = get_type_hints(cls, include_extras=True)
            kinds |= {field.name: hints[field.name] for field in fields(cls)}
        found = {}
        for key, value in self.table.items():
            if key in tables:
                continue
            if key not in kinds:
                there = f"there are: {', '.join(kinds)}"
                raise self.error(key, f"{_printable(key)}: no such setting", hint=there)
            if is_dataclass(kinds[key]):
                found[key] = self.section(key).fill(cast(type[Any], kinds[key]))
                continue
            try:
                found[key] = check(kinds[key], value)
            except ValueError as error:
                raise self.error(key, f"{key} = {_shown(value)}: {error}") from None
        return found

    def strings(self, key: str) -> tuple[str, ...]:
        """One key that is a list of strings, whatever else is in the section."""
        try:
            found: tuple[str, ...] = check(tuple[str, ...], self.table.get(key, []))
        except ValueError as error:
            raise self.error(key, f"{key} = {_shown(self.table[key])}: {error}") from None
        return found

    def fill(self, cls: type[T], *, tables: Collection[str] = ()) -> T:
        """The section as its dataclass. Raises ConfigError."""
        return cls(**self.values(cls, tables=tables))


class Config:
    """What a file says. `path`: for errors, and "" of none."""

    def __init__(self, path: Path, text: str = "", table: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._text = text
        self._table = table or {}

    def section(self, name: str) -> Section:
        """The section; an empty one if it is not there. Raises ConfigError."""
        return Section(self, (), self._table).section(name)

    def error(self, key: tuple[str, ...], text: str, hint: str | None = None) -> ConfigError:
        """An error at that key, with its line."""
        line = line_of(self._text, key)
        return ConfigError(self.path, line, text, key=".".join(key), hint=hint)

    def strangers(self) -> list[ConfigError]:
        """An error for each section that nobody reads."""
        return [
            self.error(
                (name,), f"[{_printable(name)}]: no such section",
                hint=f"there are: {', '.join(f'[{one}]' for one in SECTIONS)}",
            )
            for name in self._table
            if name not in SECTIONS
        ]  # fmt: skip


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) < _SHOWN else text[:_SHOWN] + "..."


def _printable(name: str) -> str:
    return _shown(name)[1:-1] if len(name) < _SHOWN else _shown(name)[1:]


def parse(text: str, path: Path = Path(FILE), *, strict: bool = True) -> Config:
    """`path`: for errors; `strict`: a section that nobody reads is one. Raises ConfigError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said, _, where = str(error).rpartition(" (at ")
        found = re.match(r"line (\d+)", where)
        line = int(found[1]) if found else len(text.splitlines())
        raise ConfigError(path, line, f"is no TOML: {said or error}") from None
    except RecursionError:
        raise ConfigError(path, 0, "is no TOML: nested too deeply") from None
    config = Config(path, text, table)
    for stranger in config.strangers() if strict else ():
        raise stranger
    return config


def load(path: Path, *, needed: bool = False, strict: bool = True) -> Config:
    """Reads the file; `needed`: one that is not there is an error. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise ConfigError(path, 0, f"is longer than {LONGEST} bytes")
        text = data.decode("utf-8")
    except FileNotFoundError:
        if needed:
            raise ConfigError(path, 0, "there is no such file") from None
        return Config(path)
    except OSError as error:
        raise ConfigError(path, 0, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(path, line, "is no UTF-8 text") from error
    return parse(text.replace("\r\n", "\n"), path, strict=strict)


def line_of(text: str, key: tuple[str, ...]) -> int:
    """The line, from 1, that a key of a valid TOML text is on; 0 if it has none.

    tomllib does not tell, but it decides: the key is there once the lines up to the end of its
    value are parsed, and it is not before those up to the line it begins on.
    """
    lines = text.split("\n")
    valid = 0  # so many lines from the beginning are TOML without the key
    for end in range(1, len(lines) + 1):
        try:
            found: Any = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue  # within a value of several lines
        for part in key:
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            return valid + 1
        valid = end
    return 0


def problems(path: Path, *, needed: bool = False) -> list[ConfigError]:
    """Everything wrong with the file, the first of each section."""
    try:
        config = load(path, needed=needed, strict=False)
    except ConfigError as error:
        return [error]
    found = config.strangers()
    for module in SECTIONS.values():
        try:
            cast(Callable[[Config], object], import_module(module).from_config)(config)
        except ConfigError as error:
            found.append(error)
    return sorted(found, key=lambda error: error.line)


def check_file(path: Path) -> None:
    """Raises ConfigError, the first of `problems`."""
    for error in problems(path):
        raise error


# -- settings of devices ---------------------------------------------------------------------------


class PerDevice(Generic[T]):
    """Settings of a class's devices, by number: of all, of single ones on top of that, and what the
    command line says above everything.
    """

    def __init__(
        self,
        cls: type[T],
        common: Mapping[str, Any] | None = None,
        own: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        self._cls = cls
        self._common = dict(common or {})
        self._own = {devid: dict(values) for devid, values in (own or {}).items()}
        self._forced: dict[str, Any] = {}

    def override(self, values: Mapping[str, Any]) -> None:
        """What the command line says."""
        self._forced.update(values)

    def of(self, devid: int) -> T:
        """The settings of one device."""
        return self._cls(**{**self._common, **self._own.get(devid, {}), **self._forced})


def per_device(
    section: Section, cls: type[T], service: type[S], number: Callable[[str], int | None]
) -> tuple[PerDevice[T], S]:
    """A section of devices: keys of `cls` for each, those of `service` for the whole, and a table
    for each device that is to have others. `number`: of the device of that name, None if it is no
    name of one. Raises ConfigError.
    """
    devices = section.tables()
    common = section.values(cls, service, tables=devices)
    names = get_type_hints(service)
    whole = {name: common.pop(name) for name in names if name in common}
    own: dict[int, dict[str, Any]] = {}
    for name in devices:
        devid = number(name)
        if devid is None:
            raise section.error(
                name, f"[{'.'.join((*section.name, _printable(name)))}]: no such section",
                hint=f"a section of one device is called by its name: [{section.name[0]}.NAME]",
            )  # fmt: skip
        if devid in own:
            raise section.error(name, f"{name}: the device has two sections")
        own[devid] = section.section(name).values(cls)
    return PerDevice(cls, common, own), service(**whole)


def check_patterns(section: Section, patterns: Collection[str]) -> None:
    """Each entry of `claim` must be able to match something. Raises ConfigError."""
    for pattern in patterns:
        if not re.fullmatch(r"[A-Za-z0-9_.:*?\[\]!-]{1,64}", pattern):
            raise section.error(
                "claim", f"claim: {_shown(pattern)} is neither a name nor a pattern",
                hint="names, numbers, and patterns with * ? [a-z], such as xvd[b-d]",
            )  # fmt: skip
