# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront ledger``: who holds event channels and granted pages."""

from __future__ import annotations

from datetime import datetime

import click

from ..ledger import USUAL_PORTS, Entry, Ledger, limit_path
from ..ledger import ledger as look
from ..platform import platform
from . import complete
from .output import as_json as json_option
from .output import print_fields, print_json, print_table, with_store

DEVICES = ("DEVICE", "GEN", "QUEUES", "PORTS", "PAGES", "MAPPED", "SINCE", "WORKER")
PROCESSES = ("PROCESS", "PID", "EVTCHN FDS", "GNTALLOC FDS", "PAGES")
UNKNOWN = "unknown (xen-gntalloc does not say)"


@click.command()
@click.argument("device", required=False, shell_complete=complete.device)
@json_option
def ledger(device: str | None, as_json: bool) -> None:
    """Show who holds which event channels and granted pages.

    Of DEVICE, or of every device, and of each process.
    MAPPED are the pages that the backend has mapped, as far as that can be known.
    """
    found = with_store(lambda store: look(store, device))
    if as_json:
        print_json(found.as_json())
        return
    print_table(DEVICES, [_device(entry) for entry in found.devices])
    click.echo()
    print_table(
        PROCESSES,
        [
            (found.role(holder), holder.pid, holder.event_channels, holder.grants, holder.pages)
            for holder in found.holdings.holders
        ],
    )
    click.echo()
    print_fields(_totals(found))


def _device(entry: Entry) -> tuple[object, ...]:
    if not entry.queues:
        return (entry.name, entry.generation, "none", "", "", "", "", "")
    mapped = str(entry.mapped) if entry.mapped is not None else f"{entry.mapped_at_least} or more"
    since = ""
    if entry.since is not None:
        moment = datetime.fromtimestamp(entry.since).astimezone()
        since = moment.isoformat(sep=" ", timespec="seconds")
    ports = ",".join(map(str, entry.event_channels))
    pages = f"{entry.pages}" + (
        f" of {entry.asked}" if entry.asked is not None and entry.asked != entry.pages else ""
    )
    return (entry.name, entry.generation, entry.queues, ports, pages, mapped, since, entry.pid)


def _totals(found: Ledger) -> list[tuple[str, object]]:
    held = found.as_json()
    pages, ports = held["granted_pages"], held["event_channels"]
    of = "" if pages["limit"] is None else f" of {pages['limit']} ({limit_path(platform())})"
    programs = "" if ports["of_programs"] is None else f"; {ports['of_programs']} of programs"
    guest = "" if ports["of_the_guest"] is None else f"; {ports['of_the_guest']} of the guest"
    deferred = UNKNOWN if pages["deferred"] is None else str(pages["deferred"])
    return [
        ("granted pages", f"{pages['held']}{of}"),
        ("freed, but still mapped", deferred),
        ("event channels", f"{ports['held']}{programs}{guest}; usual limit {USUAL_PORTS}"),
    ]
