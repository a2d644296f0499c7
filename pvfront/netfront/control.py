# SPDX-License-Identifier: BSD-2-Clause
"""The control ring of a vif: rare questions to its backend, one at a time (io/netif.h).

Theory of operation
    What needs more room than the store has goes over a ring of its own: how packets are spread
    over queues (hashing.py), which pages the backend keeps mapped (staticgrants.py). A request has
    an answer of the same id and type, a status and a number. Lists and keys go through one more
    granted page, which the backend may write too, since it says there what became of each entry.

    `Ring` is the protocol alone, on any page. `Control` is a ring with its port and pages. Both are
    this process's, not the worker's: what is asked is asked by the supervisor. So they end with the
    supervisor; the backend keeps what it was told until the connection ends.

    The answers are those of somebody who is not trusted: one that breaks the ring, fits no request
    or does not come within its time makes the ring unusable for the rest of the connection
    (ControlGone). The data path does not depend on it.

Timers
    A request may take `ANSWER` seconds. The port fires at most once for each look: it stays masked
    while nobody waits, and after an event that brought nothing the next one is waited for
    `BACK_OFF` seconds later, doubling up to `BACK_OFF_LAST` (rule 23). An event that got lost costs
    `LOOK_AGAIN` seconds (rule 24).

Limits: the port must be unbound before the domain suspends, as every other (evtchn.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any, Self

from ..abi import ffi, lib
from ..errors import PvfrontError
from ..evtchn import EventChannels, EventOverflow
from ..gntalloc import GrantAllocator, GrantPool
from ..platform import Source

log = logging.getLogger(__name__)

ANSWER = 2.0
LOOK_AGAIN = 0.5
BACK_OFF, BACK_OFF_LAST = 0.001, 0.5
PAGES = 2  # the ring's, and the one for lists and keys
DATA_BYTES = int(lib.PVF_PAGE_SIZE)

_TYPE = "XEN_NETIF_CTRL_TYPE_"
_STATUS = "XEN_NETIF_CTRL_STATUS_"


def _named(prefix: str) -> dict[int, str]:
    return {
        int(getattr(lib, name)): name.removeprefix(prefix)
        for name in dir(lib)
        if name.startswith(prefix)
    }


REQUESTS = _named(_TYPE)
STATUSES = _named(_STATUS)


class Refused(PvfrontError):
    """The backend's answer to a request is no; `status`: XEN_NETIF_CTRL_STATUS_*, or anything."""

    def __init__(self, kind: int, status: int) -> None:
        said = STATUSES.get(status, f"unknown status {status}")
        super().__init__(f"the backend refuses {REQUESTS.get(kind, kind)}: {said}")
        self.status = status

    @property
    def unsupported(self) -> bool:
        return self.status == int(lib.XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED)


class ControlGone(PvfrontError):
    """The control ring is of no use any more in this connection; the message says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """struct xen_netif_ctrl_response, copied."""

    id: int
    kind: int
    status: int
    data: int


class Ring:
    """The frontend's end of a control ring. Knows no descriptor and no clock."""

    def __init__(self, page: mmap | bytearray) -> None:
        """`page`: the shared one, which is cleared. Whoever unmaps it calls `release` before."""
        self._bytes = ffi.from_buffer("unsigned char[]", page, require_writable=True)
        self._ring = ffi.new("struct pvf_ring *")
        lib.pvf_ring_init(self._ring, self._bytes, lib.PVF_PAGE_SIZE, lib.PVF_NET_CTRL_SLOT, 0)
        self._last_id = 0
        self._asked: tuple[int, int] | None = None

    def release(self) -> None:
        ffi.release(self._bytes)

    def ask(self, kind: int, data: Sequence[int]) -> bool:
        """Puts a request into the ring. True: the backend must be notified.

        Only when the one before was answered (ValueError).
        """
        if self._asked is not None:
            raise ValueError("a request is under way")
        self._last_id = (self._last_id + 1) & 0xFFFF
        self._asked = self._last_id, kind
        padded = [*data, 0, 0, 0][:3]
        request = ffi.new("struct xen_netif_ctrl_request *", (self._last_id, kind, padded))
        lib.pvf_ring_put(self._ring, request, ffi.sizeof(request[0]))
        return bool(lib.pvf_ring_push(self._ring))

    def answer(self) -> Answer | None:
        """The answer to what was asked, None if it is not there. Raises ControlGone: a lie."""
        if not self._checked(lib.pvf_ring_poll):
            return None
        response = ffi.new("struct xen_netif_ctrl_response *")
        lib.pvf_ring_get(self._ring, response, ffi.sizeof(response[0]))
        found = Answer(
            int(response.id), int(response.type), int(response.status), int(response.data)
        )
        if (found.id, found.kind) != self._asked:
            raise ControlGone(
                f"the backend broke rule 5 on the control ring: an answer to request {found.id} "
                f"({REQUESTS.get(found.kind, found.kind)}), which was not asked"
            )
        self._asked = None
        return found

    def want_event(self) -> bool:
        """Asks for an event with the next answer. True: it is there already. Raises ControlGone."""
        return bool(self._checked(lib.pvf_ring_final_check))

    def _checked(self, look: Any) -> int:
        fault = ffi.new("struct pvf_fault *")
        found = int(look(self._ring, fault))
        if fault.rule:
            field, text = ffi.string(fault.field).decode(), ffi.string(fault.text).decode()
            raise ControlGone(
                f"the backend broke rule {fault.rule} on the control ring: "
                f"{field}={fault.value:#x}: {text}"
            )
        return found


