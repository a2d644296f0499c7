# SPDX-License-Identifier: BSD-2-Clause
"""The nbd target against a model of the kernel's driver (drivers/block/nbd.c) on real sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nbdkernel import FakeDevice, FakeKernel, Worker, dead
from waiting import PATIENCE, eventually

from pvfront.blkfront import nbd, target
from pvfront.blkfront.features import DiskGeometry
from pvfront.blkfront.target import NbdSettings, NbdTarget, TargetError
from pvfront.sysfs import Roots

ID = "pvfront:vbd-51728"
DISK = DiskGeometry(sectors=131072, flush=True, discard=True)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernel]:
    roots = Roots(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "sys/class/block").mkdir(parents=True)
    (tmp_path / "sys/block").mkdir()
    made = FakeKernel(roots)
    monkeypatch.setattr(target.nbd, "NbdControl", made.control)
    yield made
    for each in made.devices.values():
        each.drop()
    for worker in made.workers:
        worker.die()


def disk(kernel: FakeKernel) -> NbdTarget:
    return NbdTarget(ID, "xvdb", roots=kernel.roots)


async def serve(
    kernel: FakeKernel, geometry: DiskGeometry = DISK, *, queues: int = 1
) -> tuple[NbdTarget, Worker]:
    """A disk and the worker that serves it."""
    disk_target = disk(kernel)
    worker = kernel.worker(await disk_target.attach(geometry, queues=queues))
    await disk_target.publish(geometry)
    return disk_target, worker


def device(kernel: FakeKernel, index: int = 0) -> FakeDevice:
    return kernel.devices[index]


async def test_a_new_device_accepts_no_request_before_the_worker_serves(
    kernel: FakeKernel,
) -> None:
    disk_target = disk(kernel)
    kernel.worker(await disk_target.attach(DISK))
    assert device(kernel).get("size") == "0"
    assert kernel.log == ["connect size=0 forever=True"]
    await disk_target.publish(DISK)
    assert device(kernel).get("size") == "131072"


async def test_the_queue_is_set_up_before_the_first_request(kernel: FakeKernel) -> None:
    settings = NbdSettings(io_timeout_ms=3000, max_sectors_kb=512)
    disk_target = NbdTarget(ID, "xvdb", settings=settings, roots=kernel.roots)
    kernel.worker(await disk_target.attach(DISK))
    assert device(kernel).get("queue/io_timeout") == "3000"
    assert device(kernel).get("queue/max_sectors_kb") == "512"
    assert device(kernel).get("queue/scheduler") == "none"


async def test_the_two_ends_are_connected(kernel: FakeKernel) -> None:
    worker = kernel.worker(await disk(kernel).attach(DISK))
    held = device(kernel).held
    held.sendall(b"request")
    assert worker.sock.recv(100) == b"request"


@pytest.mark.parametrize(
    ("geometry", "flags"),
    [
        (DiskGeometry(8), 0),
        (DiskGeometry(8, read_only=True), nbd.FLAG_READ_ONLY),
        (DiskGeometry(8, flush=True), nbd.FLAG_SEND_FLUSH),
        (DiskGeometry(8, discard=True), nbd.FLAG_SEND_TRIM),
    ],
)
async def test_only_what_the_backend_has_is_offered(
    kernel: FakeKernel, geometry: DiskGeometry, flags: int
) -> None:
    kernel.worker(await disk(kernel).attach(geometry))
    assert device(kernel).flags == flags


async def test_the_link_names_the_device_and_nothing_else_is_left(kernel: FakeKernel) -> None:
    disk_target, _ = await serve(kernel)
    link = kernel.roots.dev / "pvfront/xvdb"
    assert disk_target.link == str(link)
    assert str(link.readlink()) == "../nbd0"
    assert [path.name for path in link.parent.iterdir()] == ["xvdb"]


async def test_a_dead_socket_is_replaced_without_touching_the_size(kernel: FakeKernel) -> None:
    disk_target, first = await serve(kernel)
    first.die()
    kernel.log.clear()
    second = kernel.worker(await disk_target.attach(DISK))
    await disk_target.publish(DISK)
    assert kernel.log == ["reconfigure sockets=1 size=None forever"]
    assert not second.hung_up()


async def test_requests_that_nobody_will_serve_fail_in_time_until_somebody_does(
    kernel: FakeKernel,
) -> None:
    disk_target, worker = await serve(kernel)
    kernel.log.clear()
    await disk_target.fail_after(10.0)
    assert kernel.log == ["reconfigure sockets=0 size=None dead=10"]
    assert not worker.hung_up()
    worker.die()
    kernel.worker(await disk_target.attach(DISK))
    assert kernel.log[-1] == "reconfigure sockets=1 size=None forever"


async def test_a_socket_that_the_kernel_dropped_is_never_handed_out(kernel: FakeKernel) -> None:
    disk_target, first = await serve(kernel)
    first.die()
    kernel.notices_late = 2
    kernel.log.clear()
    second = kernel.worker(await disk_target.attach(DISK))
    assert len(kernel.log) == 3
    assert not second.hung_up()


async def test_a_kernel_that_keeps_a_living_socket_is_an_error_after_the_deadline(
    kernel: FakeKernel,
) -> None:
    disk_target = disk(kernel)
    worker = kernel.worker(await disk_target.attach(DISK))
    with pytest.raises(TargetError, match="nbd0: the kernel did not let go"):
        await disk_target.attach(DISK, deadline=0.1)
    assert not worker.hung_up()


async def test_a_device_that_somebody_disconnected_is_replaced_by_a_new_one(
    kernel: FakeKernel,
) -> None:
    disk_target, first = await serve(kernel)
    kernel.still_open = True
    kernel.control(kernel.roots).disconnect(0)
    kernel.worker(await disk_target.attach(DISK))
    await disk_target.publish(DISK)
    assert disk_target.name == "nbd1"
    assert str((kernel.roots.dev / "pvfront/xvdb").readlink()) == "../nbd1"
    first.die()


async def test_each_queue_has_a_socket_and_the_flag_that_allows_it(
    kernel: FakeKernel,
) -> None:
    disk_target = disk(kernel)
    assert disk_target.max_queues == 16
    worker = kernel.worker(await disk_target.attach(DISK, queues=3))
    assert device(kernel).flags & nbd.FLAG_CAN_MULTI_CONN
    assert len(worker.socks) == len(device(kernel).socks) == 3
    for theirs, ours in zip(device(kernel).socks, worker.socks, strict=True):
        theirs.sendall(b"request")
        assert ours.recv(100) == b"request"


async def test_several_sockets_are_not_lost_to_a_slow_backend(
    kernel: FakeKernel,
) -> None:
    kernel.worker(await disk(kernel).attach(DISK, queues=2))
    assert device(kernel).get("queue/io_timeout") == "30000"


async def test_one_socket_needs_no_flag_and_replays_soon(kernel: FakeKernel) -> None:
    kernel.worker(await disk(kernel).attach(DISK, queues=1))
    assert not device(kernel).flags & nbd.FLAG_CAN_MULTI_CONN
    assert device(kernel).get("queue/io_timeout") == "2000"


async def test_a_device_has_the_queues_of_its_first_connect(
    kernel: FakeKernel,
) -> None:
    kernel.worker(await disk(kernel).attach(DISK, queues=2))
    assert disk(kernel).max_queues == 2, "by its identifier, adopted or not"


async def test_fewer_queues_replace_as_many_dead_sockets(kernel: FakeKernel) -> None:
    disk_target, first = await serve(kernel, queues=3)
    first.die()
    second = kernel.worker(await disk_target.attach(DISK, queues=2))
    assert len(second.socks) == 2
    assert not second.hung_up()
    assert [dead(sock) for sock in device(kernel).socks] == [False, False, True]
    second.die()
    third = kernel.worker(await disk_target.attach(DISK, queues=3))
    assert not third.hung_up()


async def test_sockets_that_the_kernel_lets_go_of_late_are_replaced_one_by_one(
    kernel: FakeKernel,
) -> None:
    disk_target, first = await serve(kernel, queues=3)
    first.socks[0].close()
    attaching = asyncio.create_task(disk_target.attach(DISK, queues=3))
    await eventually("another socket", lambda: not dead(device(kernel).socks[0]))
    assert not attaching.done()
    first.die()
    second = kernel.worker(await attaching)
    assert not second.hung_up()
    assert len(second.socks) == 3


async def test_what_nbd_cannot_carry_is_there_for_udev_before_the_size(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rich = DiskGeometry(
        131072,
        physical_sector_size=4096,
        removable=True,
        discard=True,
        discard_granularity=65536,
        discard_alignment=512,
    )
    disk_target = disk(kernel)
    kernel.worker(await disk_target.attach(rich))
    file = kernel.roots.run / "udev/nbd0"
    resized = FakeDevice.resize

    def resize(self: FakeDevice, size: int, block_size: int | None) -> None:
        assert file.exists()
        resized(self, size, block_size)

    monkeypatch.setattr(FakeDevice, "resize", resize)
    await disk_target.publish(rich)
    assert dict(line.split("=") for line in file.read_text().splitlines()) == {
        "PVFRONT_NAME": "xvdb",
        "PVFRONT_SERIAL": "vbd-51728",
        "PVFRONT_PHYSICAL_BLOCK_SIZE": "4096",
        "PVFRONT_REMOVABLE": "1",
        "PVFRONT_DISCARD_GRANULARITY": "65536",
        "PVFRONT_DISCARD_ALIGNMENT": "512",
    }
    await disk_target.close()
    assert not file.exists()


async def test_udev_looks_again_when_only_such_properties_have_changed(
    kernel: FakeKernel,
) -> None:
    disk_target, _ = await serve(kernel)
    assert device(kernel).get("uevent") == ""
    await disk_target.publish(replace(DISK, physical_sector_size=4096))
    assert device(kernel).get("uevent") == "change"


async def test_a_later_supervisor_adopts_the_device_by_its_identifier(kernel: FakeKernel) -> None:
    await serve(kernel)
    other = NbdTarget("pvfront:vbd-51744", "xvdc", roots=kernel.roots)
    assert not await other.adopt()
    later = disk(kernel)
    assert await later.adopt()
    assert later.name == "nbd0"


async def test_of_several_devices_the_linked_one_is_adopted(kernel: FakeKernel) -> None:
    await serve(kernel)
    forgotten = NbdTarget(ID, "other", roots=kernel.roots)
    kernel.worker(await forgotten._attach_new(DISK))
    await forgotten.publish(DISK)
    later = disk(kernel)
    assert await later.adopt()
    assert later.name == "nbd0"


async def test_a_device_that_was_never_published_is_ended_by_the_next_supervisor(
    kernel: FakeKernel,
) -> None:
    kernel.worker(await disk(kernel).attach(DISK))
    assert not await disk(kernel).adopt()
    assert kernel.devices == {}


async def test_a_lost_feature_is_taken_away_and_stays_away_over_a_resize(
    kernel: FakeKernel,
) -> None:
    disk_target, _ = await serve(kernel)
    await disk_target.feature_off("flush")
    await disk_target.feature_off("discard")
    assert device(kernel).get("queue/write_cache") == "write through"
    assert device(kernel).get("queue/discard_max_bytes") == "0"
    await disk_target.publish(DiskGeometry(262144, flush=True, discard=True))
    assert device(kernel).get("size") == "262144"
    assert device(kernel).get("queue/discard_max_bytes") == "0"


async def test_a_feature_taken_away_stays_away_after_adoption(kernel: FakeKernel) -> None:
    disk_target, _ = await serve(kernel)
    await disk_target.feature_off("discard")
    later = disk(kernel)
    await later.adopt()
    await later.publish(DiskGeometry(262144, flush=True, discard=True))
    assert device(kernel).get("queue/discard_max_bytes") == "0"
    assert device(kernel).get("queue/write_cache") == "write back"


async def test_a_feature_that_a_new_backend_lacks_is_taken_away(kernel: FakeKernel) -> None:
    disk_target, _ = await serve(kernel)
    await disk_target.publish(DiskGeometry(131072))
    assert device(kernel).get("queue/write_cache") == "write through"
    assert device(kernel).get("queue/discard_max_bytes") == "0"


async def test_an_unchanged_disk_is_not_configured_again(kernel: FakeKernel) -> None:
    disk_target, _ = await serve(kernel)
    kernel.log.clear()
    await disk_target.publish(DISK)
    assert kernel.log == []


async def test_another_sector_size_on_a_connected_disk_is_refused(kernel: FakeKernel) -> None:
    disk_target, _ = await serve(kernel)
    with pytest.raises(TargetError, match="from 512 to 4096"):
        await disk_target.publish(DiskGeometry(131072, sector_size=4096))


async def test_publishing_what_was_never_attached_is_refused(kernel: FakeKernel) -> None:
    with pytest.raises(TargetError, match="no device yet"):
        await disk(kernel).publish(DISK)


async def test_close_refuses_requests_first_then_disconnects_and_removes_the_link(
    kernel: FakeKernel,
) -> None:
    disk_target, worker = await serve(kernel)
    kernel.log.clear()
    await disk_target.close()
    assert kernel.log == [
        "reconfigure sockets=1 size=None dead=1",  # for a dead worker's place; this one lives
        "reconfigure sockets=0 size=0",
        "disconnect",
    ]
    assert not (kernel.roots.dev / "pvfront").exists()
    assert kernel.devices == {}
    assert disk_target.name == ""
    assert worker.hung_up()


async def test_close_waits_for_requests_in_flight(kernel: FakeKernel) -> None:
    disk_target, _ = await serve(kernel)
    device(kernel).put("inflight", "       1        3")
    assert disk_target.in_flight() == 4
    closing = asyncio.create_task(disk_target.close(drain=30))
    await eventually("a device of no size", lambda: kernel.log[-1].endswith("size=0"))
    assert not closing.done()
    device(kernel).put("inflight", "       0        0")
    await closing
    assert kernel.log[-1] == "disconnect"


async def test_what_waits_for_a_worker_that_will_not_come_fails_before_the_disconnect(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resize and a disconnect would wait for what waits for a connection."""
    monkeypatch.setattr(target, "_REFUSED", PATIENCE)
    disk_target, worker = await serve(kernel)
    worker.die()
    device(kernel).put("inflight", "       0        1")  # with its request timer, it comes
    kernel.log.clear()
    closing = asyncio.create_task(disk_target.close(drain=0))
    await eventually(
        "another socket, and the size",
        lambda: (
            kernel.log == ["reconfigure sockets=1 size=None dead=1", "reconfigure sockets=0 size=0"]
        ),
    )
    await eventually("a living one", lambda: not dead(device(kernel).held))
    waiting = device(kernel).held
    waiting.settimeout(PATIENCE)
    await asyncio.to_thread(waiting.sendall, bytes.fromhex("2560951300000000") + bytes(20))
    reply = await asyncio.to_thread(waiting.recv, 16)
    assert reply[:8] == bytes.fromhex("6744669800000005"), "an I/O error"
    assert not closing.done()
    device(kernel).put("inflight", "       0        0")
    await closing
    assert kernel.log[-1] == "disconnect"
    assert kernel.devices == {}


