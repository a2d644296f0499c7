# SPDX-License-Identifier: BSD-2-Clause
"""The guest's suite of event channels on the embedded host, and what only it can show."""

import array
import asyncio
import os
import select
import socket
from pathlib import Path

import pytest
from test_event_channels import *  # noqa: F403
from test_event_channels import taken
from waiting import PATIENCE

from pvfront.errors import ClosedError, DeviceUnavailable
from pvfront.evtchn import EventOverflow
from pvfront.host._host import ffi, lib
from pvfront.host.handles import EmbeddedEventChannels
from pvfront.platform import platform

pytestmark = []


@pytest.fixture(autouse=True)
def named(hub):
    """Every test here runs with $PVFRONT_HOST."""


@pytest.fixture
def backend(hub):
    """Domain 0's event channels."""
    with EmbeddedEventChannels.open(domid=0) as opened:
        yield opened


async def test_two_domains_number_their_ports_on_their_own(channels, backend):
    near, far = channels.bind_unbound(0), backend.bind_interdomain(1, 3)
    assert (near, far) == (3, 3)


async def test_a_port_for_another_domain_cannot_be_bound(channels, backend):
    port = channels.bind_unbound(2)
    with pytest.raises(OSError, match="Invalid argument"):
        backend.bind_interdomain(1, port)


async def test_a_bound_port_cannot_be_bound_again(channels, backend):
    port = channels.bind_unbound(0)
    backend.bind_interdomain(1, port)
    with EmbeddedEventChannels.open(domid=0) as other, pytest.raises(OSError, match="Invalid"):
        other.bind_interdomain(1, port)


async def test_a_backend_that_dies_leaves_a_port_that_its_domain_can_bind_again(channels):
    port = channels.bind_unbound(0)
    with EmbeddedEventChannels.open(domid=0) as first:
        far = first.bind_interdomain(1, port)
        assert await taken(first) == [far]
        channels.notify(port)  # masked there, and lost with it
    channels.notify(port)  # to nobody
    with (
        EmbeddedEventChannels.open(domid=2) as stranger,
        pytest.raises(OSError, match="Invalid argument"),
    ):
        stranger.bind_interdomain(1, port)
    with EmbeddedEventChannels.open(domid=0) as second:
        again = second.bind_interdomain(1, port)
        assert await taken(second) == [again], "a new binder is told once, whatever was before"
        second.unmask(again)
        assert second.read() == []
        second.notify(again)
        assert await taken(channels) == [port]


async def test_a_frontend_that_dies_leaves_the_backends_port_bound_to_nobody(backend):
    with platform().event_channels() as frontend:
        port = frontend.bind_unbound(0)
        far = backend.bind_interdomain(1, port)
        assert await taken(backend) == [far]
        backend.unmask(far)
    backend.notify(far)
    assert backend.read() == []
    backend.unbind(far)


async def test_an_overflow_is_told_until_it_is_reset_and_lost_ports_stay_masked(channels, backend):
    port = channels.bind_unbound(0)
    far = backend.bind_interdomain(1, port)
    backend.inject_overflow()  # takes the event of the binding with it
    for _ in range(2):
        with pytest.raises(EventOverflow, match="overflowed"):
            backend.read()
    backend.reset()
    channels.notify(port)
    assert backend.read() == []
    backend.unmask(far)
    assert await taken(backend) == [far]


async def test_a_wake_up_for_nothing_reports_no_port(channels, backend):
    """A hostile other end can write to the eventfd, and cannot do more."""
    port = channels.bind_unbound(0)
    far = backend.bind_interdomain(1, port)
    end = backend._ends[far]
    os.eventfd_write(end.other, 1)
    assert select.select([channels.pollable()], [], [], PATIENCE)[0]
    assert channels.read() == []
    assert not select.select([channels.pollable()], [], [], 0)[0], "an empty wake-up stays"


async def test_the_domains_ports_run_out_with_the_kernels_error(channels):
    for _ in range(1020):
        channels.bind_unbound(0)
    with pytest.raises(OSError, match="No space left"):
        channels.bind_unbound(0)
    channels.close()
    with platform().event_channels() as again:
        assert again.bind_unbound(0) == 3


# -- handing over ------------------------------------------------------------------------------


def receive_packet(fd):
    """What the worker reads first: the packet, and the descriptors beside it."""
    sock = socket.socket(fileno=os.dup(fd))
    with sock:
        data, fds, _, _ = socket.recv_fds(sock, 4096, 8)
    packet = ffi.from_buffer("struct pvf_host_packet *", data)
    return packet, fds


async def test_a_port_that_was_handed_over_works_for_its_new_owner(channels, backend):
    with platform().event_channels() as giver:
        port = giver.bind_unbound(0)
        fd = os.dup(giver.hand_over(port))
    packet, (memory, own, other) = receive_packet(fd)
    assert (packet.magic, packet.kind) == (lib.PVF_HOST_MAGIC, lib.PVF_HOST_EVENT)
    assert (packet.port, packet.side) == (port, 0)
    far = backend.bind_interdomain(1, port)
    assert await taken(backend) == [far]
    backend.unmask(far)
    page = ffi.new("struct pvf_channel **")
    assert lib.pvf_channel_map(memory, page) == 0
    assert lib.pvf_channel_notify(page[0], packet.side, other) == 0
    assert await taken(backend) == [far]
    backend.notify(far)
    assert lib.pvf_channel_take(page[0], packet.side, own) == 1
    lib.pvf_channel_unmap(page[0])
    for left in (fd, memory, own, other):
        os.close(left)
    # The connection was the holder: with it the port goes.
    with pytest.raises(OSError, match="Invalid argument"):
        backend.bind_interdomain(1, port)


def test_after_handing_over_only_the_close_is_left(hub):
    with platform().event_channels() as giver:
        port = giver.bind_unbound(0)
        giver.hand_over(port)
        with pytest.raises(ClosedError, match="handed over"):
            giver.hand_over(port)
        with pytest.raises(ClosedError, match="handed over"):
            giver.bind_unbound(0)


def test_a_port_that_is_not_ours_is_not_handed_over(channels):
    with pytest.raises(ClosedError, match="not bound"):
        channels.hand_over(77)
    assert channels.bind_unbound(0) == 3, "the handle still works"


def test_without_a_host_the_hint_says_how_to_start_one(tmp_path):
    with pytest.raises(DeviceUnavailable, match="ENOENT") as caught:
        EmbeddedEventChannels.open(str(tmp_path))
    assert f"pvfront-host {tmp_path}" in caught.value.hint


def test_no_descriptor_is_left_behind(hub):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(3):
        with platform().event_channels() as one, EmbeddedEventChannels.open(domid=0) as two:
            port = one.bind_unbound(0)
            far = two.bind_interdomain(1, port)
            two.unbind(far)
            two.bind_interdomain(1, port)
    assert count() <= before


async def test_events_of_both_directions_at_full_speed_lose_nothing(channels, backend):
    """Ping and pong ten thousand times: one lost event and it stands still."""
    near = channels.bind_unbound(0)
    far = backend.bind_interdomain(1, near)
    assert await taken(backend) == [far]
    backend.unmask(far)
    counts = array.array("L", [0, 0])

    async def player(mine, port, index):
        while counts[index] < 10_000:
            assert await taken(mine, PATIENCE) == [port]
            counts[index] += 1
            mine.unmask(port)
            mine.notify(port)

    players = asyncio.gather(player(channels, near, 0), player(backend, far, 1))
    backend.notify(far)
    await players
    assert list(counts) == [10_000, 10_000]
