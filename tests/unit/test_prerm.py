# SPDX-License-Identifier: BSD-2-Clause
"""What the removal of the package says of devices that the kernel cannot have at once."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "debian/pvfront.prerm"


class Removal:
    """The script as dpkg would run it, with another directory for /run/pvfront."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.systemd = run / "systemd"  # /run/systemd/system
        self.invoked = run / "invoked"

    def stopped(self) -> list[str]:
        """What deb-systemd-invoke was told to."""
        return self.invoked.read_text().split() if self.invoked.exists() else []

    def note(self, device: str, os_device: str = "", *, released: bool = False) -> None:
        text = json.dumps({"os_device": os_device, "released": released})
        (self.run / f"{device}.claim").write_text(text + "\n")

    def says(self, argument: str = "remove", *, stopping: str = ":") -> list[str]:
        """Lines without their first word. `stopping`: what stands for the end of the services."""
        script = SCRIPT.read_text()
        for old, new in (
            ("/run/pvfront", str(self.run)), ("#DEBHELPER#", stopping),
            ("py3clean -p pvfront", ":"),
            ("/run/systemd/system", str(self.systemd)), (">/dev/null", f">{self.invoked}"),
            ("deb-systemd-invoke", "echo"),
        ):  # fmt: skip
            assert old in script
            script = script.replace(old, new)
        done = subprocess.run(
            ["sh", "-c", script, "prerm", argument], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return [line.removeprefix("pvfront: ") for line in done.stdout.splitlines()]


@pytest.fixture
def removal(tmp_path: Path) -> Removal:
    return Removal(tmp_path)


def test_a_disk_in_use_is_to_be_unmounted_and_the_machine_restarted(removal: Removal) -> None:
    removal.note("vbd-51728", "xvdb")
    with socket.socket(socket.AF_UNIX) as worker:
        worker.bind(str(removal.run / "vbd-51728.sock"))
        (line,) = removal.says()
    assert line.startswith("vbd-51728 (xvdb) is in use: its worker goes on serving it.")
    assert line.endswith("restart the machine: from then on the kernel serves it.")


def test_a_disk_that_the_kernel_had_is_its_again_after_a_restart(removal: Removal) -> None:
    removal.note("vbd-51744", "xvdc", released=True)
    (line,) = removal.says()
    assert line.startswith("vbd-51744 (xvdc) is released.")
    assert "after a restart of the machine (or detach and attach it)" in line


def test_a_console_s_note_is_gone_by_then_and_it_is_told_of_all_the_same(removal: Removal) -> None:
    removal.note("console-1")
    (line,) = removal.says(stopping=f"rm {removal.run}/console-1.claim")
    assert line.startswith("console-1 is the kernel's again")
    assert line.endswith("until a restart of the machine.")


def test_what_the_kernel_has_at_once_is_not_spoken_of(removal: Removal) -> None:
    assert removal.says() == []
    removal.note("vif-1", "eth1")
    removal.note("vbd-51760", "xvdd")
    assert removal.says() == []


def test_a_timer_and_logins_that_were_enabled_by_hand_end_with_the_package(
    removal: Removal,
) -> None:
    removal.says()
    assert removal.stopped() == [], "no systemd runs"
    removal.systemd.mkdir()
    removal.says()
    assert removal.stopped() == [
        "stop", "pvfront-metrics.timer", "pvfront-metrics.service",
        "pvfront-getty@*.service", "pvfront-channel@*.service",
    ]  # fmt: skip


def test_an_upgrade_says_nothing_and_stops_nothing(removal: Removal) -> None:
    removal.note("vbd-51744", "xvdc", released=True)
    removal.note("console-1")
    removal.systemd.mkdir()
    assert removal.says("upgrade") == []
    assert removal.stopped() == []
