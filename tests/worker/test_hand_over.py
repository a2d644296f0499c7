# SPDX-License-Identifier: BSD-2-Clause
"""One worker takes over from another: under load, in the middle of requests, and when it fails."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import random
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from embedded import Host, Nbd, Supervisor, serving, text
from waiting import PATIENCE, wait_for

from pvfront.abi import ffi, lib, read_stats

MIB = 1 << 20
# hand_over.c: magic, kind, queue, queues, text
PACKET = struct.Struct(f"=IIII{lib.PVF_TEXT_MAX}s")
MAGIC = 0x58465650
QUEUE, SERVING, REFUSED = 1, 2, 3
TEXT = b""


def table(size: int = lib.PVF_HAND_OVER_BYTES, *, seal: bool = True) -> int:
    fd = os.memfd_create("table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE)
    return ours, theirs


def simple() -> Any:
    return ffi.new("struct pvf_ctl_simple *")


def end(process: Any) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    process.stderr.close()


def upgrade(host: Host) -> Any:
    """The host's worker is another process afterwards; returns TAKEN_OVER.

    Tries again if the other one did not come to its turn within the seconds that it has.
    """
    while True:
        path, process, supervisor = host.start_worker()
        ours, theirs = pair()
        memory = table()
        with ours, theirs:
            supervisor.send(lib.PVF_CTL_TAKE_OVER, simple(), 0, [theirs.fileno(), memory])
            host.supervisor.send(
                lib.PVF_CTL_HAND_OVER, simple(), host.generation, [ours.fileno(), memory]
            )
        os.close(memory)
        got = 0
        while got not in (lib.PVF_CTL_HANDED_OVER, lib.PVF_CTL_ERROR):
            got, body = host.supervisor.receive()
        if got == lib.PVF_CTL_HANDED_OVER:
            break
        assert body.error == errno.ETIMEDOUT, text(body.text)
        supervisor.close()
        end(process)
    taken = supervisor.wait(lib.PVF_CTL_TAKEN_OVER)
    assert host.process.wait(PATIENCE) == 0
    assert host.process.stderr is not None
    assert not host.process.stderr.read()
    host.process.stderr.close()
    host.supervisor.close()
    host.path, host.process, host.supervisor = path, process, supervisor
    (hello,) = [body for kind, body, _ in supervisor.seen if kind == lib.PVF_CTL_HELLO][1:]
    assert (hello.hdr.generation, hello.attached) == (host.generation, host.queues)
    return taken


def queued(host: Host, queue: int, count: int) -> tuple[Nbd, list[bytes]]:
    """So many writes of a page stand in that queue's ring, unanswered."""
    backend = host.backends[queue]
    backend.hold = True
    nbd = host.nbd(queue)
    before = len(backend.held)
    handles = [
        nbd.request(Nbd.WRITE, (queue << 20) + 4096 * i, 4096, bytes([i + 1]) * 4096)
        for i in range(count)
    ]
    wait_for(f"{count} writes in the ring", lambda: len(backend.held) == before + count)
    return nbd, handles


# -- success -------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [1, 4])
def test_requests_in_the_ring_are_answered_by_the_worker_that_took_over(queues: int) -> None:
    with serving(queues=queues, pool_pages=48) as host:
        waiting = [queued(host, i, 8) for i in range(queues)]
        taken = upgrade(host)
        assert taken.in_flight == 8 * queues
        for i, (nbd, handles) in enumerate(waiting):
            host.backends[i].release(lambda held: held[::-1])
            assert sorted(nbd.reply() for _ in handles) == sorted((h, 0) for h in handles)
            assert nbd.read((i << 20) + 4096, 4096) == b"\2" * 4096


def test_a_request_received_in_part_is_finished_by_the_worker_that_took_over() -> None:
    data = random.Random(1).randbytes(300 * 1024)
    with serving(pool_pages=48) as host:
        nbd = host.nbd()
        handle = nbd.handle()
        client = host.client
        assert client is not None
        request = nbd.HEADER.pack(0x25609513, 0, Nbd.WRITE, handle, 4096, len(data)) + data
        for cut in (10, 28, 5000, 100_001, len(request)):
            sent, request = request[:cut], request[cut:]
            client.sendall(sent)
            upgrade(host)
            if not request:
                break
        client.sendall(request)
        assert nbd.reply() == (handle, 0)
        assert bytes(host.disk[4096 : 4096 + len(data)]) == data


