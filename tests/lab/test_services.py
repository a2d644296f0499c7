# SPDX-License-Identifier: BSD-2-Clause
"""The XENBUS services on a real Xen: the suites of tests/guest, run inside the guest as root."""

from __future__ import annotations

import re

import pytest
from lab.guest import Guest

pytestmark = [pytest.mark.services, pytest.mark.core]


@pytest.mark.parametrize("suite", ["test_event_channels.py", "test_grants.py", "test_store.py"])
def test_the_suite_inside_the_guest_passes(guest: Guest, suite: str) -> None:
    result = guest.pytest(suite)
    assert result.ok, result
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result
    assert int(passed[1]) >= 5, result
