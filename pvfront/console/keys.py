# SPDX-License-Identifier: BSD-2-Clause
"""The store's keys of a secondary console. Pure.

What libxl writes and QEMU reads: `ring-ref` (a grant of one page) and `port` (an unbound event
channel) are the frontend's; `name`, `type`, `output`, `limit` and `protocol` are there already.
The primary console, which has a page number in the place of the grant, is none of these: it is not
below `device/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..negotiate import Problem

NAME_KEY = "name"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_STALE = frozenset({"ring-ref", "port"})


def stale_key(key: str) -> bool:
    """Whether it is left over from a connection."""
    return key in _STALE


def frontend_keys(ring_ref: int, port: int) -> Mapping[str, str]:
    """What is published for a connection."""
    return {"ring-ref": str(ring_ref), "port": str(port)}


def bus_name(devid: int) -> str:
    return f"console-{devid}"


def name_of(text: str | None, devid: int) -> tuple[str, Problem | None]:
    """What users call a console: the channel's name of the xl config, or "console-1".

    It becomes the name of a file: letters, digits and `_.-` only, 64 of them, none hidden. A name
    that looks like another console's number is none either.
    """
    own = bus_name(devid)
    if text is None or text == "":
        return own, None
    if _NAME.fullmatch(text) and (text == own or not re.fullmatch(r"(console-)?\d+", text)):
        return text, None
    return own, Problem(NAME_KEY, text, f"no name for a file; it is called {own}")