def test_a_reply_sent_in_part_is_finished_by_the_worker_that_took_over() -> None:
    with serving(pool_pages=352, disk_size=4 * MIB) as host:
        host.disk[:] = random.Random(2).randbytes(4 * MIB)
        nbd = host.nbd()
        handles = [nbd.request(Nbd.READ, MIB * i, MIB) for i in range(4)]
        # Nobody reads: the socket is full, with a reply cut somewhere.
        wait_for("a blocked reply", lambda: host.stats().target_blocked)
        upgrade(host)
        for i, handle in enumerate(handles):
            nbd.check(handle)
            assert nbd.exactly(MIB) == host.disk[MIB * i : MIB * (i + 1)]


def test_a_client_that_writes_and_verifies_notices_nothing_of_five_upgrades() -> None:
    problems: list[BaseException] = []
    stop = threading.Event()
    rounds = 0

    def use(nbd: Nbd) -> None:
        nonlocal rounds
        rng = random.Random(3)
        try:
            while not stop.is_set():
                at, data = 512 * rng.randrange(4096), rng.randbytes(512 * rng.randint(1, 500))
                nbd.write(at, data)
                assert nbd.read(at, len(data)) == data
                rounds += 1
        except BaseException as error:
            problems.append(error)

    with serving() as host:
        user = threading.Thread(target=use, args=(host.nbd(),))
        user.start()
        try:
            for i in range(5):
                upgrade(host)
                wait_for("progress", lambda i=i: rounds > 3 * i or problems)
        finally:
            stop.set()
            user.join(PATIENCE)
        assert not user.is_alive()
        assert not problems, problems
        # Counted on, over all workers; shown at the end of a turn, after the reply.
        wait_for("all writes counted", lambda: host.stats().write.requests == rounds)
        stats = host.stats()
        assert stats.write.errors == stats.read.errors == 0


def test_the_worker_that_took_over_is_quiesced_and_detached_as_any_other() -> None:
    with serving() as host:
        host.nbd().write(0, b"x" * 4096)
        upgrade(host)
        host.quiesce()
        upgrade(host)  # drained, it can be handed over as well
        host.detach(lib.PVF_DETACH_KEEP_TARGET)
        host.attach()
        host.start(keep=True)
        assert host.nbd().read(0, 4096) == b"x" * 4096


def test_a_stall_goes_on_over_an_upgrade() -> None:
    with serving() as host:
        host.start(keep=True, stall_seconds=1)
        nbd, handles = queued(host, 0, 1)
        host.supervisor.wait(lib.PVF_CTL_STALLED)
        upgrade(host)
        stalls = [b for k, b, _ in host.supervisor.seen if k == lib.PVF_CTL_STALLED]
        assert [stall.in_flight for stall in stalls] == [1]
        assert host.backend is not None
        host.backend.release()
        assert nbd.reply() == (handles[0], 0)
        assert host.supervisor.wait(lib.PVF_CTL_STALLED).seconds == 0


# -- the old worker, when the next one fails -------------------------------------------------------


def silent(_: socket.socket) -> None:
    """Takes nothing and says nothing."""


def gone(peer: socket.socket) -> None:
    peer.close()


def dies_with_everything(peer: socket.socket) -> None:
    """All descriptors were received."""
    data, fds, _, _ = socket.recv_fds(peer, 4096, 16)
    for fd in fds:
        os.close(fd)
    assert PACKET.unpack(data)[:4] == (MAGIC, QUEUE, 0, 1)
    peer.close()


def refuses(peer: socket.socket) -> None:
    peer.send(PACKET.pack(MAGIC, REFUSED, 0, 0, b"I do not know this table"))


def talks_nonsense(peer: socket.socket) -> None:
    peer.send(b"hello")


@pytest.mark.parametrize(
    ("fails", "text"),
    [
        (gone, "next worker"),
        (dies_with_everything, "has ended"),
        (refuses, "I do not know this table"),
        (talks_nonsense, "is none"),
        (silent, "in time"),
    ],
)
def test_a_worker_whose_successor_fails_goes_on_as_if_nothing_had_happened(
    fails: Callable[[socket.socket], None], text: str
) -> None:
    with serving() as host:
        nbd, handles = queued(host, 0, 5)
        ours, theirs = pair()
        memory = table()
        with ours:
            if fails is gone:
                ours.close()
            with theirs:
                host.supervisor.send(
                    lib.PVF_CTL_HAND_OVER, simple(), host.generation, [theirs.fileno(), memory]
                )
            os.close(memory)
            if fails is not gone:
                fails(ours)
            command, _, said = host.supervisor.error()
            assert command == lib.PVF_CTL_HAND_OVER
            assert text in said
            if fails is silent:
                # It has given up: nobody can take it over any more.
                with pytest.raises(BrokenPipeError):
                    ours.send(PACKET.pack(MAGIC, SERVING, 0, 0, TEXT))
        assert host.backend is not None
        host.backend.release()
        assert sorted(nbd.reply() for _ in handles) == sorted((h, 0) for h in handles)
        upgrade(host)
        assert nbd.read(0, 4096) == b"\1" * 4096


