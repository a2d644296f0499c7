# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront vbd list``, ``pvfront vif status``: the verbs of all devices, for one class of them."""

from __future__ import annotations

import click

from . import complete
from .list_ import NOTHING, More
from .list_ import show as show_list
from .output import as_json as json_option
from .status import show as show_status


def add_list_and_status(group: click.Group, plural: str, one: str, more: More = NOTHING) -> None:
    """Adds both to the group of a class of devices, which has the name of the class in the store.

    `plural`, `one`: what help calls its devices. `more`: what its list has besides.
    """
    klass = group.name
    besides = f"; besides: {', '.join(more.columns).lower()}" if more.columns else ""

    @group.command("list", help=f"List the {plural}.\n\nAs `pvfront list` does{besides}.")
    @json_option
    def list_command(as_json: bool) -> None:
        show_list(as_json, klass, more)

    @group.command("status", help=f"Show one {one}, or each, in full.")
    @click.argument("device", required=False, shell_complete=complete.device)
    @json_option
    def status(device: str | None, as_json: bool) -> None:
        show_status(device, as_json, klass)
