# SPDX-License-Identifier: BSD-2-Clause
"""Bytes through a real worker: what is written is read, whatever its size, depth and pool."""

from __future__ import annotations

import random

import pytest
from embedded import serving


@pytest.mark.parametrize("size", [512, 4096, 44 << 10, 45568, 1 << 20, 8 << 20])
def test_what_is_written_is_read(size: int) -> None:
    data = random.Random(size).randbytes(size)
    with serving() as host:
        nbd = host.nbd()
        nbd.write(0, data)
        assert nbd.read(0, size) == data
        assert bytes(host.disk[:size]) == data
