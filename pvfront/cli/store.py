# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront store``: look at and change the store, with the habits of the xenstore-* tools.

Relative paths are below the guest's own directory. Values are shown with everything unprintable
escaped; `read --raw` writes the bytes as they are.
"""

from __future__ import annotations

import json

import click

from .. import storetool
from ..xenstore import Xenstore
from .output import as_json as json_option
from .output import print_json, printable, with_store


@click.group()
def store() -> None:
    """Read, write and watch the store."""


@store.command("ls")
@click.argument("path", default="")
@click.option("-f", "--full", is_flag=True, help="Print full paths instead of indenting.")
@click.option("-p", "--permissions", is_flag=True, help="Print each node's permissions.")
@json_option
def ls(path: str, full: bool, permissions: bool, as_json: bool) -> None:
    """List PATH and everything below it.

    Without one, that is the guest's own directory.
    """
    nodes = with_store(lambda s: storetool.tree(s, path, permissions=permissions))
    if as_json:
        print_json([node.as_json() for node in nodes])
        return
    for node in nodes:
        name = node.path if full else " " * node.depth + node.name
        value = printable(node.value) if node.readable else None
        line = f'{printable(name)} = "{value}"' if value is not None else f"{printable(name)}:"
        if permissions:
            line += f"   ({','.join(node.permissions)})"
        click.echo(line)


@store.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("-p", "--prefix", is_flag=True, help="Print each path before its value.")
@click.option("--raw", is_flag=True, help="Write the bytes as they are, without a newline.")
@json_option
def read(paths: tuple[str, ...], prefix: bool, raw: bool, as_json: bool) -> None:
    """Print the value of each PATH."""
    values = with_store(lambda s: storetool.read_all(s, paths))
    if as_json:
        print_json({path: storetool.text(value) for path, value in values})
        return
    for path, value in values:
        if raw:
            click.echo(value, nl=False)  # bytes go out unchanged
        else:
            shown = printable(storetool.text(value))
            click.echo(f"{printable(path)}: {shown}" if prefix else shown)


@store.command()
@click.argument("pairs", metavar="PATH VALUE...", nargs=-1, required=True)
def write(pairs: tuple[str, ...]) -> None:
    """Set each PATH to its VALUE, all in one transaction."""
    if len(pairs) % 2:
        raise click.UsageError("each PATH needs a VALUE")
    wanted = list(zip(pairs[::2], pairs[1::2], strict=True))
    with_store(lambda s: storetool.write_all(s, wanted))


@store.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
def rm(paths: tuple[str, ...]) -> None:
    """Remove each PATH and everything below it."""
    with_store(lambda s: storetool.remove_all(s, paths))


@store.command()
@click.argument("path")
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after this many events.")
@json_option
def watch(path: str, count: int | None, as_json: bool) -> None:
    """Print PATH, and then whatever changes at or below it.

    It goes on until interrupted. The first line comes at once: PATH itself.
    """

    async def follow(s: Xenstore) -> None:
        seen = 0
        async with s.watch(path) as changes:
            async for changed in changes:
                click.echo(json.dumps({"path": changed}) if as_json else printable(changed))
                seen += 1
                if seen == count:
                    return

    with_store(follow)
