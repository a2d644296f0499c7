# SPDX-License-Identifier: BSD-2-Clause
"""What bash completes: verbs, options, devices."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import pytest
from click.shell_completion import ShellComplete
from hypothesis import given
from hypothesis import strategies as st
from interfaces import commands

from pvfront.cli import VERBS, cli
from pvfront.completion import device_names
from pvfront.platform import Embedded, Xen
from pvfront.sysfs import Roots

COMMANDS = dict(commands())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An embedded host's run directory with two disks, an interface and a console."""
    monkeypatch.setenv("PVFRONT_HOST", str(tmp_path))
    made = tmp_path / "run"
    made.mkdir()
    for name in ("vbd-51712", "vbd-51728", "suspend"):
        (made / f"{name}.json").write_text("{}")
    (made / "vif-0.json").write_text(json.dumps({"os_device": "enX0"}))
    (made / "console-1.json").write_text(json.dumps({"label": "chan1"}))
    return made


def offered(line: str) -> list[str]:
    """For the last word of a command line."""
    *words, last = line.split(" ")
    found = ShellComplete(cli, {}, "pvfront", "_PVFRONT_COMPLETE").get_completions(words, last)
    return [item.value for item in found]


def test_verbs_and_options_are_completed(run: Path) -> None:
    assert offered("") == sorted(VERBS)
    assert offered("st") == ["status", "store"]
    assert set(offered("vif ")) >= {"list", "serve", "status"}
    assert "--textfile" in offered("metrics --")


@pytest.mark.parametrize(("name", "command"), COMMANDS.items(), ids=COMMANDS)
def test_every_command_is_completed_with_each_of_its_options(
    run: Path, name: str, command: click.Command
) -> None:
    assert name.rpartition(" ")[2] in offered(name)
    options = [option for option in command.params if isinstance(option, click.Option)]
    for text in (text for option in options for text in (*option.opts, *option.secondary_opts)):
        if text.startswith("--"):
            assert text in offered(f"{name} {text}")


@pytest.mark.parametrize("verb", ["status", "trace", "ledger", "upgrade"])
def test_devices_are_completed_by_every_name(run: Path, verb: str) -> None:
    assert offered(f"{verb} ") == ["chan1", "enX0", "vif0", "xvda", "xvdb"]
    assert offered(f"{verb} v") == ["vif0"]


def test_a_verb_of_a_class_is_offered_its_devices_only(run: Path) -> None:
    assert offered("vbd status ") == ["xvda", "xvdb"]
    assert offered("vif serve ") == ["enX0", "vif0"]
    assert offered("release ") == ["console", "vbd", "vif"]
    assert offered("console attach ") == ["chan1"]
    assert offered("release vif ") == ["enX0", "vif0"]


def test_what_is_named_already_is_not_offered_again(run: Path) -> None:
    assert offered("vbd serve xvda ") == ["xvdb"]
    assert offered("vbd lend xvda,") == ["xvda,xvdb"]


def test_devices_of_the_kernel_are_offered_without_the_store_or_a_service(tmp_path: Path) -> None:
    bus = tmp_path / "sys/bus/xen/devices"
    for name in ("vbd-51728", "vif-1/net/eth0", "vkbd-0", "vbd-x", "vbd-1\x1b"):
        (bus / name).mkdir(parents=True)
    on = Xen()
    on.roots = Roots(tmp_path)
    assert device_names(on=on) == ["eth0", "vif1", "xvdb"]


def test_where_there_is_nothing_nothing_is_offered(tmp_path: Path) -> None:
    assert device_names(on=Embedded(tmp_path)) == []
    (tmp_path / "run").touch()
    assert device_names(on=Embedded(tmp_path)) == []


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=40))
def test_what_an_interface_is_called_cannot_play_with_the_shell(name: str) -> None:
    with TemporaryDirectory() as directory:
        (Path(directory) / "run").mkdir()
        (Path(directory) / "run/vif-0.json").write_text(json.dumps({"os_device": name}))
        found = device_names(on=Embedded(Path(directory)))
    assert set(found) <= {"vif0", name}
    assert not set("".join(found)) & set(" $`;&|<>()'\"\\*?#~!\x1b\n")


def test_bash_completes_a_device(run: Path) -> None:
    pvfront = Path(sys.executable).with_name("pvfront")
    script = subprocess.run(
        [pvfront], env={**os.environ, "_PVFRONT_COMPLETE": "bash_source"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    asked = (
        f"{script}\nCOMP_WORDS=({shlex.quote(str(pvfront))} vbd status x); COMP_CWORD=3\n"
        f"_pvfront_completion {shlex.quote(str(pvfront))}\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "xvda xvdb\n", "")