async def test_close_does_not_wait_longer_than_asked(kernel: FakeKernel) -> None:
    disk_target = disk(kernel)
    kernel.worker(await disk_target.attach(DISK))
    device(kernel).put("inflight", "       0        1")
    await disk_target.close(drain=0.1)
    assert kernel.devices == {}


async def test_closing_twice_or_what_never_was_is_harmless(kernel: FakeKernel) -> None:
    disk_target = disk(kernel)
    await disk_target.close()
    kernel.worker(await disk_target.attach(DISK))
    await disk_target.close()
    await disk_target.close()


async def test_a_worker_that_does_not_read_makes_close_an_error_in_time(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_target = disk(kernel)
    kernel.worker(await disk_target.attach(DISK))
    command = target._command

    async def impatient(work: Callable[[], Any], what: str) -> Any:
        if what == "nbd disconnect":  # not with those before it, which only a busy machine delays
            monkeypatch.setattr(target, "_COMMAND_DEADLINE", 0.1)
        return await command(work, what)

    monkeypatch.setattr(target, "_command", impatient)
    kernel.disconnect_blocks = threading.Event()
    with pytest.raises(TargetError, match="nbd disconnect did not end"):
        await disk_target.close(drain=0)
    kernel.disconnect_blocks.set()


async def test_a_device_that_stays_open_is_let_go_of(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_LAST_CLOSE", 0.1)
    disk_target, _ = await serve(kernel)
    kernel.still_open = True
    await disk_target.close()
    assert disk_target.name == ""
    kernel.worker(await disk_target.attach(DISK))
    assert disk_target.name == "nbd1"


async def test_a_cancelled_attach_leaves_nothing_that_stops_the_next(kernel: FakeKernel) -> None:
    disk_target = disk(kernel)
    first = asyncio.create_task(disk_target.attach(DISK))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    worker = kernel.worker(await disk_target.attach(DISK))
    await disk_target.publish(DISK)
    assert not worker.hung_up()


async def test_busy_without_a_device_is_nobody(kernel: FakeKernel) -> None:
    assert disk(kernel).busy() is None
    assert disk(kernel).in_flight() == 0


async def test_a_command_that_hangs_is_a_target_error_with_a_hint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(target, "_COMMAND_DEADLINE", 0.05)
    release = threading.Event()
    with pytest.raises(TargetError, match="nbd resize did not end within") as caught:
        await target._command(release.wait, "nbd resize")
    release.set()
    assert "does not read" in str(caught.value.hint)