class Control:
    """The control ring of one connection, its port and its pages."""

    def __init__(
        self,
        channels: EventChannels,
        port: int,
        grants: GrantAllocator,
        pools: tuple[GrantPool, GrantPool],
    ) -> None:
        self.port = port
        self.gone: str | None = None  # why nothing is asked any more
        self._channels = channels
        self._grants = grants
        self._pools = pools
        self._ring = Ring(pools[0].map())
        self._data = pools[1].map()
        self._closed = False

    @classmethod
    def open(cls, source: Source, domid: int) -> Self:
        """Raises GrantsExhausted, DeviceUnavailable, OSError; nothing is held then."""
        with contextlib.ExitStack() as stack:
            channels = stack.enter_context(source.event_channels())
            port = channels.bind_unbound(domid)
            grants = stack.enter_context(source.grant_allocator())
            made = cls(channels, port, grants, (grants.alloc(domid, 1), grants.alloc(domid, 1)))
            stack.pop_all()
        return made

    @property
    def ring_ref(self) -> int:
        return self._pools[0].grefs[0]

    @property
    def data_ref(self) -> int:
        return self._pools[1].grefs[0]

    def write(self, data: bytes) -> None:
        """Puts `data` (a page at most) into the page for lists and keys; nothing else stays there.

        Between two requests only.
        """
        if len(data) > DATA_BYTES:
            raise ValueError(f"{len(data)} bytes do not fit into a page")
        self._data[:] = data.ljust(DATA_BYTES, b"\0")

    def read(self, size: int) -> bytes:
        """A copy of what is there: as the backend left it, who may change it at any time."""
        return self._data[:size]

    async def request(self, kind: int, *data: int, within: float = ANSWER) -> int:
        """Asks the backend; returns the number that its answer carries.

        Raises Refused; ControlGone if there is no answer within `within` seconds, or none that
        makes sense, now or earlier. To be called by one task at a time.
        """
        if self.gone is not None:
            raise ControlGone(self.gone)
        what = REQUESTS.get(kind, str(kind))
        gone = f"{what} was cancelled"
        answer = None
        try:
            async with asyncio.timeout(within):
                answer = await self._ask(kind, data)
        except TimeoutError:
            gone = f"the backend did not answer {what} on the control ring within {within:g} s"
            raise ControlGone(gone) from None
        except ControlGone as error:
            gone = str(error)
            raise
        except OSError as error:
            gone = f"the control ring's port failed: {error.strerror}"
            raise ControlGone(gone) from error
        finally:
            if answer is None:  # it may still come, or read the page: nothing is asked after that
                self.gone = gone
        if answer.status != lib.XEN_NETIF_CTRL_STATUS_SUCCESS:
            raise Refused(kind, answer.status)
        return answer.data

    async def _ask(self, kind: int, data: Sequence[int]) -> Answer:
        if self._ring.ask(kind, data):
            self._channels.notify(self.port)
        back_off = BACK_OFF
        while (answer := self._ring.answer()) is None:
            if self._ring.want_event():
                continue
            self._channels.unmask(self.port)
            if not await self._event():
                continue
            if (answer := self._ring.answer()) is not None:
                break
            await asyncio.sleep(back_off)
            back_off = min(2 * back_off, BACK_OFF_LAST)
        return answer

    async def _event(self) -> bool:
        """False: there was none for so long that it is better to look again."""
        try:
            async with asyncio.timeout(LOOK_AGAIN):
                await self._channels.wait()
        except TimeoutError:
            return False
        except EventOverflow:
            self._channels.reset()
        return True

    def close(self) -> None:
        """Unbinds the port and frees the pages. Never raises; idempotent."""
        self._free()
        with contextlib.suppress(OSError):
            self._channels.close()

    def give_port(self) -> int:
        """Frees the pages; the descriptor with the port, still bound, is the caller's."""
        fd = self._channels.give()
        self._free()
        return fd

    def _free(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.gone = self.gone or "the connection has ended"
        self._ring.release()
        for pool in self._pools:
            with contextlib.suppress(OSError):  # closing the descriptor gives it back as well
                pool.free()
        with contextlib.suppress(OSError):
            self._grants.close()
