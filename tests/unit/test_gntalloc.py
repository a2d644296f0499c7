# SPDX-License-Identifier: BSD-2-Clause
"""Granted page pools, against a model of /dev/xen/gntalloc."""

import errno
import gc
import os
import struct

import pytest

from pvfront import gntalloc, handle
from pvfront.errors import ClosedError, DeviceUnavailable
from pvfront.gntalloc import GrantAllocator, GrantsExhausted

ALLOC, DEALLOC, NOTIFY = 0x184705, 0x104706, 0x104707


class Kernel:
    """The device behind a memfd; `limit` pages at most."""

    def __init__(self, limit: int = 1024) -> None:
        self.fd = os.memfd_create("gntalloc")
        self.limit = limit
        self.pools: dict[int, int] = {}
        self.offset = 0
        self.next_gref = 100
        self.allocs: list[tuple[int, int, int]] = []
        self.notifies: list[tuple[int, int, int]] = []

    def ioctl(self, fd: int, request: int, argument: bytearray, mutate: bool) -> int:
        assert fd == self.fd
        if request == ALLOC:
            assert len(argument) >= 24, "the kernel copies the whole struct"
            domid, flags, count, _ = struct.unpack_from("=HHIQ", argument)
            if count + sum(self.pools.values()) > self.limit:
                raise OSError(errno.ENOSPC, "no space")
            self.allocs.append((domid, flags, count))
            struct.pack_into("=Q", argument, 8, self.offset)
            grefs = range(self.next_gref, self.next_gref + count)
            struct.pack_into(f"={count}I", argument, 16, *grefs)
            self.pools[self.offset] = count
            self.offset += count * 4096
            self.next_gref += count
            os.ftruncate(self.fd, self.offset)
            return 0
        if request == DEALLOC:
            offset, count = struct.unpack("=QI4x", argument)
            if self.pools.get(offset) != count:
                raise OSError(errno.EINVAL, "no such grants")
            del self.pools[offset]
            return 0
        assert request == NOTIFY
        self.notifies.append(struct.unpack("=QII", argument))
        return 0


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    model = Kernel()
    monkeypatch.setattr(handle, "ioctl", model.ioctl)
    limit = tmp_path / "limit"
    limit.write_text("1024\n")
    monkeypatch.setattr(gntalloc, "LIMIT_PATH", str(limit))
    return model


@pytest.fixture
def allocator(kernel):
    with GrantAllocator(kernel.fd) as opened:
        yield opened


def test_a_pool_has_a_reference_for_each_page_and_an_offset(kernel, allocator):
    first = allocator.alloc(3, 1)
    second = allocator.alloc(4, 3, writable=False)
    assert (first.offset, first.grefs, first.pages, first.size) == (0, (100,), 1, 4096)
    assert (second.offset, second.grefs, second.pages) == (4096, (101, 102, 103), 3)
    assert kernel.allocs == [(3, 1, 1), (4, 0, 3)]
    assert allocator.held == 4


@pytest.mark.parametrize("pages", [0, -1, 1 << 20])
def test_an_impossible_size_is_a_value_error(allocator, pages):
    with pytest.raises(ValueError, match="pages"):
        allocator.alloc(0, pages)


def test_an_impossible_domain_is_a_value_error(allocator):
    with pytest.raises(ValueError, match="domain id"):
        allocator.alloc(0x7FF0, 1)


def test_a_mapping_shows_the_pool_and_nothing_else(allocator):
    one, two = allocator.alloc(0, 2), allocator.alloc(0, 2)
    first, second = one.map(), two.map()
    first[:5] = b"hello"
    second[8191] = 7
    assert (len(first), second[:5], first[8191]) == (8192, b"\0" * 5, 0)
    assert os.pread(allocator.fileno(), 5, one.offset) == b"hello"
    one.free()
    two.free()


def test_freeing_unmaps_and_gives_back(kernel, allocator):
    pool = allocator.alloc(0, 4)
    mapping = pool.map()
    pool.free()
    assert mapping.closed
    assert kernel.pools == {}
    assert allocator.held == 0
    pool.free()


def test_a_pool_in_use_is_not_freed(kernel, allocator):
    pool = allocator.alloc(0, 1)
    view = memoryview(pool.map())
    with pytest.raises(BufferError):
        pool.free()
    assert kernel.pools == {0: 1}
    view.release()
    pool.free()
    assert kernel.pools == {}


