# SPDX-License-Identifier: BSD-2-Clause
"""``pvfront doctor``: what is wrong here, and how it is mended."""

from __future__ import annotations

import asyncio
import sys

import click

from .. import doctor as examiner
from ..facts import gather
from .output import as_json as json_option
from .output import print_json, print_table


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what is wrong with this guest, and how it is mended.

    Looks at all that pvfront needs: kernel, modules, limits, permissions, store, devices. Each line
    is OK, WARN or FAIL, with what to do about it in parentheses. The status is 1 if anything
    failed.
    """
    findings = examiner.examine(asyncio.run(gather()))
    if as_json:
        print_json([finding.as_json() for finding in findings])
    else:
        print_table(
            ("", "WHAT", "FINDING"),
            [
                (one.level, one.subject, f"{one.text} ({one.fix})" if one.fix else one.text)
                for one in findings
            ],
        )
    sys.exit(1 if examiner.failed(findings) else 0)
