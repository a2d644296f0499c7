# SPDX-License-Identifier: BSD-2-Clause
"""From facts to keys, and from keys to the fewest writes: pure, bounded, printable."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvfront.agent.board import Board, Plan, plan
from pvfront.agent.keys import (
    MAX_ADDRESSES,
    MAX_KEYS,
    MAX_VALUE,
    MAX_VOLUMES,
    Address,
    Slots,
    Vif,
    VifKeys,
    Volume,
    VolumeKeys,
    clean,
    driver_keys,
    os_keys,
    version_keys,
)


def v4(*numbers: int) -> tuple[Address, ...]:
    return tuple(Address(4, f"10.0.0.{number}", 24, 2) for number in numbers)


def vif(*addresses: Address, devid: int = 0) -> Vif:
    return Vif(devid, f"enX{devid}", "00:16:3e:00:00:01", addresses)


def test_a_vif_has_its_name_mac_addresses_and_prefixes() -> None:
    found = VifKeys().keys([vif(Address(4, "10.0.0.1", 24, 2), Address(6, "fe80::1", 64))])
    assert found == {
        "attr/vif/0/name": "enX0",
        "attr/vif/0/mac": "00:16:3e:00:00:01",
        "attr/vif/0/ipv4/0": "10.0.0.1",
        "attr/vif/0/ipv4/0/prefix": "24",
        "attr/vif/0/ipv6/0": "fe80::1",
        "attr/vif/0/ipv6/0/prefix": "64",
    }


def test_an_address_keeps_its_index_when_another_goes_and_a_new_one_takes_the_free_one() -> None:
    keys = VifKeys()
    keys.keys([vif(*v4(1, 2, 3))])
    found = keys.keys([vif(*v4(2, 3))])
    assert (found["attr/vif/0/ipv4/1"], found["attr/vif/0/ipv4/2"]) == ("10.0.0.2", "10.0.0.3")
    assert "attr/vif/0/ipv4/0" not in found
    assert keys.keys([vif(*v4(2, 3, 9))])["attr/vif/0/ipv4/0"] == "10.0.0.9"


def test_indices_of_an_earlier_agent_go_on() -> None:
    keys = VifKeys()
    keys.remember({"attr/vif/0/ipv4/3": "10.0.0.7", "attr/vif/x/ipv4/0": "1"})
    assert keys.keys([vif(*v4(7, 8))])["attr/vif/0/ipv4/3"] == "10.0.0.7"


def test_of_thousands_of_addresses_the_global_ones_are_published_and_the_rest_counted() -> None:
    local = tuple(Address(4, f"169.254.{n // 250}.{n % 250}", 16, 0) for n in range(5000))
    keys = VifKeys()
    found = keys.keys([vif(*local, *v4(1))])
    assert sum(path.endswith("/prefix") for path in found) == MAX_ADDRESSES
    assert "10.0.0.1" in found.values()
    assert keys.left_out == 5001 - MAX_ADDRESSES


def test_of_many_vifs_and_keys_no_more_than_the_quota_allows() -> None:
    many = [vif(*v4(*range(1, 11)), devid=n) for n in range(100)]
    board = Board()
    board.put("first", {"a": "1"})
    board.put("network", VifKeys().keys(many))
    board.put("more", {f"data/x{n}": "1" for n in range(1000)})
    assert len(board.wanted()) == MAX_KEYS
    assert board.wanted()["a"] == "1"
    assert board.left_out > 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain", "plain"), ("\x1b[2J\n", "?[2J?"), ("ü\0", "??"), ("x" * 9999, "x" * MAX_VALUE)],
)
def test_a_value_is_one_short_printable_line(text: str, shown: str) -> None:
    assert clean(text) == shown


@settings(max_examples=40)
@given(st.text(max_size=600), st.integers(1, 300))
def test_whatever_comes_in_a_value_stays_short_and_printable(text: str, limit: int) -> None:
    shown = clean(text, limit)
    assert len(shown) <= limit
    assert shown.isascii()
    assert not shown or shown.isprintable()


@settings(max_examples=40)
@given(st.lists(st.sets(st.sampled_from("abcdefgh"), max_size=8), max_size=8))
def test_a_slot_is_held_by_one_name_for_as_long_as_it_is_there(rounds: list[set[str]]) -> None:
    slots, before = Slots(5), dict[str, int]()
    for names in rounds:
        now = slots.place(sorted(names))
        assert len(set(now.values())) == len(now) == min(5, len(names))
        assert all(now[name] == before[name] for name in before.keys() & names)
        before = now


def test_an_interface_named_with_control_characters_is_published_without_them() -> None:
    found = VifKeys().keys([Vif(0, "en\x1b[31m", "", ())])
    assert found["attr/vif/0/name"] == "en?[31m"


def volume(device: str, free: int | None = 5, *mounts: str) -> Volume:
    return Volume(device, 1000, free, "ext4", mounts or ("/",), ("xvda",))


def test_a_volume_has_what_toolstacks_show_of_it() -> None:
    assert VolumeKeys().keys([volume("/dev/xvda1", 500, "/", "/srv")]) == {
        "data/volumes/0/name": "/dev/xvda1",
        "data/volumes/0/size": "1000",
        "data/volumes/0/free": "500",
        "data/volumes/0/filesystem": "ext4",
        "data/volumes/0/extents/0": "xvda",
        "data/volumes/0/mount_points/0": "/",
        "data/volumes/0/mount_points/1": "/srv",
    }


def test_volumes_keep_their_numbers_and_are_bounded() -> None:
    keys = VolumeKeys()
    keys.keys([volume("/dev/a"), volume("/dev/b")])
    assert keys.keys([volume("/dev/b", None)])["data/volumes/1/name"] == "/dev/b"
    many = keys.keys([volume(f"/dev/x{n}") for n in range(200)])
    assert sum(path.endswith("/name") for path in many) == MAX_VOLUMES


def test_the_system_is_named_as_in_os_release() -> None:
    release = {"ID": "debian", "PRETTY_NAME": "Debian GNU/Linux 12", "VERSION_ID": "12.7"}
    assert os_keys(release, "6.1.0") == {
        "data/os_name": "Debian GNU/Linux 12",
        "data/os_distro": "debian",
        "data/os_majorver": "12",
        "data/os_minorver": "7",
        "data/os_uname": "6.1.0",
    }
    assert os_keys({}, "6.1.0")["data/os_name"] == "Linux"


def test_versions_are_four_numbers_and_drivers_are_named_as_windows_names_them() -> None:
    assert version_keys("1.2.0") == {
        "attr/PVAddons/Installed": "1",
        "attr/PVAddons/MajorVersion": "1",
        "attr/PVAddons/MinorVersion": "2",
        "attr/PVAddons/MicroVersion": "0",
        "attr/PVAddons/BuildVersion": "0",
    }
    assert driver_keys(["XENIFACE", "XENVBD"], "1.2.0")["drivers/1"] == "pvfront XENVBD 1.2.0"


def test_nothing_is_written_for_what_stands_there() -> None:
    assert not plan({"a/b": "1"}, {"a/b": "1"})
    assert plan({"a/b": "1"}, {"a/b": "2", "c/d": "3"}) == Plan({"a/b": "2", "c/d": "3"}, ())


def test_a_number_that_wavers_is_no_change_and_one_that_moves_is() -> None:
    def memory(free: int) -> dict[str, str]:
        return {"data/meminfo_total": "1000", "data/meminfo_free": str(free)}

    assert not plan(memory(500), memory(540))
    assert plan(memory(500), memory(550)).writes == {"data/meminfo_free": "550"}

    def disk(free: int) -> dict[str, str]:
        return {"data/volumes/3/size": "1000", "data/volumes/3/free": str(free)}

    assert not plan(disk(500), disk(549))
    assert plan(disk(500), disk(400)).writes == {"data/volumes/3/free": "400"}


def test_what_is_gone_is_removed_with_its_directory_but_never_more_than_that() -> None:
    stood = {
        "attr/vif/0/name": "enX0",
        "attr/vif/0/ipv4/0": "10.0.0.1",
        "attr/vif/0/ipv4/0/prefix": "24",
        "attr/vif/1/name": "enX1",
        "attr/vif/1/ipv4/0": "10.0.0.2",
        "drivers/0": "x",
    }
    kept = {path: stood[path] for path in ("attr/vif/0/name",)}
    assert plan(stood, kept).removals == ("attr/vif/0/ipv4", "attr/vif/1", "drivers/0")
    assert plan(stood, {}).removals == ("attr/vif/0", "attr/vif/1", "drivers/0")


def test_a_node_below_control_is_never_removed() -> None:
    assert not plan({"control/feature-s3": "1"}, {})
