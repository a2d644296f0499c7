# SPDX-License-Identifier: BSD-2-Clause
"""Every backend that a toolstack may put behind a disk: what it offers is what is reported, and
what was written is there on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from lab.disks import BackingDisk
from lab.guest import Guest
from lab.pvf import VDEV, Pvfront, fio
from lab.scenario import Lab, wait_until

pytestmark = pytest.mark.disk

MIB = 16
DIRECT_SEGMENTS = 11
MOST_SEGMENTS = 64
"""`max_indirect_segments` as it is by default."""
NAME = "xvdb"
NODE = f"/dev/pvfront/{NAME}"

BACKENDS: dict[str, Callable[[Lab], BackingDisk]] = {
    "brd": lambda lab: lab.ram_disk(MIB),
    "loop": lambda lab: lab.loop_disk(MIB),
    "loop of 4096-byte sectors": lambda lab: lab.loop_disk(MIB, sector_size=4096),
    "LVM": lambda lab: lab.volume(MIB),
    "qdisk raw": lambda lab: lab.qemu_disk(MIB, "raw"),
    "qdisk qcow2": lambda lab: lab.qemu_disk(MIB, "qcow2"),
}
MARKS = {
    "loop": pytest.mark.long,  # what nearly every other test has, too
    "LVM": pytest.mark.long,  # what is resized below
    "loop of 4096-byte sectors": pytest.mark.kinds("pvh612"),
    "qdisk raw": pytest.mark.long,  # as qcow2, but for QEMU's inside
}


def flag(keys: Mapping[str, str], name: str) -> bool:
    return keys.get(name, "0") != "0"


def offered(keys: Mapping[str, str]) -> dict[str, Any]:
    """What a backend's keys say, in the words of `pvfront status`."""
    sector = int(keys["sector-size"])
    discard = flag(keys, "feature-discard")
    return {
        "sectors": int(keys["sectors"]),
        "size": int(keys["sectors"]) * 512,
        "sector_size": sector,
        "physical_sector_size": int(keys.get("physical-sector-size", sector)),
        "read_only": keys["mode"] == "r",
        "removable": flag(keys, "removable"),
        "flush": flag(keys, "feature-flush-cache") or flag(keys, "feature-barrier"),
        "discard": discard,
        "discard_granularity": int(keys["discard-granularity"]) if discard else sector,
        "discard_alignment": int(keys.get("discard-alignment", 0)),
    }


def rings(keys: Mapping[str, str], written: Mapping[str, str]) -> dict[str, Any]:
    """What the backend's limits and our own keys come to, in the words of `pvfront status`."""
    indirect = int(keys.get("feature-max-indirect-segments", 0))
    persistent = flag(keys, "feature-persistent") and flag(written, "feature-persistent")
    return {
        "queues": int(written.get("multi-queue-num-queues", 1)),
        "ring_pages": 1 << int(written.get("ring-page-order", 0)),
        "segments": min(indirect, MOST_SEGMENTS) if indirect > DIRECT_SEGMENTS else DIRECT_SEGMENTS,
        "indirect": indirect > DIRECT_SEGMENTS,
        "persistent": persistent,
    }


def seen(guest: Guest) -> dict[str, Any]:
    """What tools show of the device."""
    columns = "SIZE,RO,LOG-SEC,DISC-MAX"
    listed = json.loads(guest.output(f"lsblk -J -b -o {columns} $(readlink -f {NODE})"))
    (row,) = listed["blockdevices"]
    return {
        "size": int(row["size"]),
        "read_only": bool(row["ro"]),
        "sector_size": int(row["log-sec"]),
        "discard": int(row["disc-max"]) > 0,
    }


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Pvfront:
    service = Pvfront(lab, guest)
    service.start("--all")
    return service


