# SPDX-License-Identifier: BSD-2-Clause
"""Disks in a real guest on real Xen, through the installed package, with tools we did not write."""

from __future__ import annotations

import json

import pytest
from lab.guest import Guest
from lab.pvf import UNIT, VDEV, Pvfront, fio
from lab.scenario import Lab, wait_until

pytestmark = pytest.mark.disk


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Pvfront:
    """The service, serving every disk that is not in use."""
    service = Pvfront(lab, guest)
    service.start("--all")
    return service


@pytest.mark.core
def test_a_disk_is_partitioned_formatted_filled_checked_and_equal_on_both_sides(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    tree = "usr/lib/python3.11/asyncio usr/lib/python3.11/json etc"
    with pvf.disk(lab.loop_disk(32)) as backing:
        guest.run("echo 'label: gpt\nsize=30M, type=L' | sfdisk -q /dev/pvfront/xvdb")
        node = guest.output("readlink -f /dev/pvfront/xvdb")
        wait_until("the partition's node", lambda: guest.run(f"test -b {node}p1", check=False).ok)
        guest.run(f"mkfs.ext4 -q {node}p1", timeout=120)
        guest.run(
            f"set -o pipefail; cd /; mkdir -p /mnt/xvdb && mount {node}p1 /mnt/xvdb "
            f"&& tar cf - {tree} | tar xf - -C /mnt/xvdb && umount /mnt/xvdb "
            f"&& mount -o ro {node}p1 /mnt/xvdb "
            f"&& for d in {tree}; do diff -r --no-dereference $d /mnt/xvdb/$d || exit 1; done "
            "&& umount /mnt/xvdb",
            timeout=300,
        )
        assert guest.run(f"e2fsck -f -n {node}p1", timeout=120).code == 0
        assert pvf.sha256() == backing.sha256()


@pytest.mark.parametrize(
    ("bs", "depth", "extra"),
    [
        ("512", 1, "--size=512k"),
        ("4k", 1, "--size=2M --fsync=16"),
        pytest.param("4k", 64, "", marks=pytest.mark.core),
        ("64k", 16, "--fsync=8"),
        ("1M", 4, "--size=48M"),
        pytest.param("512-1M", 32, "--bsrange=512-1M --blockalign=512", marks=pytest.mark.core),
    ],
)
def test_what_fio_writes_it_reads_back(
    pvf: Pvfront, guest: Guest, bs: str, depth: int, extra: str
) -> None:
    with pvf.disk():
        size = bs.split("-")[-1]
        guest.run(fio(bs=size, depth=depth, extra=extra), timeout=300)


def test_fio_verifies_with_trims_between(pvf: Pvfront, guest: Guest) -> None:
    with pvf.disk():
        assert pvf.state()["geometry"]["discard"] is True
        guest.run(
            fio(rw="randtrimwrite", bs="4k", depth=8, size="8M", extra="--fsync=32"), timeout=300
        )
        guest.run("blkdiscard /dev/pvfront/xvdb && blkdiscard -z /dev/pvfront/xvdb", timeout=120)
        guest.run(fio(size="4M"), timeout=120)


def test_the_reported_features_are_the_negotiated_ones(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    with pvf.disk(lab.ram_disk(64)) as backing:
        geometry = pvf.state()["geometry"]
        assert geometry["size"] == backing.size
        backend = lab.xenstore_ls(f"/local/domain/0/backend/vbd/{guest.domid()}/{VDEV['xvdb']}")
        keys = {path.rsplit("/", 1)[1]: value for path, value in backend.items()}
        assert geometry["flush"] == (keys["feature-flush-cache"] == "1")
        assert geometry["discard"] == (keys.get("feature-discard") == "1")
        assert geometry["sectors"] == int(keys["sectors"])
        node = guest.output("basename $(readlink -f /dev/pvfront/xvdb)")
        queue = f"/sys/block/{node}/queue"
        assert (guest.output(f"cat {queue}/discard_max_bytes") != "0") == geometry["discard"]
        assert (guest.output(f"cat {queue}/write_cache") == "write back") == geometry["flush"]


def test_a_read_only_disk_refuses_writes_and_says_so(pvf: Pvfront, guest: Guest) -> None:
    with pvf.disk(mode="r"):
        assert guest.output("blockdev --getro /dev/pvfront/xvdb") == "1"
        assert not guest.run(
            "dd if=/dev/zero of=/dev/pvfront/xvdb bs=4k count=1 oflag=direct", check=False
        ).ok
        assert pvf.sha256()


@pytest.mark.core
def test_list_shows_every_device_with_its_owner(pvf: Pvfront, guest: Guest) -> None:
    with pvf.disk(stock=True):
        rows = {(row["class"], row["name"]): row for row in pvf.list()}
        ours = rows["vbd", "xvdb"]
        assert ours["owner"] == "pvfront"
        assert ours["os_device"] == guest.output("readlink -f /dev/pvfront/xvdb")
        assert ours["frontend_state"] == ours["backend_state"] == "Connected (4)"
        assert rows["vbd", "xvda"]["owner"] == "kernel"
        assert any(row["class"] == "vif" and row["owner"] == "kernel" for row in rows.values())
        plain = guest.output("pvfront list")
        assert "xvdb" in plain
        assert "pvfront" in plain


def test_the_root_disk_and_a_mounted_one_are_never_taken(pvf: Pvfront, guest: Guest) -> None:
    pvf.stop()
    try:
        refused = guest.run("timeout 60 pvfront vbd serve xvda", check=False, timeout=90)
        assert refused.code != 0
        assert "root" in refused.stderr
        forced = guest.run("timeout 60 pvfront vbd serve --force xvda", check=False, timeout=90)
        assert forced.code != 0
        assert "root" in forced.stderr
        mounted = guest.run("timeout 60 pvfront vbd serve xvdz", check=False, timeout=90)
        assert mounted.code != 0
        assert "mounted" in mounted.stderr
        assert guest.run("touch /root/alive", check=False).ok
    finally:
        pvf.start("--all")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("pvfront vbd serve xvdq", "there is no disk"),
        ("pvfront status xvdq", "xvdq"),
        ("pvfront release vbd xvdq", "xvdq"),
        ("pvfront store read no/such/key", "ENOENT"),
        ("setpriv --reuid 65534 --clear-groups pvfront vbd serve xvdb", "root"),
    ],
)
def test_a_mistake_is_answered_with_one_clear_line(
    pvf: Pvfront, guest: Guest, command: str, said: str
) -> None:
    result = guest.run(command, check=False, timeout=60)
    assert result.code != 0
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2


