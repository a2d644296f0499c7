# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront release``: give a device back."""

from __future__ import annotations

import click

from .. import inventory
from ..errors import PvfrontError
from ..xenstore import Xenstore
from . import complete
from .output import with_store


@click.command()
@click.argument("klass", metavar="CLASS", shell_complete=complete.device_class)
@click.argument("device", shell_complete=complete.device)
def release(klass: str, device: str) -> None:
    """Close a served DEVICE of CLASS and give it back to the kernel.

    CLASS is vbd, vif or console. A disk that the kernel had before rests instead. A device in use
    is not released.
    """

    async def work(store: Xenstore) -> str:
        found = await inventory.find(store, device)
        if found.klass != klass:
            raise PvfrontError(
                f"{device} is a {found.klass}, not a {klass}",
                hint=f"pvfront release {found.klass} {device}",
            )
        return await inventory.release(found)

    click.echo(with_store(work))
