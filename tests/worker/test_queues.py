# SPDX-License-Identifier: BSD-2-Clause
"""A device of several queues: each serves its own socket, and one state is all of theirs."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from embedded import Host, Nbd, NbdError, Supervisor, serving
from ringbackend import REQ_PROD, RSP_PROD, Backend, Request
from waiting import PATIENCE, wait_for

from pvfront.abi import ffi, lib, read_all_stats

MIB = 1 << 20


def in_ring(host: Host, queue: int, at: int = 0) -> Nbd:
    """One read of that queue stands in its ring, unanswered."""
    host.backends[queue].hold = True
    nbd = host.nbd(queue)
    nbd.request(Nbd.READ, at, 4096)
    wait_for(f"the read in ring {queue}", lambda: host.backends[queue].held)
    return nbd


def supervise_again(host: Host) -> Any:
    """A new supervisor in place of the present one: the HELLO that it got."""
    host.supervisor.close()
    host.supervisor = Supervisor(host.path)
    return host.supervisor.hello


def closed(client: socket.socket) -> bool:
    """Whether the worker has closed its end. What it has still sent is thrown away."""
    with contextlib.suppress(ConnectionError):
        while client.recv(65536):
            pass
    return True


@pytest.mark.parametrize("queues", [1, 2, 4, 16])
def test_each_queue_serves_its_own_socket_at_the_same_time(queues: int) -> None:
    problems: list[BaseException] = []

    def use(nbd: Nbd, base: int, seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(12):
                at = base + 512 * rng.randrange(256)
                data = rng.randbytes(512 * rng.randint(1, 64))
                nbd.write(at, data)
                assert nbd.read(at, len(data)) == data
            nbd.flush()
        except BaseException as error:
            problems.append(error)

    with serving(queues=queues, pool_pages=48) as host:
        assert host.supervisor.hello.queues == queues
        users = [
            threading.Thread(target=use, args=(host.nbd(i), i * MIB // 2, i)) for i in range(queues)
        ]
        for user in users:
            user.start()
        for user in users:
            user.join(PATIENCE)
            assert not user.is_alive()
        assert not problems
        host.quiesce()
        stats = read_all_stats(host.supervisor.stats_fd)
        assert [s.queue for s in stats] == list(range(queues))
        for s, backend in zip(stats, host.backends, strict=True):
            assert (s.queues, s.state, s.generation) == (queues, lib.PVF_DRAINED, 1)
            assert (s.read.requests, s.write.requests, s.flush.requests) == (12, 12, 1)
            ring_requests = s.read.ring_requests + s.write.ring_requests + s.flush.ring_requests
            assert ring_requests == len(backend.log)
        host.detach()
        for backend in host.backends:
            backend.join(PATIENCE)
            assert not backend.is_alive()


def refuse(host: Host, queue: int, generation: int, **override: int) -> tuple[int, str]:
    """The answer to an ATTACH that may not be: errno, text."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b:
        body = host.attach_body(0, queue=queue, **override)
        host.supervisor.send(lib.PVF_CTL_ATTACH, body, generation, [a.fileno(), b.fileno()])
        kind, number, why = host.supervisor.error()
    assert kind == lib.PVF_CTL_ATTACH
    return number, why


def test_the_queues_of_a_connection_are_attached_in_order() -> None:
    with Host(queues=3) as host:
        host.generation = 1
        host.attach_queue(0)
        hello = supervise_again(host)
        assert (hello.state, hello.attached, hello.queues) == (lib.PVF_IDLE, 1, 3)
        assert refuse(host, 2, 1)[0] == errno.EINVAL
        assert refuse(host, 1, 1, queues=2)[0] == errno.EINVAL
        assert refuse(host, 1, 2)[0] == errno.ESTALE
        assert refuse(host, 0, 1)[0] == errno.ESTALE
        assert refuse(host, 3, 1)[0] == errno.EINVAL
        assert "more queues" in refuse(host, 1, 1, queues=4)[1]
        host.supervisor.send(lib.PVF_CTL_START, host.start_body(), 1)
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_START, errno.ENOTCONN)
        host.attach_queue(1)
        host.attach_queue(2)
        assert host.stats().state == lib.PVF_ATTACHED
        assert refuse(host, 2, 1)[0] == errno.EBUSY
        host.start()
        host.nbd(2).write(0, bytes(4096))


