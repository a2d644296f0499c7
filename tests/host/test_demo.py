# SPDX-License-Identifier: BSD-2-Clause
"""`make demo` as it is run: its exit status, and that nothing of it stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from networld import networks
from waiting import PATIENCE, wait_for

from pvfront.host import Host
from pvfront.host.demo import TOOLS, network, try_tap
from pvfront.host.netns import NetNamespace, NetNamespaceError

COMMAND = [sys.executable, "-P", "-m", "pvfront.host.demo", "--size=16"]


@pytest.fixture
def environ() -> dict[str, str]:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (tools/apt-demo.txt)")
    return dict(os.environ)


def left_behind(pid: int) -> list[str]:
    """The pids of its processes, all of which have its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"PVFRONT_DEMO_TEST={pid}".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def nothing_left_behind() -> None:
    def left() -> list[str]:
        return left_behind(os.getpid())

    wait_for("the end of all that it started", lambda: not left(), why=left)


def start(environ: dict[str, str]) -> subprocess.Popen[str]:
    mark = {"PVFRONT_DEMO_TEST": str(os.getpid())}
    return subprocess.Popen(
        COMMAND, env={**environ, **mark}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def test_the_demo_verifies_both_sides_and_leaves_nothing(environ: dict[str, str]) -> None:
    with start(environ) as process:
        text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert "read by the client" in text
    assert "event channels: 0, grants: 0, grants still mapped: 0" in text
    nothing_left_behind()


def test_the_demo_interrupted_ends_all_that_it_started(environ: dict[str, str]) -> None:
    with start(environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "nbdinfo" in line:
                break
        process.send_signal(signal.SIGINT)
        text = process.stdout.read()
        assert process.wait(timeout=PATIENCE) == 130, text
    nothing_left_behind()


async def test_where_there_can_be_no_networks_the_demo_says_why_and_leaves_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses = tmp_path / "unshare"
    refuses.write_text("#!/bin/sh\necho unshare failed: No space left on device >&2\nexit 1\n")
    refuses.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    async with await Host.start() as host:
        await network(host)
    said = capsys.readouterr().out
    assert "the network is left out: no network namespace can be made" in said
    assert "No space left on device" in said


@networks
@pytest.mark.parametrize(("mode", "said"), [(None, "is missing"), (0, "may not be opened")])
async def test_users_without_a_right_to_taps_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None, said: str
) -> None:
    tun = tmp_path / "tun"
    if mode is not None:
        tun.touch(mode)
    async with await NetNamespace.start(tmp_path, "guest") as guest:
        monkeypatch.setattr("pvfront.host.demo.TUN", str(tun))
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(os, "access", lambda path, how: False)
        with pytest.raises(NetNamespaceError, match=f"tun {said}") as error:
            await try_tap(guest)
        assert "modprobe tun" in (error.value.hint or "")
        monkeypatch.undo()
        await try_tap(guest)
        assert "try" not in await guest.run("ip", "link")
