# SPDX-License-Identifier: BSD-2-Clause
"""Granted pages, mapped back into this domain: Xen's in a (PV) guest, the embedded host's in
tests/host.
"""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pvfront.errors import ClosedError
from pvfront.gntalloc import GrantsExhausted
from pvfront.gntdev import GrantMapError, GrantMapper
from pvfront.platform import platform

pytestmark = [pytest.mark.core, pytest.mark.services]

GUEST_TYPE = Path("/sys/hypervisor/guest_type")


@pytest.fixture
def room(limit):
    """Counts the pages that fit under the limit now, by asking."""

    def count() -> int:
        with platform().grant_allocator() as allocator:
            low, high = 0, limit.get() + 1
            while high - low > 1:
                middle = (low + high) // 2
                try:
                    allocator.alloc(0, middle).free()
                    low = middle
                except GrantsExhausted:
                    high = middle
            return low

    return count


def test_pages_begin_zeroed_and_bytes_are_seen_both_ways(allocator, mapper, domid):
    pool = allocator.alloc(domid, 3)
    ours = pool.map()
    assert bytes(ours) == b"\0" * pool.size
    with mapper.map(domid, pool.grefs) as theirs:
        for page in range(3):
            ours[page * 4096] = page + 1
            assert theirs.memory[page * 4096] == page + 1
            theirs.memory[page * 4096 + 4095] = page + 101
            assert ours[page * 4096 + 4095] == page + 101
    pool.free()


def test_each_reference_names_its_page(allocator, mapper, domid):
    pool = allocator.alloc(domid, 4)
    assert len(set(pool.grefs)) == 4
    ours = pool.map()
    for page in range(4):
        ours[page * 4096] = page + 1
    with mapper.map(domid, pool.grefs[::-1]) as theirs:
        assert [theirs.memory[page * 4096] for page in range(4)] == [4, 3, 2, 1]
    pool.free()


def test_several_pools_of_one_allocator_are_apart(allocator, mapper, domid):
    one, two = allocator.alloc(domid, 2), allocator.alloc(domid, 2)
    first, second = one.map(), two.map()
    first[0], second[0] = 1, 2
    with mapper.map(domid, [one.grefs[0], two.grefs[0]]) as theirs:
        assert (theirs.memory[0], theirs.memory[4096]) == (1, 2)
    one.free()
    second[0] = 3
    assert second[0] == 3
    two.free()


def test_read_only_grants_cannot_be_mapped_writable(allocator, mapper, domid):
    pool = allocator.alloc(domid, 1, writable=False)
    ours = pool.map()
    ours[0] = 42
    with pytest.raises(GrantMapError):
        mapper.map(domid, pool.grefs)
    with mapper.map(domid, pool.grefs, writable=False) as theirs:
        assert theirs.memory[0] == 42
    pool.free()


def test_a_grant_for_another_domain_cannot_be_mapped(allocator, mapper, domid):
    pool = allocator.alloc(0, 1)
    with pytest.raises(GrantMapError, match=f"domain {domid}"):
        mapper.map(domid, pool.grefs)
    pool.free()


def test_own_grants_are_refused_where_they_would_crash_the_kernel(allocator, domid):
    kind = GUEST_TYPE.read_text().strip()
    if kind == "PV":
        pytest.skip("a PV guest may map its own grants")
    pool = allocator.alloc(domid, 1)
    ours = pool.map()
    ours[0] = 42
    with (
        GrantMapper.open(own_domid=domid) as mapper,
        pytest.raises(GrantMapError, match="not PV"),
    ):
        mapper.map(domid, pool.grefs)
    assert ours[0] == 42
    pool.free()


def test_pages_begin_zeroed_and_keep_what_is_written(allocator):
    pool = allocator.alloc(0, 3)
    ours = pool.map()
    assert bytes(ours) == b"\0" * pool.size
    ours[4096:4101] = b"hello"
    again = pool.map()
    assert again[4096:4101] == b"hello"
    pool.free()


def test_a_forked_child_does_not_inherit_the_pages(allocator, domid, memory_name):
    pool = allocator.alloc(domid, 1)
    mapping = pool.map()
    address = next(
        line.split("-")[0]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if memory_name in line
    )
    child = os.fork()
    if child == 0:
        lines = Path("/proc/self/maps").read_text().splitlines()
        os._exit(any(line.startswith(f"{address}-") for line in lines))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    mapping[0] = 1
    pool.free()


