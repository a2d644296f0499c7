# SPDX-License-Identifier: BSD-2-Clause
"""The file of settings: what it says, and where it is wrong."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.blkfront import settings
from pvfront.blkfront.settings import DiskSettings, SettingsError

XVDB, XVDC = 51728, 51744
PATH = Path("/etc/pvfront/vbd.conf")


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert settings.load(tmp_path / "none").of(XVDB) == DiskSettings()


def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no such file"):
        settings.load(tmp_path / "none", needed=True)


def test_the_defaults_are_those_of_the_manual() -> None:
    found = DiskSettings()
    assert (found.max_ring_page_order, found.max_indirect_segments) == (2, 64)
    assert (found.max_pool_pages, found.feature_persistent) == (704, True)
    assert found.max_queues == 0, "what suits the target"
    assert found.poll_us == 0, "processor time is given to those who ask for it"


def test_what_is_set_for_all_and_for_one_disk_and_on_the_command_line() -> None:
    found = settings.parse(
        """
        # comment
        [disk]
        max_queues = 2
        max_indirect_segments = 32
        feature_persistent = no
        [disk xvdc]
        max_queues = 1
        """.replace("        ", "")
    )
    assert found.of(XVDB).max_queues == 2
    assert found.of(XVDC).max_queues == 1
    assert found.of(XVDC).max_indirect_segments == 32
    assert found.of(XVDB).feature_persistent is False
    found.override({"max_queues": 3})
    assert found.of(XVDC).max_queues == 3


def test_a_disk_is_named_as_in_the_xl_configuration_or_by_its_number() -> None:
    assert settings.parse("[disk 51728]\nmax_queues=1\n").of(XVDB).max_queues == 1
    assert settings.parse("[disk sda]\nmax_queues=1\n").of(8 << 8).max_queues == 1


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("max_queues = 1\n", 1, "a setting before any section"),
        ("[disk]\n\nmax_queue = 1\n", 3, "max_queue: no such setting"),
        ("[disk]\nmax_queues = many\n", 2, "max_queues = 'many': must be a number from 0 to 16"),
        ("[disk]\nmax_queues = 17\n", 2, "must be a number from 0 to 16"),
        ("[disk]\nmax_queues = -1\n", 2, "must be a number"),
        ("[disk]\nmax_queues = \u0661\n", 2, "must be a number"),
        ("[disk]\nmax_ring_page_order = 5\n", 2, "from 0 to 4"),
        ("[disk]\nmax_pool_pages = 10\n", 2, "from 11 to 1056"),
        ("[disk]\nmax_indirect_segments = 257\n", 2, "from 0 to 256"),
        ("[disk]\nfeature_persistent = maybe\n", 2, "must be yes or no"),
        ("[disk]\nmax_queues\n", 2, "is no `key = value`"),
        ("[disk]\nmax_queues = 1\nmax_queues = 2\n", 3, "is there twice"),
        ("[disk]\n[disk]\n", 2, "is there twice"),
        ("[disk]\n[disk xvdb]\n[disk 51728]\n", 3, "disk xvdb has two sections"),
        ("[disk]\n\n[net]\n", 3, "section \\[net\\] is not known"),
        ("[disk nonsense]\nmax_queues = 1\n", 1, "section \\[disk nonsense\\] is not known"),
    ],
)
def test_an_error_names_file_line_and_key(text: str, line: int, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        settings.parse(text, PATH)
    assert str(caught.value).startswith(f"{PATH}:{line}: ")


def test_the_same_key_in_two_sections_is_told_apart() -> None:
    with pytest.raises(SettingsError) as caught:
        settings.parse("[disk]\nmax_queues = 1\n[disk xvdb]\nmax_queues = x\n", PATH)
    assert caught.value.line == 4


def test_a_file_that_is_no_text_or_no_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "vbd.conf"
    path.write_bytes(b"[disk]\nmax_queues = \xff\n")
    with pytest.raises(SettingsError, match=r"vbd.conf:2: is no UTF-8 text"):
        settings.load(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        settings.load(tmp_path)


@given(st.text(max_size=200))
def test_any_text_is_settings_or_an_error(text: str) -> None:
    with contextlib.suppress(SettingsError):
        assert settings.parse(text).of(XVDB).max_queues >= 0


def test_the_command_line_has_the_same_values_and_says_what_is_wrong() -> None:
    assert settings.parse_option("max_queues=2") == ("max_queues", 2)
    assert settings.parse_option("feature_persistent = off".replace(" ", "")) == (
        "feature_persistent",
        False,
    )
    for text, said in (
        ("max_queues", "no KEY=VALUE"),
        ("queues=1", "KEY one of max_ring_page_order, "),
        ("max_queues=no", "max_queues = 'no': must be a number from 0 to 16"),
    ):
        with pytest.raises(ValueError, match=said):
            settings.parse_option(text)
