# SPDX-License-Identifier: BSD-2-Clause
"""Save, restore and a cancelled suspend under load: applications notice nothing but a pause."""

from __future__ import annotations

import pytest
from lab.guest import Guest
from lab.pvf import Pvfront, end_fio, fio
from lab.scenario import Lab, wait_until

pytestmark = pytest.mark.survive

DIRECT = fio(depth=16, size="8M", extra="--time_based --runtime=1000 --verify_backlog=128")
BUFFERED = (
    "fio --name=buffered --directory=/mnt/xvdb --rw=randwrite --bs=4k --size=4M --fsync=1 "
    "--numjobs=2 --time_based --runtime=1000 --verify=crc32c --verify_fatal=1 "
    "--verify_backlog=64 --output-format=terse"
)


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Pvfront:
    service = Pvfront(lab, guest)
    service.start("--all")
    wait_until("suspend being watched for", lambda: "watching" in _stage(service), 60)
    return service


def _stage(pvf: Pvfront) -> str:
    return pvf.guest.run("cat /run/pvfront/suspend.json", check=False).stdout


def _progress(pvf: Pvfront) -> int:
    return int(pvf.status()["statistics"]["write"]["requests"])


@pytest.mark.core
@pytest.mark.timeout(1500)
def test_fio_direct_runs_through_save_and_restore_without_an_error(
    pvf: Pvfront, guest: Guest
) -> None:
    boot, domid = guest.boot_id(), guest.domid()
    with pvf.disk():
        load = guest.start(DIRECT, unit="direct")
        wait_until("I/O", lambda: _progress(pvf) > 50)
        guest.save()
        assert not guest.running()
        guest.restore()
        assert guest.boot_id() == boot
        assert guest.domid() != domid
        pvf.wait_served(deadline=120)
        assert load.running, "the load must have been under way during the suspend"
        before = _progress(pvf)
        wait_until("I/O after the restore", lambda: _progress(pvf) > before + 50, 60)
        end_fio(guest, load)
        kernel = guest.output("dmesg")
        assert "I/O error" not in kernel
        assert "BUG" not in kernel
        guest.run("systemctl restart pvfront-vbd", timeout=180)
        pvf.wait_served()


@pytest.mark.timeout(1500)
def test_fio_buffered_with_fsync_on_ext4_runs_through_save_and_restore(
    pvf: Pvfront, guest: Guest
) -> None:
    with pvf.disk():
        guest.run(
            "mkfs.ext4 -q /dev/pvfront/xvdb && mkdir -p /mnt/xvdb "
            "&& mount /dev/pvfront/xvdb /mnt/xvdb",
            timeout=120,
        )
        load = guest.start(BUFFERED, unit="buffered")
        wait_until("I/O", lambda: _progress(pvf) > 50)
        guest.save()
        guest.restore()
        pvf.wait_served(deadline=120)
        assert load.running, "the load must have been under way during the suspend"
        before = _progress(pvf)
        wait_until("I/O after the restore", lambda: _progress(pvf) > before + 50, 60)
        end_fio(guest, load)
        assert "I/O error" not in guest.output("dmesg")
        guest.run("umount /mnt/xvdb && e2fsck -f -n /dev/pvfront/xvdb", timeout=120)


@pytest.mark.timeout(900)
def test_a_checkpointed_guest_goes_on_with_its_disk(pvf: Pvfront, guest: Guest, lab: Lab) -> None:
    with pvf.disk():
        load = guest.start(DIRECT, unit="direct")
        wait_until("I/O", lambda: _progress(pvf) > 50)
        # -c: the domain goes on after it was saved; for the guest that is a cancelled suspend.
        lab.xl("save", "-c", guest.kind, "/var/lib/lab/checkpoint", timeout=240)
        lab.dom0.run("rm -f /var/lib/lab/checkpoint")
        pvf.wait_served(deadline=120)
        assert pvf.state()["generation"] >= 2, "the ports must have been let go for the suspend"
        before = _progress(pvf)
        wait_until("I/O after the checkpoint", lambda: _progress(pvf) > before + 50, 60)
        end_fio(guest, load)
