# SPDX-License-Identifier: BSD-2-Clause
"""What tests of the package ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import debianworld
import pytest
from debianworld import DIST, Debian


@pytest.fixture
def debian() -> Iterator[Debian]:
    if os.geteuid() != 0:
        pytest.fail("a root file system of another Debian needs root: run as root")
    with debianworld.debian() as made:
        yield made


@pytest.fixture(scope="session")
def deb() -> Path:
    """The package that `make deb` made last."""
    (found,) = DIST.glob("pvfront_*.deb")
    return found
