# SPDX-License-Identifier: BSD-2-Clause
"""The two kernel interfaces that let user space in on a domain's suspend: a veto, and the log.

Theory of operation
    The kernel acts on ``control/shutdown = suspend`` in its own thread: it acknowledges (writes
    the empty string) and freezes all of user space before any program has seen the watch event
    (drivers/xen/manage.c, `shutdown_handler`, `do_suspend`). Two facts give user space a say:

    * While ``/sys/power/wakeup_count`` holds a count that is no longer true, or a wakeup source
      is active, freezing is given up at once with EBUSY (kernel/power/process.c,
      `try_to_freeze_tasks`; drivers/base/power/wakeup.c, `pm_wakeup_pending`). `Veto` keeps such
      a source. It is one shot: a freeze given up, or done, for whatever reason, uses it up.
    * Everything that `do_suspend` does leaves a line in the kernel's log. ``control/shutdown``
      cannot tell a suspend from a poweroff, it is empty after both; the log can. `KernelLog`
      reads it, `classify` gives the few lines that matter a meaning.

    The veto outlives its owner: the death of the process ends the wakeup source, which counts as
    one more wakeup event, so the saved count is wrong and the next freeze still fails.

    The check is made between two looks at the tasks, not before the first: were every task asleep
    in a freezable wait, the freeze would succeed without it. A process that waits in epoll_wait,
    as every asyncio program does, is not (Linux 6.1, fs/eventpoll.c).
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import re
import select
import threading
from dataclasses import dataclass
from pathlib import Path

from .errors import DeviceUnavailable, PvfrontError
from .threads import in_daemon_thread

WAKEUP_COUNT = Path("/sys/power/wakeup_count")
KMSG = Path("/dev/kmsg")
PROC_STATUS = Path("/proc/self/status")

CAP_BLOCK_SUSPEND = 36  # include/uapi/linux/capability.h
EPOLLWAKEUP = 1 << 29  # include/uapi/linux/eventpoll.h; in the select module from 3.14 on
# The kernel's count has 16 bits (IN_PROGRESS_BITS), so this one is never right.
WRONG_COUNT = b"4294967295"
RECORD_MAX = 8192  # CONSOLE_EXT_LOG_MAX, include/linux/printk.h


class Line(enum.Enum):
    """What a line of the kernel's log means for suspend."""

    FREEZE_GIVEN_UP = "freeze given up"  # tasks would not freeze, or a wakeup source was active
    FREEZE_DONE = "user space frozen"  # seen only after the thaw
    XEN_SUSPENDING = "domain suspending"  # do_suspend passed the freeze; seen only after the thaw
    THAWED = "tasks restarted"  # the last thing before do_suspend returns
    REFUSED = "do_suspend failed"  # a suspend was asked for through the store, and given up
    LOST = "lines lost"  # the log was overwritten before it was read


@dataclass(frozen=True)
class LogEvent:
    """One line that matters. `elapsed`: seconds that a freeze given up had taken, else 0."""

    line: Line
    text: str = ""
    elapsed: float = 0.0


_GIVEN_UP = re.compile(r"Freezing of tasks (?:failed|aborted) after (\d{1,6}\.\d{1,6}) seconds")
# "xen:manage: do_suspend: freeze processes failed -16", "... freeze kernel threads failed -16",
# "... dpm_suspend_start -16": drivers/xen/manage.c.
_REFUSED = re.compile(r"xen:manage: (?:do_suspend: .*|dpm_suspend_end failed: )-\d+$")


def classify(text: str) -> LogEvent | None:
    """The meaning of one line of kernel log (without prefix), or None."""
    if found := _GIVEN_UP.match(text):
        return LogEvent(Line.FREEZE_GIVEN_UP, text, float(found[1]))
    if _REFUSED.match(text):
        return LogEvent(Line.REFUSED, text)
    if text.startswith("suspending xenstore"):
        return LogEvent(Line.XEN_SUSPENDING, text)
    if text.startswith("Freezing user space processes") and "elapsed" in text:
        return LogEvent(Line.FREEZE_DONE, text)
    if text.startswith("Restarting tasks"):
        return LogEvent(Line.THAWED, text)
    return None


def parse_record(record: bytes) -> LogEvent | None:
    """Meaning of one /dev/kmsg record (Documentation/ABI/testing/dev-kmsg).

    Only records of the kernel itself (facility 0) count: what programs write is never facility 0.
    """
    prefix, semicolon, rest = record.partition(b";")
    priority = prefix.split(b",", 1)[0]
    if not semicolon or not priority.isdigit() or int(priority) >> 3 != 0:
        return None
    return classify(rest.split(b"\n", 1)[0].decode("ascii", "replace").rstrip())


