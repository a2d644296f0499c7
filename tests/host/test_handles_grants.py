# SPDX-License-Identifier: BSD-2-Clause
"""The guest's suite of grants on the embedded host, and what only it can show."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hubclient import dump
from test_grants import *  # noqa: F403
from waiting import wait_for

from pvfront.errors import ClosedError
from pvfront.gntalloc import GrantsExhausted
from pvfront.gntdev import GrantMapError
from pvfront.host._host import ffi, lib
from pvfront.host.handles import EmbeddedGrantMapper
from pvfront.platform import platform

pytestmark = []

# About a kernel that this host does not have.
del test_own_grants_are_refused_where_they_would_crash_the_kernel  # noqa: F821


@pytest.fixture(autouse=True)
def named(hub):
    """Every test here runs with $PVFRONT_HOST."""


@pytest.fixture
def backend(hub):
    """Domain 0's mapper."""
    with EmbeddedGrantMapper.open(own_domid=0) as opened:
        yield opened


def test_references_are_neither_in_a_row_nor_page_numbers(allocator):
    grefs = allocator.alloc(0, 200).grefs
    assert len(set(grefs)) == 200
    assert all(8 <= gref < 32768 for gref in grefs)
    assert sum(b == a + 1 for a, b in itertools.pairwise(grefs)) < 10
    assert list(grefs) != sorted(grefs)


def test_references_are_not_given_out_again_soon(allocator):
    seen = set()
    for _ in range(20):
        pool = allocator.alloc(0, 500)
        assert not seen & set(pool.grefs)
        seen |= set(pool.grefs)
        pool.free()


def test_a_page_that_is_still_mapped_stays_valid_until_it_is_unmapped(allocator, backend, hub):
    pool = allocator.alloc(0, 2)
    pool.map()[0] = 7
    mapping = backend.map(1, pool.grefs)
    pool.free()
    assert mapping.memory[0] == 7
    mapping.memory[0] = 8
    again = backend.map(1, pool.grefs[:1])
    assert again.memory[0] == 8, "the grant is valid as long as somebody maps it"
    again.unmap()
    assert dump(hub)["deferred"] == 2
    mapping.unmap()
    wait_for("the end of the deferred grants", lambda: dump(hub)["deferred"] == 0)
    with pytest.raises(GrantMapError, match="EINVAL"):
        backend.map(1, pool.grefs)


def test_pages_that_are_still_mapped_do_not_count_against_the_limit(allocator, backend, limit):
    limit.set(100)
    pool = allocator.alloc(0, 100)
    with backend.map(1, pool.grefs):
        pool.free()
        allocator.alloc(0, 100).free()


