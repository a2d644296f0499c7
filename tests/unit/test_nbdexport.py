# SPDX-License-Identifier: BSD-2-Clause
"""The NBD handshake, pure, and the socket around it.

The numbers here are written out from doc/proto.md of the NBD project, not taken from the module.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE, eventually

from pvfront.blkfront import nbdexport as module
from pvfront.blkfront.features import DiskGeometry
from pvfront.blkfront.nbdexport import Export, Handshake, SocketTarget, Step, Then
from pvfront.blkfront.target import TargetError

DISK = DiskGeometry(sectors=131072, flush=True, discard=True)
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META = 1, 2, 3, 5, 6, 7, 8, 9
ACK, SERVER, REP_INFO = 1, 2, 3
UNSUP, POLICY, INVALID, UNKNOWN, TOO_BIG = (
    0x80000001, 0x80000002, 0x80000003, 0x80000006, 0x80000009,
)  # fmt: skip


def option(kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", 0x49484156454F5054, kind, len(data)) + data


def asking(kind: int, name: bytes = b"", *infos: int) -> bytes:
    """INFO or GO."""
    wanted = b"".join(struct.pack(">H", info) for info in infos)
    return option(
        kind, struct.pack(">I", len(name)) + name + struct.pack(">H", len(infos)) + wanted
    )


def parse(reply: bytes) -> list[tuple[int, int, bytes]]:
    """Option, type and data of each reply."""
    found = []
    while reply:
        magic, kind, what, length = struct.unpack_from(">QIII", reply)
        assert magic == 0x3E889045565A9
        found.append((kind, what, reply[20 : 20 + length]))
        assert len(found[-1][2]) == length
        reply = reply[20 + length :]
    return found


class Haggling:
    """A handshake that is fed what a client sends, as it asks for it."""

    def __init__(self, geometry: DiskGeometry = DISK, flags: int = 3) -> None:
        self.export = Export.of("xvdb", geometry)
        self.shake = Handshake(lambda: self.export)
        assert self.say(struct.pack(">I", flags)) == Step()

    def say(self, data: bytes) -> Step:
        """The step after the last byte of one client's message."""
        while True:
            part, data = data[: self.shake.need], data[self.shake.need :]
            step = self.shake.feed(part)
            if not data or step.then is not Then.MORE:
                assert not data
                return step

    def replies(self, data: bytes) -> list[tuple[int, int, bytes]]:
        step = self.say(data)
        assert step.then is Then.MORE
        return parse(step.reply)


# -- the protocol ----------------------------------------------------------------------------------


def test_the_greeting_is_newstyle_fixed_and_offers_to_leave_out_zeroes() -> None:
    assert Handshake(lambda: Export.of("x", DISK)).greeting == b"NBDMAGICIHAVEOPT\x00\x03"


def test_go_tells_size_flags_and_block_sizes_and_begins_transmission() -> None:
    client = Haggling()
    assert client.say(asking(GO, b"xvdb", 3)) == Step(then=Then.GO)
    size, blocks, ack = parse(client.shake.admit())
    # HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM
    assert size == (GO, REP_INFO, struct.pack(">HQH", 0, 64 << 20, 1 | 4 | 8 | 32))
    assert blocks == (GO, REP_INFO, struct.pack(">HIII", 3, 512, 4096, 32 << 20))
    assert ack == (GO, ACK, b"")


def test_info_tells_the_same_and_what_else_was_asked_for_and_begins_nothing() -> None:
    client = Haggling()
    kinds = {
        struct.unpack(">H", data[:2])[0]: data[2:]
        for kind, what, data in client.replies(asking(INFO, b"", 1, 2, 3, 77))
        if (kind, what) == (INFO, REP_INFO)
    }
    assert set(kinds) == {0, 1, 2, 3}
    assert kinds[1] == b"xvdb"
    assert b"xvdb" in kinds[2]
    assert client.say(asking(GO)).then is Then.GO


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ({}, 1 | 4 | 8 | 32),
        ({"read_only": True}, 1 | 2 | 4 | 8 | 32),
        ({"discard": False}, 1 | 4 | 8),
        ({"flush": False}, 1 | 32),  # without flush there is no honest FUA
        ({"flush": False, "discard": False}, 1),
    ],
)
def test_transmission_flags_are_what_the_disk_can(change: dict[str, bool], flags: int) -> None:
    assert Export.of("xvdb", replace(DISK, **change)).flags == flags


