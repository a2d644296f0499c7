# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront vif serve``: the network service in the foreground."""

from __future__ import annotations

import asyncio
import logging

import click

from ..platform import platform
from ..service import prepare_process


@click.group()
def vif() -> None:
    """Network interfaces (XENVIF, XENNET)."""


@vif.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every vif, also those attached later.")
@click.option("--force", is_flag=True, help="Take the interface of the default route, too.")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail.")
def serve(names: tuple[str, ...], everything: bool, force: bool, verbose: bool) -> None:
    """Serve network interfaces in user space until SIGTERM.

    NAME is a vif's number, or vif0, or enX0. The interface appears under the name that the kernel
    had for it.
    """
    if bool(names) == everything:
        raise click.UsageError("name the interfaces to serve, or say --all")
    from ..netfront.service import serve as serve_networks

    in_guest = platform().name == "xen"
    prepare_process(logging.DEBUG if verbose else logging.INFO, relied_on=in_guest)
    raise SystemExit(asyncio.run(serve_networks(names, everything=everything, force=force)))