def test_the_word_that_decides_counts_behind_any_other() -> None:
    with serving() as host:
        ours, theirs = pair()
        memory = table()
        with ours, theirs:
            for said in (b"hello", PACKET.pack(MAGIC, SERVING, 0, 0, TEXT)):
                ours.send(said)
            host.supervisor.send(
                lib.PVF_CTL_HAND_OVER, simple(), host.generation, [theirs.fileno(), memory]
            )
            host.supervisor.wait(lib.PVF_CTL_HANDED_OVER)
        os.close(memory)
        assert host.process.wait(PATIENCE) == 0


def test_what_a_socket_that_ends_meanwhile_held_unread_is_never_executed() -> None:
    with serving(queues=2) as host:
        path, process, supervisor = host.start_worker()
        (ours, theirs), (mine, others) = pair(), pair()
        memory = table()
        with ours, theirs, mine, others:
            ours.send(PACKET.pack(MAGIC, SERVING, 0, 0, TEXT))
            host.supervisor.send(
                lib.PVF_CTL_HAND_OVER, simple(), host.generation, [theirs.fileno(), memory]
            )
            host.supervisor.wait(lib.PVF_CTL_HANDED_OVER)
            # Nobody serves now. What is left in one socket is sent again on another.
            host.nbd(1).request(Nbd.WRITE, 0, 4096, b"old!" * 1024)
            host.clients[1].close()
            for _ in range(2):
                data, fds, _, _ = socket.recv_fds(ours, 4096, 16)
                socket.send_fds(mine, [data], fds)
                for fd in fds:
                    os.close(fd)
            supervisor.send(lib.PVF_CTL_TAKE_OVER, simple(), 0, [others.fileno(), memory])
            supervisor.wait(lib.PVF_CTL_TAKEN_OVER)
        os.close(memory)
        assert host.process.wait(PATIENCE) == 0
        host.process.stderr.close()
        host.supervisor.close()
        host.path, host.process, host.supervisor = path, process, supervisor
        if not any(kind == lib.PVF_CTL_TARGET_GONE for kind, _, _ in supervisor.seen):
            assert supervisor.wait(lib.PVF_CTL_TARGET_GONE).queue == 1
        supervisor.wait(lib.PVF_CTL_DRAINED)
        host.start()
        host.nbd(0).write(4096, bytes(4096))
        assert bytes(host.disk[:4096]) == bytes(4096)


@pytest.mark.parametrize(("size", "seal"), [(lib.PVF_HAND_OVER_BYTES, False), (4096, True)])
def test_a_memory_that_may_end_under_it_is_refused(size: int, seal: bool) -> None:
    with serving() as host:
        ours, theirs = pair()
        memory = table(size, seal=seal)
        with ours, theirs:
            host.supervisor.send(
                lib.PVF_CTL_HAND_OVER, simple(), host.generation, [theirs.fileno(), memory]
            )
            command, code, _ = host.supervisor.error()
        os.close(memory)
        assert (command, code) == (lib.PVF_CTL_HAND_OVER, errno.EINVAL)
        host.nbd().write(0, b"x" * 512)


def test_a_worker_that_does_not_serve_is_not_handed_over() -> None:
    with Host() as host:
        for step in (lambda: None, host.attach):
            step()
            ours, theirs = pair()
            memory = table()
            with ours, theirs:
                host.supervisor.send(
                    lib.PVF_CTL_HAND_OVER, simple(), host.generation, [theirs.fileno(), memory]
                )
                command, code, text = host.supervisor.error()
            os.close(memory)
            assert (command, code) == (lib.PVF_CTL_HAND_OVER, errno.EBUSY)
            assert "does not serve" in text


# -- the next worker, when the old one fails -------------------------------------------------------


