# SPDX-License-Identifier: BSD-2-Clause
"""Mapping other domains' grants, against a model of /dev/xen/gntdev."""

import errno
import os
import struct

import pytest

from pvfront import gntdev, handle
from pvfront.errors import ClosedError, DeviceUnavailable
from pvfront.gntdev import GrantMapError, GrantMapper

MAP, UNMAP = 0x184700, 0x104701


class Kernel:
    """The device behind a memfd of 16 pages; the n-th map begins at page n."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("gntdev")
        os.ftruncate(self.fd, 16 * 4096)
        self.maps: dict[int, int] = {}
        self.asked: list[tuple[int, ...]] = []

    def ioctl(self, fd: int, request: int, argument: bytearray, mutate: bool) -> int:
        assert fd == self.fd
        if request == MAP:
            (count,) = struct.unpack_from("=I", argument)
            self.asked.append(struct.unpack_from(f"={2 * count}I", argument, 16))
            if 666 in self.asked[-1]:
                raise OSError(errno.EINVAL, "bad reference")
            offset = len(self.maps) * 4096
            if 667 in self.asked[-1]:
                offset = 1  # mmap gives EINVAL, as gntdev does for a grant that cannot be mapped
            struct.pack_into("=Q", argument, 8, offset)
            self.maps[offset] = count
            return 0
        assert request == UNMAP
        offset, count = struct.unpack("=QI4x", argument)
        assert self.maps.pop(offset) == count
        return 0


@pytest.fixture
def kernel(monkeypatch):
    model = Kernel()
    monkeypatch.setattr(handle, "ioctl", model.ioctl)
    return model


@pytest.fixture
def mapper(kernel):
    with GrantMapper(kernel.fd, refused=None) as opened:
        yield opened


def test_grants_are_mapped_in_the_order_given(kernel, mapper):
    with mapper.map(3, [11, 12]) as mapping:
        assert kernel.asked == [(3, 11, 3, 12)]
        assert len(mapping.memory) == 8192
        mapping.memory[4096] = 5
        assert os.pread(kernel.fd, 1, 4096) == b"\x05"
    assert kernel.maps == {}


def test_a_read_only_mapping_cannot_be_written(mapper):
    with mapper.map(3, [11], writable=False) as mapping, pytest.raises(TypeError):
        mapping.memory[0] = 1


def test_a_mapping_is_refused_after_unmap(kernel, mapper):
    mapping = mapper.map(3, [11])
    mapping.unmap()
    with pytest.raises(ClosedError, match="unmapped"):
        mapping.memory  # noqa: B018
    mapping.unmap()


def test_a_mapping_in_use_stays(kernel, mapper):
    mapping = mapper.map(3, [11])
    view = memoryview(mapping.memory)
    with pytest.raises(BufferError):
        mapping.unmap()
    assert kernel.maps == {0: 1}
    view.release()
    mapping.unmap()
    assert kernel.maps == {}


@pytest.mark.parametrize("gref", [666, 667])
def test_a_grant_that_cannot_be_mapped_is_named_and_leaves_nothing(kernel, mapper, gref):
    with pytest.raises(GrantMapError, match=f"2 grants of domain 3 .first reference {gref}."):
        mapper.map(3, [gref, 5])
    assert kernel.maps == {}


def test_mapping_nothing_or_from_no_domain_is_a_value_error(mapper):
    with pytest.raises(ValueError, match="no grant references"):
        mapper.map(3, [])
    with pytest.raises(ValueError, match="domain id"):
        mapper.map(-1, [1])


def test_a_closed_mapper_is_refused_and_its_mappings_can_still_be_unmapped(kernel):
    mapper = GrantMapper(kernel.fd, refused=None)
    mapping = mapper.map(3, [11])
    mapper.close()
    with pytest.raises(ClosedError):
        mapper.map(3, [12])
    mapping.unmap()
    with pytest.raises(ClosedError):
        mapping.memory  # noqa: B018


def test_a_missing_device_names_the_module(tmp_path):
    with pytest.raises(DeviceUnavailable) as caught:
        GrantMapper.open(str(tmp_path / "gntdev"), own_domid=5)
    assert "modprobe xen-gntdev" in caught.value.hint


@pytest.mark.parametrize("guest_type", ["HVM\n", "PVH\n", "", None])
def test_own_grants_are_refused_in_a_translated_guest_before_the_kernel_sees_them(
    kernel, monkeypatch, tmp_path, guest_type
):
    found = tmp_path / "guest_type"
    if guest_type is not None:
        found.write_text(guest_type)
    monkeypatch.setattr(gntdev, "GUEST_TYPE_PATH", str(found))
    monkeypatch.setattr(handle.os, "open", lambda path, flags: kernel.fd)
    with GrantMapper.open("/dev/xen/gntdev", own_domid=5) as mapper:
        with pytest.raises(GrantMapError, match="domain 5 is this one and not PV"):
            mapper.map(5, [11])
        assert kernel.asked == []
        mapper.map(6, [11]).unmap()


def test_own_grants_can_be_mapped_in_a_pv_guest(kernel, monkeypatch, tmp_path):
    (tmp_path / "guest_type").write_text("PV\n")
    monkeypatch.setattr(gntdev, "GUEST_TYPE_PATH", str(tmp_path / "guest_type"))
    monkeypatch.setattr(handle.os, "open", lambda path, flags: kernel.fd)
    with GrantMapper.open("/dev/xen/gntdev", own_domid=5) as mapper:
        mapper.map(5, [11]).unmap()
    assert kernel.asked == [(5, 11)]
