# SPDX-License-Identifier: BSD-2-Clause
"""A backend that breaks the rules of docs/security.md: the worker says which, and stops."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable

import pytest
from embedded import Host, Nbd, serving, text
from ringbackend import OKAY, READ, REQ_PROD, RSP_PROD, SLOT, SLOTS, WRITE, Port, Request
from waiting import wait_for

from pvfront.abi import lib


def held(host: Host, count: int = 1) -> list[Request]:
    """Brings `count` reads into the ring, unanswered."""
    assert host.backend is not None
    host.backend.hold = True
    nbd = host.nbd()
    # In one piece: they come into the ring together, with one event.
    requests = [
        Nbd.HEADER.pack(0x25609513, 0, Nbd.READ, nbd.handle(), 4096 * i, 4096) for i in range(count)
    ]
    nbd.sock.sendall(b"".join(requests))
    backend = host.backend
    wait_for(f"{count} requests in the ring", lambda: len(backend.held) >= count)
    return backend.held


def answer_nothing(host: Host) -> None:
    held(host)
    host.pages.set(RSP_PROD, 2)
    host.backend.event()


def far_ahead(host: Host) -> None:
    held(host)
    host.pages.set(RSP_PROD, 0x7FFFFFFF)
    host.backend.event()


def backwards(host: Host) -> None:
    host.nbd().read(0, 512)
    host.pages.set(RSP_PROD, 0)
    host.backend.event()


def one_behind(host: Host) -> None:
    held(host)
    host.pages.set(RSP_PROD, 0xFFFFFFFF)
    host.backend.event()


def unknown_id(host: Host) -> None:
    request = held(host)[0]
    host.backend.respond(request.id + 1, READ, OKAY)


def huge_id(host: Host) -> None:
    request = held(host)[0]
    host.backend.respond(request.id | 0xFFFF, READ, OKAY)


def old_id(host: Host) -> None:
    host.nbd().read(0, 512)
    first = host.backend.log[0]
    held(host)
    host.backend.respond(first.id, READ, OKAY)


def twice(host: Host) -> None:
    request = held(host, 2)[0]
    host.backend.respond(request.id, READ, OKAY)
    host.backend.respond(request.id, READ, OKAY)


def other_operation(host: Host) -> None:
    request = held(host)[0]
    host.backend.respond(request.id, WRITE, OKAY)


@pytest.mark.parametrize(
    ("rule", "field", "crime"),
    [
        pytest.param(1, "rsp_prod", answer_nothing, id="rule 1 more responses than requests"),
        pytest.param(1, "rsp_prod", far_ahead, id="rule 1 rsp_prod far ahead"),
        pytest.param(2, "rsp_prod", backwards, id="rule 2 rsp_prod moves backwards"),
        pytest.param(2, "rsp_prod", one_behind, id="rule 2 rsp_prod behind its beginning"),
        pytest.param(5, "id", unknown_id, id="rule 5 an id of no request"),
        pytest.param(5, "id", huge_id, id="rule 5 an id out of range"),
        pytest.param(5, "id", old_id, id="rule 5 the id of a finished request"),
        pytest.param(5, "id", twice, id="rule 5 the same id twice"),
        pytest.param(6, "operation", other_operation, id="rule 6 another operation"),
    ],
)
def test_a_broken_rule_is_reported_and_the_ring_left_alone(
    rule: int, field: str, crime: Callable[[Host], None]
) -> None:
    with serving() as host:
        crime(host)
        broken = host.supervisor.wait(lib.PVF_CTL_BROKEN)
        assert (broken.rule, text(broken.field)) == (rule, field), text(broken.text)
        wait_for("state BROKEN", lambda: host.stats().state == lib.PVF_BROKEN)
        # Neither touched nor unmasked any more, whatever the client and the backend do.
        backend, pages = host.backend, host.pages
        assert backend is not None
        assert pages is not None
        before = bytes(pages.map), backend.notified
        nbd = host.nbd()
        nbd.request(Nbd.READ, 0, 4096)
        for _ in range(3):
            backend.port.worker_flags = 0
            backend.event()
        host.supervisor.raw(b"?")  # an answer to this proves that the loop went round
        host.supervisor.error()
        assert (bytes(pages.map), backend.notified) == before
        assert backend.port.worker_flags == Port.PENDING  # not even taken
        # And a new connection heals it.
        host.detach()
        host.attach()
        host.start()
        host.nbd().write(0, b"again" + bytes(507))
        assert host.nbd().read(0, 5 * 512)[:5] == b"again"


def test_rule_3_a_response_rewritten_after_it_was_read_changes_nothing() -> None:
    with serving() as host:
        nbd = host.nbd()
        assert host.pages is not None
        for _ in range(40):
            nbd.write(0, b"x" * 512)
            ring = host.pages.ring_offset
            host.pages.map[ring + SLOTS : ring + SLOTS + 32 * SLOT] = b"\xff" * (32 * SLOT)
        assert host.stats().state == lib.PVF_RUNNING


def test_rule_4_the_backend_writing_over_req_prod_changes_nothing() -> None:
    with serving() as host:
        nbd = host.nbd()
        assert host.pages is not None
        for _ in range(40):
            nbd.write(0, b"x" * 512)
            with host.backend.lock:  # not while the backend itself believes in it
                host.pages.set(REQ_PROD, 0x5A5A5A5A)
        assert host.stats().state == lib.PVF_RUNNING


def test_rule_23_a_storm_of_events_without_work_is_slowed_to_one_a_second() -> None:
    with serving() as host:
        backend = host.backend
        assert backend is not None
        host.nbd().read(0, 512)
        began, sent = time.monotonic(), 0

        def enough() -> bool:
            nonlocal sent
            backend.event()
            sent += 1
            return sent >= 300 and host.stats().events_spurious > 12

        wait_for("events for nothing that are taken", enough)
        stats, seconds = host.stats(), time.monotonic() - began
        # 4 at once, then 1, 2, 4 ... 1000 ms, then one a second, where an unthrottled port would
        # have taken hundreds a second. A wake-up for each, and what the watchdog does.
        assert stats.events_spurious <= 4 + 12 + seconds
        assert stats.wakeups <= 2 * stats.events_spurious + 2 * seconds + 20
        # The disk still works, and the first response forgives: its event is none for nothing,
        # even if the watchdog took the response first. Else each fourth request would count one.
        spurious, nbd = host.stats().events_spurious, host.nbd()
        for _ in range(32):
            nbd.write(0, b"y" * 4096)
            assert nbd.read(0, 4096) == b"y" * 4096
        assert host.stats().events_spurious <= spurious + 8


def test_rule_23_nonsense_in_the_event_channel_stops_nothing() -> None:
    rng = random.Random(23)
    with serving() as host:
        backend = host.backend
        assert backend is not None
        nbd = host.nbd()
        for i in range(300):
            backend.port.worker_flags = rng.getrandbits(32)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(backend.port.worker_fd, rng.choice([1, (1 << 64) - 2]))
            if i % 50:
                continue
            backend.port.worker_flags = 0  # or it would have to wait for the watchdog
            nbd.write(4096 * i, bytes([i % 251]) * 4096)
            assert nbd.read(4096 * i, 4096) == bytes([i % 251]) * 4096
        assert host.stats().state == lib.PVF_RUNNING


def test_rule_24_a_worker_that_is_kept_masked_is_served_by_the_watchdog() -> None:
    with serving() as host:
        backend = host.backend
        assert backend is not None
        nbd = host.nbd()

        def hit() -> int:
            """Not each time: what is answered before the worker sleeps needs no event."""
            backend.port.worker_flags = Port.MASKED  # as if it had been delivered, not given back
            nbd.write(0, b"m" * 4096)
            return host.stats().watchdog_hits

        wait_for("a hit of the watchdog", hit)
        backend.port.worker_flags = 0
        assert nbd.read(0, 4096) == b"m" * 4096


def test_rule_24_a_lost_event_is_found_by_the_watchdog() -> None:
    with serving() as host:
        backend = host.backend
        assert backend is not None
        backend.mute = True
        nbd = host.nbd()

        def hit() -> int:
            """Not each time, as above."""
            nbd.write(0, b"z" * 4096)
            return host.stats().watchdog_hits

        wait_for("a hit of the watchdog", hit)
        backend.mute = False
        assert nbd.read(0, 4096) == b"z" * 4096


def test_a_backend_that_does_not_answer_is_reported_once_and_its_return_once() -> None:
    with serving() as host:
        host.stall = 1
        host.quiesce()
        host.start(keep=True)
        held(host, 3)
        stalled = host.supervisor.wait(lib.PVF_CTL_STALLED)
        assert stalled.seconds >= 1
        assert stalled.in_flight == 3
        host.backend.release()
        assert host.supervisor.wait(lib.PVF_CTL_STALLED).seconds == 0
        count = [kind for kind, _, _ in host.supervisor.seen].count(lib.PVF_CTL_STALLED)
        assert count == 2


def test_an_idle_worker_does_not_wake_up() -> None:
    with serving() as host:
        host.nbd().write(0, bytes(4096))

        def still() -> bool:
            before = host.stats().wakeups
            time.sleep(1.5)  # three ticks of a watchdog that would not stop
            return host.stats().wakeups == before

        wait_for("1.5 s without a wake-up", still)
