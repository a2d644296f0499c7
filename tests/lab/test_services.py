# SPDX-License-Identifier: BSD-2-Clause
"""The XENBUS services on a real Xen: the suites of tests/guest, run inside the guest as root."""

from __future__ import annotations

import re

import pytest
from lab.guest import Guest

pytestmark = [
    pytest.mark.services,
    pytest.mark.kinds("pv"),  # the only kind that may map its own grants, and so runs all of it
]


def test_the_suites_inside_the_guest_pass(guest: Guest) -> None:
    suites = ["test_event_channels.py", "test_grants.py", "test_store.py"]
    result = guest.pytest("-vv", "--durations=10", *suites)
    assert result.ok, result
    for suite in suites:
        assert len(re.findall(rf"{suite}::\S+ PASSED", result.stdout)) >= 5, result
