# SPDX-License-Identifier: BSD-2-Clause
"""A network namespace of a test's own, for this process: no interface of the machine is touched."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvfront.netfront.tap import TUN

_CLONE_NEWNET = 0x40000000


@pytest.fixture
def namespace() -> Iterator[None]:
    """Of this thread, and of those that it starts: a test's event loop, its threads and workers."""
    if os.geteuid() or not Path(TUN).exists():
        pytest.skip(f"needs root and {TUN}")
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if libc.unshare(_CLONE_NEWNET):
        pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        assert libc.setns(before, 0) == 0
        os.close(before)


def ip(*words: str) -> str:
    """`ip`, in this thread's namespace; its output."""
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout
