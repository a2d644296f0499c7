# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront vif``: networks; ``serve`` is the network service in the foreground."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ..platform import platform
from ..service import prepare_process
from . import complete
from .ofclass import add_list_and_status


def _options(texts: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE of the command line; wrong usage is said as such."""
    if not texts:
        return {}
    from ..netfront.settings import parse_option

    try:
        return dict(map(parse_option, texts))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.group()
def vif() -> None:
    """Network interfaces (XENVIF, XENNET)."""


add_list_and_status(vif, "network interfaces", "network interface (vif0, 0, enX0)")


@vif.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=complete.device)
@click.option("--all", "everything", is_flag=True, help="Every vif, also those attached later.")
@click.option("--force", is_flag=True, help="Take the interface of the default route, too.")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file of settings instead of /etc/pvfront/pvfront.toml.",
)
@click.option(
    "-o",
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    callback=lambda _context, _parameter, values: _options(values),
    help="A setting: max_queues=N (0, the default, is one for each processor), hash=0 or 1, "
    "split_event_channels=0 or 1, multicast_filter=0 or 1.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail.")
def serve(
    names: tuple[str, ...],
    everything: bool,
    force: bool,
    config: Path | None,
    options: dict[str, Any],
    verbose: bool,
) -> None:
    """Serve network interfaces in user space until SIGTERM.

    NAME is a vif's number in the xl config, or vif0, or the interface's name (enX0). The interface
    keeps its name, its addresses and its routes. Without a NAME, those that
    /etc/pvfront/pvfront.toml names are served, and with --all every one; then vifs attached later
    are served as they come, and the interface of the default route is left to the kernel unless
    --force is said.

    On SIGTERM interfaces are given back to the kernel, with their addresses and routes. Where
    systemd restarts the service they are not: workers go on, and the next `pvfront vif serve`
    adopts them.
    """
    if names and everything:
        raise click.UsageError("name the interfaces to serve, or say --all")
    from ..netfront.service import serve as serve_networks

    in_guest = platform().name == "xen"
    prepare_process(logging.DEBUG if verbose else logging.INFO, relied_on=in_guest)
    raise SystemExit(
        asyncio.run(
            serve_networks(
                names, everything=everything, force=force, config=config, options=options
            )
        )
    )
