# SPDX-License-Identifier: BSD-2-Clause
"""The control protocol of docs/architecture.md, message by message, with the real worker."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
from pathlib import Path

import pytest
from embedded import Host, Nbd, Supervisor, binary, serving, text
from ringbackend import Port, hand_over, sealed
from waiting import PATIENCE, wait_for

from pvfront.abi import ffi, lib
from pvfront.host import _host


def descriptors(host: Host) -> int:
    return len(list(Path(f"/proc/{host.process.pid}/fd").iterdir()))


def header(kind: int, generation: int, length: int) -> bytes:
    return struct.pack("=IHHII", lib.PVF_CTL_MAGIC, lib.PVF_CTL_VERSION, kind, generation, length)


def test_hello_says_who_is_there_and_brings_the_statistics() -> None:
    with Host(name="vbd-51760") as host:
        hello = host.supervisor.hello
        assert hello.state == lib.PVF_IDLE
        assert hello.hdr.generation == 0
        assert hello.pid == host.process.pid
        assert text(hello.name) == "vbd-51760"
        assert not hello.targets
        assert host.stats().generation == 0


def test_the_statistics_cannot_be_written_by_who_reads_them() -> None:
    with Host() as host:
        fd = host.supervisor.stats_fd
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE | mmap.PROT_READ)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
        with pytest.raises(OSError, match="Invalid argument"):
            os.ftruncate(fd, 0)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            mmap.mmap(again, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE | mmap.PROT_READ)
        os.close(again)


def test_every_kind_of_bad_packet_gets_an_error_and_leaks_no_descriptor() -> None:
    with serving() as host:
        supervisor = host.supervisor
        good = header(lib.PVF_CTL_QUIESCE, 1, 16)
        before = descriptors(host)
        null = os.open("/dev/null", os.O_RDWR)
        for packet in [
            b"x",
            good[:15],
            good + b"x",
            b"XXXX" + good[4:],
            good[:4] + b"\x09\x00" + good[6:],
            header(99, 1, 16),
            header(lib.PVF_CTL_HELLO, 1, 16),
            header(lib.PVF_CTL_ATTACH, 2, 16),
            header(lib.PVF_CTL_START, 1, 16),
            b"\0" * 9000,
        ]:
            for fds in ([], [null], [null] * 3, [null] * 20):
                supervisor.raw(packet, fds)
                assert supervisor.error()[1] == errno.EINVAL
        supervisor.raw(good, [null] * 5)
        _, number, what = supervisor.error()
        assert number == errno.EINVAL
        assert "descriptors" in what
        os.close(null)
        assert descriptors(host) == before
        host.nbd().write(0, b"still here" + bytes(502))


def test_random_packets_do_not_disturb_the_data_path() -> None:
    rng = random.Random(8)
    with serving() as host:
        attach = bytes(ffi.buffer(host.attach_body(), ffi.sizeof("struct pvf_ctl_attach")))
        start = bytes(ffi.buffer(host.start_body()))
        for _ in range(300):
            body = bytearray(rng.choice([attach, start, rng.randbytes(rng.randint(16, 300))]))
            kind = rng.choice([lib.PVF_CTL_ATTACH, lib.PVF_CTL_START])
            # A generation that was never attached: nothing of this may be obeyed.
            generation = rng.choice([0, 77, 0xFFFFFFFF]) if kind != lib.PVF_CTL_ATTACH else 1
            body[:16] = header(kind, generation, len(body))
            for _ in range(rng.randint(0, 3)):
                body[rng.randrange(16, len(body))] = rng.randrange(256)
            host.supervisor.raw(bytes(body))
            host.supervisor.error()
        host.nbd().write(0, bytes(4096))
        assert host.stats().state == lib.PVF_RUNNING


def test_a_message_of_another_generation_is_refused_and_ignored() -> None:
    with serving() as host:
        host.detach()
        host.attach()
        for generation in (1, 3):
            host.supervisor.send(lib.PVF_CTL_DETACH, ffi.new("struct pvf_ctl_detach *"), generation)
            assert host.supervisor.error()[:2] == (lib.PVF_CTL_DETACH, errno.ESTALE)
        host.start()
        host.nbd().write(0, bytes(512))


def test_attach_needs_a_newer_generation_and_an_idle_worker() -> None:
    with Host() as host:
        idle = descriptors(host)
        host.attach()
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [a.fileno(), b.fileno()]
        host.supervisor.send(lib.PVF_CTL_ATTACH, host.attach_body(), 2, fds)
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_ATTACH, errno.EBUSY)
        host.detach()
        host.supervisor.send(lib.PVF_CTL_ATTACH, host.attach_body(), 1, fds)
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_ATTACH, errno.ESTALE)
        assert descriptors(host) == idle
        a.close()
        b.close()


def refused(host: Host, event: int, pages: int, **override: int) -> str:
    """What the worker says of these two descriptors. Nothing of them may stay."""
    before = descriptors(host)
    host.supervisor.send(
        lib.PVF_CTL_ATTACH, host.attach_body(**override), host.generation + 1, [event, pages]
    )
    what, _, why = host.supervisor.error()
    assert what == lib.PVF_CTL_ATTACH
    assert descriptors(host) == before
    return why


def test_attach_refuses_descriptors_that_are_no_provider() -> None:
    with Host() as host, contextlib.ExitStack() as stack:
        host.attach()
        host.detach()
        null = os.open("/dev/null", os.O_RDWR)
        stack.callback(os.close, null)
        stream, other = socket.socketpair()
        seq, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (stream, other, seq, end):
            stack.enter_context(sock)
        assert host.pages is not None
        memfd = host.pages.fd
        assert "gntalloc" in refused(host, null, memfd)
        assert "gntalloc" in refused(host, null, seq.fileno())
        assert "the ring cannot be mapped" in refused(host, null, null)
        for event in (memfd, stream.fileno()):
            assert "neither /dev/xen/evtchn nor" in refused(host, event, seq.fileno())
        for pages in (memfd, null, stream.fileno()):
            assert "so the pages must be too" in refused(host, seq.fileno(), pages)


EVENT, PAGES = _host.lib.PVF_HOST_EVENT, _host.lib.PVF_HOST_PAGES


def test_attach_refuses_pages_that_do_not_wait_or_could_vanish() -> None:
    with Host() as host, contextlib.ExitStack() as stack:
        host.attach()
        host.detach()

        def attempt(kind: int, fds: list[int], **fields: int) -> str:
            port = Port()
            stack.callback(port.close)
            hub, theirs = hand_over(kind, fds, **fields)
            with hub, theirs:
                return refused(host, port.theirs.fileno(), theirs.fileno())

        good, bare = sealed("g", 4 << 20), sealed("g", 4 << 20, seal=False)
        small = sealed("g", 4096)
        for fd in (good, bare, small):
            stack.callback(os.close, fd)
        empty, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with empty, end, Port() as port:
            assert "no pages wait" in refused(host, port.theirs.fileno(), empty.fileno())
        assert "no pages wait" in attempt(EVENT, [good])
        assert "no pages wait" in attempt(PAGES, [good], magic=1)
        assert "no pages wait" in attempt(PAGES, [])
        assert "no pages wait" in attempt(PAGES, [good, good])
        for fd in (bare, small, host.supervisor.sock.fileno()):
            assert "does not cover ring and pool, or can be shrunk" in attempt(PAGES, [fd])
        assert host.pages is not None
        for beyond in ({"pool_offset": 1 << 40}, {"ring_offset": 1 << 40}):
            with Port() as port, host.pages.hand_over() as pages:
                why = refused(host, port.theirs.fileno(), pages.fileno(), **beyond)
            assert "does not cover ring and pool" in why
        host.attach()


def test_attach_refuses_an_event_channel_that_does_not_wait_or_could_vanish() -> None:
    with Host() as host, contextlib.ExitStack() as stack:
        host.attach()
        host.detach()
        assert host.pages is not None
        spare = Port()
        stack.callback(spare.close)
        bare, empty = sealed("channel", 4096, seal=False), sealed("channel", 4096)
        for fd in (bare, empty):
            stack.callback(os.close, fd)
        eventfds = [spare.worker_fd, spare.backend_fd]

        def attempt(kind: int, fds: list[int], **fields: int) -> str:
            assert host.pages is not None
            hub, theirs = hand_over(kind, fds, **{"port": 5, **fields})
            with hub, theirs, host.pages.hand_over() as pages:
                return refused(host, theirs.fileno(), pages.fileno())

        good = [spare.fd, *eventfds]
        assert "no event channel waits" in attempt(PAGES, good)
        assert "no event channel waits" in attempt(EVENT, good, magic=1)
        for fds in ([], good[:2], [*good, spare.fd], good * 3):
            assert "no event channel waits" in attempt(EVENT, fds)
        assert "not the one that ATTACH names" in attempt(EVENT, good, port=6)
        assert "not the one that ATTACH names" in attempt(EVENT, good, side=2)
        for fd in (bare, empty, spare.hub.fileno()):
            assert "no sealed page with its magic" in attempt(EVENT, [fd, *eventfds])
        assert "cannot be watched" in attempt(EVENT, [spare.fd, bare, spare.backend_fd])
        with host.pages.hand_over() as pages, spare.theirs as theirs:
            theirs.recv(100)  # so it is empty
            assert "no event channel waits" in refused(host, theirs.fileno(), pages.fileno())
        host.attach()


def test_a_new_nbd_socket_is_refused_while_the_ring_holds_requests() -> None:
    with serving() as host:
        host.backend.hold = True
        host.nbd().request(Nbd.WRITE, 0, 512, bytes(512))
        wait_for("the write in the ring", lambda: host.backend.held)
        host.client.close()
        host.supervisor.wait(lib.PVF_CTL_TARGET_GONE)
        ours, theirs = socket.socketpair()
        host.supervisor.send(
            lib.PVF_CTL_START, host.start_body(), host.generation, [theirs.fileno()]
        )
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_START, errno.EBUSY)
        theirs.close()
        assert ours.recv(1) == b""  # refused: closed, not kept
        ours.close()
        host.backend.release()
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
        host.client = None
        host.start()
        assert host.nbd().read(0, 512) == bytes(512)


def waiting(**options: int) -> Host:
    """A host whose worker is RUNNING without a client."""
    host = Host()
    host.attach()
    host.start(keep=True, options=lib.PVF_START_CLIENTS, **options)
    return host


def test_without_a_socket_start_is_refused_unless_clients_come_and_go() -> None:
    with Host() as host:
        host.attach()
        host.supervisor.send(lib.PVF_CTL_START, host.start_body(), host.generation)
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_START, errno.ENOTCONN)
        host.start(keep=True, options=lib.PVF_START_CLIENTS)
        assert host.stats().state == lib.PVF_RUNNING


def test_an_unknown_option_of_start_is_refused() -> None:
    with Host() as host:
        host.attach()
        host.supervisor.send(lib.PVF_CTL_START, host.start_body(options=2), host.generation)
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_START, errno.EINVAL)


def test_clients_come_and_go_within_one_generation() -> None:
    with waiting() as host:
        for round_ in range(3):
            host.start(options=lib.PVF_START_CLIENTS)
            host.nbd().write(512 * round_, bytes([65 + round_]) * 512)
            host.client.close()
            gone = host.supervisor.wait(lib.PVF_CTL_TARGET_GONE)
            assert (gone.error, gone.hdr.generation) == (0, 1)
            host.supervisor.wait(lib.PVF_CTL_DRAINED)
            host.client = None
        assert host.disk[:1536] == b"A" * 512 + b"B" * 512 + b"C" * 512


def test_a_second_client_is_refused_while_one_is_connected() -> None:
    with waiting() as host:
        host.start(options=lib.PVF_START_CLIENTS)
        ours, theirs = socket.socketpair()
        body = host.start_body(options=lib.PVF_START_CLIENTS)
        host.supervisor.send(lib.PVF_CTL_START, body, host.generation, [theirs.fileno()])
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_START, errno.EBUSY)
        theirs.close()
        assert ours.recv(1) == b""
        ours.close()
        host.nbd().write(0, bytes(512))


def test_a_next_client_waits_until_the_formers_requests_have_left_the_ring() -> None:
    with waiting() as host:
        host.start(options=lib.PVF_START_CLIENTS)
        host.backend.hold = True
        host.nbd().request(Nbd.WRITE, 0, 512, b"1" * 512)
        wait_for("the write in the ring", lambda: host.backend.held)
        host.client.close()
        assert host.supervisor.wait(lib.PVF_CTL_TARGET_GONE).in_flight == 1
        ours, theirs = socket.socketpair()
        body = host.start_body(options=lib.PVF_START_CLIENTS)
        host.supervisor.send(lib.PVF_CTL_START, body, host.generation, [theirs.fileno()])
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_START, errno.EBUSY)
        ours.close()
        theirs.close()
        # A resize meanwhile changes nothing of that.
        host.start(keep=True, options=lib.PVF_START_CLIENTS, sectors=4096)
        assert host.stats().state == lib.PVF_TARGET_LOST
        host.backend.release()
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
        host.client = None
        host.start(options=lib.PVF_START_CLIENTS)
        assert host.nbd().read(0, 512) == b"1" * 512


def test_without_a_client_quiesce_and_detach_are_answered_at_once() -> None:
    with waiting() as host:
        host.quiesce()
        host.detach(lib.PVF_DETACH_KEEP_TARGET)
        host.attach()
        host.start(keep=True, options=lib.PVF_START_CLIENTS)
        host.start(options=lib.PVF_START_CLIENTS)
        host.nbd().write(0, bytes(512))


def test_quiesce_waits_for_the_ring_and_start_goes_on_where_it_stopped() -> None:
    with serving() as host:
        host.backend.hold = True
        nbd = host.nbd()
        first = nbd.request(Nbd.WRITE, 0, 512, b"1" * 512)
        wait_for("the write in the ring", lambda: host.backend.held)
        host.simple(lib.PVF_CTL_QUIESCE)
        wait_for("DRAINING", lambda: host.stats().state == lib.PVF_DRAINING)
        second = nbd.request(Nbd.WRITE, 512, 512, b"2" * 512)
        host.backend.release()
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
        nbd.check(first)
        assert len(host.backend.log) == 1
        host.start(keep=True)
        nbd.check(second)
        assert host.disk[:1024] == b"1" * 512 + b"2" * 512


def test_quiesce_without_anything_in_the_ring_is_answered_at_once() -> None:
    with Host() as host:
        host.simple(lib.PVF_CTL_QUIESCE)
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
        host.attach()
        host.quiesce()
        host.start()
        host.quiesce()
        host.quiesce()


def test_a_request_cut_by_a_quiesce_is_finished_in_the_next_generation() -> None:
    data = random.Random(1).randbytes(1 << 20)
    with serving(pool_pages=44) as host:
        nbd = host.nbd()
        wire = Nbd.HEADER.pack(0x25609513, 0, Nbd.WRITE, b"12345678", 0, len(data)) + data
        cut = 28 + 11 * 4096 * 5  # after five whole pieces
        nbd.sock.sendall(wire[:cut])
        wait_for("five pieces", lambda: host.stats().write.ring_requests == 5)
        host.quiesce()
        host.detach(lib.PVF_DETACH_KEEP_TARGET)
        host.attach()
        host.start(keep=True)
        nbd.sock.sendall(wire[cut:])
        assert nbd.reply() == (b"12345678", 0)
        assert nbd.read(0, 1 << 20) == data


def test_keep_target_gives_the_socket_up_when_its_bytes_lie_in_the_old_pages() -> None:
    with serving() as host:
        nbd = host.nbd()
        nbd.sock.sendall(Nbd.HEADER.pack(0x25609513, 0, Nbd.WRITE, b"1" * 8, 0, 8192) + bytes(5000))
        wait_for("half a write", lambda: host.stats().pool_free < host.stats().pool_pages)
        host.quiesce()
        host.detach(lib.PVF_DETACH_KEEP_TARGET)
        kinds = [kind for kind, _, _ in host.supervisor.seen]
        assert kinds[-2:] == [lib.PVF_CTL_TARGET_GONE, lib.PVF_CTL_DETACHED]
        with pytest.raises(ConnectionError):
            nbd.reply()
        host.attach()
        host.start()
        host.nbd().write(0, bytes(8192))


def test_detach_closes_every_descriptor_of_the_generation() -> None:
    with Host() as host:
        before = descriptors(host)
        for _ in range(20):
            host.attach()
            host.start()
            host.nbd().write(0, bytes(65536))
            host.detach()
            assert descriptors(host) == before
            assert host.backend is not None
            host.backend.join(PATIENCE)  # the hub's connection ended: nobody holds the port
            assert not host.backend.is_alive()
            assert host.pages is not None
            assert host.pages.hub is not None
            assert host.pages.hub.recv(1) == b""
        maps = Path(f"/proc/{host.process.pid}/maps")
        if os.access(maps, os.R_OK):
            found = maps.read_text()
            assert "memfd:grants" not in found
            assert "memfd:channel" not in found


def test_detach_in_the_middle_of_everything_frees_everything() -> None:
    with Host() as host:
        before = descriptors(host)
        for _ in range(10):
            host.attach()
            host.start()
            host.backend.hold = True
            nbd = host.nbd()
            for i in range(20):
                nbd.request(Nbd.WRITE, 16384 * i, 16384, bytes(16384))
            wait_for("a ring full of requests", lambda: len(host.backend.held) >= 20)
            host.detach()
            assert descriptors(host) == before
            stats = host.stats()
            assert stats.in_flight == stats.nbd_pending == 0


def test_a_client_that_goes_away_is_reported_and_the_ring_drains() -> None:
    with serving() as host:
        host.backend.hold = True
        nbd = host.nbd()
        for i in range(5):
            nbd.request(Nbd.READ, 4096 * i, 4096)
        wait_for("5 reads in the ring", lambda: len(host.backend.held) == 5)
        host.client.close()
        gone = host.supervisor.wait(lib.PVF_CTL_TARGET_GONE)
        assert gone.error == 0
        assert gone.in_flight == 5
        wait_for("TARGET_LOST", lambda: host.stats().state == lib.PVF_TARGET_LOST)
        host.backend.release()
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
        host.client = None
        host.start()
        assert host.nbd().read(0, 4096) == bytes(4096)


def test_a_client_that_speaks_nonsense_is_disconnected_with_eproto() -> None:
    with serving() as host:
        host.client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert host.supervisor.wait(lib.PVF_CTL_TARGET_GONE).error == errno.EPROTO
        assert host.client.recv(1) == b""


def test_a_newer_supervisor_takes_over_and_the_data_path_goes_on() -> None:
    with serving() as host:
        nbd = host.nbd()
        nbd.write(0, b"1" * 512)
        newer = Supervisor(host.path)
        with pytest.raises(ConnectionError):
            host.supervisor.receive()
        host.supervisor.close()
        host.supervisor = newer
        assert newer.hello.state == lib.PVF_RUNNING
        assert newer.hello.hdr.generation == 1
        assert newer.hello.targets
        nbd.write(512, b"2" * 512)
        host.quiesce()
        assert host.disk[:1024] == b"1" * 512 + b"2" * 512


def test_without_any_supervisor_the_data_path_goes_on() -> None:
    with serving() as host:
        host.supervisor.close()
        nbd = host.nbd()
        for i in range(50):
            nbd.write(4096 * i, bytes([i]) * 4096)
        host.supervisor = Supervisor(host.path)
        assert host.supervisor.hello.state == lib.PVF_RUNNING


def test_what_broke_is_told_again_to_a_new_supervisor() -> None:
    with serving() as host:
        host.backend.hold = True
        host.nbd().request(Nbd.READ, 0, 512)
        wait_for("a read", lambda: host.backend.held)
        host.supervisor.close()
        host.backend.respond(12345, 0, 0)
        host.supervisor = Supervisor(host.path)
        assert host.supervisor.wait(lib.PVF_CTL_BROKEN).rule == 5


def test_start_while_running_takes_a_new_size() -> None:
    with serving() as host:
        host.start(keep=True, sectors=8)
        nbd = host.nbd()
        nbd.write(0, bytes(4096))
        with pytest.raises(Exception, match="NBD error 28"):
            nbd.write(4096, bytes(512))
        host.start(keep=True)
        nbd.write(4096, bytes(512))


def test_killing_the_worker_leaves_its_peers_with_an_end() -> None:
    with serving() as host:
        host.backend.hold = True
        nbd = host.nbd()
        nbd.request(Nbd.READ, 0, 512)
        wait_for("a read", lambda: host.backend.held)
        host.process.send_signal(signal.SIGKILL)
        host.process.wait(PATIENCE)
        with pytest.raises(ConnectionError):
            nbd.reply()
        host.backend.join(PATIENCE)
        assert not host.backend.is_alive()


def test_exit_ends_the_worker_with_status_0() -> None:
    with serving() as host:
        host.simple(lib.PVF_CTL_EXIT)
        assert host.process.wait(PATIENCE) == 0


def test_signals_of_a_service_manager_do_not_end_a_worker() -> None:
    with serving() as host:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            host.process.send_signal(number)
        host.nbd().write(0, bytes(512))


def test_once_the_machine_stops_sigterm_ends_a_worker_a_moment_later() -> None:
    with serving() as host:
        host.simple(lib.PVF_CTL_LAST)
        host.supervisor.wait(lib.PVF_CTL_NOTED)
        for number in (signal.SIGINT, signal.SIGHUP):
            host.process.send_signal(number)
        host.nbd().write(0, bytes(512))
        host.process.send_signal(signal.SIGTERM)
        host.ends = [-signal.SIGALRM]  # it went on until its alarm
        host.process.wait(PATIENCE)


def test_a_parked_worker_keeps_its_port_and_does_nothing_else() -> None:
    with serving() as host:
        host.quiesce()
        host.detach(lib.PVF_DETACH_PARK)
        assert host.pages is not None
        assert host.pages.hub is not None
        assert host.pages.hub.recv(1) == b""  # the pages are freed
        assert host.backend is not None
        host.backend.event()
        host.simple(lib.PVF_CTL_EXIT)
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_EXIT, errno.EBUSY)
        assert host.backend.is_alive()
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        host.supervisor.send(lib.PVF_CTL_ATTACH, host.attach_body(), 2, [a.fileno(), b.fileno()])
        assert host.supervisor.error()[:2] == (lib.PVF_CTL_ATTACH, errno.EBUSY)
        a.close()
        b.close()


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--name"],
        ["--name", ""],
        ["--name", "x" * 64],
        ["--name", "x", "--uid", "1"],
        ["--name", "x", "--uid", "-1", "--gid", "1"],
        ["--name", "x", "y"],
        ["--what"],
        ["--name", "x"],
    ],
)
def test_wrong_usage_is_explained_on_stderr(args: list[str]) -> None:
    done = subprocess.run(
        [binary(), *args], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 2
    assert "pvfront-worker: " in done.stderr
    assert "usage:" in done.stderr
