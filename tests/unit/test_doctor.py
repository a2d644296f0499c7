# SPDX-License-Identifier: BSD-2-Clause
"""What `pvfront doctor` says of facts, one wrong thing at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pvfront.doctor import Finding, Level, examine, failed, release
from pvfront.facts import Agent, DeviceFacts, Facts, Node, Service
from pvfront.holdings import Holder, Holdings
from pvfront.inventory import Device

DISK = Device("vbd", 51728, "xvdb", 0, "Connected (4)", "Connected (4)", "pvfront", "/dev/nbd0", 7)
VIF = Device("vif", 0, "vif0", 0, "Connected (4)", "Connected (4)", "kernel", "enX0", 8)
AGENT = {"publish": {"keys": 31, "refused": {"control/feature-s3": "EACCES"}}, "xeniface": {}}
SERVED = DeviceFacts(DISK, {"phase": "connected", "worker_runs": True})
WELL = Facts(
    xen="4.17.7",
    kernel="6.1.0-40-amd64",
    modules={"xen-evtchn": "loaded", "xen-gntalloc": "loaded", "nbd": "there", "tun": "there",
             "ublk_drv": "missing"},
    nodes={name: Node() for name in ("xen/xenbus", "xen/evtchn", "xen/gntalloc")},
    limit=16384,
    services={"vbd": Service(7, enabled=True), "vif": Service(8, enabled=True, realtime=1)},
    suspend={"armed": True},
    agent=Agent(AGENT, enabled=True),
    devices=[SERVED, DeviceFacts(VIF, used="the default route goes through enX0")],
)  # fmt: skip
"""A guest in which nothing is wrong."""


def worst(facts: Facts) -> list[Finding]:
    return [finding for finding in examine(facts) if finding.level is not Level.OK]


def only(facts: Facts) -> Finding:
    """The one thing that is wrong; it has a fix, and both are a line."""
    (finding,) = worst(facts)
    assert finding.fix
    assert "\n" not in finding.text + finding.fix
    return finding


def test_nothing_is_wrong_with_a_guest_that_is_well() -> None:
    assert worst(WELL) == []
    assert not failed(examine(WELL))
    texts = [f"{finding.subject}: {finding.text}" for finding in examine(WELL)]
    assert texts[0] == "guest: HVM guest of Xen 4.17.7, Linux 6.1.0-40-amd64"
    assert "xvdb: served as /dev/nbd0" in texts
    assert "agent: the guest agent runs and has published 31 keys" in texts
    assert (
        "vif0: the kernel's as enX0, in use: the default route goes through enX0" in texts
    )  # no trouble, but why it is not ours


def test_outside_of_a_guest_nobody_misses_its_modules() -> None:
    finding = only(Facts(guest=""))
    assert (finding.level, finding.text) == (Level.FAIL, "this is not a guest of Xen")


def test_on_an_embedded_host_the_machine_s_modules_and_suspends_do_not_matter() -> None:
    host = replace(Facts(guest="", embedded="/tmp/h", limit=1024), can_suspend=False)
    assert worst(host) == []
    assert examine(host)[0].text == "none: the embedded host at /tmp/h"


def test_who_is_not_root_learns_that_most_is_not_known() -> None:
    finding = only(Facts(root=False))
    assert (finding.level, finding.fix) == (Level.FAIL, "run it again with sudo")


CASES: list[tuple[dict[str, Any], Level, str, str]] = [
    ({"domain0": True}, Level.WARN, "it is domain 0", "guest"),
    ({"kernel": "5.10.0-30-amd64"}, Level.WARN, "Linux 5.10.0", "6.1"),
    ({"worker": ("the worker program does not run: libseccomp.so.2", "apt-get install x")},
     Level.FAIL, "libseccomp", "apt-get"),
    ({"user": ("there is no user 'pvfront'", "systemd-sysusers")}, Level.FAIL, "no user", "sysu"),
    ({"config": [("pvfront.toml:3: max_qeues: no such setting", "there are: max_queues")]},
     Level.FAIL, "pvfront.toml:3", "max_queues"),
    ({"modules": WELL.modules | {"xen-evtchn": "there"}}, Level.FAIL, "xen-evtchn is not loaded",
     "> /etc/modules-load.d/xen-evtchn.conf"),
    ({"modules": WELL.modules | {"xen-gntalloc": "missing"}}, Level.FAIL, "no xen-gntalloc",
     "CONFIG_XEN_GRANT_DEV_ALLOC"),
    ({"modules": WELL.modules | {"nbd": "missing"}}, Level.FAIL, "neither ublk_drv nor nbd",
     "--target socket"),
    ({"modules": WELL.modules | {"tun": "missing"}, "tun": Node("ENOENT")}, Level.FAIL, "no tun",
     "CONFIG_TUN"),
    ({"nodes": WELL.nodes | {"xen/evtchn": Node("EPERM")}}, Level.FAIL, "/dev/xen/evtchn",
     "DeviceAllow"),
    ({"nodes": WELL.nodes | {"xen/xenbus": Node("ENOENT")}}, Level.FAIL, "ENOENT", "devtmpfs"),
    ({"nodes": WELL.nodes | {"xen/gntalloc": Node("", 0o660)}}, Level.WARN, "mode 0660",
     "chmod 600"),
    ({"store": ("xenstore: directory device: no answer within 10 s", "look at dom0's xenstored")},
     Level.FAIL, "no answer", "xenstored"),
    ({"limit": 1024}, Level.WARN, "1024 granted pages",
     "> /etc/modprobe.d/xen-gntalloc.conf"),
    ({"holdings": Holdings([Holder(9, "x", 1, 1, 16000)])}, Level.WARN, "16000 held", "limit="),
    ({"holdings": Holdings(ports=1000)}, Level.WARN, "1000 event channels", "max_event_channels"),
    ({"services": WELL.services | {"vbd": Service(7, enabled=True, locked=65536)}}, Level.WARN,
     "65536 bytes", "LimitMEMLOCK"),
    ({"services": WELL.services | {"vif": Service(8, enabled=True, realtime=0)}}, Level.WARN,
     "real-time", "LimitRTPRIO=1"),
    ({"services": WELL.services | {"vif": Service(8, enabled=False, realtime=1)}}, Level.WARN,
     "after the next boot", "systemctl enable pvfront-vif"),
    ({"can_suspend": False}, Level.FAIL, "kept from suspending", "CONFIG_PM_SLEEP"),
    ({"may_veto": False}, Level.FAIL, "hold up a suspend", "CAP_BLOCK_SUSPEND"),
    ({"cgroup2": False}, Level.WARN, "no cgroup v2", "unified_cgroup_hierarchy"),
    ({"suspend": {"armed": False, "why_unarmed": "a wakeup source"}}, Level.WARN,
     "a wakeup source", "journal"),
    ({"holdings": Holdings([Holder(9, "x", 1, 0, 0, parker=True)])}, Level.WARN, "parked",
     "reboot"),
    ({"agent": Agent(enabled=True)}, Level.WARN, "enabled and does not run", "systemctl start"),
    ({"agent": Agent(AGENT, enabled=False)}, Level.WARN, "31 keys, but will not after the next",
     "systemctl enable pvfront-agent"),
    ({"agent": Agent(None, "no answer within 5 s", True)}, Level.WARN, "no answer within 5 s",
     "systemctl restart pvfront-agent"),
    ({"agent": Agent(AGENT | {"xeniface": {"failed": "no bus"}}, "", True)}, Level.WARN,
     "its part xeniface does not work: no bus", "journalctl"),
    ({"agent": Agent({"publish": {"keys": 9, "refused": {"a": "EACCES", "b": "EDQUOT"}}})},
     Level.WARN, "takes no more keys", "--entry-nb"),
    ({"absent": ("the disk service does not run", "systemctl start pvfront-vbd")}, Level.WARN,
     "does not run", "systemctl start"),
    ({"hooks": [("post-link.d/a.sh is never run: its name", "rename it")]}, Level.WARN,
     "post-link.d/a.sh is never run", "rename it"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "level", "text", "fix"), CASES, ids=[c[2] for c in CASES])
def test_one_wrong_thing_is_one_finding_with_its_fix(
    changed: dict[str, Any], level: Level, text: str, fix: str
) -> None:
    facts = replace(WELL, **changed)
    finding = only(facts)
    assert finding.level is level
    assert text in finding.text
    assert fix in finding.fix
    assert failed(examine(facts)) is (level is Level.FAIL)


def test_an_agent_that_nobody_wants_is_told_of_and_no_trouble() -> None:
    facts = replace(WELL, agent=Agent(enabled=False))
    assert worst(facts) == []
    (found,) = [one for one in examine(facts) if one.subject == "agent"]
    assert found.fix == "systemctl enable --now pvfront-agent"
    assert not [one for one in examine(replace(WELL, agent=Agent())) if one.subject == "agent"], (
        "it is not installed, as beside an embedded host"
    )


def test_a_service_that_nothing_is_named_for_is_missed_by_nobody() -> None:
    theirs = DeviceFacts(device("kernel", os_device="xvdb"))
    absent = ("the disk service does not run", "systemctl start pvfront-vbd")
    facts = replace(WELL, devices=[theirs], absent=absent)
    assert worst(facts) == []
    assert worst(replace(facts, devices=[replace(theirs, named=True)]))


def device(owner: str = "pvfront", **changed: Any) -> Device:
    return replace(DISK, owner=owner, **changed)


@pytest.mark.parametrize(
    ("one", "level", "text"),
    [
        (DeviceFacts(device(), {"phase": "reconnecting", "reason": "waits for the backend"}),
         Level.WARN, "reconnecting: waits for the backend"),
        (DeviceFacts(device(), {"phase": "connected", "worker_outdated": True}), Level.WARN,
         "another version"),
        (DeviceFacts(device("kernel", os_device="xvdb"), used="xvdb1 is mounted at /srv"),
         Level.OK, "the kernel's as xvdb, in use: xvdb1 is mounted at /srv"),
        (DeviceFacts(device("kernel", os_device="xvdb"), used="xvdb1 is the root file system",
                     fixed=True), Level.OK, "stays with the kernel as xvdb"),
        (DeviceFacts(device("kernel", os_device="xvdb"), {"refused": "xvdb is in use"}),
         Level.WARN, "not served: xvdb is in use"),
        (DeviceFacts(device("kernel", os_device="xvdb")), Level.OK, "it can be taken"),
        (DeviceFacts(device("none")), Level.WARN, "nobody has it"),
        (DeviceFacts(device("kernel", os_device="xvdb"), named=True), Level.WARN,
         "pvfront.toml names it, but the kernel has it"),
        (DeviceFacts(device("none"), named=True), Level.WARN,
         "pvfront.toml names it, but nobody has it"),
        (DeviceFacts(device("kernel", os_device="xvdb"), used="swap space", named=True),
         Level.WARN, "in use: swap space"),
        (DeviceFacts(device("kernel", klass="console", name="console-1")), Level.WARN,
         "the kernel's as /dev/nbd0: a restore may take an interrupt from another device"),
        (DeviceFacts(device("kernel", klass="vkbd", name="vkbd-0")), Level.OK,
         "does not serve"),
    ],
)  # fmt: skip
def test_a_device_is_ours_can_be_or_says_why_not(one: DeviceFacts, level: Level, text: str) -> None:
    finding = examine(replace(WELL, devices=[one]))[-1]
    assert (finding.level, finding.subject) == (level, one.device.name)
    assert text in finding.text


def test_a_worker_without_its_service_is_what_refuses_the_next_suspend() -> None:
    alone = DeviceFacts(device(supervisor_pid=None), {"phase": "connected", "worker_runs": True})
    finding = only(replace(WELL, devices=[alone]))
    assert (finding.subject, finding.fix) == ("suspend", "systemctl start pvfront-vbd")


def test_a_module_that_is_not_loaded_is_not_said_again_of_its_node() -> None:
    facts = replace(
        WELL,
        modules=WELL.modules | {"xen-evtchn": "there"},
        nodes=WELL.nodes | {"xen/evtchn": Node("ENOENT")},
    )
    assert only(facts).subject == "modules"


@pytest.mark.parametrize(
    ("text", "found"),
    [("6.1.0-40-amd64", (6, 1)), ("6.12.9", (6, 12)), ("5.10", (5, 10)), ("next", (99, 0)),
     ("6-rc1", (99, 0)), ("", (99, 0))],
)  # fmt: skip
def test_the_release_of_a_kernel_is_two_numbers(text: str, found: tuple[int, int]) -> None:
    assert release(text) == found
