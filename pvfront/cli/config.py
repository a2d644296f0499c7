# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront config``: the file of settings."""

from __future__ import annotations

from pathlib import Path

import click

from .. import config as settings
from ..platform import platform
from .output import as_json as json_option
from .output import complain, print_json


@click.group()
def config() -> None:
    """Settings (pvfront.toml)."""


@config.command()
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@json_option
def check(file: Path | None, as_json: bool) -> None:
    """Say what is wrong with FILE, or /etc/pvfront/pvfront.toml.

    It is read as the services read it. Without the file there is nothing wrong: the defaults hold,
    and no device is taken. Of each section the first mistake is told.
    """
    path = file or platform().config_dir / settings.FILE
    found = settings.problems(path, needed=file is not None)
    if as_json:
        print_json(
            {
                "file": str(path),
                "exists": path.exists(),
                "problems": [
                    {"line": e.line or None, "key": e.key or None, "text": e.text, "hint": e.hint}
                    for e in found
                ],
            }
        )
    for error in found if not as_json else ():
        complain(error)
    if found:
        raise SystemExit(1)
    if not as_json:
        click.echo(f"{path}: {'nothing is wrong' if path.exists() else 'there is no such file'}")
