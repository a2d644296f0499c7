# SPDX-License-Identifier: BSD-2-Clause
"""The host's toolstack: xl's disk syntax, libxl's nodes, libxl's detach."""

import asyncio
import os

import pytest
from waiting import PATIENCE, eventually

from pvfront.host import DiskSpec, DiskSpecError, Host, ToolstackError
from pvfront.xenstore import Permission

FRONT = "/local/domain/1/device/vbd/51728"
BACK = "/local/domain/0/backend/vbd/1/51728"


# -- xl-disk-configuration(5) ------------------------------------------------------------------

WHOLE = DiskSpec(target="/dev/vg/guest-volume", vdev=768)
CDROM = DiskSpec(target="/root/image.iso", vdev=5632, writable=False, cdrom=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the manual's own examples
        ("/dev/vg/guest-volume,,hda", WHOLE),
        ("/dev/vg/guest-volume,raw,hda,rw", WHOLE),
        ("format=raw, vdev=hda, access=rw, target=/dev/vg/guest-volume", WHOLE),
        ("/root/image.iso,,hdc,cdrom", CDROM),
        ("/root/image.iso,,hdc,,cdrom", CDROM),
        ("/root/image.iso,raw,hdc,devtype=cdrom", CDROM),
        ("format=raw, vdev=hdc, access=ro, devtype=cdrom, target=/root/image.iso", CDROM),
        # its rules
        ("vg/guest-volume,,hda", WHOLE),
        ("vdev=hda,target=/dev/vg/guest-volume  ", WHOLE),
        (",,hda,target=/dev/vg/guest-volume", WHOLE),
        ("vdev=hda,/dev/vg/guest-volume", WHOLE),
        ("/a,,xvdb,ro", DiskSpec("/a", 51728, writable=False)),
        ("/a,,xvdb,w", DiskSpec("/a", 51728)),
        ("/a,,hdc,w,cdrom", DiskSpec("/a", 5632, cdrom=True)),
        ("vdev=xvdb,target=/a,b=c, d", DiskSpec("/a,b=c, d", 51728)),
        ("/a,qcow2,xvdb", DiskSpec("/a", 51728, format="qcow2")),
        ("/a,,xvdb,no-discard", DiskSpec("/a", 51728, discard=False)),
        ("/a,,xvdb,discard,untrusted", DiskSpec("/a", 51728, trusted=False)),
        ("/a,,xvdb,direct-io-safe", DiskSpec("/a", 51728, direct_io_safe=True)),
        ("/a,,xvdb,backendtype=qdisk", DiskSpec("/a", 51728, backendtype="qdisk")),
        ("x,,xvdb,script=block-iscsi", DiskSpec("/dev/x", 51728, script="block-iscsi")),
        ("vdev=hdc,cdrom", DiskSpec("", 5632, writable=False, cdrom=True)),
        ("vdev=xvdb,target=memory:64M", DiskSpec("memory:64M", 51728)),
        ("/a,,d1p2", DiskSpec("/a", 51730)),
    ],
)
def test_a_disk_is_read_as_xl_reads_it(text, expected):
    assert DiskSpec.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "vdev is missing"),
        ("/a", "vdev is missing"),
        ("/a,raw,,rw", "vdev is missing"),
        ("/a,,xvd1b", "vdev=xvd1b is no virtual device"),
        ("vdev=xvdb", "target is missing"),
        ("/a,cow,xvdb", "format=cow is not one of raw, qcow"),
        ("/a,,xvdb,rx", "access=rx is not one of"),
        ("/a,,xvdb,,floppy", "'floppy' is neither a flag nor key=value"),
        ("/a,,xvdb,vdev=xvdc", "vdev is given twice"),
        ("target=/a", "vdev is missing"),
        ("/a,,xvdb,target=/b", "target is given twice"),
        ("/a,,xvdb,colour=blue", "colour is no parameter"),
        ("/a,,xvdb,devtype=floppy", "devtype=floppy is not one of cdrom"),
        ("/a,,xvdb,backendtype=tap", "backendtype=tap is not one of"),
        ("/a,qcow2,xvdb,backendtype=phy", "backendtype=phy takes format=raw only"),
        ("/a,,xvdb,specification=virtio", "specification=virtio"),
        ("/a,,xvdb,backend=storage", "there is domain 0 only"),
        ("/a,,xvdb,trusted,untrusted", "trusted is given twice"),
        ("vdev=xvdb,target=memory:lots", "target=memory:lots: 'lots' is no size"),
        ("memory:0,,xvdb", "target=memory:0: '0' is not in 1..2^63-1 bytes"),
        ("vdev=xvdb,target=memory:8M,access=ro", "put it last"),
        ("raw:/a,xvdb,w", "the prefix raw: is deprecated"),
        ("phy:/dev/sda,xvdb,w", "the prefix phy: is deprecated"),
    ],
)
def test_what_is_wrong_with_a_disk_is_named(text, wrong):
    with pytest.raises(DiskSpecError) as caught:
        DiskSpec.parse(text)
    assert wrong in str(caught.value)
    assert "\n" not in str(caught.value)


