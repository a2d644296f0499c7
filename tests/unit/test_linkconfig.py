# SPDX-License-Identifier: BSD-2-Clause
"""What is configured on an interface goes to the one in its place, on this machine's kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
from netnamespace import ip, namespace
from waiting import wait_for

from pvfront.errors import PvfrontError
from pvfront.netfront.linkconfig import (
    LinkConfig,
    built_on,
    default_routes,
    look,
    put_back,
    rename,
    settle,
)
from pvfront.sysfs import Roots

__all__ = ["namespace"]
pytestmark = pytest.mark.usefixtures("namespace")


def made(name: str = "enX7") -> None:
    ip("tuntap", "add", name, "mode", "tap")


@pytest.fixture
def busy() -> str:
    """An interface as an administrator leaves it."""
    made()
    ip("link", "set", "enX7", "address", "00:16:3e:0a:0b:0c", "mtu", "1400", "txqueuelen", "77")
    ip("link", "set", "enX7", "up")
    for address in ("10.1.2.1/24", "10.1.2.3/24", "10.4.0.1/32"):
        ip("addr", "add", address, "dev", "enX7")
    ip("addr", "add", "10.6.0.1/24", "broadcast", "10.6.0.255", "dev", "enX7", "label", "enX7:1")
    ip("addr", "add", "fd00::1/64", "dev", "enX7", "nodad")
    ip("addr", "add", "fd00:1::1/64", "dev", "enX7", "nodad", "valid_lft", "9000",
       "preferred_lft", "8000")  # fmt: skip
    ip("route", "add", "default", "via", "10.1.2.9", "dev", "enX7")
    ip("route", "add", "10.9.0.0/16", "via", "10.1.2.9", "dev", "enX7", "metric", "7",
       "mtu", "1300", "src", "10.1.2.3")  # fmt: skip
    ip("route", "add", "10.8.0.0/16", "dev", "enX7", "table", "77")
    ip("route", "add", "10.10.0.0/16", "via", "192.168.9.9", "dev", "enX7", "onlink")
    ip("-6", "route", "add", "default", "via", "fd00::9", "dev", "enX7", "metric", "33")
    ip("-6", "route", "add", "fd99::/64", "dev", "enX7")
    # The kernel adds the routes to its own addresses when it finds time: addrconf's work.
    routes = ("local fd00::1 dev enX7", "local fd00:1::1 dev enX7")
    wait_for("both", lambda: all(any(r in one for one in shown()) for r in routes), why=shown)
    return "enX7"


def shown() -> list[str]:
    """All that a user can see of addresses and routes, but for what counts down."""
    lines = [
        *ip("-4", "route", "show", "table", "all").splitlines(),
        *ip("-6", "route", "show", "table", "all").splitlines(),
        *(line.split("valid_lft")[0] for line in ip("-o", "addr", "show").splitlines()),
        *ip("-o", "link", "show").splitlines(),
    ]
    return sorted(
        " ".join(word for word in line.split(": ", 1)[-1].split() if word != "nodad")
        for line in lines
    )


def test_addresses_routes_and_settings_are_put_on_the_interface_in_its_place(
    busy: str, tmp_path: Path
) -> None:
    before = shown()
    found = look(busy)
    assert found is not None
    found.save(tmp_path / "note.json")
    ip("link", "del", busy)
    made()
    config = LinkConfig.load(tmp_path / "note.json")
    assert config is not None
    assert put_back(busy, config) == []
    wait_for("the same as before", lambda: shown() == before, why=shown)
    assert put_back(busy, config) == []  # what is so already is left alone
    wait_for("the same as before", lambda: shown() == before, why=shown)


def test_the_interface_in_its_place_may_have_another_name(busy: str) -> None:
    config = look(busy)
    assert config is not None
    ip("link", "del", busy)
    made("lan0")
    assert put_back("lan0", config) == []
    assert "10.6.0.1/24 brd 10.6.0.255 scope global lan0:1" in ip("addr", "show", "lan0")
    assert "default via 10.1.2.9 dev lan0 " in ip("route", "show", "default")


def test_what_cannot_be_put_back_is_named_and_keeps_nothing_else_from_it(busy: str) -> None:
    config = look(busy)
    assert config is not None
    ip("link", "del", busy)
    made()
    made("enX8")
    ip("link", "set", "enX8", "up")
    ip("addr", "add", "10.1.2.1/24", "dev", "enX8")
    config.routes[0]["attrs"]["RTA_PREFSRC"] = "10.77.0.1"
    problems = put_back(busy, config)
    assert len(problems) == 1
    assert problems[0].startswith("route ")
    assert "default via 10.1.2.9" in ip("route", "show", "default")


def test_an_interface_that_is_down_stays_down(busy: str) -> None:
    ip("link", "set", busy, "down")
    config = look(busy)
    assert config is not None
    ip("link", "del", busy)
    made()
    assert put_back(busy, config) == []
    assert "DOWN" in ip("link", "show", busy)
    assert "10.1.2.1/24" in ip("addr", "show", busy)


def test_a_port_of_a_bridge_is_one_again() -> None:
    made()
    ip("link", "add", "br0", "type", "bridge")
    ip("link", "set", "enX7", "master", "br0")
    config = look("enX7")
    assert config is not None
    assert config.master == "br0"
    ip("link", "del", "enX7")
    made()
    assert put_back("enX7", config) == []
    assert "master br0" in ip("link", "show", "enX7")


def test_addresses_are_left_to_whoever_configures_new_interfaces(busy: str, tmp_path: Path) -> None:
    units = tmp_path / "run/systemd/units"
    units.mkdir(parents=True)
    (units / f"invocation:ifup@{busy}.service").symlink_to("1234")
    config = look(busy, Roots(tmp_path))
    assert config is not None
    assert config.manager == "ifupdown"
    ip("link", "del", busy)
    made()
    assert put_back(busy, config) == []
    assert "inet" not in ip("addr", "show", busy)
    assert "mtu 1400" in ip("link", "show", busy)


@pytest.mark.parametrize(
    ("state", "manager"), [("configured", "systemd-networkd"), ("unmanaged", "")]
)
def test_networkd_says_whether_it_manages_an_interface(
    busy: str, tmp_path: Path, state: str, manager: str
) -> None:
    (index,) = (line.split(":")[0] for line in ip("-o", "link", "show", busy).splitlines())
    links = tmp_path / "run/systemd/netif/links"
    links.mkdir(parents=True)
    (links / index).write_text(f"# private\nADMIN_STATE={state}\nOPER_STATE=routable\n")
    config = look(busy, Roots(tmp_path))
    assert config is not None
    assert config.manager == manager


def test_there_is_nothing_to_carry_of_no_interface(tmp_path: Path) -> None:
    assert look("enX7") is None
    assert LinkConfig.load(tmp_path / "none") is None
    (tmp_path / "bad").write_text('{"name": 1, "what": 2}')
    assert LinkConfig.load(tmp_path / "bad") is None
    with pytest.raises(PvfrontError, match="enX7: there is no such interface"):
        put_back("enX7", LinkConfig("enX7"))


def test_the_interfaces_of_default_routes_are_found_of_both_families() -> None:
    for name, address in (("a0", "10.1.0.1/24"), ("b0", "10.2.0.1/24"), ("c0", "fd00::1/64")):
        made(name)
        ip("link", "set", name, "up")
        ip("addr", "add", address, "dev", name)
    assert default_routes() == set()
    ip("route", "add", "default", "nexthop", "via", "10.1.0.9", "nexthop", "via", "10.2.0.9")
    ip("-6", "route", "add", "default", "via", "fd00::9", "dev", "c0", "table", "9")
    assert default_routes() == {"a0", "b0", "c0"}


def test_interfaces_that_are_built_on_one_are_found() -> None:
    made()
    assert built_on("enX7") == []
    ip("link", "add", "link", "enX7", "name", "enX7.5", "type", "macvlan")
    assert built_on("enX7") == ["enX7.5"]
    assert built_on("none") == []


def test_an_interface_is_renamed_and_a_name_that_is_taken_is_refused() -> None:
    made("a0")
    made("b0")
    rename("a0", "lan0")
    assert "lan0" in ip("link", "show")
    with pytest.raises(PvfrontError, match="File exists"):
        rename("lan0", "b0")


def test_udev_is_waited_for_where_it_runs(tmp_path: Path) -> None:
    roots = Roots(tmp_path)
    assert settle(7, roots, timeout=0)  # nobody names interfaces
    (tmp_path / "run/udev/data").mkdir(parents=True)
    (tmp_path / "run/udev/control").touch()
    assert not settle(7, roots, timeout=0)
    (tmp_path / "run/udev/data/n7").touch()
    assert settle(7, roots, timeout=0)
