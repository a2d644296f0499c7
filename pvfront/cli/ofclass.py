# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront vbd list``, ``pvfront vif status``: the verbs of all devices, for one class of them."""

from __future__ import annotations

import click

from . import complete
from .output import as_json as json_option


def add_list_and_status(group: click.Group, plural: str, one: str) -> None:
    """Adds both to the group of a class of devices, which has the name of the class in the store.

    `plural`, `one`: what help calls its devices.
    """
    klass = group.name

    @group.command("list", help=f"List the {plural}, as `pvfront list` does.")
    @json_option
    def list_command(as_json: bool) -> None:
        from .list_ import show

        show(as_json, klass)

    @group.command("status", help=f"Show one {one}, or each, as `pvfront status` does.")
    @click.argument("device", required=False, shell_complete=complete.device)
    @json_option
    def status(device: str | None, as_json: bool) -> None:
        from .status import show

        show(device, as_json, klass)
