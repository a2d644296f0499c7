# SPDX-License-Identifier: BSD-2-Clause
"""The file of settings: what it says, which devices it names, and where it is wrong."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront import claimed, config
from pvfront.agent import settings as agents
from pvfront.agent.settings import AgentSettings
from pvfront.agent.xeniface.policy import Settings as XenifaceSettings
from pvfront.blkfront import settings as disks
from pvfront.blkfront.settings import DiskService, DiskSettings
from pvfront.cli import main
from pvfront.config import ConfigError
from pvfront.console import settings as consoles
from pvfront.console.settings import OneConsole
from pvfront.netfront import settings as vifs
from pvfront.netfront.settings import NetService, NetSettings

XVDB, XVDC = 51728, 51744
PATH = Path("/etc/pvfront/pvfront.toml")

EVERYTHING = """
[disk]
claim = ["xvdb", "xvd[c-f]"]
target = "nbd"
max_queues = 2
max_indirect_segments = 32
feature_persistent = false

[disk.xvdc]                 # of one disk
max_queues = 1

[vif]
claim = ["vif1"]
force = true
max_queues = 4
[vif.vif1]
hash = false
[vif."enX2"]
max_queues = 1

[console]
claim = ["login", "2"]
[console.login]
hotkey = "^^"
[console."org.example.files"]
files = "/srv/exchange"
writable = true