def test_a_connection_left_unfinished_gives_way_to_the_next() -> None:
    with Host(queues=3) as host:
        host.generation = 1
        host.attach_queue(0)
        host.attach_queue(1)
        left = host.backends
        host.backends = []
        host.attach()
        host.start()
        for backend in left:
            backend.join(PATIENCE)  # nobody holds its port any more
            assert not backend.is_alive()
            backend.stop()
        host.nbd(1).write(0, bytes(4096))


def test_a_worker_of_several_queues_serves_a_connection_of_one() -> None:
    with Host(queues=4) as host:
        host.queues = 1
        host.attach()
        host.start()
        host.nbd().write(0, b"one" + bytes(509))
        assert [s.queues for s in read_all_stats(host.supervisor.stats_fd)] == [1, 0, 0, 0]
        host.detach()
        host.queues = 3
        host.attach()
        host.start()
        host.nbd(2).write(512, b"two" + bytes(509))
        assert host.disk[:3] + host.disk[512:515] == b"onetwo"


def test_start_wants_a_socket_for_each_queue_and_none_for_others() -> None:
    with Host(queues=2) as host:
        host.attach()
        ours, theirs = socket.socketpair()
        with ours, theirs, Path(__file__).open("rb") as file:
            fd = theirs.fileno()
            for what, first, fds in [
                (errno.ENOTCONN, 0, []),
                (errno.ENOTCONN, 0, [fd]),
                (errno.ENOTCONN, 1, [fd]),
                (errno.EINVAL, 1, [fd, fd]),
                (errno.EINVAL, 3, []),
                (errno.EINVAL, 2, [fd]),
                (errno.ENOTSOCK, 0, [fd, file.fileno()]),
            ]:
                body = host.start_body(first_queue=first)
                host.supervisor.send(lib.PVF_CTL_START, body, 1, fds)
                assert host.supervisor.error()[:2] == (lib.PVF_CTL_START, what), (first, fds)
        assert host.stats().state == lib.PVF_ATTACHED
        assert supervise_again(host).targets == 0


def test_sockets_may_come_one_by_one_where_clients_come_and_go() -> None:
    with Host(queues=2) as host:
        host.attach()
        host.start(keep=True, options=lib.PVF_START_CLIENTS)
        for queue in range(2):
            ours, theirs = socket.socketpair()
            ours.settimeout(PATIENCE)
            host.clients.append(ours)
            body = host.start_body(first_queue=queue, options=lib.PVF_START_CLIENTS)
            with theirs:
                host.supervisor.send(lib.PVF_CTL_START, body, 1, [theirs.fileno()])
            host.supervisor.wait(lib.PVF_CTL_STARTED)
            host.nbd(queue).write(4096 * queue, b"%d" % queue * 4096)
        assert host.disk[:8192] == b"0" * 4096 + b"1" * 4096


def test_quiesce_is_answered_when_every_ring_is_empty() -> None:
    with serving(queues=3) as host:
        first, last = in_ring(host, 0), in_ring(host, 2, 4096)
        host.simple(lib.PVF_CTL_QUIESCE)
        wait_for("DRAINING", lambda: host.stats(1).state == lib.PVF_DRAINING)
        host.nbd(1).request(Nbd.READ, 0, 4096)  # a request that is not begun
        host.backends[0].release()
        assert len(first.exactly(16 + 4096)) == 4112
        host.supervisor.raw(b"?")
        host.supervisor.error()
        assert lib.PVF_CTL_DRAINED not in [kind for kind, _, _ in host.supervisor.seen]
        assert host.stats().state == lib.PVF_DRAINING
        host.backends[2].release()
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
        assert len(last.exactly(16 + 4096)) == 4112
        assert not host.backends[1].log
        host.start(keep=True)
        assert len(host.nbd(1).exactly(16 + 4096)) == 4112
        kinds = [kind for kind, _, _ in host.supervisor.seen]
        assert kinds.count(lib.PVF_CTL_DRAINED) == 1


def test_sockets_are_kept_over_a_generation_of_as_many_queues() -> None:
    with serving(queues=3) as host:
        host.nbd(2).write(0, b"a" * 4096)
        host.quiesce()
        host.detach(lib.PVF_DETACH_KEEP_TARGET)
        assert supervise_again(host).targets == 7
        host.attach()
        host.start(keep=True)
        for queue in range(3):
            assert host.nbd(queue).read(0, 4096) == b"a" * 4096


