# SPDX-License-Identifier: BSD-2-Clause
"""What these tests share is the lab's plugin for pytest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ci" / "xen-nested"))

if TYPE_CHECKING:
    from lab.scenario import Record

pytest_plugins = ["lab.plugin"]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Keeps a figure, by name, for the end of the run and JUnit's file."""
    return lambda name, value: request.node.user_properties.append((name, value))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests of this directory have measured."""
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call" and Path(__file__).parent.name in Path(report.fspath).parts:
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {value}")
