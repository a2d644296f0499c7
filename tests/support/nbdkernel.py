# SPDX-License-Identifier: BSD-2-Clause
"""A model of the kernel's nbd driver (drivers/block/nbd.c) on real sockets."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from pathlib import Path
from typing import Any

from pvfront.blkfront import nbd
from pvfront.sysfs import Roots


class FakeDevice:
    def __init__(self, sys: Path, backend: str, flags: int) -> None:
        self.sys = sys
        self.backend = backend
        self.flags = flags
        self.socks: list[socket.socket] = []
        self.bound = True
        (sys / "queue").mkdir(parents=True)
        self.put("backend", backend)
        self.put("pid", 1)
        self.put("size", 0)
        self.put("uevent", "")
        self.put("inflight", "       0        0")
        self.put("queue/io_timeout", 30000)
        self.put("queue/max_sectors_kb", 128)
        self.put("queue/max_hw_sectors_kb", 32768)
        self.put("queue/scheduler", "[mq-deadline] none")
        self.put("queue/write_cache", "write back" if flags & 4 else "write through")
        self.put("queue/discard_max_bytes", 0)

    def put(self, name: str, value: object) -> None:
        (self.sys / name).write_text(f"{value}\n")

    def get(self, name: str) -> str:
        return (self.sys / name).read_text().strip()

    def resize(self, size: int, block_size: int | None) -> None:
        self.put("size", size // 512)
        self.put("queue/logical_block_size", block_size or self.get("queue/logical_block_size"))
        if self.flags & nbd.FLAG_SEND_TRIM:
            self.put("queue/discard_max_bytes", 2199023255040)

    @property
    def held(self) -> socket.socket:
        (only,) = self.socks
        return only

    def take(self, fd: int) -> None:
        # The driver holds the socket beyond the life of the caller's descriptor.
        (self.sys / "mq" / str(len(self.socks))).mkdir(parents=True)
        self.socks.append(socket.socket(fileno=os.dup(fd)))

    def replace(self, fd: int) -> bool:
        """nbd_reconnect_socket: the place of the first dead one; False (ENOSPC) if none is."""
        for place, sock in enumerate(self.socks):
            if dead(sock):
                sock.close()
                self.socks[place] = socket.socket(fileno=os.dup(fd))
                return True
        return False

    def drop(self) -> None:
        for sock in self.socks:
            sock.close()


def dead(sock: socket.socket) -> bool:
    poll = select.poll()
    try:
        poll.register(sock, select.POLLRDHUP)
    except ValueError:
        return True  # closed, by the thread of a command
    return bool(poll.poll(0))


class FakeKernel:
    """Every device there is, and the knobs of a test."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.devices: dict[int, FakeDevice] = {}
        self.log: list[str] = []
        self.notices_late = 0  # reconfigures during which the old socket does not yet count as dead
        self.still_open = False  # somebody has the device open: it stays after a disconnect
        self.disconnect_blocks: threading.Event | None = None
        self.workers: list[Worker] = []

    def worker(self, fds: list[int]) -> Worker:
        """A worker with the sockets that it got; ended with the test if not before."""
        self.workers.append(Worker(fds))
        return self.workers[-1]

    def control(self, roots: Roots) -> FakeControl:
        assert roots is self.roots
        return FakeControl(self)


class FakeControl:
    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel

    def __enter__(self) -> FakeControl:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _device(self, operation: str, index: int) -> FakeDevice:
        found = self.kernel.devices.get(index)
        if found is None or not found.bound:
            raise nbd.NbdError(operation, f"nbd{index}", errno.EINVAL)
        return found

    def connect(self, sock_fds: list[int], *, size: int, block_size: int, server_flags: int,
                identifier: str, dead_conn_timeout: int) -> int:  # fmt: skip
        index = next(i for i in range(16) if i not in self.kernel.devices)
        made = FakeDevice(self.kernel.roots.sys / "block" / f"nbd{index}", identifier, server_flags)
        (self.kernel.roots.block(made.sys.name)).symlink_to(made.sys)
        made.resize(size, block_size)
        assert len(sock_fds) == 1 or server_flags & nbd.FLAG_CAN_MULTI_CONN, "EINVAL"
        for fd in sock_fds:
            made.take(fd)
        self.kernel.devices[index] = made
        self.kernel.log.append(f"connect size={size} forever={dead_conn_timeout > 1 << 24}")
        return index

    def reconfigure(self, index: int, *, identifier: str, sock_fds: Any = (),
                    size: int | None = None, block_size: int | None = None,
                    dead_conn_timeout: int | None = None) -> None:  # fmt: skip
        found = self._device("reconfigure", index)
        assert identifier == found.backend
        text = f"reconfigure sockets={len(sock_fds)} size={size}"
        if dead_conn_timeout is not None:
            text += " forever" if dead_conn_timeout > 1 << 24 else f" dead={dead_conn_timeout}"
        self.kernel.log.append(text)
        if size is not None:
            found.resize(size, block_size)
        for fd in sock_fds:
            if self.kernel.notices_late:
                self.kernel.notices_late -= 1
            elif not found.replace(fd):
                break  # nbd_genl_reconfigure: no error, and no further look

    def disconnect(self, index: int) -> None:
        if self.kernel.disconnect_blocks is not None:
            self.kernel.disconnect_blocks.wait(30)
        found = self._device("disconnect", index)
        self.kernel.log.append("disconnect")
        found.drop()
        found.bound = False
        if not self.kernel.still_open:
            self.remove(index)

    def remove(self, index: int) -> None:
        found = self.kernel.devices.pop(index)
        self.kernel.roots.block(found.sys.name).unlink()
        for path in sorted(found.sys.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        found.sys.rmdir()


class Worker:
    """The worker's ends of the sockets."""

    def __init__(self, fds: list[int]) -> None:
        self.socks = [socket.socket(fileno=fd) for fd in fds]

    @property
    def sock(self) -> socket.socket:
        (only,) = self.socks
        return only

    def hung_up(self) -> bool:
        return any(map(dead, self.socks))

    def die(self) -> None:
        for sock in self.socks:
            sock.close()
