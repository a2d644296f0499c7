# SPDX-License-Identifier: BSD-2-Clause
"""The lab before anything of ours: a real Xen, a real guest, real backends, stock frontends."""

from __future__ import annotations

import pytest
from lab.errors import CommandFailed, DeadlineExceeded
from lab.guest import Guest, triple_fault
from lab.scenario import Lab, wait_until

FAULT = """\
(XEN) d7v0 Triple fault - invoking HVM shutdown action 1
(XEN) *** Dumping Dom7 vcpu#0 state: ***
(XEN) RIP:    0010:[<{rip}>]
(XEN) RFLAGS: 0000000000000046   CONTEXT: hvm guest (d7v0)
"""


@pytest.fixture(autouse=True)
def stock(request: pytest.FixtureRequest) -> None:
    """The kernel's frontends have the disks: our service, if another test left it, is stopped."""
    if "guest" in request.fixturenames:
        guest = request.getfixturevalue("guest")
        guest.run("systemctl stop pvfront-vbd", check=False)


@pytest.mark.parametrize(
    ("rip", "guest_said", "emulator"),
    [
        ("ffff82d040203e9b", "kernel BUG at drivers/xen/evtchn.c:422!", True),
        ("ffffffff8107505b", "random: crng init done", True),
        ("ffffffff8107505b", "kernel BUG at drivers/xen/evtchn.c:422!", False),
    ],
)
def test_the_emulators_triple_fault_is_told_from_a_crash(
    rip: str, guest_said: str, emulator: bool
) -> None:
    xen = FAULT.format(rip=rip)
    assert triple_fault(xen, guest_said) is emulator
    assert triple_fault(xen, guest_said, {8}) is False


@pytest.mark.core
def test_dom0_and_guest_run_commands_on_a_real_xen(lab: Lab, guest: Guest) -> None:
    assert lab.dom0.output(["cat", "/proc/xen/capabilities"]).split(",")[0] == "control_d"
    assert guest.output(["cat", "/sys/hypervisor/type"]) == "xen"
    expected = guest.type.upper()
    assert guest.output(["cat", "/sys/hypervisor/guest_type"]) == expected


@pytest.mark.core
def test_the_status_and_both_outputs_of_a_command_arrive(guest: Guest) -> None:
    result = guest.run("echo out; echo err >&2; exit 7", check=False)
    assert (result.code, result.stdout, result.stderr) == (7, "out\n", "err\n")
    with pytest.raises(CommandFailed, match="ended with 7"):
        guest.run("exit 7")


def test_what_is_at_a_path_is_seen_without_a_process(guest: Guest) -> None:
    guest.run("ln -sfn /etc/hostname /run/lab-link")
    text, folder, device, nothing = guest.look("/run/lab-link", "/etc", "/dev/null", "/no/such")
    assert text is not None
    content = guest.run("cat /etc/hostname").stdout
    assert (text.real, text.kind, text.text) == ("/etc/hostname", "-", content)
    assert folder is not None
    assert (folder.kind, folder.text) == ("d", None)
    assert device is not None
    assert device.kind == "c"
    assert nothing is None
    assert guest.has("/dev/null", "c")
    assert not guest.has("/dev/null", "b")


@pytest.mark.long
def test_a_command_past_its_deadline_is_killed_with_its_children(guest: Guest) -> None:
    with pytest.raises(DeadlineExceeded, match="did not end within 2 s"):
        guest.run("sleep 4242 & sleep 4242", timeout=2)
    wait_until(
        "the end of both sleeps",
        lambda: not guest.run("pgrep -f '^sleep 4242'", check=False).ok,
    )


@pytest.mark.core
def test_the_store_is_one_store_seen_from_both_sides(lab: Lab, guest: Guest) -> None:
    domid = guest.domid()
    assert guest.xenstore_read("domid") == str(domid)
    guest.run(["xenstore-write", "data/lab", "from the guest"])
    assert lab.xenstore_read(f"/local/domain/{domid}/data/lab") == "from the guest"
    lab.xenstore_write(f"/local/domain/{domid}/data/lab", "from dom0")
    assert guest.xenstore_read("data/lab") == "from dom0"
    assert guest.xenstore_read("data/absent") is None


@pytest.mark.long  # in a run: test_disk.py's disks that go to the kernel
@pytest.mark.disk
def test_an_attached_disk_appears_through_the_kernels_blkfront(lab: Lab, guest: Guest) -> None:
    disk = lab.ram_disk(32)
    guest.block_attach(disk.spec("xvdb"))
    wait_until("xvdb in the guest", lambda: guest.has("/dev/xvdb", "b"))
    assert guest.output(["blockdev", "--getsize64", "/dev/xvdb"]) == str(32 << 20)
    guest.run("dd if=/dev/urandom of=/dev/xvdb bs=1M count=32 oflag=direct status=none")
    assert lab.vbd_state(guest) == ("4", "4")
    seen = guest.output("sha256sum /dev/xvdb").split()[0]
    guest.block_detach("xvdb")
    wait_until("no xvdb in the guest", lambda: not guest.has("/dev/xvdb"))
    assert disk.sha256() == seen


@pytest.mark.long  # in a run: whatever is killed with requests held
@pytest.mark.disk
def test_a_delayed_disk_holds_requests_until_let_go(lab: Lab, guest: Guest) -> None:
    disk = lab.delayed_disk(32)
    guest.block_attach(disk.spec("xvdc"))
    wait_until("xvdc in the guest", lambda: guest.has("/dev/xvdc", "b"))
    disk.set_delay(600_000)
    job = guest.start("dd if=/dev/zero of=/dev/xvdc bs=4k count=1 oflag=direct")
    wait_until("a request held in dom0", lambda: disk.in_flight() > 0)
    assert job.running
    disk.clear_delay()
    assert job.wait().ok


@pytest.mark.long
@pytest.mark.survive
def test_a_job_runs_in_a_scope_that_can_be_frozen_without_the_agent(guest: Guest) -> None:
    count = "while sleep 0.2; do echo tick; done"
    job = guest.start(count, unit="frozen-client")
    wait_until("the first tick", lambda: job.running and "tick" in job.stdout)
    guest.run(["systemctl", "freeze", "frozen-client.scope"])
    guest.run("sleep 1")
    assert job.running
    ticks = job.stdout.count("tick")
    guest.run("sleep 2")
    assert job.running
    assert job.stdout.count("tick") == ticks
    guest.run(["systemctl", "thaw", "frozen-client.scope"])
    wait_until("a tick after the thaw", lambda: job.running and job.stdout.count("tick") > ticks)
    job.kill()