def test_a_mapper_that_is_killed_lets_go_of_its_pages(allocator, hub):
    pool = allocator.alloc(0, 3)
    program = (
        "import sys\n"
        "from pvfront.host.handles import EmbeddedGrantMapper\n"
        "m = EmbeddedGrantMapper.open(own_domid=0)\n"
        f"maps = [m.map(1, {list(pool.grefs)}) for _ in range(2)]\n"
        "print('mapped', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as peer:
        assert peer.stdout.readline() == b"mapped\n"
        pool.free()
        assert dump(hub)["deferred"] == 3
        peer.send_signal(signal.SIGKILL)
        wait_for("the dead mapper's pages", lambda: dump(hub)["deferred"] == 0)


def test_a_mapping_survives_the_close_of_its_mapper(allocator, hub):
    pool = allocator.alloc(0, 1)
    ours = pool.map()
    mapper = EmbeddedGrantMapper.open(own_domid=0)
    mapping = mapper.map(1, pool.grefs)
    mapper.close()
    with pytest.raises(ClosedError):
        mapper.map(1, pool.grefs)
    mapping.memory[0] = 9
    assert ours[0] == 9
    pool.free()
    assert dump(hub)["deferred"] == 1
    mapping.unmap()
    wait_for("the end of the mapping", lambda: dump(hub)["deferred"] == 0)


def test_a_mapping_in_use_is_not_unmapped(allocator, backend):
    pool = allocator.alloc(0, 1)
    mapping = backend.map(1, pool.grefs)
    view = memoryview(mapping.memory)
    with pytest.raises(BufferError):
        mapping.unmap()
    view.release()
    mapping.unmap()
    pool.free()


def test_a_read_only_mapping_cannot_be_written(allocator, backend):
    pool = allocator.alloc(0, 1, writable=False)
    with backend.map(1, pool.grefs, writable=False) as mapping, pytest.raises(TypeError):
        mapping.memory[0] = 1
    pool.free()


def test_of_many_grants_with_one_bad_none_stays_mapped(allocator, backend, hub):
    pool = allocator.alloc(0, 3)
    for bad in (0, 7, 40000, pool.grefs[0] ^ 1):
        with pytest.raises(GrantMapError):
            backend.map(1, [*pool.grefs, bad])
    assert dump(hub)["grants"][0]["mapped"] == 0
    pool.free()
    assert dump(hub)["deferred"] == 0


def test_a_page_that_was_freed_and_granted_again_begins_zeroed(allocator):
    for _ in range(3):
        pool = allocator.alloc(0, 4)
        ours = pool.map()
        assert bytes(ours) == bytes(pool.size)
        ours[:] = b"x" * pool.size
        pool.free()


def test_freed_memory_goes_back_to_the_machine(allocator):
    pool = allocator.alloc(0, 256)
    pool.map()[:] = b"x" * pool.size
    before = os.fstat(allocator._arena).st_blocks
    pool.free()
    assert before - os.fstat(allocator._arena).st_blocks >= 256 * 8


def test_the_notify_port_stays_bound_until_the_page_goes(allocator, channels):
    port = channels.bind_unbound(1)
    pool = allocator.alloc(0, 1)
    pool.set_unmap_notify(0, clear_byte=False, port=port)
    channels.unbind(port)
    assert channels.bind_unbound(1) != port
    pool.free()
    assert channels.bind_unbound(1) == port


def test_a_notify_port_is_let_go_when_another_takes_its_place(allocator, channels):
    first, second = channels.bind_unbound(1), channels.bind_unbound(1)
    pool = allocator.alloc(0, 1)
    pool.set_unmap_notify(0, clear_byte=False, port=first)
    pool.set_unmap_notify(0, clear_byte=False, port=second)
    channels.unbind(first)
    assert channels.bind_unbound(1) == first


def test_pages_that_were_handed_over_live_as_long_as_their_new_owner(backend, hub):
    with platform().grant_allocator() as giver:
        pool = giver.alloc(0, 2)
        fd = os.dup(giver.hand_over())
        with pytest.raises(ClosedError, match="handed over"):
            giver.alloc(0, 1)
    with socket.socket(fileno=os.dup(fd)) as sock:
        data, (arena,), _, _ = socket.recv_fds(sock, 4096, 8)
    packet = ffi.from_buffer("struct pvf_host_packet *", data)
    assert (packet.magic, packet.kind) == (lib.PVF_HOST_MAGIC, lib.PVF_HOST_PAGES)
    os.pwrite(arena, b"hello", pool.offset + 4096)
    with backend.map(1, pool.grefs) as mapping:
        assert mapping.memory[4096:4101] == b"hello"
    os.close(arena)
    os.close(fd)
    wait_for("the end of the pool", lambda: not dump(hub)["grants"])
    with pytest.raises(GrantMapError):
        backend.map(1, pool.grefs)


def test_more_pages_than_there_are_references_are_refused(allocator, limit):
    limit.set(100_000)
    with pytest.raises(GrantsExhausted, match="no room for 40000") as caught:
        allocator.alloc(0, 40_000)
    assert "limits.json" in caught.value.hint


def test_no_descriptor_is_left_behind(hub):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(3):
        with (
            platform().grant_allocator() as giver,
            EmbeddedGrantMapper.open(own_domid=0) as taker,
        ):
            pool = giver.alloc(0, 2)
            with taker.map(1, pool.grefs):
                pass
            mapping = taker.map(1, pool.grefs)
        mapping.unmap()
    assert count() <= before