def test_running_out_names_the_real_limit_and_the_commands(allocator, domid, limit, room):
    free = room()
    limit.set(limit.get() - free + 100)
    allocator.alloc(domid, 60)
    with pytest.raises(GrantsExhausted) as caught:
        allocator.alloc(domid, 41)
    error = caught.value
    assert error.limit == limit.get()
    assert (error.wanted, error.held) == (41, 60)
    assert f"({limit.path}) is {error.limit}" in str(error)
    assert limit.for_ever in error.hint
    command = error.hint.split("now: ")[1].split(";")[0]
    subprocess.run(["sh", "-c", command], check=True)
    allocator.alloc(domid, 41)


def test_freeing_gives_the_pages_back_to_the_limit(allocator, domid, room):
    before = room()
    pool = allocator.alloc(domid, 50)
    pool.map()
    assert room() == before - 50
    pool.free()
    assert room() == before


def test_closing_gives_the_pages_back_to_the_limit(domid, room):
    before = room()
    allocator = platform().grant_allocator()
    allocator.alloc(domid, 50)
    assert room() == before - 50
    allocator.close()
    assert room() == before


def test_a_process_that_is_killed_gives_its_pages_back(domid, room):
    before = room()
    program = (
        "import os, signal\n"
        "from pvfront.platform import platform\n"
        f"a = platform().grant_allocator(); m = a.alloc({domid}, 50).map(); m[0] = 1\n"
        "print('ready', flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("ready\n", -9)
    assert room() == before


def test_a_freed_pool_and_a_closed_allocator_are_refused(domid):
    allocator = platform().grant_allocator()
    pool = allocator.alloc(domid, 1)
    pool.free()
    with pytest.raises(ClosedError):
        pool.map()
    allocator.close()
    with pytest.raises(ClosedError):
        allocator.alloc(domid, 1)


def test_the_notify_byte_is_cleared_when_our_side_goes(mapper, domid):
    allocator = platform().grant_allocator()
    pool = allocator.alloc(domid, 2)
    pool.set_unmap_notify(4096 + 17, clear_byte=True, port=None)
    ours = pool.map()
    ours[4096 + 16 : 4096 + 19] = b"\1\1\1"
    with mapper.map(domid, pool.grefs) as theirs:
        assert theirs.memory[4096 + 16 : 4096 + 19] == b"\1\1\1"
        pool.free()
        assert theirs.memory[4096 + 16 : 4096 + 19] == b"\1\0\1"
    allocator.close()


def test_the_notify_byte_is_cleared_when_our_side_is_killed(mapper, domid):
    program = (
        "import os, sys, signal\n"
        "from pvfront.platform import platform\n"
        f"a = platform().grant_allocator(); p = a.alloc({domid}, 1)\n"
        "p.set_unmap_notify(5, clear_byte=True, port=None)\n"
        "m = p.map(); m[5] = 1; print(p.grefs[0], flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as peer:
        gref = int(peer.stdout.readline())
        with mapper.map(domid, [gref]) as theirs:
            assert theirs.memory[5] == 1
            peer.kill()
            deadline = time.monotonic() + 20
            while theirs.memory[5]:
                assert time.monotonic() < deadline, "the byte was never cleared"
                time.sleep(0.01)


async def test_the_notify_event_fires_when_our_side_goes(allocator, channels, domid):
    with platform().event_channels() as other:
        near = channels.bind_unbound(domid)
        far = other.bind_interdomain(domid, near)
        assert await asyncio.wait_for(other.wait(), 20) == [far]
        other.unmask(far)
        pool = allocator.alloc(domid, 1)
        pool.set_unmap_notify(0, clear_byte=False, port=near)
        pool.free()
        assert await asyncio.wait_for(other.wait(), 20) == [far]


def test_a_notify_port_that_is_not_bound_is_refused(allocator, domid):
    pool = allocator.alloc(domid, 1)
    with pytest.raises(OSError, match="Invalid argument"):
        pool.set_unmap_notify(0, clear_byte=False, port=1000)
    pool.free()
