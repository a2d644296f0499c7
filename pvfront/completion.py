# SPDX-License-Identifier: BSD-2-Clause
"""Names of devices for a shell that completes them: at once, as any user, without the store.

They are those that the kernel's bus has, and those that are served, from files that everybody may
read. Whatever goes wrong, there is just nothing to offer.
"""

from __future__ import annotations

import contextlib
import re

from . import inventory, sysfs
from .claim import Claims
from .console.keys import name_of
from .counters import CLASSES
from .errors import PvfrontError
from .platform import Platform, platform

_PLAIN = re.compile(r"[\w.:@+-]+", re.ASCII)
"""What stands in a command line as it is."""


def device_names(only: str | None = None, on: Platform | None = None) -> list[str]:
    """What devices are called: xvdb, vif0, and enX0 of a network. `only`: of that class."""
    on = on or platform()
    found = set[str]()
    with contextlib.suppress(OSError, PvfrontError):
        files = sysfs.listdir(on.run_dir)
        names = {file.removesuffix(".json") for file in files if file.endswith(".json")}
        if on.name == "xen":
            names.update(sysfs.listdir(on.roots.sys / "bus/xen/devices"))
        claims = on.claims()
        for name in names:
            found.update(_called(name, only, on, claims))
    return sorted(found)


def _called(name: str, only: str | None, on: Platform, claims: Claims) -> list[str]:
    """The names of one device; none if that is none."""
    klass, _, number = name.partition("-")
    if klass not in CLASSES or only not in (None, klass):
        return []
    if not (number.isascii() and number.isdigit() and len(number) <= inventory.MAX_ID_DIGITS):
        return []
    state = inventory.read_state(name, on.run_dir) or {}
    if klass == "console":
        return [name_of(str(state.get("label") or ""), int(number))[0]]
    found = [inventory.label(klass, int(number))]
    if klass == "vif":
        ifname = str(state.get("os_device") or "") or claims.os_device(name)
        if _PLAIN.fullmatch(ifname):
            found.append(ifname)
    return found
