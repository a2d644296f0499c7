# SPDX-License-Identifier: BSD-2-Clause
"""Follows the handshakes of this guest's PV devices, with pvfront.api.

    python3 follow_devices.py [--count N] [CLASS]

CLASS is vbd (the default), vif, ... A line for each device that is there, then one for each change
of either end's state, until interrupted or after N lines. In a Xen guest as root, or on the
embedded host that $PVFRONT_HOST names.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys

from pvfront import api


async def follow(bus: api.Bus, lines: asyncio.Queue[str]) -> None:
    """Puts a line for each device of `bus` that comes, changes or goes."""
    following: dict[int, asyncio.Task[None]] = {}
    try:
        async for ids, _ in bus.changes():
            for gone in following.keys() - ids:
                following.pop(gone).cancel()
                lines.put_nowait(f"{bus.klass}-{gone}: gone")
            for new in ids:
                if new not in following or following[new].done():
                    following[new] = asyncio.create_task(one(bus, new, lines))
    finally:
        for task in following.values():
            task.cancel()
        await asyncio.gather(*following.values(), return_exceptions=True)


async def one(bus: api.Bus, devid: int, lines: asyncio.Queue[str]) -> None:
    """Puts a line for each view of one device that differs from the one before."""
    try:
        device = await api.XenbusDevice.open(bus.store, bus.klass, devid)
    except api.PvfrontError as error:
        lines.put_nowait(f"{bus.klass}-{devid}: {error}")
        return
    try:
        shown = ""
        while device.view.present:
            view = device.view
            if str(view) != shown:
                shown = str(view)
                lines.put_nowait(f"{device.name}: {shown}")
            await device.changed(view)
    finally:
        await device.close()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("klass", metavar="CLASS", nargs="?", default="vbd")
    parser.add_argument("--count", type=int, default=0)
    wanted = parser.parse_args()
    api.require_version("1.0")
    api.require_guest()
    lines: asyncio.Queue[str] = asyncio.Queue()
    async with await api.open_store() as store:
        task = asyncio.create_task(follow(api.Bus(store, wanted.klass), lines))
        try:
            printed = 0
            while not wanted.count or printed < wanted.count:
                print(await lines.get(), flush=True)
                printed += 1
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


if __name__ == "__main__":
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(main())
    except api.PvfrontError as error:
        sys.exit(f"{error}" + (f" ({error.hint})" if error.hint else ""))
