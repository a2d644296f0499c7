# SPDX-License-Identifier: BSD-2-Clause
"""Which devices a service is to take: those that `claim` in pvfront.toml(5) names.

Nothing is taken that is not named. This file is also a program, for udev's rules, which ask about
disks at boot: so it imports little.

    python3 -m pvfront.claimed NUMBER...    a line for each disk: "51728 named" or "51728 other"
"""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Collection
from pathlib import Path

from .blkfront.vdev import parse_name, vdev_name

CONFIG = Path("/etc/pvfront/pvfront.toml")


def matches(patterns: Collection[str], names: Collection[str]) -> bool:
    """Whether one of the patterns (fnmatch(3)) is of one of the names."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def is_pattern(text: str) -> bool:
    """Whether that may be of several devices."""
    return any(char in text for char in "*?[")


def names_disk(patterns: Collection[str], vdev: int) -> bool:
    """Whether the disk with this number is named: xvdb, 51728, xvd[b-d]; also as sda, hda, d1."""
    names = (vdev_name(vdev), str(vdev))
    return any(parse_name(pattern) == vdev for pattern in patterns) or matches(patterns, names)


def names_vif(patterns: Collection[str], devid: int, interfaces: Collection[str]) -> bool:
    """Whether the vif with this number is named: 1, vif1, enX1, or as one of its interfaces is."""
    return matches(patterns, (str(devid), f"vif{devid}", f"enX{devid}", *interfaces))


def names_console(patterns: Collection[str], devid: int, name: str) -> bool:
    """Whether that secondary console is named: 1, console-1, or as its channel is called; 0, the
    primary one, never is.
    """
    return devid != 0 and matches(patterns, (str(devid), f"console-{devid}", name))


def left_running(run_dir: Path, klass: str) -> bool:
    """Whether workers of an earlier supervisor go on, for whom somebody must be there."""
    return any(run_dir.glob(f"{klass}-*.sock"))


def main(arguments: list[str]) -> int:
    from .config import load
    from .errors import PvfrontError

    named: tuple[str, ...] = ()
    try:
        disks = load(Path(os.environ.get("PVFRONT_CONFIG", CONFIG))).section("disk")
        named = disks.strings("claim")
    except PvfrontError as error:
        # The service does not start with such a file, and takes nothing either.
        print(f"pvfront: {error}", file=sys.stderr)
    for number in arguments:
        print(number, "named" if names_disk(named, int(number)) else "other")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
