# SPDX-License-Identifier: BSD-2-Clause
"""The agent's unit: how much it may, and that each point of it is explained."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).resolve().parents[2] / "systemd" / "pvfront-agent.service"
MOST = 1.5


@pytest.fixture(scope="module")
def report() -> str:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "SYSTEMD_COLORS": "0"},
    )
    if "Overall exposure" not in done.stdout:
        pytest.skip(f"systemd-analyze knows no offline check: {done.stderr[:80]}")
    return done.stdout


def test_the_agent_may_little(report: str) -> None:
    found = re.search(r"exposure level for pvfront-agent.service: ([0-9.]+)", report)
    assert found is not None
    assert float(found[1]) <= MOST, report


def test_each_point_that_is_left_is_explained_in_the_unit(report: str) -> None:
    text = " ".join(line for line in UNIT.read_text().splitlines() if line.startswith("#"))
    left = re.findall(r"^✗ (\S+) .* [0-9.]+$", report, re.M)
    assert left
    for point in left:
        name = point.removeprefix("RestrictAddressFamilies=~").partition("=")[0].partition("/")[0]
        assert name in text, f"{point} is not explained"


def test_a_call_on_d_bus_begins_the_agent_only_where_it_is_enabled() -> None:
    activation = UNIT.parent / "dbus" / "org.pvfront.Xeniface1.service"
    named = re.search(r"^SystemdService=(\S+)$", activation.read_text(), re.M)
    assert named is not None
    assert named[1] != UNIT.name
    assert f"\nAlias={named[1]}\n" in UNIT.read_text().partition("[Install]")[2] + "\n"
