# SPDX-License-Identifier: BSD-2-Clause
"""Disks in a real guest on real Xen, through the installed package, with tools we did not write.

What needs the guest's kernel: file systems, its own driver. What a disk does anywhere is in
tests/functional, and runs here too.
"""

from __future__ import annotations

import pytest
from lab.guest import Guest
from lab.pvf import VDEV, Pvfront, end_fio, fio
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
    tree = "usr/lib/python3.11/json etc"
    with pvf.disk(lab.loop_disk(32)) as backing:
        guest.run("echo 'label: gpt\nsize=30M, type=L' | sfdisk -q /dev/pvfront/xvdb")
        node = guest.output("readlink -f /dev/pvfront/xvdb")
        wait_until("the partition's node", lambda: guest.has(f"{node}p1", "b"))
        guest.run(f"mkfs.ext4 -q {node}p1")
        guest.run(
            f"set -o pipefail; cd /; mkdir -p /mnt/xvdb && mount {node}p1 /mnt/xvdb "
            f"&& tar cf - {tree} | tar xf - -C /mnt/xvdb && umount /mnt/xvdb "
            f"&& mount -o ro {node}p1 /mnt/xvdb "
            f"&& for d in {tree}; do diff -r --no-dereference $d /mnt/xvdb/$d || exit 1; done "
            "&& umount /mnt/xvdb",
            timeout=300,
        )
        assert guest.run(f"e2fsck -f -n {node}p1").code == 0
        assert pvf.sha256() == backing.sha256()


def test_the_root_disk_and_a_mounted_one_are_never_taken(pvf: Pvfront, guest: Guest) -> None:
    pvf.stop()
    try:
        forced = guest.run("timeout 150 pvfront vbd serve --force xvda", check=False)
        assert forced.code != 0
        assert "root" in forced.stderr
        mounted = guest.run("timeout 150 pvfront vbd serve xvdz", check=False)
        assert mounted.code != 0
        assert "mounted" in mounted.stderr
        assert guest.run("touch /root/alive", check=False).ok
    finally:
        pvf.start("--all")


def test_without_root_the_service_says_so_in_one_clear_line(pvf: Pvfront, guest: Guest) -> None:
    command = "setpriv --reuid 65534 --clear-groups pvfront vbd serve xvdb"
    result = guest.run(command, check=False)
    assert result.code != 0
    assert "root" in result.stderr
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
    )
    asked = lab.xl("block-detach", guest.kind, "xvdb", check=False)
    wait_until("the refusal", lambda: pvf.state().get("phase") == "detach refused")
    assert "refused while in use" in pvf.log(), asked
    guest.run("dd if=/dev/zero of=/mnt/xvdb/file bs=1M count=4 conv=fsync")
    guest.run("umount /mnt/xvdb")
    wait_until(
        "the detach to complete after the unmount",
        lambda: not guest.has("/dev/pvfront/xvdb"),
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
    guest.run(fio(size="2M"))
    before = pvf.sha256()
    pvf.stop()
    try:
        wait_until("the kernel's xvdb", lambda: guest.has("/dev/xvdb", "b"))
        kernels = guest.output("dd if=/dev/xvdb bs=1M iflag=direct status=none | sha256sum")
        assert kernels.split()[0] == before == backing.sha256()
    finally:
        pvf.start("--all")
    # The kernel has bound it now: we take it back, and it is served again.
    pvf.wait_served()
    assert pvf.sha256() == before
    pvf.detach()
    backing.remove()


@pytest.mark.area
def test_a_disk_that_the_kernel_had_is_detached_however_often_the_service_came_and_went(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.loop_disk(16)
    pvf.stop()
    try:
        guest.block_attach(backing.spec("xvdb"))
        wait_until("the kernel's xvdb", lambda: guest.has("/dev/xvdb", "b"))
        for _ in range(2):
            pvf.start("xvdb")
            pvf.wait_served()
            pvf.stop()
        guest.block_detach("xvdb")
        wait_until("its end", lambda: lab.vbd_state(guest, VDEV["xvdb"]) == (None, None))
    finally:
        pvf.start("--all")
    backing.remove()


@pytest.mark.long  # under load, at once, in test_faults.py
def test_stopping_under_a_mounted_disk_leaves_it_served_until_the_next_start(
    pvf: Pvfront, guest: Guest
) -> None:
    with pvf.disk():
        guest.run(
            "mkfs.ext4 -q /dev/pvfront/xvdb && mkdir -p /mnt/xvdb "
            "&& mount /dev/pvfront/xvdb /mnt/xvdb",
        )
        worker = pvf.worker()
        pvf.stop()
        assert "goes on serving" in pvf.log()
        guest.run("dd if=/dev/urandom of=/mnt/xvdb/f bs=1M count=4 conv=fsync")
        pvf.start("--all")
        wait_until("the worker adopted", lambda: pvf.state().get("worker_pid") == worker)
        assert guest.run("umount /mnt/xvdb && e2fsck -f -n /dev/pvfront/xvdb").ok


@pytest.mark.long
def test_the_kernel_cannot_bind_a_served_disk_and_the_attempt_costs_a_reconnect(
    pvf: Pvfront, guest: Guest
) -> None:
    with pvf.disk():
        load = guest.start(fio(depth=8, extra="--time_based --runtime=1000 --verify_backlog=64"))
        wait_until("I/O", lambda: pvf.written() > 50)
        generation = pvf.state()["generation"]
        name = f"vbd-{VDEV['xvdb']}"
        assert not guest.run(f"echo {name} >/sys/bus/xen/drivers/vbd/bind", check=False).ok
        wait_until(
            "the reconnect",
            lambda: pvf.state().get("generation", 0) > generation and pvf.served(),
        )
        assert not guest.run(f"test -e /sys/bus/xen/devices/{name}/driver", check=False).ok
        end_fio(guest, load)


def test_an_interface_attached_while_all_disks_are_served_goes_to_the_kernel(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    lab.xl("network-attach", guest.kind, "bridge=xenbr0")
    try:
        wait_until("the kernel's eth1", lambda: guest.has("/sys/class/net/eth1"))
    finally:
        lab.xl("network-detach", guest.kind, "1")


@pytest.mark.long
def test_release_gives_the_disk_back_and_says_what_became_of_it(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.loop_disk(16)
    guest.block_attach(backing.spec("xvdb"))
    pvf.wait_served()
    said = guest.run("pvfront release vbd xvdb").stdout
    assert "kernel" in said
    wait_until("the kernel's xvdb", lambda: guest.has("/dev/xvdb", "b"))
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
