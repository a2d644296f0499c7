# SPDX-License-Identifier: BSD-2-Clause
"""What a console backend is told at its start, and how xl's words say what a channel is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from pvfront.errors import PvfrontError

LIMIT = 1048576
"""LIBXL_XENCONSOLE_LIMIT, bytes."""


@dataclass(frozen=True)
class ConsFeatures:
    """hold: what the frontend sends while nobody sits at the console stays in the ring; otherwise
    it is dropped, as QEMU does.
    """

    hold: bool = True


class ChannelSpecError(PvfrontError, ValueError):
    """A channel specification that xl would not take either."""


@dataclass(frozen=True, slots=True)
class ChannelSpec:
    """One channel of a domain, as xl.cfg(5) has it in `channel=[...]`."""

    name: str
    connection: str = "pty"
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads xl's syntax. Raises ChannelSpecError."""
        found: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = part.strip().partition("=")
            if not equals or key not in ("name", "connection", "path", "backend"):
                raise ChannelSpecError(
                    f"channel {text!r}: {part!r} is none of name=, connection=, path=, backend=",
                    hint="for example: connection=pty,name=org.example.login",
                )
            found[key] = value
        if found.get("connection", "pty") not in ("pty", "socket"):
            raise ChannelSpecError(f"channel {text!r}: connection is pty or socket")
        if not re.fullmatch(r"[!-~]{1,256}", found.get("name", "")):
            raise ChannelSpecError(f"channel {text!r}: it has no name")
        if found.get("backend", "0") not in ("0", "Domain-0"):
            raise ChannelSpecError(f"channel {text!r}: there is domain 0 only")
        return cls(found["name"], found.get("connection", "pty"), found.get("path", ""))

    def frontend_keys(self, devid: int) -> dict[str, str]:
        """What libxl writes at the frontend (libxl_console.c), but for what both ends have."""
        output = "pty" if self.connection == "pty" else f"chardev:libxl-channel{devid}"
        return {
            "protocol": "vt100",
            "name": self.name,
            "connection": self.connection,
            **({"path": self.path} if self.path else {}),
            "limit": str(LIMIT),
            "type": "ioemu",
            "output": output,
            "tty": "",
        }

    def backend_keys(self) -> dict[str, str]:
        return {
            "protocol": "vt100",
            "name": self.name,
            "connection": self.connection,
            **({"path": self.path} if self.path else {}),
        }
