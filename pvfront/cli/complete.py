# SPDX-License-Identifier: BSD-2-Clause
"""What a shell offers in the place of an argument (click's `shell_complete`)."""

from __future__ import annotations

import click

from ..completion import device_names
from ..counters import CLASSES


def device(context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Devices: in a group of verbs of a class, or behind a CLASS, those of that class."""
    parent = context.parent.info_name if context.parent is not None else None
    only = context.params.get("klass") or (parent if parent in CLASSES else None)
    given = context.params.get("names") or ()
    return [
        name
        for name in device_names(str(only) if only else None)
        if name.startswith(begun) and name not in given
    ]


def devices(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Devices with commas between them."""
    before, comma, last = begun.rpartition(",")
    offered = device(context, parameter, last)
    return [f"{before}{comma}{name}" for name in offered if name not in before.split(",")]


def device_class(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Classes of devices."""
    return [name for name in CLASSES if name.startswith(begun)]
