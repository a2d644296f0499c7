# SPDX-License-Identifier: BSD-2-Clause
"""Bytes through a real worker: what is written is read, whatever its size, depth and pool."""

from __future__ import annotations

import random
import threading

import pytest
from embedded import Nbd, NbdError, serving
from ringbackend import DISCARD, ERROR, FLUSH, OKAY, READ, SECTOR, WRITE, Backend, Request
from waiting import PATIENCE, wait_for

from pvfront.abi import lib


class Mirror:
    """A client that keeps `depth` requests going and knows what every byte must be.

    The disk is cut into one lane per outstanding request, so that no two requests meet.
    """

    def __init__(self, nbd: Nbd, size: int, depth: int, seed: int, *, align: int = SECTOR) -> None:
        self.nbd, self.depth, self.align = nbd, depth, align
        self.lane = size // depth // align * align
        self.random = random.Random(seed)
        self.model = bytearray(self.random.randbytes(size))
        self.slots = threading.Semaphore(depth)
        self.free = list(range(depth))
        self.pending: dict[bytes, tuple[int, int, int, int]] = {}
        self.problem: BaseException | None = None

    def fill(self) -> None:
        step = 1 << 20
        for at in range(0, len(self.model), step):
            self.nbd.write(at, bytes(self.model[at : at + step]))

    def run(self, count: int, largest: int) -> None:
        largest = min(largest, self.lane)
        reader = threading.Thread(target=self._read, args=(count,))
        reader.start()
        for _ in range(count):
            if not self.slots.acquire(timeout=PATIENCE) or self.problem is not None:
                break
            lane = self.free.pop()
            kind = self.random.choice(
                [Nbd.READ, Nbd.READ, Nbd.WRITE, Nbd.WRITE, Nbd.FLUSH, Nbd.TRIM]
            )
            length = self.align * self.random.randint(
                1, self.random.choice([8, largest]) // self.align or 1
            )
            at = lane * self.lane + self.align * self.random.randint(
                0, (self.lane - length) // self.align
            )
            payload, flags = b"", 0
            if kind == Nbd.WRITE:
                payload = self.random.randbytes(length)
                self.model[at : at + length] = payload
                flags = self.random.choice([0, 0, 0, Nbd.FUA])
            elif kind == Nbd.TRIM:
                self.model[at : at + length] = bytes(length)
            elif kind == Nbd.FLUSH:
                at = length = 0
            handle = self.nbd.handle()
            self.pending[handle] = (kind, lane, at, length)
            self.nbd.sock.sendall(
                Nbd.HEADER.pack(0x25609513, flags, kind, handle, at, length) + payload
            )
        reader.join(PATIENCE)
        if self.problem is not None:
            raise self.problem
        assert not reader.is_alive()
        assert not self.pending

    def _read(self, count: int) -> None:
        try:
            for _ in range(count):
                handle, error = self.nbd.reply()
                kind, lane, at, length = self.pending.pop(handle)
                assert error == 0
                if kind == Nbd.READ:
                    assert self.nbd.exactly(length) == self.model[at : at + length], hex(at)
                self.free.append(lane)
                self.slots.release()
        except BaseException as error:
            self.problem = error
            self.slots.release()


@pytest.mark.parametrize("size", [512, 4096, 44 << 10, 45568, 1 << 20, 8 << 20])
def test_what_is_written_is_read(size: int) -> None:
    data = random.Random(size).randbytes(size)
    with serving() as host:
        nbd = host.nbd()
        nbd.write(0, data)
        assert nbd.read(0, size) == data
        assert bytes(host.disk[:size]) == data


@pytest.mark.parametrize("depth", [1, 2, 16, 64])
def test_random_requests_at_any_depth_keep_their_data(depth: int) -> None:
    with serving() as host:
        mirror = Mirror(host.nbd(), len(host.disk), depth, seed=depth)
        mirror.fill()
        mirror.run(1500, 1 << 20)
        assert host.disk == mirror.model

        def held() -> int:
            stats = host.stats()
            return stats.in_flight + stats.nbd_pending + stats.pool_pages - stats.pool_free

        wait_for("nothing is held any more", lambda: not held())


