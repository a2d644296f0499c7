# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront list``: the guest's PV devices and whose they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import click

from ..inventory import Device, devices, without_service
from .output import as_json as json_option
from .output import note, print_json, print_table, with_store

COLUMNS = {
    "CLASS": "class",
    "ID": "id",
    "NAME": "name",
    "BACKEND": "backend_domain",
    "FRONTEND STATE": "frontend_state",
    "BACKEND STATE": "backend_state",
    "OWNER": "owner",
    "OS DEVICE": "os_device",
}
"""What stands above each, and its key with --json."""


class More(NamedTuple):
    """What the list of one class has besides."""

    keys: Callable[[Device], dict[str, Any]]
    columns: Mapping[str, str]  # as COLUMNS, of those keys


NOTHING = More(lambda _device: {}, MappingProxyType({}))


@click.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List every PV device, the states of both ends, and who has it.

    The owner is kernel, pvfront or none. A line on standard error says if there are disks and the
    disk service does not run.
    """
    show(as_json)


def show(as_json: bool, only: str | None = None, more: More = NOTHING) -> None:
    """All of them, or those of one class."""
    found = with_store(lambda store: devices(store, only=only))
    listed = [device.as_json() | more.keys(device) for device in found]
    if as_json:
        print_json(listed)
        return
    columns = {**COLUMNS, **more.columns}
    print_table(list(columns), [[one[key] for key in columns.values()] for one in listed])
    if (trouble := without_service(found)) is not None:
        note(*trouble)
