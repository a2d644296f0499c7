# SPDX-License-Identifier: BSD-2-Clause
"""Event channels, both ends in this domain: Xen's in a guest, the embedded host's in tests/host."""

import asyncio
import errno
import os
import subprocess
import sys
import time

import pytest

from pvfront.errors import ClosedError
from pvfront.platform import platform

pytestmark = [pytest.mark.core, pytest.mark.services]


async def taken(channels, seconds=20.0):
    return await asyncio.wait_for(channels.wait(), seconds)


@pytest.fixture
async def pair(channels, domid):
    """Two ends of one channel on one descriptor, both quiet and unmasked."""
    near = channels.bind_unbound(domid)
    far = channels.bind_interdomain(domid, near)
    # Binding fires the far end once (and may fire the near one): take that away.
    await taken(channels)
    await asyncio.sleep(0.2)
    channels.read()
    channels.unmask(near, far)
    return near, far


async def test_an_event_arrives_at_the_other_end_only(channels, pair):
    near, far = pair
    channels.notify(near)
    assert await taken(channels) == [far]
    channels.notify(far)
    assert await taken(channels) == [near]
    assert channels.read() == []


async def test_a_port_that_fired_is_masked_until_it_is_unmasked(channels, pair):
    near, far = pair
    channels.notify(near)
    assert await taken(channels) == [far]
    channels.notify(near)
    with pytest.raises(TimeoutError):
        await taken(channels, 0.5)
    channels.unmask(far)
    assert await taken(channels) == [far], "the event that came while masked is lost"


async def test_the_other_port_is_not_masked_with_it(channels, pair):
    near, far = pair
    channels.notify(near)
    assert await taken(channels) == [far]
    channels.notify(far)
    assert await taken(channels) == [near]


async def test_many_events_in_turn_are_all_delivered(channels, pair):
    near, far = pair
    for _ in range(500):
        channels.notify(near)
        assert await taken(channels) == [far]
        channels.unmask(far)


async def test_a_handle_of_its_own_may_hold_each_end(channels, domid):
    with platform().event_channels() as other:
        near = channels.bind_unbound(domid)
        far = other.bind_interdomain(domid, near)
        assert await taken(other) == [far]
        other.unmask(far)
        channels.notify(near)
        assert await taken(other) == [far]
        with pytest.raises(ClosedError):
            other.notify(near)


async def test_unbinding_frees_the_other_end_to_notice_nothing(channels, pair):
    near, far = pair
    channels.unbind(far)
    channels.notify(near)
    assert channels.ports == {near}
    with pytest.raises(ClosedError):
        channels.notify(far)


def test_binding_to_a_port_that_does_not_exist_is_an_error(channels, domid):
    with pytest.raises(OSError, match="Invalid argument"):
        channels.bind_interdomain(domid, 1000)
    assert channels.ports == frozenset()


def test_closing_releases_the_ports(domid):
    """More ports than a domain has in all, a few at a time."""
    highest = 0
    for _ in range(60):
        with platform().event_channels() as channels:
            highest = max(highest, *(channels.bind_unbound(domid) for _ in range(40)))
    assert highest < 1023


def test_unbinding_releases_the_port(channels, domid):
    ports = set()
    for _ in range(1200):
        port = channels.bind_unbound(domid)
        ports.add(port)
        channels.unbind(port)
    assert len(ports) < 1023


def test_a_process_that_is_killed_releases_its_ports(channels, domid):
    program = (
        "import os, signal\n"
        "from pvfront.platform import platform\n"
        f"c = platform().event_channels(); p = c.bind_unbound({domid})\n"
        "print(p, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert run.returncode == -9

    def refused():
        try:
            port = channels.bind_interdomain(domid, int(run.stdout))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return True
        channels.unbind(port)
        return False

    end = time.monotonic() + 60  # beside an embedded host another process has to notice
    while not refused():
        assert time.monotonic() < end, "the port of a dead process can still be bound"
        time.sleep(0.01)


async def test_use_after_close_never_reaches_the_device(domid):
    channels = platform().event_channels()
    port = channels.bind_unbound(domid)
    channels.close()
    with platform().event_channels() as new:
        # The kernel gives the same numbers out again: that is why the old handle must refuse.
        again = new.bind_unbound(domid)
        for use in (
            lambda: channels.notify(port),
            lambda: channels.unmask(port),
            lambda: channels.unbind(port),
            channels.read,
            channels.fileno,
        ):
            with pytest.raises(ClosedError):
                use()
        with pytest.raises(ClosedError):
            await channels.wait()
        assert new.ports == {again}


async def test_a_given_descriptor_carries_its_ports_along(channels, domid):
    giver = platform().event_channels()
    port = giver.bind_unbound(domid)
    fd = giver.give()
    far = channels.bind_interdomain(domid, port)
    assert await taken(channels) == [far]
    os.close(fd)


# -- waiting -----------------------------------------------------------------------------------


async def test_waiting_returns_what_fires_later(channels, pair):
    near, far = pair
    waiting = asyncio.create_task(channels.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    channels.notify(near)
    assert await asyncio.wait_for(waiting, 20) == [far]


async def test_a_cancelled_wait_loses_no_event(channels, pair):
    near, far = pair
    for turn in range(100):
        waiting = asyncio.create_task(channels.wait())
        await asyncio.sleep(0)
        channels.notify(near)
        for _ in range(turn % 4):
            await asyncio.sleep(0)
        waiting.cancel()
        try:
            got = await waiting
        except asyncio.CancelledError:
            got = await taken(channels)
        assert got == [far]
        channels.unmask(far)


async def test_waiting_sleeps_on_over_events_of_unbound_ports(channels, domid):
    near = channels.bind_unbound(domid)
    far = channels.bind_interdomain(domid, near)  # fires
    other = channels.bind_unbound(domid)
    channels.unbind(far)
    channels.unbind(near)
    waiting = asyncio.create_task(channels.wait())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    last = channels.bind_interdomain(domid, other)
    assert last in await asyncio.wait_for(waiting, 20)


async def test_two_tasks_cannot_wait_at_once(channels):
    waiting = asyncio.create_task(channels.wait())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="somebody waits"):
        await channels.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("end", ["close", "give"])
async def test_whoever_waits_is_told_when_the_handle_goes(end, domid):
    channels = platform().event_channels()
    channels.bind_unbound(domid)
    waiting = asyncio.create_task(channels.wait())
    await asyncio.sleep(0)
    fd = getattr(channels, end)()
    with pytest.raises(ClosedError):
        await waiting
    if fd is not None:
        os.close(fd)


def test_unmasking_a_port_that_is_not_masked_does_nothing(channels, pair):
    near, far = pair
    channels.unmask(near, far)
    channels.unmask()
    assert channels.read() == []