@contextlib.contextmanager
def caught() -> Iterator[tuple[Host, bytes, list[int], int]]:
    """What a worker hands over of its one queue: the host, its packet, descriptors, its memory."""
    with serving() as host:
        nbd, handles = queued(host, 0, 3)
        ours, theirs = pair()
        memory = table()
        with ours, theirs:
            host.supervisor.send(
                lib.PVF_CTL_HAND_OVER, simple(), host.generation, [theirs.fileno(), memory]
            )
            data, fds, _, _ = socket.recv_fds(ours, 4096, 16)
        try:
            yield host, data, list(fds), memory
        finally:
            for fd in (*fds, memory):
                os.close(fd)
        host.supervisor.error()
        assert host.backend is not None
        host.backend.release()
        assert sorted(nbd.reply() for _ in handles) == sorted((h, 0) for h in handles)


def refusal(host: Host, data: bytes, fds: list[int], memory: int) -> tuple[int, str, str]:
    """A new worker's answer to that: errno, text, and what it told the one before."""
    _, process, supervisor = host.start_worker()
    ours, theirs = pair()
    try:
        with ours:
            if data:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                ours.sendmsg([data], rights if fds else [])
            else:
                ours.shutdown(socket.SHUT_WR)
            with theirs:
                supervisor.send(lib.PVF_CTL_TAKE_OVER, simple(), 0, [theirs.fileno(), memory])
            command, code, text = supervisor.error()
            assert command == lib.PVF_CTL_TAKE_OVER
            magic, kind, _, _, said = PACKET.unpack(ours.recv(4096))
            assert (magic, kind) == (MAGIC, REFUSED)
        # It holds nothing: neither pages, port nor socket.
        again = Supervisor(supervisor.sock.getpeername())
        assert again.hello.state == lib.PVF_IDLE
        assert (again.hello.attached, again.hello.targets) == (0, 0)
        again.close()
    finally:
        supervisor.close()
        end(process)
    return code, text, said.rstrip(b"\0").decode()


def test_a_table_of_another_layout_is_refused() -> None:
    with caught() as (host, data, fds, memory):
        os.pwrite(memory, struct.pack("=I", 77), 4)
        code, text, said = refusal(host, data, fds, memory)
        assert code == errno.EINVAL
        assert "another version" in text
        assert said == text


def test_a_table_of_other_structures_is_refused() -> None:
    with caught() as (host, data, fds, memory):
        os.pwrite(memory, b"\x55" * 8, 8)
        code, text, _ = refusal(host, data, fds, memory)
        assert code == errno.EINVAL
        assert "another version" in text


def test_a_table_that_was_not_written_is_refused() -> None:
    with caught() as (host, data, fds, _):
        empty = table()
        code, text, _ = refusal(host, data, fds, empty)
        os.close(empty)
        assert code == errno.EINVAL
        assert text == "the table is none"


def test_descriptors_that_are_missing_are_refused() -> None:
    with caught() as (host, data, fds, memory):
        for some in ([], fds[:1], fds[:-1], [*fds, fds[0]]):
            code, _, _ = refusal(host, data, some, memory)
            assert code == errno.EINVAL


def test_descriptors_in_another_order_are_refused() -> None:
    with caught() as (host, data, fds, memory):
        code, _, _ = refusal(host, data, fds[::-1], memory)
        assert code > 0


def test_a_worker_before_that_sends_nothing_is_not_waited_for_when_it_has_ended() -> None:
    with caught() as (host, _, _, memory):
        code, text, _ = refusal(host, b"", [], memory)
        assert code == errno.EPIPE
        assert "not sent everything" in text


def test_a_worker_that_serves_takes_over_no_other() -> None:
    with serving() as host:
        ours, theirs = pair()
        memory = table()
        with ours, theirs:
            host.supervisor.send(
                lib.PVF_CTL_TAKE_OVER, simple(), host.generation, [theirs.fileno(), memory]
            )
            command, code, _ = host.supervisor.error()
        os.close(memory)
        assert (command, code) == (lib.PVF_CTL_TAKE_OVER, errno.EBUSY)
        host.nbd().write(0, b"x" * 512)


def test_statistics_go_on_in_the_pages_of_the_worker_that_took_over() -> None:
    with serving() as host:
        for i in range(5):
            host.nbd().write(4096 * i, b"x" * 4096)
        # They are shown at the end of a turn, after the reply.
        before = wait_for("the fifth", lambda: (s := host.stats()).write.requests == 5 and s)
        upgrade(host)
        after = read_stats(host.supervisor.stats_fd)
        assert after.write == before.write
        assert after.generation == host.generation
        assert after.state == lib.PVF_RUNNING
