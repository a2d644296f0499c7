# SPDX-License-Identifier: BSD-2-Clause
"""Runs an embedded host until SIGTERM or Ctrl-C: `pvfront-host DIR`.

For those who write a backend of their own: it finds the store, event channels and grants of domain
0 there, and every pvfront command that is run with the variable set works in domain 1.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pvfront.blkfront.vdev import vdev_name
from pvfront.cli.output import complain
from pvfront.errors import PvfrontError
from pvfront.host import Host
from pvfront.platform import HOST_DOMID


async def run(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with await Host.start(options.directory, gntalloc_limit=options.gntalloc_limit) as host:
        await host.create_domain()
        for spec in options.disk:
            vdev = await host.attach_disk(HOST_DOMID, spec)
            print(f"# domain {HOST_DOMID} has disk {vdev_name(vdev)}", flush=True)
        for name, value in host.environ.items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        print(f"# store: {host.directory}/store.sock, hub: {host.directory}/hub.sock", flush=True)
        await stop.wait()


def _pages(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of pages")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pvfront-host", description="Runs an embedded host until SIGTERM or Ctrl-C."
    )
    parser.add_argument("directory", type=Path, help="its directory; made if need be")
    parser.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="SPEC",
        help="a disk of domain 1 in xl's syntax, such as vdev=xvdb,target=memory:64M; repeatable",
    )
    parser.add_argument(
        "--gntalloc-limit",
        type=_pages,
        default=16384,
        metavar="PAGES",
        help="pages that a domain may have granted (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        asyncio.run(run(options))
    except PvfrontError as exc:
        complain(exc, "pvfront-host")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