def compare(pvf: Pvfront, backing: BackingDisk) -> dict[str, Any]:
    """Asserts that store, status and the device's own properties agree; returns the status."""
    domid = pvf.guest.number
    keys, written = (
        {key.rsplit("/", 1)[1]: value for key, value in pvf.lab.xenstore_ls(path).items()}
        for path in (
            f"/local/domain/0/backend/{backing.backend}/{domid}/{VDEV[NAME]}",
            f"/local/domain/{domid}/device/vbd/{VDEV[NAME]}",
        )
    )
    status = pvf.state(NAME)  # what `pvfront status` shows, without the counters
    assert int(written.get("ring-page-order", 0)) <= int(keys.get("max-ring-page-order", 0))
    negotiated = rings(keys, written)
    assert {name: status["rings"][name] for name in negotiated} == negotiated
    expected = offered(keys)
    reported = status["geometry"]
    assert {name: reported[name] for name in expected} == expected
    device = seen(pvf.guest)
    assert device == {name: expected[name] for name in device}
    return status


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in BACKENDS],
)
def test_a_disk_of_any_backend_is_what_status_says_and_keeps_its_data(
    pvf: Pvfront, guest: Guest, lab: Lab, kind: str
) -> None:
    backing = BACKENDS[kind](lab)
    if backing.backend == "qdisk" and guest.kind != "hvm":
        # Only an HVM guest has a QEMU anyway. For the others libxl starts one where the guest is
        # created with a disk for it, and gives it no other while none runs.
        guest.destroy()
        guest.create(disks=[lab.qemu_disk(MIB, "raw").spec("xvdy", "r")])
        pvf.start("--all")
    guest.block_attach(backing.spec(NAME))
    pvf.wait_served(NAME)
    status = compare(pvf, backing)
    assert status["geometry"]["size"] == MIB << 20
    guest.run(fio(NAME, bs="64k", depth=8, size="8M"), timeout=300)
    if status["geometry"]["discard"]:
        guest.run(f"blkdiscard -o 8M -l 1M {NODE}")
    ours = pvf.sha256(NAME)
    pvf.detach(NAME)
    assert backing.sha256() == ours
    backing.remove()


