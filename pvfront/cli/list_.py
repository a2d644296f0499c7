# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront list``: the guest's PV devices and whose they are."""

from __future__ import annotations

import click

from ..inventory import devices, without_service
from .output import as_json as json_option
from .output import note, print_json, print_table, with_store

HEADER = ("CLASS", "ID", "NAME", "BACKEND", "FRONTEND STATE", "BACKEND STATE", "OWNER", "OS DEVICE")


@click.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List every PV device: class, id, name, backend domain, states, owner, OS device.

    The owner is kernel, pvfront or none. A line on standard error says if there are disks and the
    disk service does not run.
    """
    show(as_json)


def show(as_json: bool, only: str | None = None) -> None:
    """All of them, or those of one class."""
    found = with_store(lambda store: devices(store, only=only))
    if as_json:
        print_json([device.as_json() for device in found])
        return
    print_table(
        HEADER,
        [
            (
                device.klass,
                device.id,
                device.name,
                device.backend_domain,
                device.frontend_state,
                device.backend_state,
                device.owner,
                device.os_device,
            )
            for device in found
        ],
    )
    if (trouble := without_service(found)) is not None:
        note(*trouble)
