# SPDX-License-Identifier: BSD-2-Clause
"""One set of tests, two worlds: the lab where its runner has loaded its plugin (`python -m lab
test`), else the embedded host."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("embedded_world", "lab_world")

if TYPE_CHECKING:  # neither is wanted where the other runs
    from embedded_world import EmbeddedWorld
    from world import World


def _in_lab(config: pytest.Config) -> bool:
    return config.pluginmanager.hasplugin("lab.plugin")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What is of the embedded host alone is not even imported in the lab."""
    only_here = {"test_many_disks.py", "test_embedded_world.py"}
    return True if collection_path.name in only_here and _in_lab(config) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `soak_round` runs once, and $PVFRONT_REPEATS times in a soak."""
    if "soak_round" in metafunc.fixturenames and not _in_lab(metafunc.config):
        metafunc.parametrize("soak_round", range(int(os.environ.get("PVFRONT_REPEATS", "1"))))


class Hosts:
    """Embedded hosts, one after another: a test gets the last one's, if nothing was left there."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._host: EmbeddedWorld | None = None

    def get(self) -> EmbeddedWorld:
        if self._host is None or not self._host.is_clean():
            from embedded_world import EmbeddedWorld

            self.close()
            self._host = self._stack.enter_context(EmbeddedWorld.begin())
        self._host.start()
        return self._host

    def close(self) -> None:
        self._host = None
        self._stack.close()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    yield made
    made.close()


@pytest.fixture
def host(hosts: Hosts) -> Iterator[EmbeddedWorld]:
    """An embedded host with the disk service and no disk; so it must be in the end."""
    found = hosts.get()
    yield found
    found.assert_nothing_left()


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """The disk service runs for all disks, and there is none (of ours)."""
    if _in_lab(request.config):
        from lab_world import LabWorld

        lab = LabWorld(request.getfixturevalue("lab"), request.getfixturevalue("guest"))
        lab.start()
        yield lab
    else:
        yield request.getfixturevalue("host")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests of this directory have measured."""
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call" and Path(__file__).parent.name in Path(report.fspath).parts:
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {value}")
