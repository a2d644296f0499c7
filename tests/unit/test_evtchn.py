# SPDX-License-Identifier: BSD-2-Clause
"""Event channel handles, against a model of /dev/xen/evtchn."""

import asyncio
import errno
import gc
import os
import select
import socket
import struct

import pytest
from waiting import eventually

from pvfront import evtchn, handle
from pvfront.errors import ClosedError, DeviceUnavailable
from pvfront.evtchn import EventChannels, EventOverflow

BIND_INTERDOMAIN, BIND_UNBOUND, UNBIND, NOTIFY, RESET = (
    0x84501,
    0x44502,
    0x44503,
    0x44504,
    0x4505,
)


class Kernel:
    """The device behind a socketpair: what is sent on `end` are ports that fired."""

    def __init__(self) -> None:
        ours, self.end = socket.socketpair()
        ours.setblocking(False)
        self.end.setblocking(False)
        self.fd = ours.detach()
        self.bound: set[int] = set()
        self.calls: list[tuple[int, bytes]] = []
        self.next_port = 7

    def ioctl(self, fd: int, request: int, argument: bytearray, mutate: bool) -> int:
        assert fd == self.fd
        self.calls.append((request, bytes(argument)))
        if request in (BIND_INTERDOMAIN, BIND_UNBOUND):
            port, self.next_port = self.next_port, self.next_port + 1
            self.bound.add(port)
            return port
        if request == RESET:
            return 0
        (port,) = struct.unpack("=I", argument)
        if port not in self.bound:
            raise OSError(errno.ENOTCONN, "not bound")
        if request == UNBIND:
            self.bound.remove(port)
        return 0

    def fire(self, *ports: int) -> None:
        self.end.send(struct.pack(f"={len(ports)}I", *ports))

    def unmasked(self) -> list[int]:
        return [port for (port,) in struct.iter_unpack("=I", self.end.recv(65536))]


@pytest.fixture
def kernel(monkeypatch):
    model = Kernel()
    monkeypatch.setattr(handle, "ioctl", model.ioctl)
    yield model
    model.end.close()


@pytest.fixture
def channels(kernel):
    with EventChannels(kernel.fd) as opened:
        yield opened


def test_binding_asks_for_the_remote_domain_and_returns_the_local_port(kernel, channels):
    assert channels.bind_unbound(3) == 7
    assert channels.bind_interdomain(4, 99) == 8
    assert kernel.calls == [
        (BIND_UNBOUND, struct.pack("=I", 3)),
        (BIND_INTERDOMAIN, struct.pack("=II", 4, 99)),
    ]
    assert channels.ports == {7, 8}


@pytest.mark.parametrize("domid", [-1, 0x7FF0, 1 << 32])
def test_an_impossible_domain_is_a_value_error(channels, domid):
    with pytest.raises(ValueError, match="domain id"):
        channels.bind_unbound(domid)


def test_notify_and_unbind_name_the_port(kernel, channels):
    port = channels.bind_unbound(0)
    channels.notify(port)
    channels.unbind(port)
    assert kernel.calls[1:] == [(NOTIFY, struct.pack("=I", 7)), (UNBIND, struct.pack("=I", 7))]


def test_reading_returns_what_fired_and_nothing_means_an_empty_list(kernel, channels):
    one, two = channels.bind_unbound(0), channels.bind_unbound(0)
    assert channels.read() == []
    kernel.fire(two, one)
    assert channels.read() == [two, one]
    assert channels.read() == []


def test_unmasking_writes_the_ports_back_at_most_a_page_at_a_time(kernel, channels):
    ports = [channels.bind_unbound(0) for _ in range(1500)]
    channels.unmask()
    channels.unmask(*ports)
    assert kernel.unmasked() == ports


def test_events_of_ports_unbound_since_are_dropped(kernel, channels):
    old, new = channels.bind_unbound(0), channels.bind_unbound(0)
    kernel.fire(old, new)
    channels.unbind(old)
    assert channels.read() == [new]