@pytest.mark.long  # at each run: the embedded host's, and networks' two queues
def test_a_disk_of_two_queues_says_so_and_keeps_its_data(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    """A guest of one processor uses one of them; both are negotiated, connected and closed."""
    pvf.start("-o max_queues=2 --all")
    with pvf.disk(lab.loop_disk(MIB), NAME) as backing:
        queues = compare(pvf, backing)["rings"]["queues"]
        assert queues == len(pvf.status(NAME)["statistics_queues"]) == 2
        guest.run(fio(NAME, bs="16k", depth=8, size="4M"), timeout=300)
        assert pvf.sha256(NAME) == backing.sha256()


@pytest.mark.long
def test_a_read_only_disk_shows_what_the_other_side_wrote_and_refuses_to_change_it(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.loop_disk(MIB)
    lab.dom0.run(f"dd if=/dev/urandom of={backing.device} bs=1M count={MIB} conv=fsync")
    before = backing.sha256()
    guest.block_attach(backing.spec(NAME, "r"))
    pvf.wait_served(NAME)
    assert compare(pvf, backing)["geometry"]["read_only"] is True
    assert guest.output(f"blockdev --getro {NODE}") == "1"
    refused = guest.run(f"dd if=/dev/zero of={NODE} bs=4k count=1 oflag=direct", check=False)
    assert not refused.ok
    assert pvf.sha256(NAME) == before
    pvf.detach(NAME)
    assert backing.sha256() == before
    backing.remove()


@pytest.mark.long
def test_a_disk_of_4096_byte_sectors_takes_no_smaller_request_and_a_file_system(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    with pvf.disk(lab.loop_disk(MIB, sector_size=4096), NAME) as backing:
        assert guest.output(f"blockdev --getss --getpbsz {NODE}").split() == ["4096", "4096"]
        small = f"dd if=/dev/zero of={NODE} bs=512 count=1 oflag=direct"
        assert "Invalid argument" in guest.run(small, check=False).stderr
        guest.run(
            f"mkfs.ext4 -q {NODE} && mkdir -p /mnt/{NAME} && mount {NODE} /mnt/{NAME} "
            f"&& cp -r /usr/lib/python3.11/json /mnt/{NAME} && umount /mnt/{NAME} "
            f"&& e2fsck -f -n {NODE}",
        )
        assert pvf.sha256(NAME) == backing.sha256()


@pytest.mark.parametrize("kind", [pytest.param("loop", marks=pytest.mark.long), "LVM"])
def test_a_disk_that_is_resized_under_a_file_system_is_so_for_its_users(
    pvf: Pvfront, guest: Guest, lab: Lab, kind: str
) -> None:
    backing = lab.loop_disk(16) if kind == "loop" else lab.volume(16, most=24)

    def size() -> int:
        # blkback looks at the size when it gets a request.
        guest.run(f"dd if={NODE} of=/dev/null bs=4k count=1 iflag=direct status=none")
        return int(guest.output(f"blockdev --getsize64 {NODE}"))

    with pvf.disk(backing, NAME):
        guest.run(
            f"mkfs.ext4 -q {NODE} 12m && mkdir -p /mnt/{NAME} && mount {NODE} /mnt/{NAME} "
            f"&& cp -r /usr/lib/python3.11/json /mnt/{NAME}",
        )
        for mib in (24, 12):
            backing.resize(mib)
            wait_until(f"{mib} MiB in the guest", lambda mib=mib: size() == mib << 20)
            wait_until(
                "its word of it",
                lambda mib=mib: pvf.state(NAME)["geometry"]["size"] == mib << 20,
            )
            compare(pvf, backing)
            if mib == 24:
                guest.run(f"resize2fs {NODE} && resize2fs -M {NODE} 2>&1 | grep -q on-line; true")
                used = guest.output(f"df --output=size -B1M /mnt/{NAME} | tail -1")
                assert int(used) > 14, "the file system did not grow"
                guest.run(
                    f"umount /mnt/{NAME} && e2fsck -f -p {NODE} && resize2fs {NODE} 12m "
                    f"&& mount {NODE} /mnt/{NAME}",
                )
        guest.run(
            f"diff -r /usr/lib/python3.11/json /mnt/{NAME}/json && umount /mnt/{NAME} "
            f"&& e2fsck -f -n {NODE}",
        )


@pytest.mark.long
def test_an_idle_disk_is_ejected_and_leaves_nothing(pvf: Pvfront, guest: Guest, lab: Lab) -> None:
    backing = lab.loop_disk(MIB)
    guest.block_attach(backing.spec(NAME))
    pvf.wait_served(NAME)
    worker, node = pvf.worker(NAME), guest.output(f"readlink -f {NODE}")
    guest.run("dmesg -C")
    guest.block_detach(NAME)
    wait_until("its end in the store", lambda: lab.vbd_state(guest, VDEV[NAME]) == (None, None))
    wait_until(
        "the end of node, link, state and worker",
        lambda: (
            guest.look(NODE, f"/proc/{worker}", f"/run/pvfront/vbd-{VDEV[NAME]}.json") == [None] * 3
        ),
    )
    wait_until("its device's end", lambda: not guest.run(f"lsblk {node}", check=False).ok)
    assert "error" not in guest.output("dmesg").lower()
    backing.remove()


@pytest.mark.pv  # xl gives an HVM guest no such disk while it runs
def test_a_cd_is_refused_for_what_it_is_and_left_to_the_kernel(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    backing = lab.loop_disk(MIB)
    guest.block_attach(f"{backing.spec('xvdc', 'r').replace('format', 'devtype=cdrom,format')}")
    why = "it is a cdrom, not a disk"
    refused = "/run/pvfront/refused-vbd.json"
    wait_until("the refusal", lambda: why in str(guest.look(refused)[0]))
    wait_until("the kernel's xvdc", lambda: guest.has("/dev/xvdc", "b"))
    (row,) = (row for row in pvf.list() if row["name"] == "xvdc")
    assert row["owner"] == "kernel"
    assert why in guest.output("pvfront status xvdc")
    guest.block_detach("xvdc")
    wait_until("its end in the guest", lambda: not guest.has("/dev/xvdc"))
    wait_until("its end in the store", lambda: lab.vbd_state(guest, VDEV["xvdc"]) == (None, None))
    backing.remove()
