# SPDX-License-Identifier: BSD-2-Clause
"""The guest agent: what dom0 reads of a guest, and what a guest does on dom0's word."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
from lab.guest import Guest
from lab.scenario import Lab, wait_until

pytestmark = [pytest.mark.services, pytest.mark.last]

AGENT = "pvfront-agent"
HOOKS = "/etc/pvfront/hooks.d"
LOG = "/root/hooks.log"
UPDATED = "data/updated"
ASLEEP = 60 if "PVFRONT_REPEATS" in os.environ else 5  # seconds between save and restore: a soak's


class Agent:
    """The agent of one guest, and its keys as dom0 reads them."""

    def __init__(self, lab: Lab, guest: Guest) -> None:
        self.lab = lab
        self.guest = guest

    def start(self) -> None:
        self.guest.run(f"systemctl start {AGENT}", timeout=300)
        wait_until("the guest's keys", lambda: self.read(UPDATED))

    def read(self, path: str) -> str | None:
        return self.lab.xenstore_read(f"/local/domain/{self.guest.number}/{path}")

    def keys(self) -> dict[str, str]:
        home = f"/local/domain/{self.guest.number}/"
        return {p.removeprefix(home): v for p, v in self.lab.xenstore_ls(home[:-1]).items()}

    def status(self) -> Any:
        return json.loads(self.guest.output("pvfront agent status --json"))


@pytest.fixture
def agent(lab: Lab, guest: Guest) -> Agent:
    found = Agent(lab, guest)
    found.start()
    return found


def hook(guest: Guest, moment: str) -> None:
    guest.run(
        f"mkdir -p {HOOKS}/{moment}.d && printf '#!/bin/sh\\n"
        f'echo "$PVFRONT_EVENT $PVFRONT_KIND" >>{LOG}; sync {LOG}\\n'
        f"' >{HOOKS}/{moment}.d/log && chmod +x {HOOKS}/{moment}.d/log"
    )


def test_dom0_reads_the_guests_system_addresses_and_volumes_as_they_change(
    agent: Agent, guest: Guest, request: pytest.FixtureRequest
) -> None:
    wait_until("the volumes", lambda: agent.read("data/volumes/0/name"))
    wait_until("the address", lambda: agent.read("attr/vif/0/ipv4/0") == guest.address)
    found = agent.keys()
    assert found["attr/PVAddons/Installed"] == "1"
    assert found["data/os_distro"] == "debian"
    assert found["data/os_uname"] == guest.output("uname -r")
    assert found["drivers/0"].startswith("pvfront XENIFACE ")
    assert found["attr/vif/0/mac"] == guest.mac
    assert found["attr/vif/0/ipv4/0/prefix"] == "24"
    assert int(found["data/meminfo_free"]) < int(found["data/meminfo_total"]) < 512 << 10
    roots = [p for p, v in found.items() if p.endswith("/mount_points/0") and v == "/"]
    root = roots[0].removesuffix("/mount_points/0")
    assert found[f"{root}/extents/0"] == "xvda"
    assert 0 < int(found[f"{root}/free"]) < int(found[f"{root}/size"])

    guest.run("ip address add 10.99.0.1/16 dev eth0")
    wait_until("the new address", lambda: agent.read("attr/vif/0/ipv4/1") == "10.99.0.1")
    guest.run("ip address delete 10.99.0.1/16 dev eth0")
    wait_until("its end", lambda: agent.read("attr/vif/0/ipv4/1") is None)
    assert agent.read("attr/vif/0/ipv4/0") == guest.address
    status = agent.status()
    failed = [name for name, part in status.items() if "failed" in part]
    assert failed in ([], ["xeniface"]), status  # which wants a policy that D-Bus has read
    request.node.user_properties.append(("agent's keys", status["publish"]["keys"]))
    request.node.user_properties.append(("store writes so far", status["publish"]["store_writes"]))


def test_a_change_of_memory_is_followed_and_a_dump_comes_on_dom0s_word(
    agent: Agent, guest: Guest, lab: Lab
) -> None:
    lab.xl("mem-set", guest.kind, "448")
    try:
        wait_until("a balloon of 448 MiB", lambda: memory(agent)["current_kib"] <= 448 << 10)
        assert memory(agent)["told_here"] == 0, "the kernel follows by itself"
    finally:
        lab.xl("mem-set", guest.kind, "512")
    wait_until("all of the memory", lambda: memory(agent)["current_kib"] > 448 << 10)
    debug = f"/local/domain/{guest.number}/data/pvfront/debug"
    lab.xenstore_write(debug, "1")
    wait_until("the end of the dump", lambda: lab.xenstore_read(debug) == "")
    assert "debug: agent: publish keys " in guest.journal(AGENT)
    wait_until("the dump on the console", lambda: "pvfront: agent: memory" in guest.console())


def memory(agent: Agent) -> dict[str, int]:
    found: dict[str, int] = agent.status()["memory"]
    return found


@pytest.mark.timeout(1800)
def test_after_save_and_restore_the_clock_is_right_and_the_data_there_again(
    agent: Agent, guest: Guest, lab: Lab, request: pytest.FixtureRequest
) -> None:
    hook(guest, "post-resume")
    old = guest.number
    guest.save()
    time.sleep(ASLEEP)  # a clock that stood still is wrong by this and what save and restore take
    guest.restore()
    assert guest.number != old
    wait_until("the guest's keys", lambda: agent.read(UPDATED))
    wait_until("the address", lambda: agent.read("attr/vif/0/ipv4/0") == guest.address)
    wait_until("a look at the clock", lambda: "time: " in guest.journal(AGENT))
    journal = guest.journal(AGENT)
    wait_until("the hook", lambda: "post-resume" in guest.output(f"cat {LOG} || true"))
    before = float(lab.dom0.output("date +%s.%N"))
    inside = float(guest.output("date +%s.%N"))
    after = float(lab.dom0.output("date +%s.%N"))
    assert before - 1 <= inside <= after + 1, journal
    found = json.loads(guest.output("pvfront time --json"))
    if guest.kind == "hvm":
        assert found["source"] == "rtc_cmos"
        assert abs(found["difference"]) < 1, found
    else:
        assert (found["source"], found["difference"]) == ("unknown", None)
    assert agent.status()["resume"]["count"] >= 1
    (line,) = [line for line in journal.splitlines() if "time: " in line][-1:]
    request.node.user_properties.append(("the clock after a restore", line.split("time: ")[1]))
    guest.run(f"rm -r {HOOKS}/post-resume.d {LOG}")
    assert "BUG" not in guest.output("dmesg")


@pytest.mark.parametrize("kind", ["reboot", pytest.param("poweroff", marks=pytest.mark.long)])
def test_hooks_are_run_before_services_end_and_after(
    agent: Agent, guest: Guest, lab: Lab, kind: str
) -> None:
    guest.run(f"systemctl start {AGENT} pvfront-pre-shutdown pvfront-post-shutdown; rm -f {LOG}")
    for moment in ("pre-shutdown", "post-shutdown"):
        hook(guest, moment)
    guest.dirty = True
    if kind == "poweroff":
        guest.shutdown()
    else:
        lab.xl("reboot", guest.kind)
        wait_until("its end", lambda: not guest.running())  # on_reboot is destroy
        guest.close()
    with guest.root_in_dom0() as root:
        said = lab.dom0.output(f"cat {root}{LOG}")
        lab.dom0.run(f"rm -r {root}{HOOKS} {root}{LOG}")
    assert said.split("\n") == [f"pre-shutdown {kind}", f"post-shutdown {kind}"]
