# SPDX-License-Identifier: BSD-2-Clause
"""File systems and loads that others wrote, on a disk whose worker is killed under them."""

from __future__ import annotations

import pytest
from lab.guest import Guest
from lab.pvf import Pvfront
from lab.scenario import Lab, wait_until

pytestmark = pytest.mark.disk

NODE = "/dev/pvfront/xvdb"
MOUNT = "/mnt/xvdb"

STRESS = (
    f"stress-ng --temp-path {MOUNT} --verify --metrics-brief --timeout 1000 "
    "--hdd 1 --hdd-bytes 2m --hdd-opts fsync,wr-rnd,rd-rnd --dentry 1 --dentries 64 "
    "--rename 1 --fallocate 1 --fallocate-bytes 1m"
)
"""Works on names, data, sizes and holes at once; what it reads back it compares."""

FILE_SYSTEMS = {
    # MiB, make, check; xfs would like 300 MiB
    "ext4": (48, f"mkfs.ext4 -q {NODE}", f"e2fsck -f -n {NODE}"),
    "xfs": (48, f"mkfs.xfs -q -f --unsupported {NODE}", f"xfs_repair -n {NODE}"),
}


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Pvfront:
    service = Pvfront(lab, guest)
    service.start("--all")
    return service


@pytest.mark.area  # at each run: ext4 over a suspend, and workers killed in test_faults.py
@pytest.mark.parametrize("name", ["ext4", pytest.param("xfs", marks=pytest.mark.long)])
def test_a_file_system_under_stress_is_whole_though_its_worker_was_killed(
    pvf: Pvfront, guest: Guest, lab: Lab, name: str
) -> None:
    mib, make, check = FILE_SYSTEMS[name]

    def flushes() -> int:
        # Documentation/block/stat.rst: the 16th word is flushes that have ended.
        (seen,) = guest.look(f"/sys/block/{device}/stat")
        return int((seen.text or "").split()[15]) if seen else 0

    with pvf.disk(lab.loop_disk(mib)) as backing:
        guest.run(f"{make} && mkdir -p {MOUNT} && mount {NODE} {MOUNT}")
        device = guest.output(f"readlink -f {NODE}").rsplit("/", 1)[1]
        load = guest.start(STRESS)
        wait_until("ten flushes", lambda: flushes() > 10)
        old = pvf.worker()
        guest.run(f"kill -KILL {old}")
        wait_until("a new worker", lambda: pvf.state().get("worker_pid") not in (None, old))
        pvf.wait_served()
        before = flushes()
        wait_until("ten flushes by the new worker", lambda: flushes() > before + 10)
        assert load.running, "stress-ng must outlive the worker"
        guest.run("pkill -INT -o -x stress-ng")
        result = load.wait()
        assert result.ok, result
        assert "fail" not in result.stdout + result.stderr, result
        guest.run(f"umount {MOUNT}")
        assert guest.run(check).ok
        assert "I/O error" not in guest.output("dmesg | tail -n 80")
        assert pvf.sha256() == backing.sha256()