@pytest.mark.parametrize(
    ("logical", "physical", "minimum", "preferred"),
    [(512, 512, 512, 4096), (4096, 4096, 4096, 4096), (512, 65536, 512, 65536),
     (512, 1 << 31, 512, 32 << 20)],
)  # fmt: skip
def test_block_sizes_are_the_disks_and_within_the_protocols_bounds(
    logical: int, physical: int, minimum: int, preferred: int
) -> None:
    export = Export.of("x", replace(DISK, sector_size=logical, physical_sector_size=physical))
    assert (export.minimum, export.preferred, export.maximum) == (minimum, preferred, 32 << 20)


def test_what_the_protocol_has_no_field_for_is_told_to_people() -> None:
    rich = replace(
        DISK,
        physical_sector_size=4096,
        discard=True,
        discard_granularity=65536,
        discard_alignment=512,
        removable=True,
    )
    assert Export.of("xvdb", rich).description == (
        "Xen disk xvdb, served by pvfront; physical sectors of 4096 bytes; "
        "discards in 65536 bytes from 512 on; removable"
    )
    plain = Export.of("xvdb", replace(rich, discard=False, removable=False)).description
    assert plain.endswith("4096 bytes")


def test_export_name_begins_transmission_with_or_without_zeroes() -> None:
    for flags, zeroes in ((1, 124), (3, 0)):
        client = Haggling(flags=flags)
        assert client.say(option(EXPORT_NAME, b"xvdb")) == Step(then=Then.GO)
        assert client.shake.admit() == struct.pack(">QH", 64 << 20, 45) + bytes(zeroes)


def test_the_size_that_is_told_is_the_one_at_that_moment() -> None:
    client = Haggling()
    client.say(asking(INFO))
    client.export = Export.of("xvdb", replace(DISK, sectors=8))
    assert client.say(asking(GO)).then is Then.GO
    assert struct.pack(">HQ", 0, 4096) in client.shake.admit()
    assert client.shake.told is client.export


def test_list_names_the_one_export() -> None:
    assert Haggling().replies(option(LIST)) == [
        (LIST, SERVER, b"\0\0\0\4xvdb"),
        (LIST, ACK, b""),
    ]


def test_list_with_data_is_invalid() -> None:
    assert Haggling().replies(option(LIST, b"x"))[0][:2] == (LIST, INVALID)


@pytest.mark.parametrize("kind", [INFO, GO])
def test_an_unknown_export_is_said_to_be_and_haggling_goes_on(kind: int) -> None:
    client = Haggling()
    ((option_, what, text),) = client.replies(asking(kind, b"xvdc"))
    assert (option_, what) == (kind, UNKNOWN)
    assert b"xvdb" in text
    assert client.say(asking(GO)).then is Then.GO


def test_an_unknown_export_ends_export_name_which_has_no_errors() -> None:
    assert Haggling().say(option(EXPORT_NAME, b"xvdc")) == Step(then=Then.CLOSE)


def test_abort_is_acknowledged_and_ends() -> None:
    step = Haggling().say(option(ABORT))
    assert (parse(step.reply), step.then) == ([(ABORT, ACK, b"")], Then.CLOSE)


@pytest.mark.parametrize("kind", [STARTTLS, STRUCTURED_REPLY, LIST_META, 10, 11, 4, 0, 0xFFFFFFFF])
def test_what_is_not_supported_is_said_to_be_with_its_data_skipped(kind: int) -> None:
    client = Haggling()
    for data in (b"", b"x" * 100):
        assert client.replies(option(kind, data))[0][:2] == (kind, UNSUP)
    assert client.say(asking(GO)).then is Then.GO


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0",  # no count
        b"\0\0\0\0\0\1",  # one info, and none
        b"\0\0\0\0\0\0\0",  # a byte too many
        b"\0\0\0\7xvdb\0\0",  # a name that is longer than the data
        b"\xff\xff\xff\xffxvdb\0\0",
        struct.pack(">I", 4097) + b"x" * 4097 + b"\0\0",  # longer than a string may be
    ],
)
def test_lengths_that_do_not_agree_are_invalid(data: bytes) -> None:
    assert Haggling().replies(option(GO, data))[0][:2] == (GO, INVALID)


def test_a_refused_client_is_told_why_and_may_try_again() -> None:
    client = Haggling()
    client.say(asking(GO))
    step = client.shake.refuse("one at a time")
    assert parse(step.reply) == [(GO, POLICY, b"one at a time")]
    assert step.then is Then.MORE
    assert client.say(asking(GO)).then is Then.GO


def test_an_option_of_absurd_length_is_refused_without_reading_it() -> None:
    step = Haggling().say(struct.pack(">QII", 0x49484156454F5054, GO, 0xFFFFFFFF))
    assert (parse(step.reply), step.then) == ([(GO, TOO_BIG, b"")], Then.CLOSE)
    step = Haggling().say(struct.pack(">QII", 0x49484156454F5054, EXPORT_NAME, 8193))
    assert step == Step(then=Then.CLOSE)


