# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront trace``: what happened to devices, and when."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import BinaryIO

import click

from ..platform import platform
from ..timeline import Line, Timeline, label
from . import complete
from .output import as_json as json_option
from .output import print_json, printable

_LOOK_AGAIN = 0.2  # seconds; a mapped file tells nobody that it was written


@click.command()
@click.argument("device", required=False, shell_complete=complete.device)
@click.option("-f", "--follow", is_flag=True, help="Go on printing what happens.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last so many lines.")
@click.option("--packets", is_flag=True, help="Show the packets of a network, as they pass.")
@click.option("-c", "--count", type=click.IntRange(min=1), help="End after so many packets.")
@click.option(
    "-w",
    "--write",
    type=click.File("wb"),
    help="Write the packets to this file, for tcpdump, instead of showing them.",
)
@json_option
def trace(
    device: str | None,
    follow: bool,
    lines: int | None,
    packets: bool,
    count: int | None,
    write: BinaryIO | None,
    as_json: bool,
) -> None:
    """Show what happened to DEVICE, or to all, and when.

    That is states of both ends, waits, phases, workers. Each line has the time, the seconds since
    the line before, the device and its generation. What a supervisor has recorded is there after
    its end, and after that of the device.

    With --packets, show each packet that passes a served network interface until interrupted:
    direction, length, slots of the ring, who finishes its checksum, what it is to be cut into, and
    why it was dropped. The first 256 bytes of each go to the file of -w.
    """
    if packets:
        if device is None:
            raise click.UsageError("name the network interface whose packets to show")
        if follow or lines is not None:
            raise click.UsageError("--packets shows packets as they pass, and no timeline")
        # cffi takes its time to import.
        from .packets import show_packets

        show_packets(device, count, write, as_json=as_json)
        return
    if count is not None or write is not None:
        raise click.UsageError("-c and -w are for --packets")
    # Files only: neither a store nor a supervisor, nor the device, needs to be there any more.
    timeline = Timeline(platform().run_dir, device)
    news = timeline.news(lines)
    if as_json and not follow:
        print_json([line.as_json() for line in news])
        return
    while True:
        for line in news:
            click.echo(json.dumps(line.as_json()) if as_json else _text(line))
        if not follow:
            return
        time.sleep(_LOOK_AGAIN)
        news = timeline.news()


def _text(line: Line) -> str:
    event = line.event
    moment = datetime.fromtimestamp(event.time).astimezone()
    when = moment.strftime("%Y-%m-%d %H:%M:%S.") + f"{moment.microsecond // 1000:03}"
    delta = "" if line.delta is None else f"+{line.delta:.3f}"
    text = event.text
    if line.answered is not None:
        text += f"  ({line.answered[0]} waited {line.answered[1]:.3f} s for it)"
    generation = f"#{event.generation}" if event.generation else "-"
    name = label(event.device)
    return printable(f"{when} {delta:>9}  {name:<6} {generation:<4} {event.kind:<8}  {text}")
