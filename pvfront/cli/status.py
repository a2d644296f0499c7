# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront status``: one device in full, or each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from .. import counters, figures, inventory
from ..xenstore import Xenstore
from . import complete
from .output import as_json as json_option
from .output import note, print_fields, print_json, print_table, with_store

_TIMES = ("connected_since", "last_trouble_at")
_FIRST = ("name", "class", "id", "owner", "os_device", "link", "phase", "reason")


@click.command()
@click.argument("device", required=False, shell_complete=complete.device)
@json_option
def status(device: str | None, as_json: bool) -> None:
    """Show a DEVICE (xvdb, 51728, vif0, enX0), or each, in full.

    That is its states, what was negotiated, its worker, and the counters of each queue.
    """
    show(device, as_json)


def show(device: str | None, as_json: bool, only: str | None = None) -> None:
    """One device, or each; `only`: of that class."""

    async def work(store: Xenstore) -> list[inventory.Device]:
        if device is not None:
            return [await inventory.find(store, device, only=only)]
        return await inventory.devices(store, only=only)

    devices = with_store(work)
    found = [inventory.status(one) for one in devices]
    if as_json:
        print_json(found if device is None else found[0])
        return
    for number, one in enumerate(found):
        if number:
            click.echo()
        _show(one)
    if (trouble := inventory.without_service(devices)) is not None:
        note(*trouble)


def _show(found: dict[str, Any]) -> None:
    queues = found.pop("statistics_queues", None)
    if queues:
        del found["statistics"]
    order = [key for key in _FIRST if key in found]
    order += [key for key in found if key not in _FIRST]
    print_fields([line for key in order for line in _lines(key, found[key])])
    if queues and found["class"] == "vif":
        click.echo("statistics:")
        for name, value in figures.net_rows(_used(found, queues)):
            click.echo(f"     {name}: {value}")
    elif queues and found["class"] == "console":
        click.echo("statistics:")
        for name, value in queues[0].items():
            click.echo(f"     {name}: {value}")
    elif queues:
        click.echo("statistics:")
        used = _used(found, queues)
        for header, rows in (
            (figures.REQUESTS, figures.request_rows(used)),
            (figures.EVENTS, figures.event_rows(used)),
        ):
            if rows:
                print_table(header, rows, indent="  ")


def _used(found: Mapping[str, Any], queues: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [queue for queue in queues if counters.used(found["class"], queue)]


def show_fields(found: Mapping[str, Any]) -> None:
    """Values, and values of values, one a line."""
    print_fields([line for key, value in found.items() for line in _lines(key, value)])


def _lines(key: str, value: Any) -> Iterator[tuple[str, object]]:
    name = key.replace("_", " ")
    if isinstance(value, Mapping):
        for inner, what in value.items():
            yield from _lines(f"{key} {inner}", what)
    elif isinstance(value, bool):
        yield name, "yes" if value else "no"
    elif value is None or value == "":
        yield name, "-"
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value)) or "-"
    elif key in _TIMES and isinstance(value, int | float):
        moment = datetime.fromtimestamp(value).astimezone()
        yield name, moment.isoformat(sep=" ", timespec="seconds")
    elif key.endswith(" size") and isinstance(value, int):
        yield name, f"{value} ({figures.amount(value)})"
    else:
        yield name, value
