# SPDX-License-Identifier: BSD-2-Clause
"""What every verb shares: tables, JSON, the line of an error, and a store for one command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import click

from ..errors import PvfrontError
from ..platform import platform
from ..xenstore import Xenstore

T = TypeVar("T")

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def with_store(work: Callable[[Xenstore], Awaitable[T]]) -> T:
    """Runs one command's work with a connection to the store."""

    async def run() -> T:
        on = platform()
        on.require()
        async with await on.store() as connected:
            return await work(connected)

    return asyncio.run(run())


def complain(error: PvfrontError, program: str = "pvfront") -> None:
    """`pvfront: what is wrong (what to do)`, in one line."""
    note(str(error), error.hint, program)


def note(text: str, hint: str | None = None, program: str = "pvfront") -> None:
    """A line on standard error."""
    click.echo(printable(f"{program}: {text}" + (f" ({hint})" if hint else "")), err=True)


def printable(text: str) -> str:
    """Text from the store with everything escaped that could play with a terminal."""
    if text.isprintable():  # most is, and a flood of lines may come through here
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, indent: str = ""
) -> None:
    """Columns aligned to the left, two spaces between them; `-` for what is empty."""
    cells = [[printable(_cell(value)) for value in row] for row in rows]
    table = [list(header), *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo((indent + line).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value in (None, "") else str(value)


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """`name: value` lines, aligned."""
    width = max((len(name) for name, _ in fields), default=0) + 1
    for name, value in fields:
        click.echo(f"{name + ':':<{width}} {printable(str(value))}")
