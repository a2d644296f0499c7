# SPDX-License-Identifier: BSD-2-Clause
"""The C structures as Python sees them, and the C ring against an independent model."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pvfront.abi import BlkStats, StatsUnreadable, ffi, lib, read_all_stats, read_stats
from pvfront.inventory import total

PAGE = 4096
SLOT = 112  # union blkif_sring_entry of x86_64
MASK = 0xFFFFFFFF


def test_the_structures_have_no_implicit_padding() -> None:
    # A structure without padding has the size of its members: what pvf_ctl.h promises, so that
    # messages can be compared as bytes.
    names = [
        "pvf_ctl_hdr",
        "pvf_ctl_attach",
        "pvf_ctl_start",
        "pvf_ctl_simple",
        "pvf_ctl_detach",
        "pvf_ctl_hello",
        "pvf_ctl_error",
        "pvf_ctl_broken",
        "pvf_ctl_target_gone",
        "pvf_ctl_feature_off",
        "pvf_ctl_stalled",
        "pvf_ctl_log",
        "pvf_blk_op_stats",
        "pvf_blk_stats",
    ]
    for name in names:
        kind = ffi.typeof(f"struct {name}")
        end = 0
        for field, info in kind.fields:
            assert info.offset == end, f"{name}.{field}"
            if info.type.kind != "array" or info.type.length is not None:
                end += ffi.sizeof(info.type)
        assert ffi.sizeof(kind) == end, name


def test_the_largest_attach_fits_into_a_message() -> None:
    size = ffi.sizeof("struct pvf_ctl_attach") + 4 * lib.PVF_MAX_POOL_PAGES
    assert size <= lib.PVF_CTL_MAX


def test_the_disk_ring_has_the_numbers_of_the_headers() -> None:
    assert lib.PVF_BLK_RING_SLOTS == 32
    assert lib.PVF_BLK_MAX_SEGMENTS == 11
    assert lib.pvf_ring_entries(PAGE, SLOT) == lib.PVF_BLK_RING_SLOTS


@given(st.integers(0, 1 << 20), st.integers(1, 4096))
def test_a_ring_holds_the_largest_power_of_two_of_slots_that_fits(size: int, entry: int) -> None:
    slots = lib.pvf_ring_entries(size, entry)
    fit = max(0, size - 64) // entry
    assert slots == (1 << (fit.bit_length() - 1) if fit else 0)


class Stats:
    """A statistics page that the test itself writes."""

    def __init__(self, queues: int = 1) -> None:
        self.fd = os.memfd_create("stats")
        os.ftruncate(self.fd, PAGE * queues)
        self.map = mmap.mmap(self.fd, PAGE * queues)
        self.pages = [
            ffi.cast("struct pvf_blk_stats *", ffi.addressof(ffi.from_buffer(self.map), PAGE * i))
            for i in range(queues)
        ]
        for page in self.pages:
            page.magic, page.version = lib.PVF_STATS_MAGIC, lib.PVF_STATS_VERSION
        self.page = self.pages[0]

    def close(self) -> None:
        del self.page, self.pages
        os.close(self.fd)


def test_statistics_are_read_field_by_field() -> None:
    stats = Stats()
    stats.page.state = 2
    stats.page.rejected = 1 << 40
    stats.page.write.bytes = 4096
    stats.page.discard.errors = 7
    got = read_stats(stats.fd)
    assert isinstance(got, BlkStats)
    assert (got.state, got.rejected, got.write.bytes, got.discard.errors) == (2, 1 << 40, 4096, 7)
    stats.close()


def test_each_queue_has_statistics_of_its_own_and_a_status_shows_their_sum() -> None:
    stats = Stats(3)
    for queue, page in enumerate(stats.pages):
        page.queue, page.queues, page.state, page.generation = queue, 3, 2, 7
        page.in_flight = page.write.requests = page.read.latency[5] = 1 << queue
    got = read_all_stats(stats.fd)
    assert [queue.queue for queue in got] == [0, 1, 2]
    assert read_stats(stats.fd, 2) == got[2]
    shown = total([asdict(queue) for queue in got])
    assert (shown["state"], shown["generation"], shown["queues"]) == (2, 7, 3)
    assert shown["in_flight"] == shown["write"]["requests"] == shown["read"]["latency"][5] == 7
    assert sum(shown["read"]["latency"]) == 7
    with pytest.raises(StatsUnreadable, match="no page of queue 3"):
        read_stats(stats.fd, 3)
    stats.close()


def test_statistics_never_come_half_written() -> None:
    stats = Stats()
    done = threading.Event()

    def writer() -> None:
        n = 0
        while not done.is_set():
            n += 1
            stats.page.sequence += 1
            stats.page.read.bytes = n
            stats.page.rejected = n
            stats.page.sequence += 1

    thread = threading.Thread(target=writer)
    thread.start()
    try:
        for _ in range(300):
            got = read_stats(stats.fd, attempts=100000)
            assert got.read.bytes == got.rejected
    finally:
        done.set()
        thread.join()
    stats.close()


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("magic", 1, "not a statistics page"),
        ("version", 99, "not a statistics page"),
        ("sequence", 3, "never stood still"),
    ],
)
def test_statistics_that_cannot_be_trusted_are_refused(field: str, value: int, what: str) -> None:
    stats = Stats()
    setattr(stats.page, field, value)
    with pytest.raises(StatsUnreadable, match=what):
        read_stats(stats.fd, attempts=20)
    stats.close()


def test_a_page_that_is_too_short_is_refused() -> None:
    fd = os.memfd_create("short")
    with pytest.raises(StatsUnreadable, match="no page of queue 0"):
        read_stats(fd)
    os.close(fd)


class RingModel(RuleBasedStateMachine):
    """The frontend's ring in C against both ends as Python integers, from any first index.

    The model knows only the text of io/ring.h: free-running 32-bit indices, a request is visible
    once req_prod passed it, and each end is notified when its event index is reached.
    """

    @initialize(
        first=st.one_of(st.integers(0, MASK), st.sampled_from([0, 1 << 31, MASK - 5, MASK - 40])),
        order=st.integers(0, 4),
    )
    def start(self, first: int, order: int) -> None:
        size = PAGE << order
        self.memory = ffi.new("char[]", size)
        self.shared = memoryview(ffi.buffer(self.memory))
        self.ring = ffi.new("struct pvf_ring *")
        lib.pvf_ring_init(self.ring, self.memory, size, SLOT, first)
        self.slots = 1 << ((size - 64) // SLOT).bit_length() - 1
        self.filled = self.published = self.taken = self.answered = self.read = first
        self.fault = ffi.new("struct pvf_fault *")
        self.responses: list[int] = []
        self.next = 1

    def get(self, offset: int) -> int:
        return int(struct.unpack_from("=I", self.shared, offset)[0])

    def set(self, offset: int, value: int) -> None:
        struct.pack_into("=I", self.shared, offset, value & MASK)

    def free(self) -> int:
        return self.slots - (self.filled - self.read & MASK)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "ring"):
            return
        assert lib.pvf_ring_free(self.ring) == self.free()
        assert self.get(0) == self.published

    @rule(count=st.integers(1, 40))
    def put(self, count: int) -> None:
        for _ in range(count):
            fits = self.free() > 0
            request = struct.pack("=QQ", 0, self.next)
            assert lib.pvf_ring_put(self.ring, request, len(request)) == fits
            if fits:
                self.filled = self.filled + 1 & MASK
                self.next += 1

    @rule(event=st.integers(-3, 40))
    def push(self, event: int) -> None:
        wanted = self.published + event & MASK
        self.set(4, wanted)
        news = [self.published + i & MASK for i in range(self.filled - self.published & MASK)]
        reached = any(index + 1 & MASK == wanted for index in news)
        assert lib.pvf_ring_push(self.ring) == reached
        self.published = self.filled

    @rule(count=st.integers(1, 40))
    def answer(self, count: int) -> None:
        for _ in range(min(count, self.published - self.answered & MASK)):
            at = 64 + SLOT * (self.answered % self.slots)
            (_, ident) = struct.unpack_from("=QQ", self.shared, at)
            struct.pack_into("=QQ", self.shared, at, ident, 0)
            self.responses.append(ident)
            self.answered = self.answered + 1 & MASK
        self.set(8, self.answered)

    @rule(final=st.booleans())
    def consume(self, final: bool) -> None:
        look = lib.pvf_ring_final_check if final else lib.pvf_ring_poll
        count = look(self.ring, self.fault)
        assert self.fault.rule == 0
        assert count == self.answered - self.read & MASK
        response = ffi.new("uint64_t[2]")
        for _ in range(count):
            lib.pvf_ring_get(self.ring, response, 16)
            assert response[0] == self.responses.pop(0)
            self.read = self.read + 1 & MASK
        if final and not count:
            assert self.get(12) == self.read + 1 & MASK

    @precondition(lambda self: hasattr(self, "ring"))
    @rule(lie=st.integers(1, MASK), final=st.booleans())
    def lie(self, lie: int, final: bool) -> None:
        """rsp_prod anywhere but where it may be: found, and nothing is consumed."""
        seen = int(self.ring.rsp_seen)
        allowed = self.published - seen & MASK
        if lie <= allowed:
            return
        honest = self.get(8)
        self.set(8, seen + lie)
        look = lib.pvf_ring_final_check if final else lib.pvf_ring_poll
        fault = ffi.new("struct pvf_fault *")
        assert look(self.ring, fault) == 0
        assert fault.rule == (2 if lie > MASK // 2 else 1)
        assert fault.value == seen + lie & MASK
        assert ffi.string(fault.field) == b"rsp_prod"
        self.set(8, honest)


RingModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRing = RingModel.TestCase
