#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause
"""Writes that overlap in flight, and reads that know which of them they may return.

    overlapping.py PATH OFFSET [BLOCKS [WRITERS READERS]]

Runs in a guest, past the page cache, on a device or a file. Threads write blocks of 4 KiB, several
times more threads than blocks, so that writes to the same place are always under way together; fio
cannot verify those. Of such writes any may win, each sector for itself. But once a write was
acknowledged, what had been acknowledged before that one began is gone for good: a sector that
shows it again was written by a request that somebody sent too late, or twice.

SIGUSR1 begins the measurement of pauses anew. SIGINT ends it: it prints one line of JSON and
exits with 0 if no operation failed and no read was wrong. `pause`: the longest time without an
answer by the clock that programs wait by (CLOCK_MONOTONIC); `away`: by the one that goes on while
the domain is a file (CLOCK_BOOTTIME).
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time

BLOCK, SECTOR = 4096, 512
STAMP = struct.Struct("<QQ")  # block, number of the write


def clocks() -> tuple[float, ...]:
    return time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)


class Register:
    """What a block may hold. The order of events is that of calls of `now`, under one lock."""

    def __init__(self) -> None:
        self.began: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.reads: set[int] = set()  # when those began that are under way

    def may_be_read(self, write: int, since: int) -> bool:
        """Whether a read that began at `since` may return `write`: nothing was written over it."""
        if write not in self.began:
            return False
        end = self.ended.get(write)
        return end is None or not any(
            self.ended[other] < since and began > end
            for other, began in self.began.items()
            if other in self.ended
        )

    def forget(self, now: int) -> None:
        """Drops the writes that no read, of now or later, may return."""
        since = min(self.reads, default=now)
        for write in [w for w in self.ended if not self.may_be_read(w, since)]:
            del self.began[write], self.ended[write]


class Work:
    def __init__(
        self, path: str, offset: int, blocks: int = 8, writers: int = 20, readers: int = 12
    ) -> None:
        self.acts = ["write"] * writers + ["read"] * readers
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.offset = offset
        self.blocks = [Register() for _ in range(blocks)]
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.errors: list[str] = []
        self.clock = 0
        self.writes = self.reads = self.overlaps = 0
        self.last = clocks()
        self.longest: tuple[float, ...] = (0.0, 0.0)

    def now(self) -> int:
        self.clock += 1
        return self.clock

    def answered(self) -> None:
        """An operation has ended: how long was it since the one before?"""
        now = clocks()
        gaps = (after - before for after, before in zip(now, self.last, strict=True))
        self.longest = tuple(map(max, self.longest, gaps))
        self.last = now

    def measure(self) -> None:
        with self.lock:
            self.last, self.longest = clocks(), (0.0, 0.0)

    def write(self, buffer: mmap.mmap, block: int) -> None:
        register = self.blocks[block]
        with self.lock:
            number = self.now()
            register.began[number] = number
            self.overlaps += len(register.began) - len(register.ended) > 1
        buffer[:] = (STAMP.pack(block, number) * (SECTOR // STAMP.size)) * (BLOCK // SECTOR)
        os.pwrite(self.fd, buffer, self.offset + block * BLOCK)
        with self.lock:
            register.ended[number] = self.now()
            register.forget(self.clock)
            self.writes += 1
            self.answered()

    def read(self, buffer: mmap.mmap, block: int) -> None:
        register = self.blocks[block]
        with self.lock:
            since = self.now()
            register.reads.add(since)
        os.preadv(self.fd, [buffer], self.offset + block * BLOCK)
        with self.lock:
            register.reads.remove(since)
            for sector in range(BLOCK // SECTOR):
                at, number = STAMP.unpack_from(buffer, sector * SECTOR)
                if at != block or not register.may_be_read(number, since):
                    self.errors.append(f"block {block}, sector {sector}: write {number} of {at}")
            self.reads += 1
            self.answered()

    def lane(self, act: str) -> None:
        """One thread: what it does until the end."""
        chance = random.Random()
        with mmap.mmap(-1, BLOCK) as buffer:
            try:
                while not self.stop.is_set():
                    getattr(self, act)(buffer, chance.randrange(len(self.blocks)))
            except OSError as error:
                self.errors.append(f"{act}: {error}")

    def run(self) -> int:
        with mmap.mmap(-1, BLOCK) as buffer:
            for block in range(len(self.blocks)):
                self.write(buffer, block)
        lanes = [threading.Thread(target=self.lane, args=(act,)) for act in self.acts]
        for lane in lanes:
            lane.start()
        while signal.sigwait({signal.SIGINT, signal.SIGUSR1}) == signal.SIGUSR1:
            self.measure()
        self.stop.set()
        for lane in lanes:
            lane.join()
        with mmap.mmap(-1, BLOCK) as buffer:
            for block in range(len(self.blocks)):
                self.read(buffer, block)
        pause, away = self.longest
        result = {
            "writes": self.writes, "reads": self.reads, "overlaps": self.overlaps,
            "pause": round(pause, 3), "away": round(away, 3), "errors": self.errors[:20],
        }  # fmt: skip
        print(json.dumps(result), flush=True)
        return 1 if self.errors else 0


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
    sys.exit(Work(sys.argv[1], *map(int, sys.argv[2:])).run())
