# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront top``: what devices do, live."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from ..platform import platform
from ..top import GAP, Follower, tables
from .output import as_json as json_option
from .output import print_table, printable

if TYPE_CHECKING:
    from rich.console import Group

NOTHING = "no device is served"


@click.command()
@click.option(
    "-i",
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    help="Seconds from look to look (1).",
)
@click.option("-c", "--count", type=click.IntRange(min=1), help="End after so many intervals.")
@json_option
def top(interval: float, count: int | None, as_json: bool) -> None:
    """Show what each served device does a second, until interrupted.

    Each queue of one that has several, too.
    Requests, megabytes (10^6 bytes), packets, gigabits, drops and errors, requests in flight,
    bounds of the latency, notifications of the backend, and the worker's processor time (of one
    processor). On a terminal q ends it; elsewhere there are tables, one after the other. With
    --json each interval is an object on a line of its own.
    """
    platform().require()
    with contextlib.suppress(KeyboardInterrupt):
        if sys.stdout.isatty() and not as_json:
            _live(interval, count)
        else:
            _lines(interval, count, as_json=as_json)


def _moments(interval: float, count: int | None) -> Iterator[float]:
    """When to look, by CLOCK_MONOTONIC; none twice if one took too long."""
    at = time.monotonic()
    while count is None or count > 0:
        at = max(at + interval, time.monotonic())
        yield at
        count = None if count is None else count - 1


def _lines(interval: float, count: int | None, *, as_json: bool) -> None:
    follower = Follower()
    for at in _moments(interval, count):
        time.sleep(max(0.0, at - time.monotonic()))
        found = follower.look()
        if as_json:
            click.echo(json.dumps(found))
            continue
        click.echo(_headline(found))
        for table in tables(found):
            print_table([column.header for column in table.columns], table.rows)
        click.echo()


def _headline(found: Mapping[str, Any]) -> str:
    moment = datetime.fromtimestamp(found["time"]).astimezone()
    nothing = "" if found["devices"] else f"  {NOTHING}"
    return f"{moment:%Y-%m-%d %H:%M:%S}  {found['interval']:.1f} s{nothing}"


def _live(interval: float, count: int | None) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        follower = Follower()
        for at in _moments(interval, count):
            while (left := at - time.monotonic()) > 0:
                if select.select(keys, [], [], left)[0] and _ends(os.read(keys[0], 64)):
                    return
            live.update(_screen(follower.look(), console.width, console.height), refresh=True)


def _ends(pressed: bytes) -> bool:
    """Whether it is the key that ends it, or the end of the terminal."""
    return not pressed or b"q" in pressed.lower()


def _screen(found: Mapping[str, Any], width: int, height: int) -> Group:
    """One screen; what the store or an admin called something is text, no markup."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(f"pvfront top  {_headline(found)}   q: end")]
    room = height - 1
    for table in tables(found, width):
        shown = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        for column in table.columns:
            justify = "right" if column.right else "left"
            shown.add_column(column.header, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        room -= 2
        rows = table.rows[: max(0, room - 1)] if len(table.rows) > room else table.rows
        for row in rows:
            shown.add_row(*(Text(printable(cell)) for cell in row))
        room -= len(table.rows)
        parts += [Text(""), shown]
        if len(rows) < len(table.rows):
            parts.append(Text(f"and {len(table.rows) - len(rows)} more"))
            break
    return Group(*parts)


@contextlib.contextmanager
def _keys() -> Iterator[list[int]]:
    """Standard input, key by key, if it is a terminal: its descriptor.

    It is as it was at the end, also if a signal brings that.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, lambda got, _frame: sys.exit(128 + got))
    attributes = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    try:
        if attributes is not None:
            tty.setcbreak(sys.stdin)
        yield [sys.stdin.fileno()] if attributes is not None else []
    finally:
        if attributes is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, attributes)
        for number, handler in before.items():
            signal.signal(number, handler)
