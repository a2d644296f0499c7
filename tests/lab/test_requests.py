# SPDX-License-Identifier: BSD-2-Clause
"""What XAPI asks of a guest whose administrator allows it, as XAPI writes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.guest import Guest
from lab.scenario import Lab, wait_until

# What becomes of a request is a unit test; that systemd and `ip` do it only a guest can show.
pytestmark = [pytest.mark.services, pytest.mark.area]

ALLOWED = "/etc/pvfront/pvfront.toml"
MAC = "00:16:3e:77:00:77"
GATEWAY = "10.77.0.1"


class Request:
    """`static-ip-setting` of a vif, which the toolstack makes and the guest may answer."""

    def __init__(self, lab: Lab, guest: Guest, devid: int) -> None:
        self.lab = lab
        top = f"/local/domain/{guest.number}/xenserver"
        self.keys = f"{top}/device/vif/{devid}/static-ip-setting"
        self.lab.dom0.run(
            f"xenstore-write {self.keys} '' && xenstore-chmod -r {top} n{guest.number}"
        )

    def ask(self, enabled: int, **keys: str) -> None:
        """All at once: a transaction would show the same."""
        for key, value in {**keys, "enabled": str(enabled)}.items():
            self.lab.xenstore_write(f"{self.keys}/{key}", value)

    def answer(self) -> str | None:
        wait_until(
            "the end of the request",
            lambda: self.lab.xenstore_read(f"{self.keys}/enabled") is None,
        )
        return self.lab.xenstore_read(f"{self.keys}/error-msg")


@pytest.fixture
def allowed(guest: Guest) -> Iterator[Guest]:
    guest.run("systemctl stop pvfront-agent")
    guest.run(f"mkdir -p /etc/pvfront && printf '[agent]\\nstatic_ip = true\\n' >{ALLOWED}")
    yield guest
    guest.run(f"systemctl stop pvfront-agent; rm -f {ALLOWED}", check=False)


def test_an_address_and_a_gateway_reach_an_interface_that_is_down_and_are_taken_back(
    lab: Lab, allowed: Guest
) -> None:
    guest, devid = allowed, 1
    request = Request(lab, guest, devid)
    find = f"grep -l {MAC} /sys/class/net/*/address | cut -d/ -f5"
    lab.dom0.run(f"ip address add {GATEWAY}/24 dev xenbr0")
    lab.xl("network-attach", guest.kind, f"mac={MAC}", "bridge=xenbr0")
    try:
        wait_until("the interface", lambda: guest.run(f"{find} | grep .", check=False).ok)
        ifname = guest.output(find)
        # Before the agent is there, as at a boot.
        request.ask(1, address="10.77.0.5/24", gateway=GATEWAY)
        guest.run("systemctl start pvfront-agent", timeout=300)
        assert request.answer() == ""
        assert f"default via {GATEWAY} dev {ifname}" in guest.output("ip route")
        guest.run(f"ping -c 3 -i 0.2 -W 60 {GATEWAY}")
        address = f"/local/domain/{guest.number}/attr/vif/{devid}/ipv4/0"
        wait_until("it in the guest's data", lambda: lab.xenstore_read(address) == "10.77.0.5")
        request.ask(1, address="10.77.0.5/24", gateway="10.99.0.1")
        assert "10.99.0.1" in (said := request.answer() or "")
        assert "invalid gateway" in said
        request.ask(0)
        assert request.answer() == ""
        assert "10.77.0" not in guest.output("ip route; ip address")
    finally:
        lab.xl("network-detach", guest.kind, MAC)
        lab.dom0.run(f"ip address delete {GATEWAY}/24 dev xenbr0")
