# SPDX-License-Identifier: BSD-2-Clause
"""What others build on does not change without its version: docs/interfaces.md."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import interfaces
import pytest
from interfaces import commands, judge

from pvfront import api, versions
from pvfront.agent.xeniface.bus import INTROSPECTION

POLICY = Path(__file__).resolve().parents[2] / "docs" / "interfaces.md"

HAS = {"read": "(path)", "write": "(path, value)"}


def verdict(before: str, now: str, has: dict[str, str]) -> str:
    return judge("the API", (before, now), HAS, has, "versions.API")


def test_what_has_not_changed_is_fine():
    assert verdict("1.4", "1.4", dict(HAS)) == ""


def test_an_addition_wants_the_next_minor_version_and_says_so():
    said = verdict("1.4", "1.4", HAS | {"watch": "()"})
    assert "the API 1.4 has changed: watch is new" in said
    assert 'set versions.API to "1.5"' in said
    assert "tools/interfaces.py record" in said


@pytest.mark.parametrize(
    "has", [{"read": "(path)"}, HAS | {"read": "(path, timeout)"}, {"read": "(path)", "put": "()"}]
)
def test_what_is_removed_or_otherwise_wants_the_next_major_version(has):
    assert 'set versions.API to "2.0"' in verdict("1.4", "1.4", has)


def test_a_version_that_was_raised_too_little_is_refused():
    said = verdict("1.4", "1.5", {"read": "(path)"})
    assert "calls itself 1.5, but after 1.4 this must be 2.0 or later" in said


def test_a_version_that_was_raised_enough_is_to_be_recorded():
    assert "1.5 is not recorded" in verdict("1.4", "1.5", HAS | {"watch": "()"})
    assert "2.0 is not recorded" in verdict("1.4", "2.0", {})


def test_a_version_never_goes_back():
    assert "must be 1.4 or later" in verdict("1.4", "1.3", dict(HAS))


def test_the_python_api_is_what_was_recorded_for_its_version():
    before, has = interfaces.record("api.json")
    now = interfaces.api_surface(api)
    assert not judge("pvfront.api", (before, versions.API), has, now, "versions.API")


def test_the_d_bus_interfaces_are_what_was_recorded_for_their_version():
    before, has = interfaces.record("dbus.json")
    now = interfaces.dbus_surface(INTROSPECTION)
    assert not judge("XENIFACE", (before, versions.DBUS), has, now, "versions.DBUS")


def test_the_json_is_what_was_recorded_for_its_version():
    before, has = interfaces.record("json.json")
    now = interfaces.json_surface(interfaces.shapes())
    assert not judge("the JSON of --json", (before, versions.JSON), has, now, "versions.JSON")


def test_every_command_that_prints_json_says_which():
    printing = {
        name
        for name, command in commands()
        if any("--json" in option.opts for option in command.params)
    }
    assert printing == interfaces.shapes().keys(), (
        "a command has --json and no shape in tests/interfaces/shapes.json, or the other way: "
        "write there what it prints, look at it in tests/host/test_json.py, raise versions.JSON"
    )


SHAPE = {
    "name": "str",
    "size?": "int|null",
    "rate": "number",
    "more??": {"*": "any"},
    "all": ["int"],
}
FITS = {"name": "x", "rate": 1, "all": [1, 2]}


@pytest.mark.parametrize(
    "more", [{}, {"size": 1}, {"size": None}, {"rate": 1.5}, {"more": None}, {"more": {"a": []}}]
)
def test_a_value_that_fits_its_shape_has_no_differences(more):
    assert interfaces.differences(FITS | more, SHAPE) == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (FITS | {"new": 1}, ".new is not recorded"),
        ({"rate": 1, "all": []}, ".name is missing"),
        (FITS | {"name": 1}, ".name is int, recorded as str"),
        (FITS | {"name": None}, ".name is null, recorded as str"),
        (FITS | {"name": True}, ".name is bool, recorded as str"),
        (FITS | {"all": ["x"]}, ".all[] is str, recorded as int"),
        (FITS | {"all": {}}, ".all is no list, recorded as one"),
        (FITS | {"more": 1}, ".more is no object, recorded as one"),
        ([], "it is no object, recorded as one"),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_its_place(value, said):
    assert interfaces.differences(value, SHAPE) == [said]


def test_the_surface_of_json_has_every_key_with_its_kind():
    assert interfaces.json_surface({"list": [SHAPE]}) == {
        "list: []": "object",
        "list: [].name": "str",
        "list: [].size": "int|null, may be missing",
        "list: [].rate": "number",
        "list: [].more": "object, may be null or missing",
        "list: [].more.*": "any",
        "list: [].all[]": "int",
    }


def test_the_surface_of_d_bus_knows_methods_signals_and_properties():
    surface = interfaces.dbus_surface(INTROSPECTION)
    name = "org.pvfront.Xeniface1"
    assert surface[f"{name}.Store.Write"] == "method (path: s, value: s) -> ()"
    assert surface[f"{name}.Session.WatchFired"] == "signal () -> (watch: u, path: s)"
    assert surface[f"{name}.Version"] == "property s read const"


def test_the_surface_knows_methods_attributes_and_constants():
    surface = interfaces.api_surface(api)
    assert surface["GrantPool.map"] == "(self) -> mmap.mmap"
    assert surface["GrantPool.grefs"] == "attribute"
    assert surface["PAGE_SIZE"] == "= 4096"
    assert surface["Bus"] == "class (store: Xenstore, klass: str, *, home: str = '') -> None"
    assert "XenstoreError.errno" in surface
    assert "Xenstore.write" in surface, "inherited, and public all the same"


@pytest.mark.parametrize("name", api.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(api, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        # A dataclass without a docstring gets one that says its fields.
        assert value.__doc__, name
        assert not value.__doc__.startswith(f"{name}("), name


@pytest.mark.parametrize("wanted", ["1.0", versions.API])
def test_a_program_gets_the_version_that_it_asks_for(wanted):
    api.require_version(wanted)


@pytest.mark.parametrize("wanted", ["0.9", "1.99", "2.0"])
def test_a_program_is_told_that_the_version_is_another(wanted):
    with pytest.raises(api.VersionMismatch, match=f"is {versions.API}, the program wants {wanted}"):
        api.require_version(wanted)


def test_the_policy_names_the_versions_of_now():
    row = r"^\| .* \| `versions\.(\w+)` \| (\d+\.\d+) \|"
    said = dict(re.findall(row, POLICY.read_text(), re.M))
    assert said == {name: value for name, value in vars(versions).items() if name.isupper()}
