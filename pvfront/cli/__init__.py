# SPDX-License-Identifier: BSD-2-Clause
"""The command line: one file per verb, no logic. Errors are one line on stderr and status 1;
wrong usage is status 2.

A verb's file is imported when the verb is used: what the others need costs each command, and each
start of a service, a third of its time.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

from .. import __version__
from ..errors import PvfrontError
from ..versions import API, DBUS, JSON
from .output import complain

VERBS = {
    "agent": "agent",
    "config": "config",
    "console": "console",
    "doctor": "doctor",
    "ledger": "ledger",
    "list": "list_",
    "metrics": "metrics",
    "release": "release",
    "status": "status",
    "store": "store",
    "top": "top",
    "time": "time",
    "trace": "trace",
    "upgrade": "upgrade",
    "vbd": "vbd",
    "vif": "vif",
}
"""The file of each, which has it under its name, or as NAME_command where that is a builtin's."""


class Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = import_module(f".{VERBS[name]}", __name__)
        command = getattr(module, name, None) or getattr(module, f"{name}_command")
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    __version__,
    message=f"pvfront, version %(version)s\nPython {API}, D-Bus {DBUS}, JSON {JSON}",
)
def cli() -> None:
    """Xen PV devices of this guest, served in user space."""


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
