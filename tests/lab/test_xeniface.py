# SPDX-License-Identifier: BSD-2-Clause
"""XENIFACE in a guest: busctl reads the store of a real Xen, and sees a resume."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.guest import Guest
from lab.scenario import wait_until

# Minutes of the emulator's, and little that only a guest can show: for who asks for services.
pytestmark = [pytest.mark.services, pytest.mark.area]

NAME = "org.pvfront.Xeniface1"
MAIN = f"{NAME} /org/pvfront/Xeniface1 {NAME}"
NOBODY = "setpriv --reuid=nobody --regid=nogroup --clear-groups"
SEEN = "/run/xeniface-seen"


@pytest.fixture
def agent(guest: Guest) -> Iterator[Guest]:
    guest.run("systemctl start dbus && systemctl restart pvfront-agent")
    wait_until("the name", lambda: guest.run(f"busctl status {NAME}", check=False).ok)
    yield guest
    guest.run(f"systemctl stop xeniface-seen pvfront-agent; rm -f {SEEN}", check=False)


def test_busctl_reads_the_store_for_anybody_and_writes_it_for_root(agent: Guest) -> None:
    store = f"busctl call {MAIN}.Store"
    assert agent.output(f"{store} Read s domid") == f's "{agent.number}"'
    name = agent.output("pvfront store read name")
    assert agent.output(f"{NOBODY} {store} Read s name") == f's "{name}"'
    agent.run(f"{store} Write ss data/xeniface it-works")
    assert agent.output("pvfront store read data/xeniface") == "it-works"
    refused = agent.run(f"{NOBODY} {store} Write ss data/xeniface no", check=False)
    assert not refused.ok
    assert "Access denied" in refused.stderr
    assert agent.output("pvfront store read data/xeniface") == "it-works"
    agent.run(f"{store} Remove s data/xeniface")


def test_a_call_does_not_begin_an_agent_that_is_not_enabled(agent: Guest) -> None:
    agent.run("systemctl disable --now pvfront-agent")
    assert not agent.run(f"{NOBODY} busctl call {MAIN}.Store Read s domid", check=False).ok
    assert agent.run("systemctl is-active pvfront-agent", check=False).stdout.strip() == "inactive"


def test_a_resume_is_seen_by_busctl_where_no_device_is_served(agent: Guest) -> None:
    count = f"busctl get-property {MAIN} SuspendCount"
    before = int(agent.output(count).removeprefix("t "))
    agent.run(
        f"systemd-run --quiet --unit=xeniface-seen --property=StandardOutput=file:{SEEN} "
        f"busctl monitor {NAME}"
    )
    wait_until(
        "busctl listens",
        lambda: "Monitoring" in agent.output(f"cat {SEEN}; journalctl -u xeniface-seen -o cat"),
    )
    boot, domid = agent.boot_id(), agent.number
    agent.save()
    agent.restore()
    assert agent.boot_id() == boot
    assert agent.number != domid
    seen = wait_until(
        "the signal", lambda: "Member=Resumed" in (text := agent.output(f"cat {SEEN}")) and text
    )
    assert f"UINT64 {before + 1};" in seen
    assert agent.output(count) == f"t {before + 1}"
    assert agent.output(f"busctl call {MAIN}.Store Read s domid") == f's "{agent.number}"'
