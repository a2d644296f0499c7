# SPDX-License-Identifier: BSD-2-Clause
"""What udev's rules ask about a disk at boot: pvfront-wants, in a system of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "systemd/udev/pvfront-wants"
DISKS = {"xvda": 51712, "xvdb": 51728, "xvdc": 51744}


class System:
    """The directories that the script looks into, below one of ours."""

    def __init__(self, root: Path) -> None:
        self.root = root
        text = SCRIPT.read_text().replace(" /dev/", " @dev@/").replace("^/dev/", "^@dev@/")
        for top in ("/etc/", "/run/", "/sys/", "/proc/"):
            text = text.replace(f'"{top}', f'"{root}{top}').replace(f" {top}", f" {root}{top}")
            text = text.replace(f"={top}", f"={root}{top}")
        text = text.replace("/usr/lib/pvfront/bin/python3", f"{root}/python3")
        self.script = root / "pvfront-wants"
        self.script.write_text(text.replace("@dev@", "/dev"))
        self.script.chmod(0o755)
        self.config = self.put("etc/pvfront/pvfront.toml", "")
        self.asked = self.put("asked", "")
        self.mounts = self.put("proc/self/mountinfo", "")
        self.put("proc/swaps", "Filename Type\n")
        self.put("python3", f'#!/bin/sh\necho >>{self.asked}\nexec {sys.executable} "$@"\n')
        (root / "python3").chmod(0o755)
        (root / "run").mkdir()
        for minor, (name, number) in enumerate(DISKS.items()):
            self.disk(name, number, minor)

    def put(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def disk(self, name: str, number: int, minor: int) -> None:
        device = self.root / f"sys/devices/vbd-{number}"
        self.put(f"sys/devices/vbd-{number}/block/{name}/dev", f"202:{minor}\n")
        (device / f"block/{name}/device").symlink_to(device)
        for link in (f"sys/class/block/{name}", f"sys/bus/xen/devices/vbd-{number}"):
            (self.root / link).parent.mkdir(parents=True, exist_ok=True)
        (self.root / f"sys/class/block/{name}").symlink_to(device / f"block/{name}")
        (self.root / f"sys/bus/xen/devices/vbd-{number}").symlink_to(device)

    def enable(self) -> None:
        wants = self.root / "etc/systemd/system/multi-user.target.wants"
        wants.mkdir(parents=True)
        (wants / "pvfront-vbd.service").symlink_to("/lib/systemd/system/pvfront-vbd.service")

    def wants(self, name: str) -> bool:
        done = subprocess.run(
            [self.script, name],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PVFRONT_CONFIG": str(self.config)},
        )
        assert done.stderr == ""
        return done.returncode == 0

    def times_asked(self) -> int:
        return len(self.asked.read_text())


@pytest.fixture
def system(tmp_path: Path) -> System:
    made = System(tmp_path)
    made.enable()
    return made


def test_a_disk_that_is_named_is_wanted_and_python_is_asked_once_for_all(system: System) -> None:
    system.config.write_text('[disk]\nclaim = ["xvd[bc]"]\n')
    assert [name for name in DISKS if system.wants(name)] == ["xvdb", "xvdc"]
    assert system.times_asked() == 1


def test_other_settings_or_another_disk_are_asked_about_anew(system: System) -> None:
    system.config.write_text('[disk]\nclaim = ["xvdb"]\n')
    assert (system.wants("xvdb"), system.wants("xvdc")) == (True, False)
    system.config.write_text('[disk]\nclaim = ["xvdc"]\n')
    assert (system.wants("xvdb"), system.wants("xvdc")) == (False, True)
    assert system.times_asked() == 2
    system.config.write_text('[disk]\nclaim = ["xvd*"]\n')
    assert system.wants("xvda")
    system.disk("xvdd", 51760, 3)
    assert system.wants("xvdd")
    assert system.times_asked() == 4


def test_a_disk_in_use_is_not_wanted_and_where_nothing_is_named_python_is_not_asked(
    system: System,
) -> None:
    assert not system.wants("xvdb")
    system.config.write_text('[disk]\nclaim = ["*"]\n')
    system.mounts.write_text("22 1 202:0 / / rw - ext4 /dev/root rw\n")
    assert not system.wants("xvda")
    assert system.times_asked() == 0
    assert system.wants("xvdb")