def test_detaching_a_mounted_disk_waits_for_the_unmount(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.loop_disk(64)
    guest.block_attach(backing.spec("xvdb"))
    pvf.wait_served()
    guest.run(
        "mkfs.ext4 -q /dev/pvfront/xvdb && mkdir -p /mnt/xvdb && mount /dev/pvfront/xvdb /mnt/xvdb",
        timeout=120,
    )
    asked = lab.xl("block-detach", guest.kind, "xvdb", check=False)
    assert "refused while in use" in pvf.log(), asked
    assert pvf.state()["phase"] == "detach refused"
    guest.run("dd if=/dev/zero of=/mnt/xvdb/file bs=1M count=4 conv=fsync", timeout=60)
    guest.run("umount /mnt/xvdb")
    wait_until(
        "the detach to complete after the unmount",
        lambda: not guest.run("test -e /dev/pvfront/xvdb", check=False).ok,
    )
    lab.xl("block-detach", guest.kind, "xvdb", check=False)
    wait_until(
        "xvdb gone from dom0's store", lambda: lab.vbd_state(guest, VDEV["xvdb"]) == (None, None)
    )
    backing.remove()


def test_a_never_bound_disk_goes_to_the_kernel_at_sigterm_with_the_same_data(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.loop_disk(32)
    guest.block_attach(backing.spec("xvdb"))
    pvf.wait_served()
    guest.run(fio(size="8M"), timeout=120)
    before = pvf.sha256()
    pvf.stop()
    try:
        wait_until("the kernel's xvdb", lambda: guest.run("test -b /dev/xvdb", check=False).ok, 30)
        kernels = guest.output(
            "dd if=/dev/xvdb bs=1M iflag=direct status=none | sha256sum", timeout=120
        )
        assert kernels.split()[0] == before == backing.sha256()
    finally:
        pvf.start("--all")
    # The kernel has bound it now: we take it back, and it is served again.
    pvf.wait_served()
    assert pvf.sha256() == before
    pvf.detach()
    backing.remove()


def test_stopping_under_a_mounted_disk_leaves_it_served_until_the_next_start(
    pvf: Pvfront, guest: Guest
) -> None:
    with pvf.disk():
        guest.run(
            "mkfs.ext4 -q /dev/pvfront/xvdb && mkdir -p /mnt/xvdb "
            "&& mount /dev/pvfront/xvdb /mnt/xvdb",
            timeout=120,
        )
        worker = pvf.worker()
        pvf.stop()
        assert "goes on serving" in pvf.log()
        guest.run("dd if=/dev/urandom of=/mnt/xvdb/f bs=1M count=4 conv=fsync", timeout=60)
        pvf.start("--all")
        wait_until("the worker adopted", lambda: pvf.state().get("worker_pid") == worker)
        assert guest.run("umount /mnt/xvdb && e2fsck -f -n /dev/pvfront/xvdb", timeout=60).ok


def test_a_killed_supervisor_costs_no_io_and_the_next_adopts_the_worker(
    pvf: Pvfront, guest: Guest
) -> None:
    with pvf.disk():
        worker, supervisor = pvf.worker(), pvf.pid()
        load = guest.start(fio(depth=16, extra="--time_based --runtime=25 --verify_backlog=64"))
        wait_until("I/O", lambda: pvf.status()["statistics"]["write"]["requests"] > 50)
        guest.run(f"kill -KILL {supervisor}")
        wait_until(
            "systemd's new supervisor", lambda: pvf.running() and pvf.pid() not in (0, supervisor)
        )
        wait_until("the adoption", lambda: pvf.state().get("worker_pid") == worker)
        result = load.wait(timeout=120)
        assert result.ok, result
        assert pvf.state()["generation"] == 1


def test_a_worker_killed_with_16_requests_in_flight_loses_nothing(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.delayed_disk(64)
    with pvf.disk(backing):
        load = guest.start(
            fio(depth=32, size="8M", extra="--time_based --runtime=30 --verify_backlog=128")
        )
        wait_until("I/O", lambda: pvf.status()["statistics"]["write"]["requests"] > 50)
        backing.set_delay(3000)
        wait_until("16 requests held by dom0", lambda: backing.in_flight() >= 16)
        old = pvf.worker()
        guest.run(f"kill -KILL {old}")
        assert backing.in_flight() >= 16, "the requests must still be in flight after the kill"
        wait_until(
            "a new worker serving",
            lambda: pvf.state().get("worker_pid") not in (None, old) and pvf.served(),
            60,
        )
        backing.clear_delay()
        result = load.wait(timeout=180)
        assert result.ok, result
        assert pvf.state()["generation"] >= 2
    assert "I/O error" not in guest.output("dmesg | tail -n 50")


def test_the_kernel_cannot_bind_a_served_disk_and_the_attempt_costs_a_reconnect(
    pvf: Pvfront, guest: Guest
) -> None:
    with pvf.disk():
        load = guest.start(fio(depth=8, extra="--time_based --runtime=20 --verify_backlog=64"))
        wait_until("I/O", lambda: pvf.status()["statistics"]["write"]["requests"] > 50)
        generation = pvf.state()["generation"]
        name = f"vbd-{VDEV['xvdb']}"
        assert not guest.run(f"echo {name} >/sys/bus/xen/drivers/vbd/bind", check=False).ok
        wait_until(
            "the reconnect",
            lambda: pvf.state().get("generation", 0) > generation and pvf.served(),
            60,
        )
        assert not guest.run(f"test -e /sys/bus/xen/devices/{name}/driver", check=False).ok
        result = load.wait(timeout=120)
        assert result.ok, result


def test_an_interface_attached_while_all_disks_are_served_goes_to_the_kernel(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    lab.xl("network-attach", guest.kind, "bridge=xenbr0")
    try:
        wait_until(
            "the kernel's eth1", lambda: guest.run("test -e /sys/class/net/eth1", check=False).ok
        )
    finally:
        lab.xl("network-detach", guest.kind, "1")


def test_an_idle_disk_costs_no_cpu_and_no_events(pvf: Pvfront, guest: Guest) -> None:
    with pvf.disk():
        pids = (pvf.worker(), pvf.pid())

        def spent(seconds: int) -> list[int]:
            """Ticks (10 ms) that the worker and the supervisor used in so many seconds."""
            look = f"cat /proc/{pids[0]}/stat /proc/{pids[1]}/stat"
            lines = guest.output(f"{look}; sleep {seconds}; {look}", timeout=60).splitlines()
            ticks = [sum(map(int, line.rpartition(")")[2].split()[11:13])) for line in lines]
            return [ticks[2] - ticks[0], ticks[3] - ticks[1]]

        def events() -> int:
            return int(pvf.status()["statistics"]["events"])

        # What the attach set going (udev's probes, the log, the state file) ends first.
        wait_until("the end of what the attach began", lambda: spent(2) == [0, 0], 90)
        before = events()
        assert spent(10) == [0, 0]
        assert events() == before


@pytest.mark.usefixtures("soak_round")
def test_attach_and_detach_20_times_leaks_nothing(pvf: Pvfront, guest: Guest, lab: Lab) -> None:
    def held() -> dict[str, int]:
        pid = pvf.pid()
        return {
            "supervisor descriptors": int(guest.output(f"ls /proc/{pid}/fd | wc -l")),
            "workers": int(guest.output("pgrep -c pvfront-worker || true")),
            "event channels": int(
                guest.output("grep -c 'xen-dyn.*evtchn' /proc/interrupts || true")
            ),
            "supervisor KiB": int(guest.output(f"awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status")),
        }

    backing = lab.ram_disk(16)
    try:
        before: dict[str, int] = {}
        for cycle in range(20):
            guest.block_attach(backing.spec("xvdb"))
            pvf.wait_served()
            if cycle % 5 == 0:
                guest.run("dd if=/dev/pvfront/xvdb of=/dev/null bs=1M count=4 status=none")
            pvf.detach()
            if cycle == 9:  # by then Python's and libc's arenas have what a cycle needs
                before = held()
        after = held()
    finally:
        backing.remove()
    memory = after.pop("supervisor KiB") - before.pop("supervisor KiB")
    assert after == before
    assert memory < 512, f"{memory} KiB more after 10 cycles"
    # Every page that was ever granted is free again: the whole limit can be granted at once.
    limit = int(guest.output("cat /sys/module/xen_gntalloc/parameters/limit"))
    probe = (
        "from pvfront.gntalloc import GrantAllocator\n"
        f"GrantAllocator.open().alloc(0, min({limit}, 8192))\n"
    )
    guest.run(["/opt/pvfront/bin/python", "-W", "ignore", "-c", probe], timeout=60)


def test_release_gives_the_disk_back_and_says_what_became_of_it(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.loop_disk(16)
    guest.block_attach(backing.spec("xvdb"))
    pvf.wait_served()
    said = guest.run("pvfront release vbd xvdb", timeout=60).stdout
    assert "kernel" in said
    wait_until("the kernel's xvdb", lambda: guest.run("test -b /dev/xvdb", check=False).ok)
    guest.block_detach("xvdb")
    backing.remove()


def test_no_worker_has_privileges(pvf: Pvfront, guest: Guest) -> None:
    with pvf.disk():
        status = guest.output(f"cat /proc/{pvf.worker()}/status")
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert set(fields["Uid"].split()) == {guest.output("id -u pvfront")}
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
        assert fields["Seccomp"].strip() == "2"
        assert fields["NoNewPrivs"].strip() == "1"


def test_status_is_readable_and_json_agrees(pvf: Pvfront, guest: Guest) -> None:
    with pvf.disk():
        plain = guest.output("pvfront status xvdb")
        answer = json.loads(guest.output("pvfront status xvdb --json"))
        assert answer["phase"] == "connected"
        assert str(answer["worker_pid"]) in plain
        assert guest.run(f"systemctl is-active {UNIT}").stdout.strip() == "active"
