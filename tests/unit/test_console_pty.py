# SPDX-License-Identifier: BSD-2-Clause
"""A new terminal, before any program has set its modes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvfront.console.pty import Pty


@pytest.fixture
def pty(tmp_path: Path) -> Iterator[Pty]:
    one = Pty.open(tmp_path / "console" / "login")
    yield one
    one.close()


def test_what_waited_for_a_program_is_not_echoed_when_it_opens_the_terminal(pty: Pty) -> None:
    program = os.open(pty.link, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        long = b"x" * 5000  # in canonical mode a line has 4095 bytes
        assert os.write(pty.master, long) == len(long)
        found = b""
        while len(found) < len(long):
            found += os.read(program, 8192)
        assert found == long
        with pytest.raises(BlockingIOError):
            os.read(pty.master, 1)
    finally:
        os.close(program)