@pytest.mark.parametrize("pool", [2, 11, 22, 64])
def test_random_requests_through_a_small_pool_keep_their_data(pool: int) -> None:
    with serving(pool_pages=pool) as host:
        mirror = Mirror(host.nbd(), len(host.disk), 16, seed=pool)
        mirror.fill()
        mirror.run(600, 256 << 10)
        assert host.disk == mirror.model


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_rings_of_several_pages_work(order: int) -> None:
    with serving(ring_pages=1 << order, pool_pages=1056) as host:
        mirror = Mirror(host.nbd(), len(host.disk), 32, seed=order)
        mirror.fill()
        mirror.run(400, 256 << 10)
        assert host.disk == mirror.model
        assert host.stats().ring_slots == 1 << ((4096 << order) // 112).bit_length() - 1


@pytest.mark.parametrize("pool", [22, 256])
def test_a_32_mib_request_streams_through_a_small_pool(pool: int) -> None:
    size = 32 << 20
    data = random.Random(pool).randbytes(size)
    with serving(disk_size=size, pool_pages=pool) as host:
        nbd = host.nbd()
        nbd.write(0, data)
        assert host.disk == data
        assert nbd.read(0, size) == data
        nbd.write(0, b"\x11" * 512)  # the stream is still in step
        assert nbd.read(0, 1024) == b"\x11" * 512 + data[512:1024]


@pytest.mark.parametrize("sector_size", [1024, 4096])
def test_no_piece_of_a_request_splits_a_logical_sector(sector_size: int) -> None:
    with serving(sector_size=sector_size, pool_pages=22) as host:
        mirror = Mirror(host.nbd(), len(host.disk), 8, seed=1, align=sector_size)
        mirror.fill()
        mirror.run(300, 128 << 10)
        assert host.backend is not None
        per = sector_size // SECTOR
        for request in host.backend.log:
            assert request.sector % per == 0
            for _, first, last in request.segments:
                assert first % per == 0
                assert (last + 1) % per == 0


def test_requests_that_make_no_sense_get_the_error_that_says_so() -> None:
    with serving() as host:
        nbd, end = host.nbd(), len(host.disk)
        for number, act in [
            (22, lambda: nbd.read(end, 512)),
            (28, lambda: nbd.write(end - 512, bytes(1024))),
            (22, lambda: nbd.read(1, 512)),
            (22, lambda: nbd.read(0, 0)),
            (22, lambda: nbd.trim(end, 512)),
            (22, lambda: nbd.check(nbd.request(7, 0, 512))),
            (22, lambda: nbd.read(0, (32 << 20) + 512)),
        ]:
            with pytest.raises(NbdError) as caught:
                act()
            assert caught.value.number == number
        nbd.write(0, b"a" * 512)
        assert nbd.read(0, 512) == b"a" * 512
        wait_for("7 refusals counted", lambda: host.stats().rejected == 7)
        assert host.backend is not None
        assert len(host.backend.log) == 2


def test_a_read_only_disk_refuses_writes_and_takes_reads() -> None:
    with serving(flags=lib.PVF_BLK_READ_ONLY) as host:
        nbd = host.nbd()
        with pytest.raises(NbdError) as caught:
            nbd.write(0, bytes(65536))
        assert caught.value.number == 1
        assert nbd.read(0, 4096) == bytes(4096)


def test_flush_and_trim_are_not_served_when_the_backend_has_neither() -> None:
    with serving(flags=0) as host:
        nbd = host.nbd()
        for act in (nbd.flush, lambda: nbd.trim(0, 4096)):
            with pytest.raises(NbdError) as caught:
                act()
            assert caught.value.number == 95
        with pytest.raises(NbdError):
            nbd.write(0, bytes(512), flags=Nbd.FUA)
        assert host.backend is not None
        assert not host.backend.log


def test_fua_is_answered_after_write_and_flush() -> None:
    with serving() as host:
        host.nbd().write(0, b"x" * 4096, flags=Nbd.FUA)
        assert host.backend is not None
        assert [request.op for request in host.backend.log] == [WRITE, FLUSH]


class NoFlush(Backend):
    def execute(self, request: Request) -> int:
        return -2 if request.op in (FLUSH, DISCARD) else super().execute(request)


def test_rule_7_eopnotsupp_is_an_error_and_turns_the_feature_off() -> None:
    with serving(backend=NoFlush) as host:
        nbd = host.nbd()
        for feature, act in [
            (lib.PVF_BLK_FLUSH, nbd.flush),
            (lib.PVF_BLK_DISCARD, lambda: nbd.trim(0, 4096)),
        ]:
            for _ in range(3):
                with pytest.raises(NbdError) as caught:
                    act()
                assert caught.value.number == 95
            assert host.supervisor.wait(lib.PVF_CTL_FEATURE_OFF).feature == feature
        assert host.backend is not None
        assert [request.op for request in host.backend.log] == [FLUSH, DISCARD]


class Failing(Backend):
    """Fails requests that touch the sectors of `bad`; what it read stays in the page."""

    bad: range = range(0)
    status = ERROR

    def execute(self, request: Request) -> int:
        status = super().execute(request)
        length = sum(last - first + 1 for _, first, last in request.segments)
        touched = range(request.sector, request.sector + length)
        hit = max(touched.start, self.bad.start) < min(touched.stop, self.bad.stop)
        return self.status if hit else status


@pytest.mark.parametrize("status", [ERROR, -3, 1, 32767])
def test_rule_7_an_unknown_status_is_an_i_o_error(status: int) -> None:
    with serving(backend=Failing) as host:
        assert isinstance(host.backend, Failing)
        host.backend.status = status
        host.backend.bad = range(100, 101)
        nbd = host.nbd()
        for act in (lambda: nbd.read(0, 1 << 20), lambda: nbd.write(0, bytes(1 << 20))):
            with pytest.raises(NbdError) as caught:
                act()
            assert caught.value.number == 5
        assert nbd.read(1 << 20, 4096) == bytes(4096)


class Lying(Backend):
    """Claims that reads succeeded and writes nothing into the pages."""

    def execute(self, request: Request) -> int:
        return OKAY if request.op == READ else super().execute(request)


def test_rule_19_a_read_that_brought_nothing_returns_no_stale_bytes() -> None:
    canary = b"CANARY!!" * 512
    with serving(backend=Lying, pool_pages=22) as host:
        nbd = host.nbd()
        for at in range(0, 4 << 20, 1 << 17):
            nbd.write(at, canary * 32)
        for length in (512, 4096, 65536, 1 << 20):
            assert nbd.read(0, length) == bytes(length)


def test_rule_17_a_short_write_shows_the_backend_no_bytes_of_earlier_requests() -> None:
    canary = b"CANARY!!" * 512
    with serving(pool_pages=22) as host:
        nbd = host.nbd()
        nbd.write(0, canary * 11)
        assert host.backend is not None
        assert host.pages is not None
        host.backend.hold = True
        handle = nbd.request(Nbd.WRITE, 0, 512, b"x" * 512)
        wait_for("the short write", lambda: host.backend and host.backend.held)
        [(gref, first, last)] = host.backend.held[0].segments
        assert (first, last) == (0, 0)
        page = host.pages.of(gref)
        assert host.pages.map[page : page + 4096] == b"x" * 512 + bytes(4096 - 512)
        host.backend.release()
        nbd.check(handle)


def test_rule_18_an_untrusted_backend_gets_pages_cleared_of_its_own_scribbles() -> None:
    with serving(backend=Lying, pool_pages=2) as host:
        host.detach()
        host.scrub = True
        host.attach()
        host.start()
        assert host.pages is not None
        host.pages.map[host.pages.pool_offset :] = b"\xbb" * 8192
        assert host.nbd().read(0, 512) == bytes(512)


def test_answers_in_any_order_are_matched_to_their_requests() -> None:
    with serving() as host:
        assert host.backend is not None
        host.disk[:] = random.Random(3).randbytes(len(host.disk))
        host.backend.hold = True
        nbd = host.nbd()
        handles = {nbd.request(Nbd.READ, 4096 * i, 4096): i for i in range(30)}
        wait_for("30 requests in the ring", lambda: len(host.backend.held) == 30)
        host.backend.release(lambda held: held[::-1])
        for _ in range(30):
            handle, error = nbd.reply()
            at = 4096 * handles.pop(handle)
            assert error == 0
            assert nbd.exactly(4096) == host.disk[at : at + 4096]


def test_a_client_that_never_reads_stops_only_itself_and_control_goes_on() -> None:
    with serving() as host:
        nbd = host.nbd()
        nbd.sock.setblocking(False)

        def ask_for_ever() -> None:
            while True:
                nbd.request(Nbd.READ, 0, 65536)

        with pytest.raises(BlockingIOError):
            ask_for_ever()
        wait_for("the worker is blocked", lambda: host.stats().target_blocked)
        host.quiesce()
        before = host.stats().wakeups
        host.simple(lib.PVF_CTL_QUIESCE)
        host.supervisor.wait(lib.PVF_CTL_DRAINED)
        assert host.stats().wakeups - before < 20


def test_a_burst_of_requests_costs_few_notifies_and_wakeups() -> None:
    with serving() as host:
        nbd = host.nbd()
        header = b"".join(
            Nbd.HEADER.pack(0x25609513, 0, Nbd.READ, bytes([i] * 8), 0, 512) for i in range(16)
        )
        before = host.stats()
        nbd.sock.sendall(header)
        for _ in range(16):
            nbd.reply()
            nbd.exactly(512)
        wait_for("16 reads in the statistics", lambda: host.stats().read.requests == 16)
        assert host.stats().notifies - before.notifies <= 2
