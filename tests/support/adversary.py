# SPDX-License-Identifier: BSD-2-Clause
"""A scheduler that is against us: what may come late, apart or in another order does.

``PVFRONT_ADVERSARY=SEED`` has a whole run of the tests suffer it; `make test` runs some suites so
(tools/test.py). Nothing here is against the rules of those whom it stands for:

- The events of one transaction come one by one and in any order, each after a pause of its own.
  Events and answers are read from descriptors of their own: neither waits for the other. Answers
  of one connection keep their order.
- So do a worker's messages, but the end of its process may be noticed before its last words are
  read, or long after.
- What a thread has found is told late.
- Descriptors that are ready together are served in any order.

Who plays the other domains in a test has no enemy. A test begins with the same numbers whichever
ran before it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import weakref
from asyncio import base_events, selector_events
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import memstore
from memwire import Wire
from vclock import VirtualLoop

from pvfront.worker import Worker
from pvfront.workerlink import WorkerLink
from pvfront.xslink import Link
from pvfront.xswire import Op, Packet, WireError

SEED = os.environ.get("PVFRONT_ADVERSARY", "")
LONGEST = 0.02
"""Seconds. Much longer than what it comes apart from takes, much shorter than any deadline."""

_numbers = random.Random()
_test = ""


def begin(test: str) -> None:
    """Each test, and each loop in virtual time, draws the same numbers again."""
    global _test
    _test = f"{SEED} {test}"
    _numbers.seed(_test)


def install() -> None:
    _patch_loop()
    _patch_store()
    _patch_worker()


def _pause() -> float:
    """Often none, mostly a short one."""
    kind = _numbers.random()
    if kind < 0.4:
        return 0.0
    return _numbers.uniform(0, LONGEST / 10 if kind < 0.85 else LONGEST)


class _Late:
    """Calls in their order, each after a pause."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self._next()

    def at_once(self) -> None:
        """All that are left."""
        if self._timer is not None:
            self._timer.cancel()
        while self._calls:
            self._calls.popleft()()

    def _next(self) -> None:
        if self._calls and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_pause(), self._one)

    def _one(self) -> None:
        self._timer = None
        if self._calls:
            try:
                self._calls.popleft()()
            finally:
                self._next()


# -- the store ---------------------------------------------------------------------------------


def _patch_store() -> None:
    late: weakref.WeakKeyDictionary[Link, tuple[_Late, _Late]] = weakref.WeakKeyDictionary()
    feed, fail = Link.feed, Link.fail

    def fed(self: Link, data: bytes) -> None:
        if isinstance(self.transport, Wire) and self.transport.domid == 0:
            feed(self, data)
            return
        events, replies = late.setdefault(self, (_Late(), _Late()))
        link = weakref.ref(self)
        try:
            for packet in self._parser.feed(data):
                queue = events if packet.op is Op.WATCH_EVENT else replies
                queue.add(lambda packet=packet: _deliver(link(), packet))  # type: ignore[misc]
        except WireError as exc:
            self.fail(errno.EPROTO, f"protocol error: {exc}")

    def failed(self: Link, code: int, reason: str) -> None:
        """What came before the end counts, unless the end is our own."""
        queues = late.pop(self, ())
        if code != errno.EBADF:
            for queue in queues:
                queue.at_once()
        fail(self, code, reason)

    Link.feed, Link.fail = fed, failed  # type: ignore[method-assign]
    memstore.arrange = _numbers.shuffle


def _deliver(link: Link | None, packet: Packet) -> None:
    if link is None or link.failure is not None:
        return
    try:
        if packet.op is Op.WATCH_EVENT:
            link._event(packet.payload)
        else:
            link._reply(packet)
            link._pump()
    except WireError as exc:
        link.fail(errno.EPROTO, f"protocol error: {exc}")


# -- workers -----------------------------------------------------------------------------------


def _patch_worker() -> None:
    def later(worker: WorkerLink, fd: Any, then: Callable[[], None], again: Any) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(fd)

        def now() -> None:
            if worker.alive:
                then()
            if worker.alive:
                loop.add_reader(fd, again)

        loop.call_later(_pause(), now)

    def readable(self: WorkerLink) -> None:
        later(self, self._sock, lambda: WorkerLink._readable(self), self._readable)

    def exited(self: WorkerLink) -> None:
        later(self, self._pidfd, lambda: WorkerLink._exited(self), self._exited)

    Worker._readable, Worker._exited = readable, exited  # type: ignore[method-assign]


# -- the event loop ----------------------------------------------------------------------------


def _patch_loop() -> None:
    process = selector_events.BaseSelectorEventLoop._process_events  # type: ignore[attr-defined]
    threadsafe = base_events.BaseEventLoop.call_soon_threadsafe
    made = VirtualLoop.__init__

    def shuffled(self: Any, events: Iterable[Any]) -> None:
        ready = list(events)
        _numbers.shuffle(ready)
        process(self, ready)

    def call_soon_threadsafe(self: Any, callback: Any, *args: Any, context: Any = None) -> Any:
        if not (seconds := _pause()):
            return threadsafe(self, callback, *args, context=context)

        def later() -> None:
            self.call_later(seconds, callback, *args, context=context)

        return threadsafe(self, later)

    def begun(self: VirtualLoop) -> None:
        _numbers.seed(_test)  # an example of Hypothesis can be made again
        made(self)

    def run_in_executor(
        self: VirtualLoop, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()

        def call() -> None:
            if future.done():
                return
            try:
                self.call_later(_pause(), tell, future.set_result, func(*args))
            except Exception as error:
                self.call_later(_pause(), tell, future.set_exception, error)

        def tell(how: Callable[[Any], None], what: Any) -> None:
            if not future.done():
                how(what)

        self.call_later(_pause(), call)
        return future

    selector_events.BaseSelectorEventLoop._process_events = shuffled  # type: ignore[attr-defined]
    base_events.BaseEventLoop.call_soon_threadsafe = call_soon_threadsafe  # type: ignore
    VirtualLoop.__init__ = begun  # type: ignore[method-assign]
    VirtualLoop.run_in_executor = run_in_executor  # type: ignore[method-assign]