[agent]
volumes = false
[agent.xeniface]
write_group = "adm"
"""


def test_without_a_file_the_defaults_hold_and_nothing_is_named(tmp_path: Path) -> None:
    found = config.load(tmp_path / "none")
    assert disks.from_config(found).disks.of(XVDB) == DiskSettings()
    assert disks.from_config(found).service == DiskService(claim=(), target="auto")
    assert vifs.from_config(found).service == NetService(claim=(), force=False)
    assert config.problems(tmp_path / "none") == []


def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        config.load(tmp_path / "none", needed=True)


def test_the_defaults_are_those_of_the_manual() -> None:
    found = DiskSettings()
    assert (found.max_ring_page_order, found.max_indirect_segments) == (2, 64)
    assert (found.max_pool_pages, found.feature_persistent) == (704, True)
    assert found.max_queues == 0, "what suits the target"
    assert found.poll_us == 0, "processor time is given to those who ask for it"


def test_what_is_set_for_all_and_for_one_disk_and_on_the_command_line() -> None:
    found = disks.from_config(config.parse(EVERYTHING))
    assert found.service == DiskService(claim=("xvdb", "xvd[c-f]"), target="nbd")
    assert found.disks.of(XVDB).max_queues == 2
    assert found.disks.of(XVDC).max_queues == 1
    assert found.disks.of(XVDC).max_indirect_segments == 32
    assert found.disks.of(XVDB).feature_persistent is False
    found.disks.override({"max_queues": 3})
    assert found.disks.of(XVDC).max_queues == 3


def test_of_networks_and_of_the_agent() -> None:
    file = config.parse(EVERYTHING)
    found = vifs.from_config(file)
    assert found.service == NetService(claim=("vif1",), force=True)
    assert found.vifs.of(0) == NetSettings(max_queues=4)
    assert found.vifs.of(1) == NetSettings(max_queues=4, hash=False)
    assert found.vifs.of(2) == NetSettings(max_queues=1)
    assert file.section("agent").fill(AgentSettings) == AgentSettings(
        volumes=False, xeniface=XenifaceSettings(write_group="adm")
    )


def test_of_consoles_by_name_or_number_and_nothing_unless_it_is_said() -> None:
    found = consoles.from_config(config.parse(EVERYTHING))
    assert found.service.claim == ("login", "2")
    assert found.of(1, "login") == OneConsole(hotkey="^^")
    assert found.of(2, "org.example.files") == OneConsole(files="/srv/exchange", writable=True)
    assert found.of(3, "other") == OneConsole()
    by_number = consoles.from_config(config.parse('[console.console-3]\nhotkey = "^A"\n'))
    assert by_number.escape(3, "other") == 1
    assert by_number.escape(4, "another") is None


def test_a_hot_key_of_the_command_line_is_above_the_file() -> None:
    found = consoles.from_config(config.parse(EVERYTHING))
    assert (found.escape(1, "login"), found.escape(2, "org.example.files")) == (0x1E, None)
    assert replace(found, hotkeys={"login": 2}).escape(1, "login") == 2


def test_a_disk_is_named_as_in_the_xl_configuration_or_by_its_number() -> None:
    for name, vdev in (("51728", XVDB), ("sda", 8 << 8), ("d1", XVDB)):
        found = disks.from_config(config.parse(f"[disk.{name}]\nmax_queues = 1\n"))
        assert found.disks.of(vdev).max_queues == 1


@pytest.mark.parametrize(
    ("patterns", "named"),
    [
        (["xvdb"], {"xvdb"}),
        (["51744"], {"xvdc"}),
        (["xvd[cd]", "xvdb"], {"xvdb", "xvdc", "xvdd"}),
        (["*"], {"xvda", "xvdb", "xvdc", "xvdd"}),
        (["xvd[!a]"], {"xvdb", "xvdc", "xvdd"}),
        (["xvd"], set()),
        ([], set()),
    ],
)
def test_a_disk_is_claimed_by_name_number_or_pattern(patterns: list[str], named: set[str]) -> None:
    present = {f"xvd{letter}": 51712 + 16 * n for n, letter in enumerate("abcd")}
    assert {name for name, vdev in present.items() if claimed.names_disk(patterns, vdev)} == named


@pytest.mark.parametrize("pattern", ["1", "vif1", "enX1", "lan*", "[12]"])
def test_a_vif_is_claimed_by_number_by_interface_or_by_pattern(pattern: str) -> None:
    assert claimed.names_vif([pattern], 1, ["lan0"])
    assert not claimed.names_vif([pattern], 3, ["wan0"])


@pytest.mark.parametrize("pattern", ["2", "console-2", "log*", "[12]", "*"])
def test_a_console_is_claimed_by_name_number_or_pattern(pattern: str) -> None:
    assert claimed.names_console([pattern], 2, "login")
    assert claimed.names_console(["console-[23]"], 3, "files")
    assert not claimed.names_console(["login", "2"], 3, "files")
    assert not claimed.names_console([pattern, "0"], 0, "login"), "the primary one is the kernel's"


def read_all(file: config.Config) -> None:
    for module in (disks, vifs, consoles, agents):
        module.from_config(file)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "line", "key", "said"),
    [
        ("[disk\n", 1, "", "is no TOML"),
        ("[disk]\nmax_queues = \n", 2, "", "is no TOML"),
        ('[disk]\nclaim = [\n"xvdb",\n', 3, "", "is no TOML"),
        ("[disk]\n[disk]\n", 2, "", "is no TOML"),
        ("[disk]\nmax_queues = 1\nmax_queues = 2\n", 3, "", "is no TOML"),
        ("max_queues = 1\n", 1, "max_queues", r"\[max_queues\]: no such section"),
        ("[disk]\n[disks]\n", 2, "disks", r"\[disks\]: no such section"),
        ("disk = 3\n", 1, "disk", r"must be a section: \[disk\]"),
        ("[disk]\n\nmax_queue = 1\n", 3, "disk.max_queue", "max_queue: no such setting"),
        ("[disk]\nmax_queues = 'many'\n", 2, "disk.max_queues", "max_queues = 'many': must be a"),
        ("[disk]\nmax_queues = 17\n", 2, "disk.max_queues", "must be a number from 0 to 16"),
        ("[disk]\nmax_queues = true\n", 2, "disk.max_queues", "must be a number from 0 to 16"),
        ("[disk]\nmax_queues = 1.0\n", 2, "disk.max_queues", "must be a number from 0 to 16"),
        ("disk.max_queues = -1\n", 1, "disk.max_queues", "must be a number"),
        ("[disk]\nmax_ring_page_order = 5\n", 2, "disk.max_ring_page_order", "from 0 to 4"),
        ("[disk]\nmax_pool_pages = 10\n", 2, "disk.max_pool_pages", "from 11 to 1056"),
        ("[disk]\nfeature_persistent = 1\n", 2, "disk.feature_persistent", "must be true or false"),
        ("[disk]\ntarget = 'tape'\n", 2, "disk.target", "must be one of auto, nbd, ublk, socket"),
        ("[disk]\nclaim = 'xvdb'\n", 2, "disk.claim", "must be a list of strings"),
        ("[disk]\nclaim = [\n 1 ]\n", 2, "disk.claim", "must be a list of strings"),
        ("[disk]\nclaim = ['/dev/xvdb']\n", 2, "disk.claim", "neither a name nor a pattern"),
        ("[disk]\n[disk.xvdb]\nclaim = []\n", 3, "disk.xvdb.claim", "claim: no such setting"),
        ("[disk]\n[disk.any]\n", 2, "disk.any", r"\[disk.any\]: no such section"),
        ("[disk.xvdb]\n[disk.51728]\n", 2, "disk.51728", "the device has two sections"),
        ("[vif]\n[vif.eth0]\n", 2, "vif.eth0", r"\[vif.eth0\]: no such section"),
        ("[vif]\nforce = 'yes'\n", 2, "vif.force", "must be true or false"),
        ("[console]\nclaim = ['a b']\n", 2, "console.claim", "neither a name nor a pattern"),
        ("[console]\nhotkey = '^A'\n", 2, "console.hotkey", "hotkey: no such setting"),
        ("[console.login]\nhotkey = 'A'\n", 2, "console.login.hotkey", "a control character"),
        ("[console.login]\nfiles = 'srv'\n", 2, "console.login.files", "begins with /"),
        ("[console.login]\nwritable = true\n", 2, "console.login.writable", "there are no files"),
        ("[console]\n[console.'a/b']\n", 2, "console.a/b", "no name of a console"),
        ("[console.org.example]\n", 1, "console.org.example", "example: no such setting"),
        ("[agent]\nxeniface = 1\n", 2, "agent.xeniface", r"must be a section: \[agent.xeniface\]"),
        ("[agent.xeniface]\nwrite_group = 1\n", 2, "agent.xeniface.write_group", "a string"),
        (
            '[agent.xeniface]\nhidden_paths = ["vm-data/"]\n',
            2,
            "agent.xeniface.hidden_paths",
            "'vm-data/' is no path below the guest's own directory",
        ),
        (
            '[agent.xeniface]\nwrite_paths = ["data", "/data/x"]\n',
            2,
            "agent.xeniface.write_paths",
            "'/data/x' is no path below",
        ),
        ("[agent]\nvolume = true\n", 2, "agent.volume", "volume: no such setting"),
        ('["a\\u001b[2J"]\n', 1, "a\x1b[2J", r"\[a\\x1b\[2J\]: no such section"),
    ],
)
def test_a_mistake_is_said_with_line_and_key(text: str, line: int, key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_all(config.parse(text, PATH))
    assert str(caught.value).startswith(f"{PATH}:{line}: ")
    assert (caught.value.line, caught.value.key) == (line, key)


def test_a_mistake_of_another_section_is_not_the_services_trouble() -> None:
    file = config.parse("[vif]\nmax_queues = 99\n[disk]\nmax_queues = 2\n")
    assert disks.from_config(file).disks.of(XVDB).max_queues == 2


def test_a_key_is_found_after_values_of_several_lines() -> None:
    text = (
        '# [disk]\n[vif]\nclaim = [  # max_queues = 1\n  "a",\n]\n\n'
        '[disk]\nx = """\nmax_queues = 1\n"""\nmax_queues = 2\n'
    )
    assert config.line_of(text, ("vif", "claim")) == 3
    assert config.line_of(text, ("disk",)) == 7
    assert config.line_of(text, ("disk", "x")) == 8
    assert config.line_of(text, ("disk", "max_queues")) == 11
    assert config.line_of(text, ("disk", "none")) == 0


def test_what_is_no_text_has_a_line_too(tmp_path: Path) -> None:
    path = tmp_path / "pvfront.toml"
    path.write_bytes(b"[disk]\n# \xff\n")
    with pytest.raises(ConfigError, match=r"pvfront.toml:2: is no UTF-8 text"):
        config.load(path)
    path.write_bytes(b"#" * (config.LONGEST + 1))
    with pytest.raises(ConfigError, match="is longer than"):
        config.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)


@given(st.text())
def test_no_text_whatever_leads_to_anything_but_settings_or_that_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        found = disks.from_config(config.parse(text))
        assert isinstance(found.disks.of(XVDB), DiskSettings)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [("max_queues=16", "max_queues", 16), ("feature_persistent=no", "feature_persistent", False),
     ("poll_us= 5", "poll_us", 5)],
)  # fmt: skip
def test_the_command_line_sets_numbers_and_switches(text: str, key: str, value: Any) -> None:
    assert disks.parse_option(text) == (key, value)
    assert vifs.parse_option("hash=0") == ("hash", False)


@pytest.mark.parametrize(
    ("text", "said"),
    [("max_queues", "KEY=VALUE with KEY one of max_ring_page_order, "),
     ("claim=xvdb", "KEY=VALUE"), ("max_queues=17", "from 0 to 16"),
     ("max_queues=\u0661", "must be a number"), ("feature_persistent=2", "yes or no")],
)  # fmt: skip
def test_wrong_usage_of_the_command_line_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        disks.parse_option(text)


# -- pvfront config check, and udev's question -----------------------------------------------------


def run_check(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["config", "check", *arguments])
    return int(ended.value.code or 0)


def test_check_tells_the_first_mistake_of_each_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pvfront.toml"
    path.write_text("[agent]\nvolume = 1\n[disk]\nmax_queues = 99\n")
    assert run_check(str(path)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"pvfront: {path}:2: volume: no such setting (there are: ")
    assert lines[1] == f"pvfront: {path}:4: max_queues = 99: must be a number from 0 to 16"
    assert run_check(str(path), "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert [(p["line"], p["key"]) for p in answer["problems"]] == [
        (2, "agent.volume"),
        (4, "disk.max_queues"),
    ]


def test_a_section_that_there_is_not_hides_no_other_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pvfront.toml"
    path.write_text('[vbd]\nclaim = []\n[disk]\nclaim = "xvdb"\n[network]\nx = 1\n')
    assert run_check(str(path)) == 1
    said = [line.removeprefix(f"pvfront: {path}:") for line in capsys.readouterr().err.splitlines()]
    assert [line.split(" ")[:2] for line in said] == [
        ["1:", "[vbd]:"], ["4:", "claim"], ["5:", "[network]:"],
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r":1: \[vbd\]: no such section"):
        config.load(path)


def test_check_is_content_with_what_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pvfront.toml"
    assert run_check(str(path)) == 1, "it was named, and is not there"
    path.write_text(EVERYTHING)
    assert run_check(str(path)) == 0
    assert capsys.readouterr().out == f"{path}: nothing is wrong\n"
    assert run_check(str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": str(path), "exists": True, "problems": [],
    }  # fmt: skip


def test_udev_is_told_of_a_disk_whether_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pvfront.toml"
    monkeypatch.setenv("PVFRONT_CONFIG", str(path))

    def named() -> list[str]:
        assert claimed.main([str(XVDB), str(XVDC)]) == 0
        return [line.split()[1] for line in capsys.readouterr().out.splitlines()]

    assert named() == ["other", "other"], "there is no file"
    path.write_text('[disk]\nclaim = ["xvdb"]\nmax_queues = 99\n')
    assert named() == ["named", "other"]
    path.write_text("[disk]\nclaim = 3\n")
    claimed.main([str(XVDB)])
    said = capsys.readouterr()
    assert said.out == f"{XVDB} other\n"
    assert "claim = 3: must be a list of strings" in said.err
