# SPDX-License-Identifier: BSD-2-Clause
"""One open device node that refuses use after its close.

Event channels, grant allocators and grant mappers are descriptors whose numbers the kernel reuses.
A call on a stale handle would therefore act on whatever has the number now. Every operation takes
the descriptor from `fileno()`, which raises ClosedError once the handle is closed or given away.
"""

from __future__ import annotations

import errno
import os
import warnings
from fcntl import ioctl
from typing import Self

from pvfront.errors import ClosedError, DeviceUnavailable

PAGE_SIZE = 4096
"""Bytes in a Xen page on x86: the unit of grants, whatever the kernel's own page size."""

MAX_DOMID = 0x7FEF
"""Largest id of a real domain: DOMID_FIRST_RESERVED (xen/include/public/xen.h) is 0x7FF0."""


def check_domid(domid: int) -> int:
    """Returns `domid` if it can name a domain, else raises ValueError."""
    if not 0 <= domid <= MAX_DOMID:
        raise ValueError(f"domain id {domid} is not in 0..{MAX_DOMID}")
    return domid


class DeviceHandle:
    """Owner of one descriptor of a Xen device node. `MODULE` is the kernel module behind it."""

    MODULE = ""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self.path = path

    @classmethod
    def _open(cls, path: str) -> Self:
        return cls(cls._open_fd(path), path)

    @classmethod
    def _open_fd(cls, path: str) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise _unavailable(path, cls.MODULE, exc) from exc

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def fileno(self) -> int:
        """The descriptor. Raises ClosedError after `close` or `give`."""
        if self._fd < 0:
            raise ClosedError(f"{self.path}: used after close")
        return self._fd

    def give(self) -> int:
        """Hands the descriptor to a new owner, who must close it; this handle counts as closed.

        What the descriptor holds in the kernel (ports, grants) stays as it is.
        """
        fd = self.fileno()
        self._forget()
        self._fd = -1
        return fd

    def close(self) -> None:
        """Closes the descriptor; the kernel releases what it held. Closing twice is harmless."""
        if self._fd < 0:
            return
        self._forget()
        # The number goes first: after close(2) it may be somebody else's, even if close failed.
        fd, self._fd = self._fd, -1
        os.close(fd)

    def _forget(self) -> None:
        """Called before the descriptor leaves this handle: drop what depends on it."""

    def _ioctl(self, request: int, argument: bytes | bytearray) -> int:
        """Returns the kernel's answer; what it wrote back is in `argument` if that is a bytearray.

        Always a writable buffer for the kernel: Python would otherwise copy at most 1024 bytes.
        """
        buffer = argument if isinstance(argument, bytearray) else bytearray(argument)
        return int(ioctl(self.fileno(), request, buffer, True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = f"fd {self._fd}" if self._fd >= 0 else "closed"
        return f"<{type(self).__name__} {self.path} {state}>"


def _unavailable(path: str, module: str, exc: OSError) -> DeviceUnavailable:
    code = exc.errno or errno.EIO
    name = errno.errorcode.get(code, str(code))
    hint = None
    if code in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        hint = f"in a Xen guest, load the module: modprobe {module}"
    elif code in (errno.EACCES, errno.EPERM):
        hint = "Xen's device nodes are for root only: run as root"
    return DeviceUnavailable(
        path, code, f"cannot open {path}: {name} ({os.strerror(code)})", hint=hint
    )
