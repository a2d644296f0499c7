# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront vbd serve``: the disk service in the foreground."""

from __future__ import annotations

import asyncio
import logging

import click

from ..service import prepare_process


@click.group()
def vbd() -> None:
    """Disks (XENVBD)."""


@vbd.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every disk, also those attached later.")
@click.option(
    "--force",
    is_flag=True,
    help="Take a disk that is mounted or held, too. Never the root disk.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail.")
def serve(names: tuple[str, ...], everything: bool, force: bool, verbose: bool) -> None:
    """Serve disks in user space until SIGTERM.

    NAME is the disk's name in the xl config (xvdb) or its virtual device number. The disk
    appears as /dev/pvfront/NAME. With --all, disks attached later are served as they come, and
    a disk that is in use by the kernel's driver is left alone.

    On SIGTERM a disk that nobody holds is drained, closed and given back; a mounted one goes on
    being served by its worker until the next `pvfront vbd serve` adopts it.
    """
    if bool(names) == everything:
        raise click.UsageError("name the disks to serve, or say --all")
    # Netlink and cffi take their time to import: other verbs, and --help, do without.
    from ..blkfront.service import serve as serve_disks

    prepare_process(logging.DEBUG if verbose else logging.INFO)
    raise SystemExit(asyncio.run(serve_disks(names, everything=everything, force=force)))
