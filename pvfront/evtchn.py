# SPDX-License-Identifier: BSD-2-Clause
"""Event channels through /dev/xen/evtchn.

Rules of the device (drivers/xen/evtchn.c), which callers build on:

* A port that fired stays *masked* until its number is written back with `unmask`. Whoever drains a
  ring leaves the port masked meanwhile, looks once more, then unmasks.
* Pending ports wait in a ring inside the kernel. If it overflows, every read fails with EFBIG
  until `reset`, and the lost ports stay masked: see EventOverflow.
* notify, unmask and bind share one lock per descriptor: threads want one handle each.
* A port bound here must be unbound before the domain suspends: the kernel forgets its interrupt
  and hits a BUG when the port is unbound or the descriptor closed afterwards.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Sequence
from typing import Self

from pvfront.errors import ClosedError, PvfrontError
from pvfront.handle import DeviceHandle, check_domid

# _IOC(_IOC_NONE, 'E', nr, size) of xen/evtchn.h
_BIND_INTERDOMAIN = 0x00084501
_BIND_UNBOUND_PORT = 0x00044502
_UNBIND = 0x00044503
_NOTIFY = 0x00044504
_RESET = 0x00004505

_PORT = struct.Struct("=I")
_INTERDOMAIN = struct.Struct("=II")

_PORTS_PER_CALL = 1024
"""The device moves at most one page of port numbers in a read or write."""


class EventOverflow(PvfrontError):
    """The kernel's ring of pending ports overflowed: some ports fired and will not be reported.

    Remedy: `reset()`, then treat every bound port as fired (drain its ring and unmask it).
    """


class EventChannels(DeviceHandle):
    """One open /dev/xen/evtchn and the ports bound through it.

    Closing unbinds every port. After `close` or `give` everything but `close` raises ClosedError,
    and so does any use of a port that is not bound here: port numbers are reused.
    """

    MODULE = "xen-evtchn"

    def __init__(self, fd: int, path: str = "/dev/xen/evtchn") -> None:
        super().__init__(fd, path)
        self._ports: set[int] = set()
        self._waiter: asyncio.Future[None] | None = None
        self._waited_fd = -1

    @classmethod
    def open(cls, path: str = "/dev/xen/evtchn") -> Self:
        """Opens the device. Raises DeviceUnavailable (module not loaded, not root)."""
        return cls._open(path)

    @property
    def ports(self) -> frozenset[int]:
        """The ports bound through this handle now."""
        return frozenset(self._ports)

    def bind_unbound(self, remote_domid: int) -> int:
        """Makes a port that domain `remote_domid` may bind to; returns its number here.

        The port starts unmasked. Raises OSError as the kernel gives it (ENOSPC: the domain has no
        event channel left).
        """
        return self._bound(self._bind_unbound(check_domid(remote_domid)))

    def bind_interdomain(self, remote_domid: int, remote_port: int) -> int:
        """Binds to an unbound port that domain `remote_domid` made for us; returns the local port.

        The port starts unmasked, and Xen fires it once at once. Raises OSError (EINVAL: no such
        port, or it is not for this domain).
        """
        return self._bound(self._bind_interdomain(check_domid(remote_domid), remote_port))

    def notify(self, port: int) -> None:
        """Sends an event to the other end of `port`. Success says nothing about the other end."""
        self._notify(self._mine(port))

    def unmask(self, *ports: int) -> None:
        """Lets `ports` fire again after they were read. Unmasking an unmasked port does nothing."""
        self.fileno()
        for port in ports:
            self._mine(port)
        self._unmask(ports)

    def unbind(self, port: int) -> None:
        """Closes `port`. Its number may be given out again at once, here or to others."""
        self._unbind(self._mine(port))
        self._ports.discard(port)

    def read(self) -> list[int]:
        """The ports that fired, now masked, without waiting; [] if there are none.

        Events of ports that have been unbound since are dropped. Raises EventOverflow.
        """
        self.fileno()
        try:
            fired = self._take()
        except OSError as exc:
            if exc.errno == errno.EFBIG:
                raise EventOverflow(
                    f"{self.path}: the kernel's event ring overflowed",
                    hint="reset, then look at every bound port",
                ) from exc
            raise
        return [port for port in fired if port in self._ports]

    def reset(self) -> None:
        """Empties the kernel's ring of pending ports and clears an overflow (see EventOverflow)."""
        self.fileno()
        self._reset()

    def pollable(self) -> int:
        """A descriptor that is readable while `read` would return something. Not to be read."""
        return self.fileno()

    async def wait(self) -> list[int]:
        """Waits until ports fire; returns them, masked. Never returns an empty list.

        Safe to cancel: an event is taken from the kernel only in the step that returns it. One
        waiter at a time, a second one gets RuntimeError. If the handle is closed meanwhile, the
        waiter gets ClosedError. Raises EventOverflow.
        """
        if self._waiter is not None:
            raise RuntimeError(f"{self.path}: somebody waits on this handle already")
        loop = asyncio.get_running_loop()
        while not (ports := self.read()):
            fd = self._waited_fd = self.pollable()
            waiter = self._waiter = loop.create_future()
            loop.add_reader(fd, _wake, waiter)
            try:
                await waiter
            finally:
                # After close() the number may be somebody else's: _forget removed the reader then.
                if self._waiter is waiter:
                    self._waiter = None
                    loop.remove_reader(fd)
        return ports

    def hand_over(self, port: int) -> int:
        """The descriptor that gives `port` to another process (over SCM_RIGHTS); still ours.

        The new owner has the port from then on: close this handle when it has the descriptor.
        """
        self._mine(port)
        return self.fileno()

    def _forget(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.get_loop().is_closed():
            waiter.get_loop().remove_reader(self._waited_fd)
            if not waiter.done():
                waiter.set_exception(ClosedError(f"{self.path}: closed while waited for"))
        self._ports.clear()

    # What the device does; arguments have been checked.

    def _bind_unbound(self, remote_domid: int) -> int:
        return self._ioctl(_BIND_UNBOUND_PORT, _PORT.pack(remote_domid))

    def _bind_interdomain(self, remote_domid: int, remote_port: int) -> int:
        return self._ioctl(_BIND_INTERDOMAIN, _INTERDOMAIN.pack(remote_domid, remote_port))

    def _notify(self, port: int) -> None:
        self._ioctl(_NOTIFY, _PORT.pack(port))

    def _unmask(self, ports: Sequence[int]) -> None:
        for start in range(0, len(ports), _PORTS_PER_CALL):
            chunk = ports[start : start + _PORTS_PER_CALL]
            data = struct.pack(f"={len(chunk)}I", *chunk)
            if os.write(self.fileno(), data) != len(data):
                raise OSError(f"{self.path}: short write while unmasking {len(chunk)} ports")

    def _unbind(self, port: int) -> None:
        self._ioctl(_UNBIND, _PORT.pack(port))

    def _take(self) -> list[int]:
        """The ports that fired. Raises OSError EFBIG after an overflow."""
        try:
            data = os.read(self.fileno(), _PORTS_PER_CALL * _PORT.size)
        except BlockingIOError:
            return []
        return [port for (port,) in _PORT.iter_unpack(data)]

    def _reset(self) -> None:
        self._ioctl(_RESET, b"")

    def _bound(self, port: int) -> int:
        self._ports.add(port)
        return port

    def _mine(self, port: int) -> int:
        self.fileno()
        if port not in self._ports:
            raise ClosedError(f"{self.path}: port {port} is not bound through this handle")
        return port


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
