# SPDX-License-Identifier: BSD-2-Clause
"""What an admin sets for disks: a file in the manner of pvfront-vbd.conf(5), and its parser.

    [disk]                      for every disk
    max_queues = 2
    [disk xvdc]                 for one, on top of that
    max_indirect_segments = 32

The names are those of the parameters of the kernel's drivers (xen-blkfront), and of a crash loop
those of systemd and of nbd (startlimit.py). A missing file is an
empty one; anything in it that is not understood is an error with file, line and key, because a
setting that is silently not applied is worse than none.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..abi import lib
from ..errors import PvfrontError
from ..startlimit import Limits
from .features import DIRECT_SEGMENTS, MAX_INDIRECT_SEGMENTS, MAX_RING_PAGE_ORDER
from .vdev import parse_name, vdev_name

FILE = "vbd.conf"
SECTION = "disk"


class SettingsError(PvfrontError):
    """A file that cannot be read or makes no sense; `path` and `line` (0: the whole file)."""

    def __init__(self, path: Path, line: int, text: str, hint: str | None = None) -> None:
        super().__init__(f"{path}:{line}: {text}" if line else f"{path}: {text}", hint=hint)
        self.path = path
        self.line = line


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """Of one disk. Upper bounds: what the backend does not offer, no setting brings."""

    max_ring_page_order: int = 2
    max_indirect_segments: int = 64
    max_pool_pages: int = 704  # granted pages for each queue
    max_queues: int = 0  # 0: what suits the target (target.py, `usual_queues`)
    feature_persistent: bool = True
    poll_us: int = 0  # look for a response for so long before sleeping
    start_limit_burst: int = Limits.start_limit_burst
    start_limit_interval: int = int(Limits.start_limit_interval)  # seconds
    dead_conn_timeout: int = int(Limits.dead_conn_timeout)  # seconds

    @property
    def start_limits(self) -> Limits:
        return Limits(self.start_limit_burst, self.start_limit_interval, self.dead_conn_timeout)


NAMES = tuple(field.name for field in fields(DiskSettings))


def _number(lo: int, hi: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not lo <= int(text) <= hi:
            raise ValueError(f"must be a number from {lo} to {hi}")
        return int(text)

    return parse


def _switch(text: str) -> bool:
    found = configparser.RawConfigParser.BOOLEAN_STATES.get(text.lower())
    if found is None:
        raise ValueError("must be yes or no")
    return found


_PARSERS: dict[str, Callable[[str], Any]] = {
    "max_ring_page_order": _number(0, MAX_RING_PAGE_ORDER),
    "max_indirect_segments": _number(0, MAX_INDIRECT_SEGMENTS),
    "max_pool_pages": _number(DIRECT_SEGMENTS, lib.PVF_MAX_POOL_PAGES),
    "max_queues": _number(0, lib.PVF_MAX_QUEUES),
    "feature_persistent": _switch,
    "poll_us": _number(0, lib.PVF_POLL_MAX_US),
    "start_limit_burst": _number(0, 1000),
    "start_limit_interval": _number(1, 86400),
    "dead_conn_timeout": _number(0, 999999999),
}


def parse_option(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` as the command line has it. Raises ValueError with what is wrong."""
    key, equals, value = text.partition("=")
    if not equals or key not in _PARSERS:
        raise ValueError(f"{text!r} is no KEY=VALUE with KEY one of {', '.join(NAMES)}")
    try:
        return key, parse_value(key, value)
    except ValueError as error:
        raise ValueError(f"{key} = {value!r}: {error}") from None


def parse_value(key: str, text: str) -> Any:
    """The value of a setting. Raises ValueError with what is wrong, KeyError for no such key."""
    return _PARSERS[key](text.strip())


class Settings:
    """What the file says: of all disks, and of single ones."""

    def __init__(
        self,
        common: Mapping[str, Any] | None = None,
        own: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        self._common = dict(common or {})
        self._own = {vdev: dict(values) for vdev, values in (own or {}).items()}
        self._forced: dict[str, Any] = {}

    def override(self, values: Mapping[str, Any]) -> None:
        """What the command line says: above everything in the file."""
        self._forced.update(values)

    def of(self, vdev: int) -> DiskSettings:
        """The settings of the disk with this number."""
        return DiskSettings(**{**self._common, **self._own.get(vdev, {}), **self._forced})


def load(path: Path, *, needed: bool = False) -> Settings:
    """Reads the file; `needed`: one that is not there is an error. Raises SettingsError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if needed:
            raise SettingsError(path, 0, "there is no such file") from None
        return Settings()
    except OSError as error:
        raise SettingsError(path, 0, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SettingsError(path, line, "is no UTF-8 text") from error
    return parse(text, path)


def parse(text: str, path: Path = Path(FILE)) -> Settings:
    """`path`: for errors only. Raises SettingsError."""
    parser = configparser.RawConfigParser(
        default_section="", interpolation=None, delimiters=("=",), empty_lines_in_values=False
    )
    try:
        parser.read_string(text, source=str(path))
    except configparser.MissingSectionHeaderError as error:
        raise SettingsError(
            path, error.lineno, f"a setting before any section: {error.line.strip()!r}",
            hint=f"begin with the line [{SECTION}]",
        ) from None  # fmt: skip
    except configparser.DuplicateSectionError as error:
        raise SettingsError(
            path, error.lineno or 0, f"section [{error.section}] is there twice"
        ) from None
    except configparser.DuplicateOptionError as error:
        raise SettingsError(
            path, error.lineno or 0, f"{error.option} is there twice in section [{error.section}]"
        ) from None
    except configparser.ParsingError as error:
        line, what = error.errors[0]
        raise SettingsError(path, line, f"is no `key = value`: {what}") from None
    where = _lines(text)
    common: dict[str, Any] = {}
    own: dict[int, dict[str, Any]] = {}
    for section in parser.sections():
        values = _section(parser, section, path, where)
        kind, _, name = section.partition(" ")
        if section == SECTION:
            common = values
            continue
        vdev = parse_name(name) if kind == SECTION else None
        if vdev is None:
            raise SettingsError(
                path, where.get((section, None), 0), f"section [{section}] is not known",
                hint=f"there are [{SECTION}], and [{SECTION} NAME] for one disk ([disk xvdb])",
            )  # fmt: skip
        if vdev in own:
            raise SettingsError(
                path, where.get((section, None), 0), f"disk {vdev_name(vdev)} has two sections"
            )
        own[vdev] = values
    return Settings(common, own)


def _section(
    parser: configparser.RawConfigParser,
    section: str,
    path: Path,
    where: Mapping[tuple[str, str | None], int],
) -> dict[str, Any]:
    values = {}
    for key, text in parser.items(section):
        line = where.get((section, key), 0)
        try:
            values[key] = parse_value(key, text)
        except KeyError:
            raise SettingsError(
                path, line, f"{key}: no such setting", hint=f"there are: {', '.join(NAMES)}"
            ) from None
        except ValueError as error:
            shown = text if len(text) < 40 else text[:40] + "..."
            raise SettingsError(path, line, f"{key} = {shown!r}: {error}") from None
    return values


def _lines(text: str) -> dict[tuple[str, str | None], int]:
    """Where sections and keys are, which configparser does not tell: (section, key) to line."""
    found: dict[tuple[str, str | None], int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.fullmatch(r"\s*\[(.+)\].*", line)
        if header is not None:
            section = header[1]
            found[section, None] = number
        elif "=" in line and not line.lstrip().startswith(("#", ";")):
            found.setdefault((section, line.partition("=")[0].strip().lower()), number)
    return found
