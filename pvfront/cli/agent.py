# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront agent``: the guest agent in the foreground, and what it says of itself."""

from __future__ import annotations

import asyncio
import logging

import click

from ..platform import platform
from ..service import prepare_log
from .output import as_json as json_option
from .output import print_json
from .status import show_fields

MOMENTS = ["pre-shutdown", "post-shutdown", "post-resume", "post-link"]


@click.group()
def agent() -> None:
    """The guest agent (XENIFACE)."""


@agent.command()
@click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail.")
def run(verbose: bool) -> None:
    """Tell the toolstack of this guest, and do what it asks for.

    This is the agent, in the foreground, until SIGTERM.
    """
    from ..agent.service import serve
    from ..agent.settings import from_config
    from ..config import FILE, load

    prepare_log(logging.DEBUG if verbose else logging.INFO)
    asyncio.run(serve(from_config(load(platform().config_dir / FILE))))


@agent.command()
@click.argument("moment", type=click.Choice(MOMENTS))
def hooks(moment: str) -> None:
    """Run the hooks of MOMENT.

    Those of a shutdown are run only if the machine is on its way down. A hook that fails or hangs
    is said in the log, and holds up nothing but its time.
    """
    from ..agent.shutdown import run_hooks

    prepare_log(logging.INFO)
    asyncio.run(run_hooks(moment, platform().config_dir / "hooks.d"))


@agent.command()
@json_option
def status(as_json: bool) -> None:
    """Show what the running agent does: each of its parts."""
    from ..agent.service import ask_status

    found = asyncio.run(ask_status(platform().run_dir))
    if as_json:
        print_json(found)
    else:
        show_fields(found)