def test_a_freed_pool_is_refused(allocator):
    pool = allocator.alloc(0, 1)
    pool.free()
    with pytest.raises(ClosedError, match="freed"):
        pool.map()
    with pytest.raises(ClosedError, match="freed"):
        pool.set_unmap_notify(0, clear_byte=True, port=None)


@pytest.mark.parametrize("end", ["close", "give"])
def test_pools_of_a_closed_allocator_are_refused_but_tell_their_numbers(kernel, end):
    allocator = GrantAllocator(kernel.fd)
    pool = allocator.alloc(0, 2)
    fd = getattr(allocator, end)()
    for use in (
        pool.map,
        pool.free,
        lambda: pool.set_unmap_notify(0, clear_byte=True, port=None),
        lambda: allocator.alloc(0, 1),
        allocator.fileno,
        allocator.give,
    ):
        with pytest.raises(ClosedError):
            use()
    assert pool.grefs == (100, 101)
    allocator.close()
    if fd is not None:
        assert kernel.pools == {0: 2}
        os.close(fd)


def test_unmap_notify_names_byte_and_port(kernel, allocator):
    allocator.alloc(0, 1)
    pool = allocator.alloc(0, 2)
    pool.set_unmap_notify(0, clear_byte=True, port=None)
    pool.set_unmap_notify(4096 + 17, clear_byte=True, port=9)
    pool.set_unmap_notify(8191, clear_byte=False, port=9)
    assert kernel.notifies == [(4096, 1, 0), (8192 + 17, 3, 9), (4096 + 8191, 2, 9)]
    for outside in (-1, 8192):
        with pytest.raises(ValueError, match="outside"):
            pool.set_unmap_notify(outside, clear_byte=True, port=None)


def test_running_out_names_limit_wanted_held_and_the_commands(allocator):
    allocator.alloc(0, 1000)
    with pytest.raises(GrantsExhausted) as caught:
        allocator.alloc(0, 25)
    error = caught.value
    assert (error.limit, error.wanted, error.held) == (1024, 25, 1000)
    for part in ("25 granted pages", "holds 1000", "1024", "limit"):
        assert part in str(error)
    assert "\n" not in str(error)
    assert f"echo 16384 > {gntalloc.LIMIT_PATH}" in error.hint
    assert "options xen-gntalloc limit=16384 > /etc/modprobe.d/" in error.hint


def test_running_out_below_the_limit_points_at_the_others_and_at_xen(kernel, allocator, tmp_path):
    (tmp_path / "limit").write_text("65536\n")
    kernel.limit = 10
    with pytest.raises(GrantsExhausted) as caught:
        allocator.alloc(0, 25)
    assert "max_grant_frames" in caught.value.hint


def test_an_unreadable_limit_is_said_to_be_unknown(kernel, allocator, monkeypatch):
    monkeypatch.setattr(gntalloc, "LIMIT_PATH", "/nonexistent/limit")
    kernel.limit = 0
    with pytest.raises(GrantsExhausted, match="is unknown") as caught:
        allocator.alloc(0, 1)
    assert caught.value.limit is None


def test_what_this_process_holds_is_counted_over_all_allocators(kernel, monkeypatch):
    gc.collect()
    before = gntalloc.pages_held()
    one = GrantAllocator(kernel.fd)
    one.alloc(0, 5)
    pool = one.alloc(0, 6)
    assert gntalloc.pages_held() - before == 11
    pool.free()
    assert gntalloc.pages_held() - before == 5
    os.close(one.give())
    assert gntalloc.pages_held() - before == 0


def test_other_errors_of_the_kernel_are_raised_as_they_are(kernel, allocator, monkeypatch):
    def no_memory(*args):
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(handle, "ioctl", no_memory)
    with pytest.raises(OSError, match="no memory"):
        allocator.alloc(0, 1)
    assert allocator.held == 0


def test_a_missing_device_names_the_module(tmp_path):
    with pytest.raises(DeviceUnavailable) as caught:
        GrantAllocator.open(str(tmp_path / "gntalloc"))
    assert "modprobe xen-gntalloc" in caught.value.hint
