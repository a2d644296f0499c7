# SPDX-License-Identifier: BSD-2-Clause
"""Who may do what on XENIFACE, and how much of it. Pure: no bus, no store, no clock.

Everybody may read what is in the guest's own directory, but for what is hidden. Root may do what
the guest itself may. Members of the group for writes may also write below the paths for writes. All
that a user may have at a time, and ask for in a second, is counted by user and not by connection:
anybody can make many of those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ...errors import PvfrontError
from ...xswire import printable

ROOT = 0

PATH_MAX = 1024
"""Bytes of a path; xenstored takes 2048 of a relative one, and nodes that deep are nobody's."""

_PATH = re.compile(r"/?[A-Za-z0-9_@-]+(/[A-Za-z0-9_@-]+)*", re.ASCII)


class Refused(PvfrontError):
    """A request that is not carried out. `name` is the last part of its D-Bus error name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True)
class Settings:
    """What an admin decides. Paths are relative to the guest's own directory."""

    enabled: bool = True
    write_group: str = ""
    """The group whose members may write; "": nobody but root."""
    write_paths: tuple[str, ...] = ("data",)
    """Below which they may."""
    hidden_paths: tuple[str, ...] = ("vm-data",)
    """What only root may read: whoever made the guest may have put secrets there."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one user may have at a time. A second connection adds nothing."""

    sessions: int = 16
    watches: int = 64
    value_bytes: int = 2048  # xenstored's own, quota-max-entry-size
    per_second: float = 100.0  # requests; not of root's
    burst: int = 400
    transaction_seconds: float = 5.0  # open ones are in the way of everybody's


@dataclass(frozen=True, slots=True)
class Caller:
    """A connection to the bus, and whose it is."""

    name: str  # ":1.42"
    uid: int
    may_write: bool = False  # member of the group for writes


def is_relative(path: str) -> bool:
    """Whether it can be a path below the guest's own directory."""
    return not path.startswith("/") and bool(_PATH.fullmatch(path))


def is_below(path: str, directory: str) -> bool:
    return path.startswith(f"{directory}/")


@dataclass(frozen=True, slots=True)
class Policy:
    """What a caller may do. The methods return the path, or raise Refused."""

    settings: Settings = field(default_factory=Settings)
    limits: Limits = field(default_factory=Limits)

    def readable(self, caller: Caller, path: str) -> str:
        """ "" is the guest's own directory."""
        path = self._known(caller, path) if path else path
        if caller.uid != ROOT:
            for hidden in self.settings.hidden_paths:
                if path == hidden or is_below(path, hidden):
                    raise _denied(f"{path}: only root may read what is in {hidden}")
        return path

    def writable(self, caller: Caller, path: str) -> str:
        path = self._known(caller, path)
        if caller.uid == ROOT:
            return path
        self.writer(caller)
        if not any(is_below(path, directory) for directory in self.settings.write_paths):
            raise _denied(
                f"{path}: only root may write there; you may below "
                f"{', '.join(self.settings.write_paths) or 'no path'}"
            )
        return path

    def writer(self, caller: Caller) -> None:
        """Whether the caller may write at all."""
        if caller.uid != ROOT and not caller.may_write:
            group = self.settings.write_group
            raise _denied(
                "only root may write" + (f", and members of the group {group}" if group else "")
            )

    def owner(self, caller: Caller) -> None:
        """Whether the caller may say which domains may do what."""
        if caller.uid != ROOT:
            raise _denied("only root may set permissions")

    def value(self, value: bytes) -> bytes:
        if len(value) > self.limits.value_bytes:
            raise Refused(
                "LimitsExceeded",
                f"a value has at most {self.limits.value_bytes} bytes, not {len(value)}",
            )
        return value

    def _known(self, caller: Caller, path: str) -> str:
        if len(path) > PATH_MAX or not _PATH.fullmatch(path):
            raise Refused("InvalidArgs", f"not a path of the store: {printable(path)}")
        if path.startswith("/") and caller.uid != ROOT:
            raise _denied(
                f"{path}: only root may use absolute paths; "
                "a relative one begins at the guest's own directory"
            )
        return path


def _denied(message: str) -> Refused:
    return Refused("AccessDenied", message)


class Usage:
    """What one user has, and asks for. `now` is in seconds, of any clock that goes on."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._credit = float(limits.burst)
        self._at = now
        self.sessions = 0
        self.watches = 0

    def request(self, now: float, cost: int = 1) -> None:
        """Counts a request, as `cost` of them. Raises Refused for one too many."""
        limits = self._limits
        self._credit = min(limits.burst, self._credit + (now - self._at) * limits.per_second)
        self._at = now
        if self._credit < cost:
            raise Refused(
                "LimitsExceeded", f"too many requests: {limits.per_second:g} a second are answered"
            )
        self._credit -= cost

    def idle(self, now: float) -> bool:
        """Whether forgetting it changes nothing."""
        full = self._credit + (now - self._at) * self._limits.per_second >= self._limits.burst
        return full and not self.sessions and not self.watches

    def session(self) -> None:
        """Counts a session. Raises Refused for one too many."""
        if self.sessions >= self._limits.sessions:
            raise Refused(
                "LimitsExceeded", f"a user may have {self._limits.sessions} sessions at a time"
            )
        self.sessions += 1

    def watch(self) -> None:
        """Counts a watch. Raises Refused for one too many."""
        if self.watches >= self._limits.watches:
            raise Refused(
                "LimitsExceeded", f"a user may have {self._limits.watches} watches at a time"
            )
        self.watches += 1


class Usages:
    """Those of all users that have or want something."""

    MANY = 64
    """Users, after which those that are idle are forgotten."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._of: dict[int, Usage] = {}

    def request(self, caller: Caller, now: float, cost: int = 1) -> None:
        """Counts a request, unless it is root's. Raises Refused for one too many."""
        if caller.uid != ROOT:
            self.of(caller.uid, now).request(now, cost)

    def of(self, uid: int, now: float) -> Usage:
        found = self._of.get(uid)
        if found is None:
            if len(self._of) >= self.MANY:
                self._of = {each: use for each, use in self._of.items() if not use.idle(now)}
            found = self._of[uid] = Usage(self._limits, now)
        return found
