# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront metrics``: OpenMetrics of every device and queue."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from ..errors import PvfrontError
from ..platform import platform
from ..sysfs import errno_text

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--textfile",
    type=FILE,
    help="Replace this file, for the textfile collector of node_exporter (NAME.prom).",
)
@click.option("--listen", type=FILE, help="Answer GET /metrics on this Unix socket until SIGTERM.")
def metrics(textfile: Path | None, listen: Path | None) -> None:
    """Print the metrics of every served device as OpenMetrics.

    A file for node_exporter is in the older text format, which is all that its collector reads. On
    a socket the Accept header decides.
    """
    if textfile and listen:
        raise click.UsageError("--textfile writes and ends, --listen goes on: say one")
    platform().require()
    from ..metrics import exposition, write_textfile
    from ..metricsserver import serve

    try:
        if textfile:
            write_textfile(textfile)
        elif listen:
            asyncio.run(serve(listen))
        else:
            click.echo(exposition()[0], nl=False)
    except OSError as error:
        raise PvfrontError(f"{textfile or listen or 'metrics'}: {errno_text(error)}") from error
