# SPDX-License-Identifier: BSD-2-Clause
"""A disk on a socket: the real worker, and clients that nobody here wrote.

Around it tests/support/diskworld.py; the loop of device.py is `follow`, as far as it matters here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from diskworld import (
    SECTORS,
    Refusing,
    World,
    end,
)
from embedded import Nbd
from waiting import PATIENCE, eventually

from pvfront import workerprogram
from pvfront.blkfront.frontend import DiskFrontend
from pvfront.blkfront.nbdexport import SocketTarget
from pvfront.states import XenbusState
from pvfront.workermessage import State

SIZE = SECTORS * 512


class SocketWorld(World):
    """A world whose disk is exported on a socket."""

    connected = False

    def frontend(self) -> DiskFrontend:
        self.target = SocketTarget("xvdb", self.run_dir)
        self.poked = asyncio.Event()
        made = super().frontend()
        made.on_poke(self.poked.set)
        return made

    async def follow(self) -> None:
        """What `DeviceLoop` does while Connected."""
        while True:
            self.poked.clear()
            if self.connected and self.disk.pending and self.disk.trouble is None:
                await self.disk.update(self.device)
            await self.poked.wait()

    async def running(self) -> DiskFrontend:
        await super().running()
        self.connected = True
        return self.disk

    async def leave(self, *, drained: bool = False) -> None:
        """The backend is away: the generation ends."""
        self.connected = False
        if drained:
            assert await self.disk.quiesce(PATIENCE)
        await self.disk.detach(keep_target=drained)

    def connect(self) -> Nbd:
        """A client in transmission, by EXPORT_NAME. Blocks: from a thread."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(self.target.link)
            sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
            client = Nbd(sock)
            client.exactly(18 + 10)
        except BaseException:
            sock.close()
            raise
        return client

    async def client(self) -> Nbd:
        return await asyncio.to_thread(self.connect)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SocketWorld]:
    monkeypatch.setattr(workerprogram, "USER", "nobody")
    made = SocketWorld(tmp_path)
    following = asyncio.create_task(made.follow())
    try:
        await made.running()
        yield made
    finally:  # also if the start failed: a worker outlives whoever started it
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
        await end(made)
        await made.target.close()