# -- nodes -------------------------------------------------------------------------------------


@pytest.fixture
async def host():
    async with await Host.start() as started:
        await started.create_domain()
        yield started


async def nodes(host, path):
    return {
        name: await host.store.read(f"{path}/{name}") for name in await host.store.directory(path)
    }


async def test_both_ends_of_a_disk_are_written_as_libxl_does(host, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"")
    assert await host.attach_disk(1, f"{image},raw,xvdb,ro") == 51728
    assert await nodes(host, FRONT) == {
        "backend": BACK,
        "backend-id": "0",
        "state": "1",
        "virtual-device": "51728",
        "device-type": "disk",
        "trusted": "1",
    }
    assert await nodes(host, BACK) == {
        "frontend": FRONT,
        "frontend-id": "1",
        "online": "1",
        "state": "1",
        "removable": "0",
        "bootable": "1",
        "dev": "xvdb",
        "type": "qdisk",
        "mode": "r",
        "device-type": "disk",
        "discard-enable": "1",
        "specification": "xen",
        "params": f"aio:{image}",
    }
    assert await host.store.get_permissions(f"{FRONT}/state") == [
        Permission(1),
        Permission(0, read=True),
    ]
    assert await host.store.get_permissions(f"{BACK}/state") == [
        Permission(0),
        Permission(1, read=True),
    ]


async def test_a_disk_appears_in_one_step(host):
    """Whoever sees one end sees all of both."""
    async with host.store.watch("/local/domain/0/backend") as watch:
        await asyncio.wait_for(anext(watch), PATIENCE)
        attaching = asyncio.create_task(host.attach_disk(1, "vdev=xvdb,target=memory:1M"))
        await asyncio.wait_for(anext(watch), PATIENCE)
        assert len(await nodes(host, BACK)) == 13
        assert len(await nodes(host, FRONT)) == 6
        await attaching


async def test_a_domain_is_made_once_and_keeps_what_it_has(host):
    await host.store.write("/local/domain/1/data/x", "1")
    await host.create_domain()
    assert await host.store.read("/local/domain/1/data/x") == "1"
    assert await host.store.read("/local/domain/1/name") == "guest"
    assert await host.store.read("/local/domain/0/name") == "Domain-0"
    assert (await host.store.get_permissions("/local/domain/1/data"))[0] == Permission(1)
    assert await host.store.get_permissions("/local/domain/1/name") == [
        Permission(0),
        Permission(1, read=True),
    ]


async def test_a_second_disk_of_the_same_name_is_refused(host):
    await host.attach_disk(1, "vdev=xvdb,target=memory:1M")
    with pytest.raises(ToolstackError, match="has a disk xvdb already"):
        await host.attach_disk(1, "vdev=xvdb,target=memory:1M")
    await host.attach_disk(1, "vdev=xvdc,target=memory:1M")


