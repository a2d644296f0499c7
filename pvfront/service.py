# SPDX-License-Identifier: BSD-2-Clause
"""What makes a process fit to be a supervisor: memory, OOM, a log that never blocks; systemd.

A supervisor reconnects disks; while it does, writeback may wait for exactly that. So it must not
wait for memory that only writeback can free (mlockall, PR_SET_IO_FLUSHER), nor for a journal whose
own file may lie on the disk: log records go to a thread through a bounded queue, and are
counted and dropped when it is full. Nor does the end of the process wait for the journal.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import logging
import logging.handlers
import os
import queue
import resource
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from .errors import PvfrontError

_MCL_CURRENT_FUTURE_ONFAULT = 1 | 2 | 4  # sys/mman.h
_PR_SET_IO_FLUSHER = 57  # linux/prctl.h
_PR_SET_THP_DISABLE = 41
_LOG_QUEUE = 4096
_SYSTEMD = Path("/run/systemd/system")  # there if systemd is the init, sd_booted(3)
_KINDS = ("poweroff", "reboot", "halt", "kexec", "soft-reboot")
_SYSTEMCTL_DEADLINE = 5.0
_LAST_WORDS = 2.0  # seconds that the log gets at the end of the process
_SYSLOG_LEVEL = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


class _DroppingHandler(logging.handlers.QueueHandler):
    """Hands records to the writing thread; never waits."""

    def __init__(self, records: queue.Queue[logging.LogRecord | None]) -> None:
        super().__init__(records)
        self.records = records
        self.dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.records.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            return
        if self.dropped and self.records.qsize() < _LOG_QUEUE // 2:
            lost, self.dropped = self.dropped, 0
            with contextlib.suppress(queue.Full):
                self.records.put_nowait(
                    logging.makeLogRecord(
                        {
                            "name": __name__,
                            "levelno": logging.WARNING,
                            "levelname": "WARNING",
                            "msg": f"{lost} log lines were dropped: the log did not keep up",
                        }
                    )
                )


class _Formatter(logging.Formatter):
    """sd-daemon(3) level prefixes under systemd, the time elsewhere."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)-7s %(message)s")
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self.journal:
            return text
        level = _SYSLOG_LEVEL.get(record.levelno, 6)
        return "\n".join(f"<{level}>{line}" for line in text.splitlines())


class _Writer:
    """The writing thread: writes every record to `fd`.

    Not a StreamHandler, whose lock logging.shutdown() would wait for, held by a thread that hangs.
    """

    def __init__(
        self, records: queue.Queue[logging.LogRecord | None], formatter: logging.Formatter, fd: int
    ) -> None:
        self._records = records
        self._formatter = formatter
        self._fd = fd
        self.thread = threading.Thread(target=self._run, name="log", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            line = (self._formatter.format(record) + "\n").encode(errors="backslashreplace")
            with contextlib.suppress(OSError):
                while line:
                    line = line[os.write(self._fd, line) :]

    def stop(self) -> None:
        """Writes what is left, as far as that goes in `_LAST_WORDS` seconds."""
        end = time.monotonic() + _LAST_WORDS
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=_LAST_WORDS)
            self.thread.join(max(0.0, end - time.monotonic()))


def prepare_log(level: int) -> None:
    """Has a thread write the log."""
    records: queue.Queue[logging.LogRecord | None] = queue.Queue(_LOG_QUEUE)
    writer = _Writer(records, _Formatter(journal="JOURNAL_STREAM" in os.environ), 2)
    atexit.register(writer.stop)
    root = logging.getLogger()
    root.addHandler(_DroppingHandler(records))
    root.setLevel(level)
    logging.getLogger("pyroute2").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def prepare_process(level: int, *, relied_on: bool = True) -> None:
    """Sets up logging and, as root, what a process in the writeback path needs.

    relied_on: writeback may wait for this process, so what cannot be had is worth a warning.
    """
    prepare_log(level)
    if os.geteuid() != 0:
        return
    log = logging.getLogger(__name__)
    missing = logging.WARNING if relied_on else logging.DEBUG
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(
            resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
    # A huge page in the place of a few small ones is memory that nobody asked for, and locked.
    if libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0):
        log.log(missing, "PR_SET_THP_DISABLE: %s", os.strerror(ctypes.get_errno()))
    # On fault: what is touched stays; locking all that is mapped would triple the memory.
    if libc.mlockall(_MCL_CURRENT_FUTURE_ONFAULT):
        log.log(missing, "mlockall: %s", os.strerror(ctypes.get_errno()))
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        log.log(missing, "PR_SET_IO_FLUSHER: %s", os.strerror(ctypes.get_errno()))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-900")


