# SPDX-License-Identifier: BSD-2-Clause
"""Hooks around the end of the machine; what the toolstack asks for, and the kernel's part in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pvfront import service
from pvfront.agent.shutdown import run_hooks
from pvfront.service import kind_of

JOBS = """\
 812 pvfront-pre-shutdown.service stop  running
 799 reboot.target                start waiting
 801 xvda.swap                    stop  waiting
"""


def hook(directory: Path, moment: str, body: str) -> None:
    path = directory / f"{moment}.d" / "hook"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def systemd(monkeypatch: pytest.MonkeyPatch, running: str, jobs: str = JOBS) -> None:
    async def say(*words: str) -> str:
        return running if words[0] == "is-system-running" else jobs

    monkeypatch.setattr(service, "_systemctl", say)


def test_the_kind_of_a_shutdown_is_the_target_that_is_started() -> None:
    assert kind_of(JOBS) == "reboot"
    assert kind_of(" 1 poweroff.target stop waiting\n\nx\n") == "shutdown"


async def test_hooks_are_told_what_the_machine_goes_down_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(tmp_path, "pre-shutdown", f'echo "$PVFRONT_EVENT $PVFRONT_KIND" > {tmp_path}/out; exit 2')
    systemd(monkeypatch, "stopping\n")
    assert await run_hooks("pre-shutdown", tmp_path) == ["hook: pre-shutdown: ended with status 2"]
    assert (tmp_path / "out").read_text() == "pre-shutdown reboot\n"


async def test_stopping_the_unit_alone_runs_no_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(tmp_path, "pre-shutdown", f"echo run > {tmp_path}/out")
    systemd(monkeypatch, "running\n")
    assert await run_hooks("pre-shutdown", tmp_path) == []
    assert not (tmp_path / "out").exists()