def test_a_wrong_magic_and_unknown_client_flags_end_the_connection() -> None:
    assert Haggling().say(b"IHAVEOPS" + bytes(8)).then is Then.CLOSE
    shake = Handshake(lambda: Export.of("x", DISK))
    assert shake.feed(struct.pack(">I", 4)).then is Then.CLOSE


def test_haggling_without_end_is_ended() -> None:
    client = Haggling()
    for _ in range(64):
        assert client.say(option(LIST)).then is Then.MORE
    assert client.say(option(LIST)[:16]).then is Then.CLOSE


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(option, st.integers(0, 12), st.binary(max_size=64)),
            st.builds(asking, st.sampled_from([INFO, GO]), st.sampled_from([b"", b"xvdb", b"y"])),
        ),
        max_size=12,
    )
)
def test_whatever_a_client_sends_little_is_wanted_and_replies_are_well_formed(
    messages: list[bytes],
) -> None:
    shake = Handshake(lambda: Export.of("xvdb", DISK))
    data = struct.pack(">I", 3) + b"".join(messages)
    while len(data) >= shake.need:
        assert 0 < shake.need <= 8192
        part, data = data[: shake.need], data[shake.need :]
        step = shake.feed(part)
        parse(step.reply)
        if step.then is Then.GO:
            shake.admit()
            return
        if step.then is Then.CLOSE:
            return


# -- the socket ------------------------------------------------------------------------------------


