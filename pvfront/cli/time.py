# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront time``: this guest's clock beside the host's."""

from __future__ import annotations

import click

from ..platform import platform
from .output import as_json as json_option
from .output import note, print_json
from .status import show_fields


@click.command()
@click.option("--set", "to_set", is_flag=True, help="Set this guest's clock if it is wrong.")
@json_option
def time(to_set: bool, as_json: bool) -> None:
    """Show how far this guest's clock is from the host's.

    The source is "unknown" where the kind of guest lets user space see none: PV and PVH.
    """
    from ..agent.clock import describe, is_late, measure, set_clock

    roots = platform().roots
    reading = measure(roots)
    if to_set and is_late(reading):
        set_clock(reading, roots.run)
        note(f"the clock was {reading.difference:+.3f} s from {reading.source}: set")
    found = describe(reading, roots)
    if as_json:
        print_json(found)
    else:
        show_fields(found)
