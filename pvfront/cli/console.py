# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront console``: the console service, and what is done with a console."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ..console import listing
from ..errors import PvfrontError
from ..platform import platform
from ..service import prepare_process
from . import complete
from .list_ import More
from .ofclass import add_list_and_status
from .output import with_store


def _settings(texts: Iterable[str]) -> Any:
    """KEY=VALUE of the command line; wrong usage is said as such."""
    from ..console.settings import parse_options

    try:
        return parse_options(texts)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _escape(caret: str) -> int:
    from ..console.settings import escape_byte

    try:
        return escape_byte(caret)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.group()
def console() -> None:
    """Secondary consoles (XENCONS)."""


add_list_and_status(
    console,
    "secondary consoles",
    "secondary console (login, console-1)",
    More(listing.more, {"IN USE": "pty_in_use", "WRITER": "writer"}),
)


@console.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=complete.device)
@click.option("--all", "everything", is_flag=True, help="Every one, also those attached later.")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file of settings instead of /etc/pvfront/pvfront.toml.",
)
@click.option(
    "-o",
    "--option",
    "hotkeys",
    metavar="KEY=VALUE",
    multiple=True,
    callback=lambda _context, _parameter, values: _settings(values),
    help="hotkey.NAME=^X gives console NAME hot keys behind that control character.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail.")
def serve(
    names: tuple[str, ...],
    everything: bool,
    config: Path | None,
    hotkeys: Any,
    verbose: bool,
) -> None:
    """Serve secondary consoles in user space until SIGTERM.

    NAME is a channel's name in the xl config, or console-1. Without one, those that
    /etc/pvfront/pvfront.toml names are served, and with --all every one. Each is a terminal under
    /dev/pvfront/console. The primary console stays with the kernel.

    Where systemd restarts the service, terminals, workers and what nobody has read yet are kept.
    """
    if names and everything:
        raise click.UsageError("name the consoles to serve, or say --all")
    from ..console.service import serve as serve_consoles

    in_guest = platform().name == "xen"
    prepare_process(logging.DEBUG if verbose else logging.INFO, relied_on=in_guest)
    raise SystemExit(
        asyncio.run(serve_consoles(names, everything=everything, config=config, hotkeys=hotkeys))
    )


@console.command()
@click.argument("name", shell_complete=complete.device)
@click.option("-r", "--read-only", is_flag=True, help="Watch only.")
@click.option("--steal", is_flag=True, help="Write, also if a program or another client does.")
@click.option(
    "--history",
    type=click.IntRange(0, 1 << 16),
    default=4096,
    show_default=True,
    help="Bytes of what came before to begin with.",
)
@click.option(
    "-e",
    "--escape",
    metavar="^X",
    default="^]",
    show_default=True,
    callback=lambda _context, _parameter, value: _escape(value),
    help="The control character that ends it.",
)
def attach(name: str, read_only: bool, steal: bool, history: int, escape: int) -> None:
    """Attach this terminal to console NAME.

    It becomes what the program on the console's terminal is: what dom0 types is shown, what is
    typed here goes to dom0.

    Ctrl-] ends it, as in xl console; within one, say another --escape. Several may be attached;
    one writes at a time: the program that has the terminal open, or who came first. Others watch,
    unless --steal is said.
    """
    if read_only and steal:
        raise click.UsageError("--read-only and --steal")
    from ..console.attach import attach as attach_here

    raise SystemExit(
        attach_here(name, write=not read_only, steal=steal, history=history, escape=escape)
    )


@console.command()
@click.argument("name", shell_complete=complete.device)
@click.option("--stdin", is_flag=True, help="Lines of standard input instead of the journal's.")
@click.option("-p", "--priority", metavar="LEVEL", help="As journalctl's: err, or warning..notice.")
@click.option("-u", "--unit", "units", metavar="UNIT", multiple=True, help="Only of this unit.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Lines of the journal to begin with.",
)
def log(name: str, stdin: bool, priority: str | None, units: tuple[str, ...], lines: int) -> None:
    """Write the journal, as it grows, to console NAME.

    It goes on until it is ended. Nobody who logs waits for who reads the console: where lines are
    too many, some are dropped, and a line in their place says how many.
    """
    if stdin and (priority or units):
        raise click.UsageError("--priority and --unit are of the journal")
    from ..console import log as journal

    command = None if stdin else journal.journal(priority, units, lines)
    raise SystemExit(journal.run(_served(name)[2], command))


@console.command()
@click.argument("name")
@click.option(
    "--files",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Offer the files below DIR, to be read.",
)
@click.option("--writable", is_flag=True, help="They may be written, too, and new ones be made.")
@click.option(
    "--commands",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Offer the programs in DIR.",
)
def channel(name: str, files: Path | None, writable: bool, commands: Path | None) -> None:
    """Let dom0 copy files and run commands over console NAME.

    It goes on until it is ended. Nothing is offered but what is said here or, if nothing is, in
    [console.NAME] of pvfront.toml. In dom0 `pvfront-channel` is the other end.
    """
    if writable and files is None:
        raise click.UsageError("--writable is of --files")
    from ..console.channel import serve as serve_channel

    devid, label, terminal = _served(name)
    if files is None and commands is None:
        files, writable, commands = _offered(devid, label)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    raise SystemExit(serve_channel(terminal, files=files, writable=writable, commands=commands))


def _offered(devid: int, label: str) -> tuple[Path | None, bool, Path | None]:
    """What the settings let dom0 have over a console: files, whether to be written, commands."""
    from ..config import FILE, load
    from ..console.settings import from_config

    path = platform().config_dir / FILE
    one = from_config(load(path)).of(devid, label)
    if not one.files and not one.commands:
        raise click.UsageError(
            f"say --files or --commands, here or in [console.{label}] of {path}: "
            "there is nothing to offer"
        )
    return (
        Path(one.files) if one.files else None,
        one.writable,
        (Path(one.commands) if one.commands else None),
    )


def _served(name: str) -> tuple[int, str, Path]:
    """Number, name and terminal of a console that is served. Raises PvfrontError."""
    from ..console.service import find, names
    from ..inventory import read_state

    present: dict[int, str] = with_store(names)
    devid = find(name, present)
    state = read_state(f"console-{devid}", platform().run_dir) or {}
    if not (path := state.get("os_device")):
        raise PvfrontError(f"{name}: nobody serves it", hint="systemctl start pvfront-console")
    return devid, present[devid], Path(str(path))