async def test_a_disk_for_a_domain_that_there_is_not_is_refused(host):
    with pytest.raises(ToolstackError, match="no domain 5"):
        await host.attach_disk(5, "vdev=xvdb,target=memory:1M")


# -- detach ------------------------------------------------------------------------------------


async def backend_that_follows(host, states):
    """Answers Closing with `states`, as a backend would."""
    async with host.store.watch(f"{BACK}/state") as watch:
        async for _ in watch:
            if await host.store.read(f"{BACK}/state") == "5":
                assert await host.store.read(f"{BACK}/online") == "0"
                for state in states:
                    await host.store.write(f"{BACK}/state", state)
                return


async def test_a_detached_disk_leaves_no_node(host):
    await host.attach_disk(1, "vdev=xvdb,target=memory:1M")
    backend = asyncio.create_task(backend_that_follows(host, ["6"]))
    await asyncio.wait_for(host.detach_disk(1, 51728), PATIENCE)
    await backend
    assert await host.store.directory("/local/domain/1/device") == []
    assert await host.store.directory("/local/domain/0/backend") == []
    await host.attach_disk(1, "vdev=xvdb,target=memory:1M")


async def test_the_nodes_of_other_disks_stay(host):
    for vdev in ("xvdb", "xvdc"):
        await host.attach_disk(1, f"vdev={vdev},target=memory:1M")
    await host.store.write(f"{BACK}/state", "6")
    await host.detach_disk(1, 51728)
    assert await host.store.directory("/local/domain/1/device/vbd") == ["51744"]
    assert await host.store.directory("/local/domain/0/backend/vbd/1") == ["51744"]


async def test_a_disk_in_use_stays_and_the_error_says_who_is_stuck(host):
    await host.attach_disk(1, "vdev=xvdb,target=memory:1M")
    await host.store.write(f"{FRONT}/state", "4")
    with pytest.raises(ToolstackError, match="xvdb of domain 1 was not released") as caught:
        await host.detach_disk(1, 51728, timeout=0.2)
    assert "frontend Connected (4), backend Closing (5)" in str(caught.value)
    assert await host.store.read(f"{FRONT}/state") == "4"


async def test_force_takes_the_frontends_nodes_at_once_and_gives_the_backend_its_time(host):
    await host.attach_disk(1, "vdev=xvdb,target=memory:1M")
    await host.store.write(f"{FRONT}/state", "4")
    detaching = asyncio.create_task(host.detach_disk(1, 51728, force=True, timeout=2 * PATIENCE))

    async def gone():
        return await host.store.read_opt(FRONT) is None

    await eventually("the end of the frontend's nodes", gone)
    assert not detaching.done()
    await host.store.write(f"{BACK}/state", "6")
    await asyncio.wait_for(detaching, PATIENCE)
    assert await host.store.read_opt(BACK) is None


async def test_force_takes_a_disk_from_under_both_ends_that_do_not_follow(host):
    await host.attach_disk(1, "vdev=xvdb,target=memory:1M")
    await host.store.write(f"{FRONT}/state", "4")
    await host.detach_disk(1, 51728, force=True, timeout=0.2)
    assert await host.store.read_opt(FRONT) is None
    assert await host.store.read_opt(BACK) is None


async def test_detaching_what_is_not_there_is_an_error(host):
    with pytest.raises(ToolstackError, match="has no disk xvdb"):
        await host.detach_disk(1, 51728)


async def test_a_block_device_goes_to_phy_with_its_numbers(host):
    if not os.path.exists("/dev/loop0"):  # noqa: ASYNC240, PTH110
        pytest.skip("needs a block device, /dev/loop0")
    await host.attach_disk(1, "/dev/loop0,,xvdb,ro")
    found = await nodes(host, BACK)
    assert (found["type"], found["params"]) == ("phy", "/dev/loop0")
    assert found["physical-device"] == "7:0"
