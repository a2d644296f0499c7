# SPDX-License-Identifier: BSD-2-Clause
"""The man page names what the command line has, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click
import pytest
from interfaces import commands

from pvfront import __version__
from pvfront.agent.settings import AgentSettings
from pvfront.agent.xeniface.policy import Settings as XenifaceSettings
from pvfront.blkfront.settings import DiskService, DiskSettings
from pvfront.cli import cli
from pvfront.netfront.settings import NetService, NetSettings

PAGE = Path(__file__).resolve().parents[2] / "man" / "pvfront.1"
CONF = PAGE.with_name("pvfront.toml.5")
PAGES = sorted(PAGE.parent.iterdir())


def plain(roff: str) -> str:
    """The text without requests, fonts and escapes."""
    text = re.sub(r"\\f[A-Z]|\\&|\\\|", "", roff.replace("\\-", "-").replace("\\ ", " "))
    text = re.sub(r"^\.\\\".*$", "", text, flags=re.M)
    text = re.sub(r"^\.[A-Z]{1,2}\b ?", "", text, flags=re.M)
    return text.replace('"', "")


def options(command: click.Command) -> set[str]:
    return {
        text
        for option in command.params
        if isinstance(option, click.Option)
        for text in (*option.opts, *option.secondary_opts)
    }


COMMANDS = dict(commands())
TEXT = plain(PAGE.read_text(encoding="utf-8"))


def words(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w/-])--?[a-z][a-z-]*", text))


def test_there_are_commands_to_look_for() -> None:
    assert set(COMMANDS) >= {"list", "status", "release", "vbd serve", "store watch"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_verb_stands_in_the_synopsis_and_has_a_paragraph(name: str) -> None:
    synopsis, _, rest = TEXT.partition("DESCRIPTION\n")
    assert f"pvfront\n{name}" in synopsis
    described = rest.partition("COMMANDS\n")[2].partition("OPTIONS\n")[0]
    assert f"pvfront {name}" in described


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name, command in COMMANDS.items() for option in options(command)],
)
def test_an_option_is_explained_with_its_verb(name: str, option: str) -> None:
    section = TEXT.partition("\nOPTIONS\n")[2].partition("\nEXIT STATUS\n")[0]
    explained = [part for part in section.split("\n\n") if option in words(part)]
    assert any(name in part for part in explained), f"{option} of {name}"


def test_no_option_is_made_up() -> None:
    section = TEXT.partition("\nOPTIONS\n")[2].partition("\nEXIT STATUS\n")[0]
    known = set().union(*(options(command) for command in COMMANDS.values()))
    known |= {"-h", "--help"} | options(cli)
    assert words(section) <= known


@pytest.mark.parametrize(
    "cls",
    [DiskService, DiskSettings, NetService, NetSettings, AgentSettings, XenifaceSettings],
)
def test_every_setting_is_explained_with_its_default(cls: type[Any]) -> None:
    text = plain(CONF.read_text(encoding="utf-8")).replace(r"\(dq", '"')
    for field in fields(cls):
        value = field.default
        if value is MISSING:
            assert f"[agent.{field.name}]" in text
            continue
        default = ("false", "true")[value] if isinstance(value, bool) else value
        if isinstance(value, tuple) or value == "":
            default = re.escape(json.dumps(value))
        assert re.search(rf"^{field.name} .*default {default}\)", text, re.M), field.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_of_this_version(page: Path) -> None:
    assert f"pvfront {__version__}" in page.read_text(encoding="utf-8").splitlines()[1]


@pytest.mark.skipif(shutil.which("man") is None, reason="there is no man(1) to render the page")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_renders_without_a_warning(page: Path) -> None:
    done = subprocess.run(
        ["man", "-l", "--warnings", "-E", "UTF-8", str(page)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "SYNOPSIS" in done.stdout
