# SPDX-License-Identifier: BSD-2-Clause
"""Descriptors that must never be closed pass to a process that never ends by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import PATIENCE

from pvfront.parking import NAME, CannotPark, park

NODE = "/dev/full"
HOLDS_TWO = f"""
import os, time
a, b = os.open({NODE!r}, os.O_RDWR), os.open({NODE!r}, os.O_RDONLY)
print("ready", flush=True)
time.sleep(600)
"""


def cmdline(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.fixture
def ended() -> int:
    """The pid of a process that was."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def held(pid: int) -> int:
    rdev = Path(NODE).stat().st_rdev
    return sum(fd.stat().st_rdev == rdev for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.exists())


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", HOLDS_TWO], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="taking another process's descriptors needs root")
async def test_the_ports_outlive_the_process_that_bound_them(
    holder: subprocess.Popen[bytes],
) -> None:
    parker, count = await park(holder.pid, node=NODE, timeout=PATIENCE)
    try:
        assert count == 2
        holder.kill()
        holder.wait()
        os.kill(parker, signal.SIGTERM)
        assert held(parker) == 2
        assert cmdline(parker).startswith(NAME)
        assert NAME.startswith("@")  # systemd's last kill spares it
    finally:
        os.kill(parker, signal.SIGKILL)


@pytest.mark.skipif(os.geteuid() != 0, reason="taking another process's descriptors needs root")
async def test_a_process_that_goes_on_has_only_the_named_port_parked() -> None:
    first, second = os.open(NODE, os.O_RDWR), os.open(NODE, os.O_RDWR)
    try:
        parker, count = await park(os.getpid(), node=NODE, timeout=PATIENCE, fds=[second])
        try:
            assert (count, held(parker)) == (1, 1)
        finally:
            os.kill(parker, signal.SIGKILL)
    finally:
        os.close(first)
        os.close(second)


async def test_a_named_descriptor_that_is_no_port_is_not_said_to_be_parked() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(CannotPark, match="0 of 1 ports were taken over"):
            await park(os.getpid(), node=NODE, timeout=PATIENCE, fds=[read])
    finally:
        os.close(read)
        os.close(write)


async def test_a_process_without_ports_leaves_no_parker_behind() -> None:
    assert await park(os.getpid(), node=NODE, timeout=PATIENCE) == (0, 0)


async def test_a_process_that_is_gone_is_reported(ended: int) -> None:
    with pytest.raises(CannotPark, match=f"process {ended}: its ports cannot be taken over"):
        await park(ended, node=NODE, timeout=PATIENCE)
