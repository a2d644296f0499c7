# SPDX-License-Identifier: BSD-2-Clause
"""The units: how much each service may, and that each point that is left is explained there."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

import pytest

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
AGENT = SYSTEMD / "pvfront-agent.service"
MOST = {
    "pvfront-agent": 1.5,
    "pvfront-metrics": 1.5,
    "pvfront-vbd": 6.3,
    "pvfront-vif": 6.4,
    "pvfront-console": 5.9,
    "pvfront-pre-shutdown": 8.0,
    "pvfront-post-shutdown": 8.0,
}
"""As `systemd-analyze security` counts it."""
UNCONFINED = ("pvfront-channel@", "pvfront-getty@")
"""Logins and dom0's commands are not ours to confine; their units say so."""
UNITS = {SYSTEMD / f"{name}.service": most for name, most in MOST.items()}


@functools.cache
def report(unit: Path) -> str:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "SYSTEMD_COLORS": "0"},
    )
    if "Overall exposure" not in done.stdout:
        pytest.skip(f"systemd-analyze knows no offline check: {done.stderr[:80]}")
    return done.stdout


def explained(point: str, words: set[str]) -> bool:
    """Whether the comments name a point: `UMask=`, `CapabilityBoundingSet=~CAP_(DAC_*|FOWNER)`."""
    name, _, of = point.partition("=~")
    if of and name != "RestrictNamespaces":
        group = re.fullmatch(r"(.*)\((.*)\)", of)
        names = [group[1] + each for each in group[2].split("|")] if group else [of]
        return any(fnmatch(word, each.removeprefix("CAP_")) for each in names for word in words)
    name = name.partition("=")[0]
    return any(fnmatch(name, word) for word in words)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_service_may_no_more_than_its_unit_says(unit: Path) -> None:
    found = re.search(rf"exposure level for {unit.name}: ([0-9.]+)", text := report(unit))
    assert found is not None
    assert float(found[1]) <= UNITS[unit], text
    assert f"security` says {found[1]}" in unit.read_text().replace("\n# ", " ")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_each_point_that_is_left_is_explained_in_the_unit(unit: Path) -> None:
    comments = " ".join(line for line in unit.read_text().splitlines() if line.startswith("#"))
    words = set(re.split(r"[\s,;:()#]+", comments)) - {"*"}
    left = re.findall(r"^✗ (\S+) .* [0-9.]+$", report(unit), re.M)
    assert left
    assert [point for point in left if not explained(point, words)] == []


def test_every_service_is_measured_or_says_that_it_is_not_confined() -> None:
    services = {unit.stem for unit in SYSTEMD.glob("*.service")}
    assert services == {*MOST, *UNCONFINED}


@pytest.mark.parametrize("name", UNCONFINED)
def test_a_unit_that_is_not_confined_says_so_and_how_much_that_is(name: str) -> None:
    unit = SYSTEMD / f"{name}.service"
    found = re.search(r"exposure level for \S+: ([0-9.]+)", report(unit))
    assert found is not None
    said = unit.read_text().replace("\n# ", " ")
    assert f"Not confined (`systemd-analyze security` says {found[1]}" in said


def test_a_call_on_d_bus_begins_the_agent_only_where_it_is_enabled() -> None:
    activation = SYSTEMD / "dbus" / "org.pvfront.Xeniface1.service"
    named = re.search(r"^SystemdService=(\S+)$", activation.read_text(), re.M)
    assert named is not None
    assert named[1] != AGENT.name
    assert f"\nAlias={named[1]}\n" in AGENT.read_text().partition("[Install]")[2] + "\n"
