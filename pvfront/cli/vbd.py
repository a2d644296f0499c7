# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront vbd``: disks; ``serve`` is the disk service in the foreground."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..platform import platform
from ..service import prepare_process
from . import complete
from .ofclass import add_list_and_status
from .output import complain

if TYPE_CHECKING:
    from ..blkfront.settings import Export


def _options(texts: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE of the command line; wrong usage is said as such."""
    if not texts:
        return {}
    from ..blkfront.settings import parse_option

    try:
        return dict(map(parse_option, texts))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.group()
def vbd() -> None:
    """Disks (XENVBD)."""


add_list_and_status(vbd, "disks", "disk (xvdb, 51728)")


@vbd.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=complete.device)
@click.option("--all", "everything", is_flag=True, help="Every disk, also those attached later.")
@click.option(
    "--force",
    is_flag=True,
    help="Take a disk that is mounted or held, too. Never the root disk.",
)
@click.option(
    "--target",
    "export",
    type=click.Choice(["auto", "nbd", "ublk", "socket"]),
    help="What users of a disk get: the kernel's ublk or nbd device (auto, without it in a guest: "
    "ublk where the kernel has it), or an NBD server on a socket, NAME.nbd in the run directory.",
)
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
    help="A setting, above those of the file; may be given several times.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail.")
def serve(
    names: tuple[str, ...],
    everything: bool,
    force: bool,
    export: Export | None,
    config: Path | None,
    options: dict[str, Any],
    verbose: bool,
) -> None:
    """Serve disks in user space until SIGTERM.

    NAME is the disk's name in the xl config (xvdb) or its virtual device number. The disk
    appears as /dev/pvfront/NAME, or with --target socket at
    nbd+unix:///?socket=/run/pvfront/NAME.nbd, for one client at a time. Without a NAME, the
    disks that /etc/pvfront/pvfront.toml names are served, and with --all every disk; then those
    attached later are served as they come, and a disk that is in use by the kernel's driver is
    left alone.

    On SIGTERM a disk that nobody holds is drained, closed and given back; a mounted one goes on
    being served by its worker until the next `pvfront vbd serve` adopts it. A socket's client
    counts as a mount.

    Where PVFRONT_HOST names the directory of an embedded host, its disks are served, without
    root, with sockets as the default.
    """
    if names and everything:
        raise click.UsageError("name the disks to serve, or say --all")
    # Netlink and cffi take their time to import: other verbs, and --help, do without.
    from ..blkfront.service import serve as serve_disks

    # An embedded host's disks are sockets for programs: no kernel waits for them.
    in_guest = platform().name == "xen"
    prepare_process(logging.DEBUG if verbose else logging.INFO, relied_on=in_guest)
    raise SystemExit(
        asyncio.run(
            serve_disks(
                names,
                everything=everything,
                force=force,
                export=export,
                config=config,
                options=options,
            )
        )
    )


@vbd.command(context_settings={"allow_interspersed_args": False})
@click.argument("names", metavar="NAME[,NAME]...", shell_complete=complete.devices)
@click.argument("command", metavar="[--] PROGRAM [ARGUMENT]...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Take a disk that is mounted or held, too.")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail.")
def lend(names: str, command: tuple[str, ...], force: bool, verbose: bool) -> None:
    """Run PROGRAM with disks to itself, and give them back when it ends.

    PROGRAM finds them by pvf_disk_open() of pvfront/disk.h: it reads and writes the rings it
    shares with the backend in its own process, without a block device. Its exit status is
    this command's; SIGTERM and SIGHUP are passed on to it.
    """
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise click.UsageError("name the program that is to have the disks")
    from ..blkfront.lend import NotStarted
    from ..blkfront.lend import lend as lend_disks

    # Not prepare_process(): a program would inherit what fits a server that writeback waits for.
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)-7s %(message)s",
    )
    try:
        raise SystemExit(asyncio.run(lend_disks(names.split(","), command, force=force)))
    except NotStarted as error:
        complain(error)
        raise SystemExit(error.status) from None
