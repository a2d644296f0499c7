# SPDX-License-Identifier: BSD-2-Clause
"""Many disks in one guest, each with a worker, a ring and grants of its own."""

from __future__ import annotations

import shlex
import time

import pytest
from lab.guest import Guest
from lab.progress import say
from lab.pvf import NAMES, VDEV, Pvfront
from lab.scenario import Lab, wait_until

pytestmark = [pytest.mark.disk, pytest.mark.long]

COUNT = 50
"""Disks: all that `NAMES` has besides the guest's own two. Attaching one costs dom0 a second; in as
much, 16 and 64 are attached on the embedded host (tests/functional)."""


@pytest.mark.timeout(1800)
def test_many_disks_are_served_used_and_detached_within_the_limit_of_grants(
    lab: Lab, guest: Guest
) -> None:
    pvf = Pvfront(lab, guest)
    pvf.start("--all")
    names = [name for name in NAMES if name not in ("xvda", "xvdz")][:COUNT]
    backings = [lab.loop_disk(4) for _ in names]
    attach = "".join(
        f"xl block-attach {guest.kind} {shlex.quote(backing.spec(name))} || exit 1\n"
        for name, backing in zip(names, backings, strict=True)
    )
    begin = time.monotonic()
    lab.dom0.run(attach, timeout=60 * COUNT)
    attached = time.monotonic() - begin
    for name in names:
        pvf.wait_served(name)
    served = time.monotonic() - begin
    say(f"{COUNT} disks: attached in {attached:.0f} s, all served after {served:.0f} s")

    rows = [row for row in pvf.list() if row["owner"] == "pvfront"]
    assert sorted(row["name"] for row in rows) == sorted(names)
    states = [pvf.state(name) for name in names]
    say(f"{sum(bool(state['last_trouble']) for state in states)} of them at a second try")
    assert len({state["worker_pid"] for state in states}) == COUNT
    granted = sum(state["rings"]["pool_pages"] + state["rings"]["ring_pages"] for state in states)
    limit = int(guest.output("cat /sys/module/xen_gntalloc/parameters/limit"))
    assert granted <= limit

    jobs = " ".join(f"--name={name} --filename=/dev/pvfront/{name}" for name in names)
    guest.run(
        "fio --rw=randrw --bs=64k --iodepth=4 --ioengine=libaio --direct=1 --size=1M "
        f"--verify=crc32c --verify_fatal=1 --output-format=terse {jobs}",
        timeout=900,
    )
    reads = "".join(f"sha256sum </dev/pvfront/{name} || exit 1\n" for name in (names[0], names[-1]))
    first, last = guest.output(reads).split("-")[:2]
    begin = time.monotonic()
    detach = "".join(f"xl block-detach {guest.kind} {VDEV[name]} || exit 1\n" for name in names)
    lab.dom0.run(detach, timeout=60 * COUNT)
    say(f"and detached in {time.monotonic() - begin:.0f} s")
    wait_until(
        "the end of all workers", lambda: guest.output("pgrep -c pvfront-worker || true") == "0"
    )
    assert backings[0].sha256() == first.strip()
    assert backings[-1].sha256() == last.strip()
    assert sorted(guest.vdevs()) == [51712, VDEV["xvdz"]]
    wait_until(
        "the end of their claims and states",
        lambda: guest.output("cd /run/pvfront && ls -d *.claim vbd-*.json || true") == "",
    )
    for backing in backings:
        backing.remove()
