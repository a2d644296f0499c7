# SPDX-License-Identifier: BSD-2-Clause
"""The command line: one file per verb, no logic. Errors are one line on stderr and status 1;
wrong usage is status 2."""

from __future__ import annotations

import sys
from typing import Any

import click

from .. import __version__
from ..errors import PvfrontError
from .ledger import ledger
from .list_ import list_command
from .output import complain
from .release import release
from .status import status
from .store import store
from .trace import trace
from .upgrade import upgrade
from .vbd import vbd
from .vif import vif


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pvfront")
def cli() -> None:
    """Xen PV devices of this guest, served in user space."""


for command in (ledger, list_command, release, status, store, trace, upgrade, vbd, vif):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> Any:
    """The entry point of `pvfront` and `python -m pvfront`."""
    try:
        return cli.main(args=arguments, prog_name="pvfront", standalone_mode=True)
    except PvfrontError as error:
        complain(error)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output has gone (`pvfront store ls | head`): no news.
        sys.stderr.close()
        sys.exit(1)
