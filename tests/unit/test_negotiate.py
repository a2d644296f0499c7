# SPDX-License-Identifier: BSD-2-Clause
"""Hostile keys: parsed or refused, clamped or replaced, always named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.errors import PvfrontError
from pvfront.negotiate import (
    BadValue,
    Keys,
    Problem,
    is_power_of_two,
    parse_bool,
    parse_power_of_two,
    parse_uint,
)

NONSENSE = [
    "",
    " 1",
    "1 ",
    "1\0",
    "1\n",
    "-1",
    "+1",
    "1_0",
    "0x10",
    "1.0",
    "1e3",
    "\u0661",
    "²",
    "9" * 21,
]


@given(st.integers(0, 2**64 - 1))
def test_every_number_in_range_is_read(number):
    assert parse_uint(str(number), lo=0, hi=2**64 - 1) == number


def test_leading_zeros_are_allowed():
    assert parse_uint("007", lo=0, hi=9) == 7


@pytest.mark.parametrize("text", [*NONSENSE, None])
def test_nonsense_is_refused_by_name(text):
    with pytest.raises(BadValue) as caught:
        parse_uint(text, lo=0, hi=2**64, field="sectors")
    assert (caught.value.field, caught.value.value) == ("sectors", text)
    assert str(caught.value).startswith("sectors")
    assert isinstance(caught.value, PvfrontError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("text", "fits"), [("1", False), ("2", True), ("5", True), ("6", False)])
def test_the_range_includes_both_ends(text, fits):
    if fits:
        assert parse_uint(text, lo=2, hi=5) == int(text)
    else:
        with pytest.raises(BadValue, match=r"not in 2\.\.5"):
            parse_uint(text, lo=2, hi=5)


def test_a_missing_key_says_so():
    with pytest.raises(BadValue, match=r"^info: missing$"):
        parse_uint(None, lo=0, hi=1, field="info")


def test_only_powers_of_two_pass_as_such():
    found = [n for n in range(5000) if is_power_of_two(n)]
    assert found == [2**n for n in range(13)]
    assert parse_power_of_two("4096", lo=512, hi=4096) == 4096
    for text in ("0", "256", "8192", "513", "1000"):
        with pytest.raises(BadValue):
            parse_power_of_two(text, lo=512, hi=4096, field="sector-size")


def test_a_boolean_is_0_or_1():
    assert parse_bool("1") is True
    assert parse_bool("0") is False
    for text in ("2", "true", "yes", "", None):
        with pytest.raises(BadValue):
            parse_bool(text)


def test_good_keys_are_read_without_complaint():
    keys = Keys({"queues": "4", "sector-size": "4096", "flush": "1", "discard": "0", "odd": "7"})
    assert keys.uint("queues", default=1, lo=1, hi=8) == 4
    assert keys.power_of_two("sector-size", default=512, lo=512, hi=4096) == 4096
    assert [keys.flag("flush"), keys.flag("discard"), keys.flag("odd")] == [True, False, True]
    assert keys.problems == []


def test_missing_keys_are_defaults_without_complaint():
    keys = Keys({})
    assert keys.uint("queues", default=3, lo=1, hi=8) == 3
    assert keys.power_of_two("sector-size", default=512, lo=512, hi=4096) == 512
    assert keys.flag("flush") is False
    assert keys.problems == []


def test_numbers_out_of_range_are_clamped_and_named():
    keys = Keys({"queues": "1000", "order": "0"})
    assert keys.uint("queues", default=1, lo=1, hi=8) == 8
    assert keys.uint("order", default=2, lo=1, hi=4) == 1
    assert [str(problem) for problem in keys.problems] == [
        "queues='1000': not in 1..8; taken as 8",
        "order='0': not in 1..4; taken as 1",
    ]


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_becomes_the_default_and_is_named(text):
    keys = Keys({"key": text})
    assert keys.uint("key", default=3, lo=1, hi=8) == 3
    assert keys.power_of_two("key", default=4, lo=1, hi=8) == 4
    assert keys.flag("key") is False
    assert [problem.field for problem in keys.problems] == ["key"] * 3
    assert keys.problems[0].value == text


def test_a_power_of_two_is_not_clamped_but_replaced():
    keys = Keys({"sector-size": "8192"})
    assert keys.power_of_two("sector-size", default=512, lo=512, hi=4096) == 512
    assert "8192" in str(keys.problems[0])


@given(st.text(max_size=300), st.integers(0, 100), st.integers(100, 200))
def test_whatever_a_key_says_the_result_is_in_range(text, lo, hi):
    keys = Keys({"key": text})
    assert lo <= keys.uint("key", default=100, lo=lo, hi=hi) <= hi
    keys.flag("key")
    for problem in keys.problems:
        assert str(problem).isprintable()
        assert len(str(problem)) < 600


def test_a_problem_without_a_value_names_the_key_alone():
    assert str(Problem("ring-ref", None, "missing")) == "ring-ref: missing"


def test_a_line_stays_short_whatever_its_value_is_written_as():
    line = str(Problem("feature-max-indirect-segments", "\U00010000" * 40, "not a decimal number"))
    assert line.endswith("…: not a decimal number")
    assert len(line) < 160
    assert str(Problem("sectors", "x" * 40, "bad")) == f"sectors='{'x' * 40}': bad"
