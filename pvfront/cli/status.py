# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront status``: one device in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from .. import inventory
from .output import as_json as json_option
from .output import human_size, print_fields, print_json, with_store

_FIRST = ("name", "class", "id", "owner", "os_device", "link", "phase", "reason")


@click.command()
@click.argument("device")
@json_option
def status(device: str, as_json: bool) -> None:
    """Show one DEVICE (xvdb, 51728, vbd-51728): states, geometry, worker, counters."""
    found = with_store(lambda store: inventory.status(store, device))
    if as_json:
        print_json(found)
        return
    order = [key for key in _FIRST if key in found]
    order += [key for key in found if key not in _FIRST]
    print_fields([line for key in order for line in _lines(key, found[key])])


def _lines(key: str, value: Any) -> Iterator[tuple[str, object]]:
    name = key.replace("_", " ")
    if isinstance(value, Mapping):
        for inner, what in value.items():
            yield from _lines(f"{key} {inner}", what)
    elif isinstance(value, bool):
        yield name, "yes" if value else "no"
    elif value is None or value == "":
        yield name, "-"
    elif key.endswith(" size") and isinstance(value, int):
        yield name, f"{value} ({human_size(value)})"
    else:
        yield name, value
