# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront upgrade``: replace the workers of devices that are in use."""

from __future__ import annotations

import sys

import click

from .. import inventory
from ..errors import PvfrontError
from ..xenstore import Xenstore
from . import complete
from .output import complain, with_store


@click.command()
@click.argument("device", required=False, shell_complete=complete.device)
def upgrade(device: str | None) -> None:
    """Replace the worker of a served DEVICE, or of each.

    The new one, of the installed program, takes over in the midst of everything: the connection to
    the backend stays, and whoever uses the device notices a pause of milliseconds. If it cannot,
    the old one goes on.
    """

    async def work(store: Xenstore) -> list[str]:
        if device is not None:
            return [await inventory.upgrade(await inventory.find(store, device))]
        served = [d for d in await inventory.devices(store) if d.owner == inventory.PVFRONT]
        if not served:
            raise PvfrontError("no device is served", hint="`pvfront list` shows who has what")
        for one in served:
            try:
                click.echo(await inventory.upgrade(one))
            except PvfrontError as error:
                failed.append(error)
                complain(error)
        return []

    failed: list[PvfrontError] = []
    for line in with_store(work):
        click.echo(line)
    if failed:
        sys.exit(1)
