# SPDX-License-Identifier: BSD-2-Clause
"""The screens of the documentation are those of the commands as they are: `make screens`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from samples import console, console_queue, disk, disk_queue, net_queue, vif

from pvfront import figures
from pvfront.cli import VERBS, ledger, list_
from pvfront.doctor import Level
from pvfront.metrics import Devices
from pvfront.top import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "docs/tools.md"
SPEC = importlib.util.spec_from_file_location("screens", ROOT / "tools/screens.py")
assert SPEC is not None
assert SPEC.loader is not None
screens = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(screens)


def shown(path: Path) -> dict[str, str]:
    """What each command says there."""
    found = screens.SCREEN.finditer(path.read_text(encoding="utf-8"))
    return {screen["command"]: screen["text"] for screen in found}


DOCUMENTED = [
    (path, command, text) for path in screens.FILES for command, text in shown(path).items()
]
END = r"( +IN USE +WRITER)?$"  # of consoles
HEADERS = {
    "list": [list(list_.COLUMNS)],
    "status": [figures.REQUESTS, figures.EVENTS],
    "top": [[column.header for column in COLUMNS[klass]] for klass in ("vbd", "vif")],
    "ledger": [ledger.DEVICES, ledger.PROCESSES],
    "doctor": [("WHAT", "FINDING")],
}


@pytest.mark.parametrize(("path", "command", "text"), DOCUMENTED)
def test_a_screen_is_what_its_command_said(path: Path, command: str, text: str) -> None:
    program, group, *words = command.split()
    assert program == "pvfront"
    assert group in VERBS
    verb = words[0] if group in ("vbd", "vif", "console", "agent") else group
    first, *lines = text.splitlines()
    assert first == f"$ {command}"
    assert lines
    assert not [line for line in lines if "Traceback" in line or line.startswith("pvfront: ")]
    if verb == "trace":
        form = re.compile(r"\d{4}-\d\d-\d\d [\d:]{8}\.\d{3} +(\+[\d.]+)? +\S+ +(#\d+|-) +\S+ +\S")
        assert [line for line in lines if form.match(line)] == lines
    elif "|" not in command and group not in ("agent", "time"):
        table = "\n".join(lines)
        for header in HEADERS[verb]:
            assert re.search(r"^ *" + r"\s+".join(map(re.escape, header)) + END, table, re.M)
    if verb == "doctor":
        assert {line.split()[0] for line in lines[1:]} <= set(Level)


@pytest.mark.parametrize("path", screens.FILES, ids=lambda path: path.name)
def test_the_screens_that_are_looked_for_are_there(path: Path) -> None:
    assert {command.split()[1] for command in shown(path)} >= {
        "list", "status", "top", "trace", "doctor",
    }  # fmt: skip


def test_every_metric_that_is_documented_exists() -> None:
    named = set(re.findall(r"\bpvfront_[a-z_]+", TOOLS.read_text(encoding="utf-8")))
    samples = [disk(0, disk_queue(), cpu=0.0), vif(0, net_queue()), console(0, console_queue())]
    agent = {"keys": 1, "store_writes": 1}
    families = Devices(samples, services={"vbd": True}, limit=1, agent=agent).collect()
    there = {sample.name for family in families for sample in family.samples}
    there |= {name.removesuffix("_bucket") for name in there}
    assert named <= there