def sd_notify(*lines: str) -> None:
    """Tells systemd (sd_notify(3)); nothing without NOTIFY_SOCKET. Never raises, never blocks."""
    where = os.environ.get("NOTIFY_SOCKET")
    if not where:
        return
    address = "\0" + where[1:] if where.startswith("@") else where
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
    ):
        sock.sendto("\n".join(lines).encode(), address)


def nothing_named(path: Path, noun: str, example: str, section: str) -> int:
    """What becomes of a service that the file of settings names no device for: its exit status.

    Where systemd started it that is no failure, since it is enabled in every system that has the
    package. Raises PvfrontError elsewhere.
    """
    text = f"{path} names no {noun} to serve"
    if "NOTIFY_SOCKET" not in os.environ:
        raise PvfrontError(text, hint=f"there, in section [{section}]: {example}; or name it here")
    logging.getLogger(__name__).info("%s", text)
    sd_notify("READY=1", f"STATUS={text}")
    return 0


async def keep_watchdog(environ: Mapping[str, str] = os.environ) -> None:
    """Tells systemd that the event loop runs, twice as often as its unit's WatchdogSec wants.

    Returns at once where systemd does not ask for it (sd_watchdog_enabled(3)).
    """
    text = environ.get("WATCHDOG_USEC", "")
    if not (text.isascii() and text.isdigit() and int(text)):
        return
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        sd_notify("WATCHDOG=1")
        await asyncio.sleep(int(text) / 2e6)


async def system_is_stopping() -> bool:
    """Whether the whole machine is on its way down, as far as systemd says so in time."""
    return (await _systemctl("is-system-running")).strip() == "stopping"


async def shutdown_kind() -> str:
    """What the machine is on its way down for: poweroff, reboot, halt, kexec, or shutdown if
    systemd names none of them; "" if it is not on its way down, as far as systemd says in time.
    """
    if not await system_is_stopping():
        return ""
    return kind_of(await _systemctl("list-jobs", "--plain", "--no-legend"))


def kind_of(jobs: str) -> str:
    """The kind of shutdown among the jobs (number, unit, type, state)."""
    for line in jobs.splitlines():
        match line.split():
            case [_, unit, "start", *_] if unit.removesuffix(".target") in _KINDS:
                return unit.removesuffix(".target")
    return "shutdown"


async def service_restarts(cgroup: Path = Path("/proc/self/cgroup")) -> bool:
    """Whether systemd stops our unit only to start it again, as far as it says so in time."""
    try:
        text = await asyncio.to_thread(cgroup.read_text)
        unit = text.strip().rpartition("/")[2]
    except OSError:
        return False
    if not unit.endswith(".service"):
        return False
    return restarted(unit, await _systemctl("list-jobs", "--plain", "--no-legend"))


def restarted(unit: str, jobs: str) -> bool:
    """Whether the list of jobs (number, unit, type, state) has a restart of the unit."""
    lines = [line.split() for line in jobs.splitlines()]
    return any(line[1:3] == [unit, "restart"] for line in lines)


async def _systemctl(*words: str) -> str:
    """What systemctl says; "" if there is no systemd, or no answer in time."""
    if not await asyncio.to_thread(_SYSTEMD.is_dir):
        return ""
    try:
        process = await asyncio.create_subprocess_exec(
            "systemctl",
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return ""
    try:
        out, _ = await asyncio.wait_for(process.communicate(), _SYSTEMCTL_DEADLINE)
    except TimeoutError:
        process.kill()
        return ""
    return out.decode(errors="replace")