class KernelLog:
    """Reads /dev/kmsg from where it was when this was opened. Needs CAP_SYSLOG."""

    def __init__(self, path: Path = KMSG) -> None:
        """Raises DeviceUnavailable."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise DeviceUnavailable(
                str(path),
                error.errno or 0,
                f"{path}: cannot be read ({error.strerror}); without it a suspend cannot be "
                "told from a poweroff",
                hint="run as root with CAP_SYSLOG",
            ) from error

    def fileno(self) -> int:
        return self._fd

    def read(self) -> list[LogEvent]:
        """Everything new that matters; never blocks. LOST if the log was overwritten meanwhile."""
        found: list[LogEvent] = []
        while True:
            try:
                record = os.read(self._fd, RECORD_MAX)
            except BlockingIOError:
                return found
            except OSError as error:
                # EPIPE: records were overwritten; the next read gives the oldest one left.
                # EINVAL: a record longer than the buffer, which it then skips.
                if error.errno not in (errno.EPIPE, errno.EINVAL):
                    raise
                found.append(LogEvent(Line.LOST, f"/dev/kmsg: {error.strerror}"))
                continue
            if not record:
                return found
            if event := parse_record(record):
                found.append(event)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class CannotVeto(PvfrontError):
    """This kernel, or this process, cannot hold up a suspend."""


def may_block_suspend(status: str) -> bool:
    """Whether /proc/self/status `status` shows CAP_BLOCK_SUSPEND as effective."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_BLOCK_SUSPEND & 1)
    return False


class Veto:
    """Makes the next freeze of user space fail at once, once."""

    def __init__(self, count: Path = WAKEUP_COUNT, status: Path = PROC_STATUS) -> None:
        """Raises CannotVeto: no ``wakeup_count``, or the capability is missing.

        Without CAP_BLOCK_SUSPEND the kernel ignores EPOLLWAKEUP silently (epoll_ctl(2)).
        """
        if not count.exists():
            raise CannotVeto(
                f"{count}: not there; this kernel has no suspend support",
                hint="a kernel with CONFIG_PM_SLEEP is needed to survive xl save and migration",
            )
        if not may_block_suspend(status.read_text()):
            raise CannotVeto(
                "CAP_BLOCK_SUSPEND is missing; a suspend could not be held up",
                hint="run as root, or add CAP_BLOCK_SUSPEND to the service",
            )
        self._count = count
        self._lock = threading.Lock()  # save and raise must not be interleaved with a disarm
        self._generation = 0  # of the latest arm or disarm; an older arm gives up
        self._epoll: select.epoll | None = None
        self._event = -1

    async def arm(self) -> None:
        """Arms, anew if it is armed already; returns when that is done.

        Reading the count blocks while any other wakeup source is active: this may take for ever.
        Cancelled or overtaken by another `arm` or by `disarm`, it does nothing more. Raises
        CannotVeto if the kernel refuses.
        """
        with self._lock:
            self._generation += 1
            generation = self._generation
        try:
            await in_daemon_thread("pvfront-arm", lambda: self._arm(generation))
        except asyncio.CancelledError:
            with self._lock:
                if self._generation == generation:
                    self._generation += 1
            raise

    def _arm(self, generation: int) -> None:
        while True:
            with self._lock:
                if self._generation != generation:
                    return
                # Dropped before the read, which waits for it. The count that was saved is wrong
                # from here on, so the veto stands until the new one is saved.
                self._drop()
                self._prepare()
            # Blocks while another source is active; the lock is free for a disarm meanwhile.
            count = self._count.read_bytes()
            with self._lock:
                if self._generation != generation:
                    return
                try:
                    self._write(count)
                except OSError as error:
                    if error.errno == errno.EINVAL:
                        continue  # a wakeup event since the read
                    self._drop()
                    raise CannotVeto(f"{self._count}: {error.strerror}") from error
                # Between the write and this a suspend gets through: keep them together.
                os.eventfd_write(self._event, 1)
                return

    def disarm(self) -> None:
        """Takes the veto back: the next freeze goes through. Raises CannotVeto if that failed."""
        with self._lock:
            self._generation += 1
            self._drop()
            try:
                self._write(WRONG_COUNT)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return  # as it should be: a wrong count turns the check off
                raise CannotVeto(f"{self._count}: {error.strerror}") from error
            raise CannotVeto(f"{self._count}: accepted a count that cannot be right")

    def close(self) -> None:
        """Lets go of the source but leaves the veto standing, as the death of the process would."""
        with self._lock:
            self._generation += 1
            self._drop()

    def _write(self, count: bytes) -> None:
        fd = os.open(self._count, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, count)
        finally:
            os.close(fd)

    def _prepare(self) -> None:
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        # Its own epoll, never waited on: waiting is what ends the source.
        self._epoll.register(self._event, select.EPOLLIN | EPOLLWAKEUP)

    def _drop(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
            os.close(self._event)
            self._event = -1