@pytest.mark.parametrize("queue", [0, 2])
def test_a_rule_broken_in_one_ring_stops_all_queues(queue: int) -> None:
    with serving(queues=3) as host:
        other = 1
        in_ring(host, other)
        in_ring(host, queue, 4096)
        host.all_pages[queue].set(RSP_PROD, 77)
        host.backends[queue].event()
        broken = host.supervisor.wait(lib.PVF_CTL_BROKEN)
        assert (broken.rule, broken.queue, broken.value) == (1, queue, 77)
        # The other rings are left alone as well: neither read nor written nor notified.
        pages, backend = host.all_pages[other], host.backends[other]
        before = bytes(pages.map), backend.notified
        backend.respond(backend.held[0].id, 0, 0)
        after = bytes(pages.map)
        host.nbd(other).request(Nbd.READ, 0, 4096)
        host.simple(lib.PVF_CTL_QUIESCE)
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_QUIESCE, errno.EIO)
        assert (bytes(pages.map), backend.notified) == (after, before[1])
        assert pages.get(REQ_PROD) == 1
        wait_for(
            "all queues BROKEN",
            lambda: {s.state for s in read_all_stats(host.supervisor.stats_fd)} == {lib.PVF_BROKEN},
        )
        supervise_again(host)
        assert host.supervisor.wait(lib.PVF_CTL_BROKEN).queue == queue
        host.detach()
        host.attach()
        host.start()
        host.nbd(other).write(0, bytes(4096))


@pytest.mark.parametrize("queue", [0, 1])
def test_a_lost_socket_of_several_closes_all_and_new_ones_wait_for_every_ring(queue: int) -> None:
    with serving(queues=3) as host:
        in_ring(host, 0)
        in_ring(host, 1, 4096)
        host.clients[queue].close()
        gone = host.supervisor.wait(lib.PVF_CTL_TARGET_GONE)
        assert (gone.queue, gone.error, gone.in_flight) == (queue, 0, 1)
        for i in range(3):
            assert i == queue or closed(host.clients[i])
        hello = supervise_again(host)
        assert (hello.state, hello.targets) == (lib.PVF_TARGET_LOST, 0)
        host.backends[queue].release()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            host.supervisor.send(lib.PVF_CTL_START, host.start_body(), 1, [theirs.fileno()] * 3)
            assert host.supervisor.error()[:2] == (lib.PVF_CTL_START, errno.EBUSY)
        host.backends[1 - queue].release()
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
        kinds = [kind for kind, _, _ in host.supervisor.seen]
        assert lib.PVF_CTL_TARGET_GONE not in kinds  # told once, to the one before
        host.start()
        for i in range(3):
            host.nbd(i).write(4096 * i, bytes(4096))


def test_what_a_lost_socket_held_unread_is_never_executed() -> None:
    with serving(queues=2) as host:
        # A client that hangs up leaves requests behind that it sends again elsewhere: they are
        # older than whatever comes there.
        os.kill(host.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, host.process.pid, os.WSTOPPED)  # each thread of it
        host.nbd(1).request(Nbd.WRITE, 0, 4096, b"old!" * 1024)
        host.clients[1].close()
        host.nbd(0).request(Nbd.WRITE, 4096, 4096, b"also" * 1024)
        os.kill(host.process.pid, signal.SIGCONT)
        assert host.supervisor.wait(lib.PVF_CTL_TARGET_GONE).queue == 1
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
        assert not host.backends[1].log
        assert host.disk[:4096] == bytes(4096)
        assert closed(host.clients[0])


def test_nothing_is_received_once_a_request_of_any_queue_is_overdue() -> None:
    """As the kernel would send it again on another socket."""
    with serving(queues=2) as host:
        began = time.monotonic()
        in_ring(host, 0)
        nbd, served = host.nbd(1), 0
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < lib.PVF_NBD_PATIENCE_SECONDS + PATIENCE:
                nbd.read(0, 4096)
                served += 1
                time.sleep(0.05)
        assert served
        # Whichever looked first: queue 0 does at its watchdog's ticks.
        assert host.supervisor.wait(lib.PVF_CTL_TARGET_GONE).error == errno.ETIMEDOUT
        assert time.monotonic() - began >= lib.PVF_NBD_PATIENCE_SECONDS - 0.5
        assert closed(host.clients[0])
        host.backends[0].release()
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
        host.start()
        host.nbd(1).write(0, bytes(4096))


class Refusing(Backend):
    """Offers flush and does not have it."""

    def execute(self, request: Request) -> int:
        return -2 if request.op == 3 else super().execute(request)


