# SPDX-License-Identifier: BSD-2-Clause
"""Last of all: what the other scenarios left behind."""

from __future__ import annotations

import re

import pytest
from lab.guest import Guest
from lab.scenario import Lab


@pytest.mark.core
def test_in_the_end_dom0s_services_live_and_no_kernel_has_reported_a_bug(
    lab: Lab, guest: Guest
) -> None:
    lab.check_services()
    for machine in (lab.dom0, guest):
        log = machine.output("dmesg")
        assert not re.search(r"\bBUG\b", log), machine
