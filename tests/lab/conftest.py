# SPDX-License-Identifier: BSD-2-Clause
"""What these tests share is the lab's plugin for pytest."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ci" / "xen-nested"))

pytest_plugins = ["lab.plugin"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests of this directory have measured."""
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call" and Path(__file__).parent.name in Path(report.fspath).parts:
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {value}")