def test_a_feature_that_is_not_there_is_told_once_for_the_device() -> None:
    with serving(queues=3, backend=Refusing) as host:
        with pytest.raises(NbdError, match="95"):
            host.nbd(2).flush()
        off = host.supervisor.wait(lib.PVF_CTL_FEATURE_OFF)
        assert (off.feature, off.queue) == (lib.PVF_BLK_FLUSH, 2)
        for queue in (0, 1):
            with pytest.raises(NbdError, match="95"):
                host.nbd(queue).flush()
        host.quiesce()
        kinds = [kind for kind, _, _ in host.supervisor.seen]
        assert kinds.count(lib.PVF_CTL_FEATURE_OFF) == 1
        supervise_again(host)
        assert host.supervisor.wait(lib.PVF_CTL_FEATURE_OFF).feature == lib.PVF_BLK_FLUSH


def test_a_stall_names_its_queue() -> None:
    with Host(queues=2) as host:
        host.stall = 1
        host.attach()
        host.start()
        in_ring(host, 1)
        stalled = host.supervisor.wait(lib.PVF_CTL_STALLED)
        assert (stalled.queue, stalled.in_flight) == (1, 1)
        assert stalled.seconds >= 1
        host.backends[1].release()
        stalled = host.supervisor.wait(lib.PVF_CTL_STALLED)
        assert (stalled.queue, stalled.seconds) == (1, 0)


def test_killing_the_worker_ends_it_for_the_peers_of_all_queues() -> None:
    with serving(queues=4) as host:
        in_ring(host, 3)
        host.process.send_signal(signal.SIGKILL)
        host.process.wait(PATIENCE)
        for client, backend in zip(host.clients, host.backends, strict=True):
            assert closed(client)
            backend.join(PATIENCE)
            assert not backend.is_alive()


def test_exit_ends_all_threads_with_status_0() -> None:
    with serving(queues=4) as host:
        host.simple(lib.PVF_CTL_EXIT)
        assert host.process.wait(PATIENCE) == 0


def test_parking_keeps_the_ports_of_all_queues() -> None:
    with serving(queues=3) as host:
        host.quiesce()
        host.detach(lib.PVF_DETACH_PARK)
        for pages, backend in zip(host.all_pages, host.backends, strict=True):
            assert pages.hub is not None
            assert pages.hub.recv(1) == b""  # the pages are freed
            backend.event()
            # The hub's connection of the event channel has no end yet.
            assert not select.select([backend.port.hub], [], [], 0)[0]
            assert backend.is_alive()
        host.simple(lib.PVF_CTL_EXIT)
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_EXIT, errno.EBUSY)


def test_descriptors_of_all_queues_are_closed_by_a_detach() -> None:
    with Host(queues=4) as host:
        folder = Path(f"/proc/{host.process.pid}/fd")
        before = len(list(folder.iterdir()))
        for _ in range(5):
            host.attach()
            host.start()
            for queue in range(4):
                in_ring(host, queue, 4096 * queue)
            host.detach()
            assert len(list(folder.iterdir())) == before


def test_an_unanswered_queue_does_not_hold_up_the_others() -> None:
    with serving(queues=2) as host:
        in_ring(host, 0)
        for i in range(50):
            host.nbd(1).write(4096 * i, bytes([i]) * 4096)
        host.backends[0].release()
        host.quiesce()


def switches(pid: int) -> dict[str, int]:
    """How often each thread of a process has been put to sleep by its own wish."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                found[task.name] = int(line.split()[1])
    return found


@pytest.mark.skipif(
    "PVFRONT_SANITIZED" in os.environ, reason="a sanitizer has a thread of its own that wakes up"
)
def test_an_idle_worker_of_several_queues_does_not_wake_up() -> None:
    with serving(queues=4) as host:
        for queue in range(4):
            host.nbd(queue).write(4096 * queue, bytes(4096))
        pid = host.process.pid
        assert len(switches(pid)) >= 5

        def still() -> bool:
            before = switches(pid)
            time.sleep(1.5)  # three ticks of a watchdog that would not stop
            return switches(pid) == before

        wait_for("1.5 s in which no thread of the worker moves", still)


def test_clients_of_all_queues_that_never_read_do_not_stop_the_control_connection() -> None:
    with serving(queues=3, pool_pages=48) as host:
        for queue in range(3):
            nbd = host.nbd(queue)
            for i in range(64):
                nbd.request(Nbd.READ, 65536 * (i % 16), 65536)
        for queue in range(3):
            wait_for(
                f"queue {queue} is blocked", lambda queue=queue: host.stats(queue).target_blocked
            )
        host.start(keep=True, sectors=8 << 11)  # a resize
        host.detach()
        body: Any = ffi.new("struct pvf_ctl_simple *")
        host.supervisor.send(lib.PVF_CTL_QUIESCE, body, 1)
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
