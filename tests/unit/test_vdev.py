# SPDX-License-Identifier: BSD-2-Clause
"""Virtual device numbers and names, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.blkfront.vdev import parse_name, vdev_name

KNOWN = [
    (51712, "xvda"),
    (51713, "xvda1"),
    (51728, "xvdb"),
    (51952, "xvdp"),
    (51967, "xvdp15"),
    (1 << 28 | 16 << 8, "xvdq"),
    (1 << 28 | 25 << 8, "xvdz"),
    (1 << 28 | 26 << 8, "xvdaa"),
    (1 << 28 | 1 << 8 | 16, "xvdb16"),
    (768, "hda"),
    (769, "hda1"),
    (832, "hdb"),
    (5632, "hdc"),
    (5696, "hdd"),
    (5759, "hdd63"),
    (2048, "sda"),
    (2064, "sdb"),
    (2303, "sdp15"),
]


@pytest.mark.parametrize(("number", "name"), KNOWN)
def test_a_known_number_has_its_name_and_the_name_its_number(number: int, name: str) -> None:
    assert vdev_name(number) == name
    assert parse_name(name) == number


def test_a_path_in_dev_is_a_name() -> None:
    assert parse_name("/dev/xvdb") == 51728
    assert parse_name("/dev/pvfront/xvdb") == 51728


def test_xls_own_spelling_is_understood() -> None:
    assert parse_name("d1") == 51728
    assert parse_name("d1p2") == 51730
    assert parse_name("d20") == 1 << 28 | 20 << 8


def test_a_number_is_its_own_name() -> None:
    assert parse_name("51728") == 51728


@pytest.mark.parametrize("number", [0, 1, 4096, 65535, 2 << 28, (1 << 32) - 1, -1])
def test_a_number_without_a_name_is_shown_as_it_is(number: int) -> None:
    assert vdev_name(number) == str(number)


@pytest.mark.parametrize(
    "text", ["", "xvd", "xvd1", "xvdb0", "xvdb01", "xvdb256", "sdq", "sda16", "hde", "hda64", "vda",
             "XVDB", "xvdb1x", "99999999999", "-1", "xvdzzzzzz", "nbd0"]
)  # fmt: skip
def test_anything_else_is_no_name(text: str) -> None:
    assert parse_name(text) is None


@given(st.integers(min_value=0, max_value=(1 << 28) - 1))
def test_every_extended_number_survives_the_way_there_and_back(low: int) -> None:
    number = 1 << 28 | low
    back = parse_name(vdev_name(number))
    # The name of an extended number with a small disk and partition has a shorter number, too.
    small = low >> 8 < 16 and low & 0xFF < 16
    assert back == (202 << 8 | (low >> 8) << 4 | low & 0xFF if small else number)


@given(st.integers(), st.text())
def test_no_input_breaks_them(number: int, text: str) -> None:
    assert isinstance(vdev_name(number), str)
    assert parse_name(text) is None or parse_name(text) == parse_name(text.strip())
