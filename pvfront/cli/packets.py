# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront trace --packets``: the packets of a network interface, as they pass."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import datetime
from typing import BinaryIO

import click

from .. import inventory
from ..packettrace import Packet, Reader, begin_pcap
from ..xenstore import Xenstore
from .output import note, printable, with_store

_LOOK_AGAIN = 0.1  # seconds; who writes tells nobody


def show_packets(device: str, count: int | None, write: BinaryIO | None, *, as_json: bool) -> None:
    """Until `count` packets have passed, or the user interrupts."""
    if write is not None:
        begin_pcap(write)
        write.flush()
    shown = _Shown(count, write, as_json=as_json)
    try:
        with_store(lambda store: _follow(store, device, shown))
    except KeyboardInterrupt:
        pass
    if shown.missed:
        note(f"{shown.missed} packets passed faster than they could be read")
    if write is not None:
        note(f"{shown.packets} packets")


class _Shown:
    """What has been shown."""

    def __init__(self, count: int | None, write: BinaryIO | None, *, as_json: bool) -> None:
        self.packets = self.missed = 0
        self._count = count
        self._write = write
        self._as_json = as_json

    @property
    def done(self) -> bool:
        return self._count is not None and self.packets >= self._count

    def show(self, packet: Packet) -> None:
        self.packets += 1
        if self._write is not None:
            self._write.write(packet.pcap())
        elif self._as_json:
            click.echo(json.dumps(packet.as_json()))
        else:
            moment = datetime.fromtimestamp(packet.time / 1e9).astimezone()
            click.echo(printable(f"{moment:%H:%M:%S.%f}  {packet.text()}"))


async def _follow(store: Xenstore, text: str, shown: _Shown) -> None:
    device = await inventory.find(store, text)
    file, reader = "", None
    try:
        while True:
            answer = await inventory.packets(device)
            if str(answer["file"]) != file:  # of another worker
                if reader is not None:
                    reader.close()
                file = str(answer["file"])
                reader = Reader(file)
            assert reader is not None
            end = time.monotonic() + float(answer["renew"])
            while time.monotonic() < end:
                for packet in reader.news():
                    shown.show(packet)
                    if shown.done:
                        return
                await asyncio.sleep(_LOOK_AGAIN)
    finally:
        if reader is not None:
            shown.missed = reader.missed
            reader.close()