@pytest.mark.parametrize("use", ["notify", "unmask", "unbind"])
def test_a_port_of_somebody_else_is_refused_before_the_kernel_sees_it(kernel, channels, use):
    port = channels.bind_unbound(0)
    channels.unbind(port)
    before = list(kernel.calls)
    with pytest.raises(ClosedError, match=f"port {port} is not bound"):
        getattr(channels, use)(port)
    assert kernel.calls == before


def test_an_overflow_is_told_and_reset_clears_it(kernel, channels, monkeypatch):
    class Overflowed:
        read = staticmethod(lambda fd, size: (_ for _ in ()).throw(OSError(errno.EFBIG, "full")))

    monkeypatch.setattr(evtchn, "os", Overflowed)
    with pytest.raises(EventOverflow, match="overflowed") as caught:
        channels.read()
    assert "reset" in caught.value.hint
    monkeypatch.undo()
    monkeypatch.setattr(handle, "ioctl", kernel.ioctl)
    channels.reset()
    assert kernel.calls == [(RESET, b"")]


USES = {
    "bind_unbound": lambda c: c.bind_unbound(0),
    "bind_interdomain": lambda c: c.bind_interdomain(0, 1),
    "notify": lambda c: c.notify(7),
    "unmask": lambda c: c.unmask(7),
    "unmask nothing": lambda c: c.unmask(),
    "unbind": lambda c: c.unbind(7),
    "read": lambda c: c.read(),
    "reset": lambda c: c.reset(),
    "fileno": lambda c: c.fileno(),
    "give": lambda c: c.give(),
    "wait": lambda c: asyncio.run(c.wait()),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("end", ["close", "give"])
def test_after_the_end_everything_is_refused(kernel, use, end):
    channels = EventChannels(kernel.fd)
    channels.bind_unbound(0)
    fd = channels.give() if end == "give" else channels.close()
    before = list(kernel.calls)
    with pytest.raises(ClosedError):
        USES[use](channels)
    assert kernel.calls == before
    assert channels.closed
    channels.close()
    if fd is not None:
        os.close(fd)


def test_closing_twice_does_not_close_somebody_elses_descriptor(kernel):
    channels = EventChannels(kernel.fd)
    channels.close()
    reused = os.dup2(kernel.end.fileno(), kernel.fd)
    channels.close()
    os.fstat(reused)
    os.close(reused)


def test_a_given_descriptor_stays_open_and_keeps_its_ports(kernel):
    channels = EventChannels(kernel.fd)
    port = channels.bind_unbound(0)
    fd = channels.give()
    assert fd == kernel.fd
    assert kernel.bound == {port}
    os.fstat(fd)
    os.close(fd)


def test_a_handle_that_is_forgotten_open_warns_and_closes(kernel):
    fd = kernel.fd
    channels = EventChannels(fd)
    with pytest.warns(ResourceWarning, match="never closed"):  # noqa: PT031
        del channels
        gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_missing_device_names_the_module(tmp_path):
    with pytest.raises(DeviceUnavailable, match="ENOENT") as caught:
        EventChannels.open(str(tmp_path / "evtchn"))
    assert "modprobe xen-evtchn" in caught.value.hint
    assert caught.value.errno == errno.ENOENT


def test_a_forbidden_device_says_root(monkeypatch):
    def forbidden(path, flags):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(handle.os, "open", forbidden)
    with pytest.raises(DeviceUnavailable, match="EACCES") as caught:
        EventChannels.open("/dev/xen/evtchn")
    assert "root" in caught.value.hint


# -- waiting -----------------------------------------------------------------------------------


async def test_waiting_returns_what_fires_later(kernel, channels):
    port = channels.bind_unbound(0)
    waiting = asyncio.create_task(channels.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    kernel.fire(port)
    assert await asyncio.wait_for(waiting, 60) == [port]


async def test_waiting_returns_at_once_what_has_fired(kernel, channels):
    port = channels.bind_unbound(0)
    kernel.fire(port)
    assert await asyncio.wait_for(channels.wait(), 60) == [port]


async def test_waiting_sleeps_on_over_events_of_unbound_ports(kernel, channels):
    old, new = channels.bind_unbound(0), channels.bind_unbound(0)
    channels.unbind(old)
    waiting = asyncio.create_task(channels.wait())
    kernel.fire(old)
    await eventually("it is read", lambda: not select.select([kernel.fd], [], [], 0)[0])
    await asyncio.sleep(0)
    assert not waiting.done()
    kernel.fire(new)
    assert await asyncio.wait_for(waiting, 60) == [new]


async def test_a_cancelled_wait_loses_no_event(kernel, channels):
    port = channels.bind_unbound(0)
    for turn in range(100):
        waiting = asyncio.create_task(channels.wait())
        await asyncio.sleep(0)
        kernel.fire(port)
        for _ in range(turn % 4):
            await asyncio.sleep(0)
        waiting.cancel()
        try:
            got = await waiting
        except asyncio.CancelledError:
            got = await asyncio.wait_for(channels.wait(), 60)
        assert got == [port]


async def test_two_tasks_cannot_wait_at_once(channels):
    waiting = asyncio.create_task(channels.wait())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="somebody waits"):
        await channels.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("end", ["close", "give"])
async def test_whoever_waits_is_told_when_the_handle_goes(kernel, end):
    channels = EventChannels(kernel.fd)
    waiting = asyncio.create_task(channels.wait())
    await asyncio.sleep(0)
    fd = getattr(channels, end)()
    with pytest.raises(ClosedError):
        await waiting
    if fd is not None:
        os.close(fd)


class WatchedElsewhere(EventChannels):
    """As the embedded host's handle: what is watched is another descriptor than the device's."""

    watched = -1

    def pollable(self) -> int:
        return self.watched


@pytest.fixture
def elsewhere(kernel):
    channels = WatchedElsewhere(kernel.fd)
    channels.watched = os.dup(kernel.fd)
    yield channels
    channels.close()
    os.close(channels.watched)


async def test_an_event_wakes_who_waits_on_a_descriptor_beside_the_devices(kernel, elsewhere):
    port = elsewhere.bind_unbound(0)
    waiting = asyncio.create_task(elsewhere.wait())
    await asyncio.sleep(0)
    kernel.fire(port)
    assert await asyncio.wait_for(waiting, 60) == [port]
    assert not asyncio.get_running_loop().remove_reader(elsewhere.watched)


@pytest.mark.parametrize("end", ["close", "give"])
async def test_the_end_of_a_handle_lets_go_of_the_descriptor_that_was_watched(
    kernel, elsewhere, end
):
    watched, later = elsewhere.watched, os.dup(kernel.fd)
    waiting = asyncio.create_task(elsewhere.wait())
    await asyncio.sleep(0)
    elsewhere.watched = later  # where the next wait would look
    given = getattr(elsewhere, end)()
    with pytest.raises(ClosedError):
        await waiting
    assert not asyncio.get_running_loop().remove_reader(watched), "it is watched for nobody"
    os.close(watched)
    if given is not None:
        os.close(given)


async def test_a_cancelled_wait_watches_nothing_any_more(elsewhere):
    waiting = asyncio.create_task(elsewhere.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not asyncio.get_running_loop().remove_reader(elsewhere.watched)


async def test_a_descriptor_number_that_is_reused_is_not_watched_for_the_old_handle(kernel):
    channels = EventChannels(kernel.fd)
    waiting = asyncio.create_task(channels.wait())
    await asyncio.sleep(0)
    channels.close()
    reused = os.dup2(os.open("/dev/null", os.O_RDONLY), kernel.fd)
    with pytest.raises(ClosedError):
        await waiting
    assert not asyncio.get_running_loop().remove_reader(reused)
    os.close(reused)
