# SPDX-License-Identifier: BSD-2-Clause
"""The last bytes that came over a console, in a mapped file of fixed size that outlives its writer.

One writer, the supervisor. Bytes have positions: the first that ever came is 0. The file, a header
and a ring, lies in /run, and so in memory; a supervisor that is killed has lost neither what late
readers are to see nor what the PTY has not taken.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path
from typing import Self

SIZE = 1 << 16
"""Bytes of the ring: what a late reader sees, and how far the slowest reader may be behind."""

_HEADER = struct.Struct("=8sQQQ")  # magic, size, end, what the PTY has taken
_MAGIC = b"pvfcons1"
_END, _TAKEN = 16, 24
_U64 = struct.Struct("=Q")
_DATA = 64


class History:
    """Made by `open`. Positions count up for ever; `begin` to `end` are there to be read."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path = path
        self._memory = memory
        self.end: int
        self.taken: int
        _, _, self.end, self.taken = _HEADER.unpack_from(memory)

    @classmethod
    def open(cls, path: Path) -> Self:
        """What a supervisor before has left, or else a new one. Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, _DATA + SIZE)
            memory = mmap.mmap(fd, _DATA + SIZE)
        finally:
            os.close(fd)
        magic, size, end, taken = _HEADER.unpack_from(memory)
        if magic != _MAGIC or size != SIZE or not max(0, end - SIZE) <= taken <= end:
            _HEADER.pack_into(memory, 0, _MAGIC, SIZE, 0, 0)
        return cls(path, memory)

    @property
    def begin(self) -> int:
        """The oldest byte that is still there."""
        return max(0, self.end - SIZE)

    def append(self, data: bytes) -> None:
        """Up to SIZE bytes; the oldest go."""
        at = _DATA + self.end % SIZE
        first = data[: _DATA + SIZE - at]
        self._memory[at : at + len(first)] = first
        self._memory[_DATA : _DATA + len(data) - len(first)] = data[len(first) :]
        self.end += len(data)
        _U64.pack_into(self._memory, _END, self.end)
        if self.taken < self.begin:
            self.take(self.begin)

    def read(self, position: int, most: int) -> bytes:
        """Bytes from `position` on, which is between `begin` and `end`; fewer than asked at the end
        of the ring.
        """
        at = position % SIZE
        count = min(most, self.end - position, SIZE - at)
        return self._memory[_DATA + at : _DATA + at + count]

    def take(self, position: int) -> None:
        """The PTY has taken everything before `position`."""
        self.taken = position
        _U64.pack_into(self._memory, _TAKEN, position)

    def close(self, *, keep: bool) -> None:
        """`keep`: the file stays for the next supervisor."""
        self._memory.close()
        if not keep:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