async def run(*command: str, status: int = 0) -> str:
    """stdout of a tool; skips where it is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (tools/apt-packages.txt)")
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await asyncio.wait_for(process.communicate(), 5 * PATIENCE)
    assert process.returncode == status, f"{command}: {process.returncode}\n{out!r}\n{errors!r}"
    return (out if status == 0 else errors).decode()


# -- tools that nobody here wrote ------------------------------------------------------------------


async def test_nbdinfo_reads_what_the_disk_is(world: SocketWorld) -> None:
    found = json.loads(await run("nbdinfo", "--json", world.target.path))
    assert found["protocol"] == "newstyle-fixed"
    (export,) = found["exports"]
    assert export["export-size"] == SIZE
    assert export["is_read_only"] is False
    assert (export["can_flush"], export["can_fua"], export["can_trim"]) == (True, True, True)
    assert (export["can_multi_conn"], export["can_zero"]) == (False, False)
    assert (export["block_size_minimum"], export["block_size_preferred"]) == (512, 4096)
    assert export["block_size_maximum"] == 32 << 20
    assert "xvdb" in export["description"]


async def test_nbdinfo_lists_the_one_export(world: SocketWorld) -> None:
    found = json.loads(await run("nbdinfo", "--json", "--list", world.target.path))
    assert [export["export-name"] for export in found["exports"]] == ["xvdb"]
    assert found["exports"][0]["export-size"] == SIZE


async def test_nbdcopy_there_and_back_again(world: SocketWorld, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_bytes(os.urandom(SIZE))
    await run("nbdcopy", "--flush", str(before), world.target.path)
    assert bytes(world.host.disk[:SIZE]) == before.read_bytes()
    await run("nbdcopy", world.target.path, str(after))
    assert after.read_bytes() == before.read_bytes()
    assert world.disk.generation == 1, "clients come and go within one generation"
    assert world.disk.trouble is None


async def test_qemu_io_writes_reads_flushes_and_discards(world: SocketWorld) -> None:
    out = await run(
        "qemu-io", "-f", "raw", "-c", "write -P 0x5a 4096 65536", "-c", "write -f -P 0x66 512 512",
        "-c", "flush", "-c", "read -P 0x5a 4096 65536", "-c", "discard 4096 4096",
        "-c", "read -P 0x66 512 512", world.target.path,
    )  # fmt: skip
    assert "verification failed" not in out
    assert world.host.disk[512:1024] == b"\x66" * 512
    assert world.host.disk[8192:8704] == b"\x5a" * 512
    assert world.host.disk[4096:8192] == bytes(4096)
    assert any(request.op == 3 for request in world.backend.log), "a flush reached the backend"


async def test_qemu_img_compares_the_disk_with_a_file(world: SocketWorld, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(SIZE))
    world.host.disk[:SIZE] = image.read_bytes()
    out = await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), world.target.path)
    assert "Images are identical" in out


async def test_fio_verifies_what_it_has_written(world: SocketWorld) -> None:
    if "nbd" not in await run("fio", "--enghelp"):
        pytest.skip("this fio has no nbd engine")
    await run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={world.target.path}", "--rw=randwrite",
        "--bsrange=512-16k", "--iodepth=16", "--size=512k", "--verify=crc32c",
        "--verify_fatal=1", "--verify_state_save=0",
    )  # fmt: skip


async def test_an_unknown_export_is_refused(world: SocketWorld) -> None:
    uri = world.target.path.replace("unix:///", "unix:///xvdc")
    assert "No such file or directory for export: xvdc" in await run("nbdinfo", uri, status=1)


async def test_a_read_only_disk_is_told_to_be_and_refuses_writes(
    world: SocketWorld, tmp_path: Path
) -> None:
    await world.leave()
    world.device.keys["mode"] = "r"
    await world.running()
    found = json.loads(await run("nbdinfo", "--json", world.target.path))
    assert found["exports"][0]["is_read_only"] is True
    (tmp_path / "x").write_bytes(bytes(SIZE))
    await run("nbdcopy", str(tmp_path / "x"), world.target.path, status=1)


# -- clients come and go ---------------------------------------------------------------------------


async def test_a_client_that_leaves_is_no_trouble_and_the_next_finds_its_data(
    world: SocketWorld,
) -> None:
    for round_ in range(3):
        client = await world.client()
        await asyncio.to_thread(client.write, 512 * round_, bytes([65 + round_]) * 512)
        await eventually("served", lambda: world.disk.busy())
        client.sock.close()
    await eventually("nobody connected", lambda: world.disk.busy() is None)
    assert world.host.disk[:1536] == b"A" * 512 + b"B" * 512 + b"C" * 512
    assert (world.disk.generation, world.disk.trouble) == (1, None)


async def test_the_next_client_is_served_when_the_formers_requests_have_left_the_ring(
    world: SocketWorld,
) -> None:
    first = await world.client()
    await eventually("served", lambda: world.disk.busy())
    world.backend.hold = True
    first.request(Nbd.WRITE, 0, 512, b"1" * 512)
    await eventually("the write in the ring", lambda: world.backend.held)
    first.sock.close()
    second = await world.client()
    handle = second.request(Nbd.READ, 0, 512)
    await eventually("it waits", lambda: world.target.waiting)
    assert len(world.backend.held) == 1
    world.backend.release()
    await asyncio.to_thread(second.check, handle)
    assert second.exactly(512) == b"1" * 512
    second.sock.close()


async def test_a_client_s_requests_are_in_flight_until_they_are_answered(
    world: SocketWorld,
) -> None:
    """What a suspend waits for before it closes the disk."""
    disk = world.disk
    client = await world.client()
    assert world.backend is not None
    assert disk.in_flight() == 0
    world.backend.hold = True
    handles = [client.request(Nbd.WRITE, 4096 * i, 4096, bytes(4096)) for i in range(3)]
    await eventually("three requests in flight", lambda: disk.in_flight() == 3)
    world.backend.release()
    for _ in handles:
        await asyncio.to_thread(client.reply)
    await eventually("none in flight", lambda: disk.in_flight() == 0)
    client.sock.close()


async def test_a_resize_is_seen_by_the_next_client_and_status_says_so(world: SocketWorld) -> None:
    client = await world.client()
    await eventually("served", lambda: world.disk.details()["client"].get("size") == SIZE)
    world.device.keys["sectors"] = str(2 * SECTORS)
    await world.disk.update(world.device)
    shown = world.disk.details()
    assert shown["geometry"]["size"] == 2 * SIZE
    assert shown["client"]["size"] == SIZE
    assert "next client" in shown["client"]["note"]
    await asyncio.to_thread(client.write, SIZE - 512, b"e" * 512)
    client.sock.close()
    assert (await run("nbdinfo", "--size", world.target.path)).strip() == str(2 * SIZE)


async def test_a_client_stays_connected_over_a_generation_that_ended_drained(
    world: SocketWorld,
) -> None:
    client = await world.client()
    await asyncio.to_thread(client.write, 0, b"1" * 512)
    await world.leave(drained=True)
    await world.running()
    assert world.disk.generation == 2
    assert await asyncio.to_thread(client.read, 0, 512) == b"1" * 512
    client.sock.close()


async def test_a_client_with_nothing_under_way_stays_and_one_with_requests_is_cut_off(
    world: SocketWorld,
) -> None:
    client = await world.client()
    await asyncio.to_thread(client.write, 0, b"1" * 512)
    await world.leave()
    await world.running()
    assert await asyncio.to_thread(client.read, 0, 512) == b"1" * 512
    world.backend.hold = True
    client.request(Nbd.WRITE, 0, 512, b"2" * 512)
    await eventually("the write in the ring", lambda: world.backend.held)
    await world.leave()
    with pytest.raises(ConnectionError):
        await asyncio.to_thread(client.exactly, 1)
    client.sock.close()
    assert world.disk.busy() is None
    await world.running()
    second = await world.client()
    assert await asyncio.to_thread(second.read, 0, 512) == b"1" * 512
    second.sock.close()


async def test_a_client_of_a_worker_that_cannot_be_adopted_goes_on_with_the_next_generation(
    world: SocketWorld,
) -> None:
    client = await world.client()
    await asyncio.to_thread(client.write, 0, b"1" * 512)
    await world.target.close()
    world.disk._forget()  # it does not end its worker
    later = world.disk = world.frontend()
    connected = world.device.view
    world.device.view = replace(connected, backend=XenbusState.CLOSED)
    assert not await later.adopt(world.device)
    world.device.view = connected
    await world.running()
    assert later.generation == 2
    assert later.busy() is not None
    assert await asyncio.to_thread(client.read, 0, 512) == b"1" * 512
    client.sock.close()


async def test_a_client_that_comes_while_the_backend_is_away_is_served_with_the_next_generation(
    world: SocketWorld,
) -> None:
    await world.leave()
    client = await world.client()
    client.request(Nbd.WRITE, 0, 512, b"w" * 512)
    await eventually("it waits", lambda: world.target.waiting)
    assert world.disk.busy() is None
    await world.running()
    assert await asyncio.to_thread(client.reply) == ((1).to_bytes(8, "little"), 0)
    client.sock.close()


async def test_the_death_of_the_worker_ends_its_client_and_the_next_one_is_served(
    world: SocketWorld,
) -> None:
    client = await world.client()
    await asyncio.to_thread(client.write, 0, b"1" * 512)
    world.disk._need_worker().kill()
    await eventually("trouble", lambda: world.disk.trouble is not None)
    with pytest.raises(ConnectionError):
        await asyncio.to_thread(client.exactly, 1)
    client.sock.close()
    await world.leave()
    assert world.disk.busy() is None
    await world.running()
    second = await world.client()
    assert await asyncio.to_thread(second.read, 0, 512) == b"1" * 512
    second.sock.close()


async def test_a_client_that_breaks_the_protocol_is_said_to_and_is_no_trouble(
    world: SocketWorld, caplog: pytest.LogCaptureFixture
) -> None:
    client = await world.client()
    await eventually("served", lambda: world.disk.busy())
    client.sock.sendall(b"x" * 100)
    await eventually("it is gone", lambda: world.disk.busy() is None)
    assert "EPROTO" in caplog.text
    assert world.disk.trouble is None
    client.sock.close()
    (await world.client()).sock.close()


async def test_a_feature_that_is_refused_is_offered_to_no_further_client(
    world: SocketWorld,
) -> None:
    await world.leave()
    world.host.backend_class = Refusing
    await world.running()
    client = await world.client()
    with pytest.raises(Exception, match="NBD error 95"):
        await asyncio.to_thread(client.flush)
    client.sock.close()
    await eventually("flush is off", lambda: "flush" in world.disk.off)
    found = json.loads(await run("nbdinfo", "--json", world.target.path))
    assert (found["exports"][0]["can_flush"], found["exports"][0]["can_fua"]) == (False, False)


async def test_close_removes_the_socket_and_end_cuts_the_client_off(world: SocketWorld) -> None:
    client = await world.client()
    await asyncio.to_thread(client.write, 0, bytes(512))
    world.connected = False
    await world.disk.close()
    with pytest.raises(FileNotFoundError):
        await world.client()
    await world.leave()
    with pytest.raises(ConnectionError):
        await asyncio.to_thread(client.exactly, 1)
    client.sock.close()
    await world.disk.end()


# -- another supervisor ----------------------------------------------------------------------------


async def test_another_supervisor_adopts_the_worker_with_its_client(world: SocketWorld) -> None:
    client = await world.client()
    await asyncio.to_thread(client.write, 0, b"1" * 512)
    await world.target.close()
    world.disk._forget()  # it does not end its worker
    later = world.disk = world.frontend()
    assert await later.adopt(world.device)
    assert "a client is connected" in str(later.busy())
    assert await asyncio.to_thread(client.read, 0, 512) == b"1" * 512
    client.sock.close()
    await eventually("it is gone", lambda: later.busy() is None)


async def test_another_supervisor_adopts_a_worker_without_a_client(world: SocketWorld) -> None:
    client = await world.client()
    await asyncio.to_thread(client.write, 0, b"1" * 512)
    client.sock.close()
    await eventually("it is gone", lambda: world.disk.busy() is None)
    await world.target.close()
    world.disk._forget()  # it does not end its worker
    later = world.disk = world.frontend()
    assert await later.adopt(world.device)
    hello = later._need_worker().hello
    assert hello is not None
    assert hello.state is State.DRAINED
    assert later.generation == 1
    waiting = asyncio.create_task(world.client())
    await eventually("a client waits", lambda: world.target.waiting)
    await later.update(world.device)
    again = await waiting
    assert await asyncio.to_thread(again.read, 0, 512) == b"1" * 512
    again.sock.close()
