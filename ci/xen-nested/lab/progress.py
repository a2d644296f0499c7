# SPDX-License-Identifier: BSD-2-Clause
"""Progress lines on the terminal: what is being done, for how long, how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_START = time.monotonic()


def say(text: str) -> None:
    """One line on standard error, stamped with the seconds since this program started."""
    print(f"[lab {time.monotonic() - _START:6.1f}s] {text}", file=sys.stderr, flush=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """`say` before, and after with the duration."""
    say(f"{text} ...")
    begin = time.monotonic()
    try:
        yield
    except BaseException:
        say(f"{text}: FAILED after {time.monotonic() - begin:.1f} s")
        raise
    say(f"{text}: done in {time.monotonic() - begin:.1f} s")