class Client:
    """A client without a library, so that it can misbehave."""

    def __init__(self, target: SocketTarget) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(target.link)
        self.sock.setblocking(False)

    async def receive(self, count: int) -> bytes:
        loop, data = asyncio.get_running_loop(), b""
        async with asyncio.timeout(PATIENCE):
            while len(data) < count:
                part = await loop.sock_recv(self.sock, count - len(data))
                if not part:
                    raise ConnectionError("closed")
                data += part
        return data

    async def reply(self) -> tuple[int, bytes]:
        """Type and data of the next reply."""
        head = await self.receive(20)
        _, _, what, length = struct.unpack(">QIII", head)
        return what, await self.receive(length)

    async def greet(self) -> None:
        assert await self.receive(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        self.sock.send(struct.pack(">I", 3))

    async def go(self) -> list[int]:
        """Asks for transmission; the types of the replies."""
        await self.greet()
        self.sock.send(asking(GO))
        found: list[int] = []
        while not found or found[-1] == REP_INFO:
            found.append((await self.reply())[0])
        return found

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[SocketTarget]:
    made = SocketTarget("xvdb", tmp_path)
    yield made
    await made.close()


async def published(target: SocketTarget, geometry: DiskGeometry = DISK) -> SocketTarget:
    await target.publish(geometry)
    return target


async def taken(target: SocketTarget) -> socket.socket:
    """The socket of the client that waits, as a worker has it."""
    await eventually("a client that waits", lambda: target.waiting)
    (fd,) = await target.attach(DISK)
    target.served(True)
    return socket.socket(fileno=fd)


async def test_the_socket_appears_with_publish_for_its_owner_alone_and_goes_with_close(
    target: SocketTarget,
) -> None:
    assert target.path == ""
    await target.publish(DISK)
    assert os.stat(target.link).st_mode & 0o777 == 0o600  # noqa: PTH116
    assert target.path == f"nbd+unix:///?socket={target.link}"
    await target.close()
    await target.close()
    assert os.listdir(os.path.dirname(target.link)) == []  # noqa: PTH120, PTH208
    assert target.path == ""


async def test_a_socket_left_by_an_earlier_supervisor_is_replaced(target: SocketTarget) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(target.link)
    await target.publish(DISK)
    Client(target).close()


async def test_a_path_that_is_too_long_for_a_socket_is_said_to_be(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(TargetError, match="no socket can be made") as caught:
        await SocketTarget("xvdb", deep).publish(DISK)
    assert "107" in str(caught.value.hint)


async def test_what_a_client_sends_ahead_is_left_for_the_worker(target: SocketTarget) -> None:
    await published(target)
    pokes = asyncio.Event()
    target.on_waiting(pokes.set)
    client = Client(target)
    ahead = os.urandom(5000)
    client.sock.send(struct.pack(">I", 3) + asking(INFO) + asking(GO) + ahead)
    async with asyncio.timeout(PATIENCE):
        await pokes.wait()
    assert target.waiting
    with await taken(target) as worker:
        assert worker.recv(10000) == ahead
        assert not target.waiting
        assert await target.attach(DISK) == []
    client.close()


async def test_busy_and_status_name_the_client_while_the_worker_has_it(
    target: SocketTarget,
) -> None:
    await published(target)
    assert (target.busy(), target.details()) == (None, {"connected": False})
    client = Client(target)
    assert await client.go() == [REP_INFO, REP_INFO, ACK]
    with await taken(target):
        assert target.busy() == f"pid {os.getpid()} is connected to {target.link}"
        assert target.details() == {"connected": True, "pid": os.getpid(), "size": 64 << 20}
        await target.publish(replace(DISK, sectors=8))
        assert target.details()["size"] == 64 << 20
        assert "next client" in target.details()["note"]
    target.served(False)
    assert (target.busy(), target.details()) == (None, {"connected": False})
    client.close()


async def test_others_may_ask_while_one_is_connected_and_go_is_refused_with_a_reason(
    target: SocketTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN", 0.05)
    await published(target)
    first, second = Client(target), Client(target)
    await first.go()
    with await taken(target):
        await second.greet()
        second.sock.send(option(LIST))
        assert [(await second.reply())[0] for _ in range(2)] == [SERVER, ACK]
        second.sock.send(asking(INFO))
        assert [(await second.reply())[0] for _ in range(3)] == [REP_INFO, REP_INFO, ACK]
        second.sock.send(asking(GO))
        what, text = await second.reply()
        assert what == POLICY
        assert f"pid {os.getpid()} is connected".encode() in text
    target.served(False)
    second.sock.send(asking(GO))
    assert [(await second.reply())[0] for _ in range(3)] == [REP_INFO, REP_INFO, ACK]
    (await taken(target)).close()
    first.close()
    second.close()


async def test_who_asks_to_go_while_one_is_connected_gets_its_turn_when_that_leaves(
    target: SocketTarget,
) -> None:
    await published(target)
    first, second = Client(target), Client(target)
    await first.go()
    worker = await taken(target)
    waits = asyncio.create_task(second.go())
    done, _ = await asyncio.wait({waits}, timeout=0.1)
    assert not done
    worker.close()
    target.served(False)
    assert await waits == [REP_INFO, REP_INFO, ACK]
    (await taken(target)).close()
    first.close()
    second.close()


async def test_a_client_that_leaves_before_it_is_served_makes_room(target: SocketTarget) -> None:
    await published(target)
    first, second = Client(target), Client(target)
    await first.go()
    first.close()
    assert await second.go() == [REP_INFO, REP_INFO, ACK]
    second.close()


async def test_a_client_that_is_silent_is_left_after_the_deadline(
    target: SocketTarget, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "HANDSHAKE", 0.05)
    await published(target)
    client = Client(target)
    await client.receive(18)
    with pytest.raises(ConnectionError):
        await client.receive(1)
    assert f"xvdb: pid {os.getpid()} did not end its handshake in time" in caplog.text
    client.close()


async def test_more_clients_than_places_wait_and_are_served_in_the_end(
    target: SocketTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLIENTS", 2)
    await published(target)
    clients = [Client(target) for _ in range(3)]
    for client in clients[:2]:
        await client.receive(18)
    late = asyncio.create_task(clients[2].receive(18))
    done, _ = await asyncio.wait({late}, timeout=0.1)
    assert not done
    clients[0].close()
    assert await late == b"NBDMAGICIHAVEOPT\x00\x03"
    for client in clients:
        client.close()


async def test_a_feature_that_the_backend_lost_is_not_offered_to_the_next_client(
    target: SocketTarget,
) -> None:
    await published(target)
    await target.feature_off("flush")
    client = Client(target)
    await client.greet()
    client.sock.send(asking(INFO))
    assert struct.unpack(">HQH", (await client.reply())[1])[2] == 1 | 32
    client.close()


async def test_close_cuts_off_who_haggles_and_who_waits_to_be_served(
    target: SocketTarget,
) -> None:
    await published(target)
    haggling, waiting = Client(target), Client(target)
    await haggling.receive(18)
    await waiting.go()
    await target.close()
    for client in (haggling, waiting):
        with pytest.raises(ConnectionError):
            await client.receive(1)
        client.close()


async def test_a_client_of_an_earlier_supervisor_counts_as_connected(
    target: SocketTarget,
) -> None:
    assert await target.adopt()
    target.served(True)
    assert target.busy() == f"a client is connected to {target.link}"
    target.served(False)
    assert target.busy() is None


async def test_who_waits_to_be_served_stays_when_the_worker_is_told_to_have_no_socket(
    target: SocketTarget,
) -> None:
    await published(target)
    client = Client(target)
    await client.go()
    target.served(False)
    (await taken(target)).close()
    client.close()
