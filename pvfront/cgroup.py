# SPDX-License-Identifier: BSD-2-Clause
"""Stopping every program but our own with the cgroup v2 freezer, and never leaving one stopped.

Theory of operation
    A domain suspends only when all of user space is frozen, and the kernel freezes in no order: a
    task in the middle of a write to a disk that we serve cannot be frozen once we are. So the
    users of our devices are frozen first, by cgroup, while we go on serving; a task that waits for
    a disk counts as frozen when the disk has answered it (Documentation/admin-guide/
    cgroup-v2.rst, "cgroup.freeze").

    *Who.* Every cgroup that hangs off the paths from the root to our own and to those of other
    services that take part, which leaves exactly these running (`clients`). Two more are spared.
    ``init.scope``: PID 1 has to be able to restart us and to reap; it hardly ever touches a disk,
    and if it is caught in a write to ours all the same the kernel's freeze fails and the suspend is
    tried again. ``pvfront.slice``, if we are in it: other packages' services serve devices
    themselves. Tasks in the root cgroup cannot be frozen; on a system with an init that uses no
    cgroups that is everybody, and nothing is frozen here.

    *Never left stopped.* The list of what we froze is on tmpfs before the first of them is
    frozen. A child process (`thawguard.py`), locked in memory, thaws the list when its pipe
    from us ends, which is when we die, and when the list has stood for longer than any suspend
    takes. Whoever starts next thaws what is listed. What somebody else has frozen stays frozen.

    *File systems.* Threads of the kernel's own write to disks too (ext4 initialises its tables for
    hours), and cannot be frozen while they wait for one. `hold` freezes file systems, which
    such threads respect; they stand in the same list, and are thawed with the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from . import fssync
from .errors import PvfrontError
from .threads import in_daemon_thread

log = logging.getLogger(__name__)

SPARED = ("init.scope",)
OUR_SLICE = "pvfront.slice"
POLL = 0.02  # seconds between two looks at cgroup.events
GUARD = Path(__file__).with_name("thawguard.py")
GUARD_LIMIT = 120.0  # seconds of running time after which frozen programs are thawed regardless


class FreezeFailed(PvfrontError):
    """Some programs did not freeze in time; the message names cgroups and tasks."""


def mount_point(mountinfo: str) -> Path | None:
    """Where cgroup v2 is mounted, from the text of /proc/self/mountinfo (proc(5))."""
    for line in mountinfo.splitlines():
        left, dash, right = line.partition(" - ")
        if dash and right.split(" ", 1)[0] == "cgroup2":
            return Path(left.split(" ")[4])
    return None


def own_cgroup(proc_cgroup: str) -> str:
    """Our own cgroup v2 path, "/" at the root, from the text of /proc/self/cgroup (cgroups(7)).

    Inside `OUR_SLICE` the slice counts as a whole.
    """
    for line in proc_cgroup.splitlines():
        if line.startswith("0::/"):
            parts = line.removeprefix("0::/").split("/")
            if OUR_SLICE in parts:
                parts = parts[: parts.index(OUR_SLICE) + 1]
            return "/" + "/".join(parts).rstrip("/")
    return "/"


def clients(
    root: Path, own: str, spared: Collection[str] = SPARED, others: Collection[str] = ()
) -> list[Path]:
    """The cgroups to freeze so that only `own`, `others` (paths like it) and `spared` (names
    below the root) go on.

    Only those that have processes now (``populated``) and that nobody else has frozen.
    """
    ways = [path.strip("/").split("/") for path in (own, *others) if path.strip("/")]
    return list(_off(root, ways, spared))


def _off(here: Path, ways: list[list[str]], spared: Collection[str] = ()) -> Iterator[Path]:
    """What hangs off the ways that lead on from `here`."""
    if not all(ways):  # one ends here: all below it goes on
        return
    for child in _children(here):
        if onward := [way[1:] for way in ways if way[0] == child.name]:
            yield from _off(child, onward)
        elif child.name in spared or not _event(child, "populated"):
            continue
        elif not _asked_to_freeze(child):
            yield child


def _children(group: Path) -> Iterator[Path]:
    try:
        entries = sorted(group.iterdir())
    except FileNotFoundError:
        return
    for entry in entries:
        if (entry / "cgroup.freeze").exists():
            yield entry


def _event(group: Path, key: str) -> bool:
    """A flag in cgroup.events; False if the cgroup is gone."""
    try:
        lines = (group / "cgroup.events").read_text().splitlines()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return False
        raise
    return f"{key} 1" in lines


def _asked_to_freeze(group: Path) -> bool:
    try:
        return (group / "cgroup.freeze").read_text().strip() == "1"
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return True  # gone: nothing to do
        raise


def _ask(group: Path, freeze: bool) -> None:
    try:
        (group / "cgroup.freeze").write_text("1" if freeze else "0")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise


def awake_tasks(group: Path, proc: Path = Path("/proc"), most: int = 5) -> list[str]:
    """Up to `most` of the tasks that keep a cgroup from being frozen: ``fio[812] D wait``.

    A guess: those in uninterruptible sleep (D) or running (R); frozen ones sleep (S).
    """
    found: list[str] = []
    for procs in sorted(group.rglob("cgroup.procs")):
        with contextlib.suppress(OSError):
            for pid in procs.read_text().split():
                for task in (proc / pid / "task").iterdir():
                    with contextlib.suppress(OSError):
                        before, _, after = (task / "stat").read_text().rpartition(")")
                        state = after.split()[0]
                        if state in "DR":
                            wchan = (task / "wchan").read_text().strip()
                            name = before.partition("(")[2]
                            found.append(f"{name}[{task.name}] {state} {wchan}".rstrip(" 0"))
                            if len(found) == most:
                                return found
    return found


def thaw_listed(record: Path) -> list[Path]:
    """Thaws what `record` lists and removes it; returns what was listed, [] if there is none.

    File systems are thawed in threads: that takes as long as their disks do.
    """
    try:
        listed = [Path(line) for line in record.read_text().splitlines() if line]
    except FileNotFoundError:
        return []
    for entry in listed:
        if (entry / "cgroup.freeze").exists():
            _ask(entry, False)
        elif entry.is_mount():
            _let_go(str(entry))
    record.unlink(missing_ok=True)
    return listed


def _let_go(where: str) -> threading.Thread:
    thread = threading.Thread(target=fssync.let_go, args=(where,), name="FITHAW", daemon=True)
    thread.start()
    return thread


class Freezer:
    """Freezes the clients, and thaws them whatever happens."""

    def __init__(
        self,
        record: Path,
        *,
        root: Path | None,
        own: str,
        spared: Collection[str] = SPARED,
        guard_limit: float = GUARD_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`record`: the list of what is frozen, on tmpfs. `root`: None without cgroup v2."""
        self.root = root
        self.own = own
        self._record = record
        self._spared = spared
        self._guard_limit = guard_limit
        self._clock = clock
        self.others: Collection[str] = ()
        """Cgroups of other services that serve devices, as `own`."""
        self._frozen: list[Path] = []
        self._held: list[str] = []
        self._letting_go: list[threading.Thread] = []
        self._guard: subprocess.Popen[bytes] | None = None

    @classmethod
    def of_this_process(cls, record: Path) -> Freezer:
        root = mount_point(Path("/proc/self/mountinfo").read_text())
        own = own_cgroup(Path("/proc/self/cgroup").read_text())
        return cls(record, root=root, own=own)

    def start(self) -> None:
        """Thaws what a predecessor has left frozen and starts the guard."""
        if left := thaw_listed(self._record):
            log.warning("thawed what an earlier run had left frozen: %s", _names(left))
        if self.root is None or self.own == "/":
            log.warning(
                "no cgroup of our own (%s): programs are not frozen before a suspend; one under "
                "load on our devices may make it fail",
                "cgroup v2 is not mounted" if self.root is None else "we are in the root cgroup",
            )
            return
        self._record.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._ensure_guard()

    def _ensure_guard(self) -> None:
        if self._guard is not None:
            if self._guard.poll() is None:
                return
            log.error("the thaw guard has ended (%s); starting another", self._guard.returncode)
            self._forget_guard()
        self._guard = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                str(GUARD),
                str(self._record),
                str(self._guard_limit),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _forget_guard(self) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.close()

    @property
    def guard_pid(self) -> int | None:
        return self._guard.pid if self._guard is not None else None

    def _tell_guard(self, what: bytes) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            try:
                self._guard.stdin.write(what)
                self._guard.stdin.flush()
            except BrokenPipeError:
                log.error("the thaw guard is gone")

    async def freeze(self, timeout: float) -> int:
        """Freezes every client, also those that appear meanwhile; returns how many cgroups.

        Raises FreezeFailed after `timeout` seconds; what is frozen then stays so until `thaw`.
        """
        if self.root is None or self.own == "/":
            return 0
        self._ensure_guard()
        deadline = self._clock() + timeout
        while True:
            new = clients(self.root, self.own, self._spared, self.others)
            self._list(new)
            for group in new:
                _ask(group, True)
            waiting = [group for group in self._frozen if not self._is_still(group)]
            if not new and not waiting:
                return len(self._frozen)
            if self._clock() >= deadline:
                tasks = [task for group in waiting for task in awake_tasks(group)][:5]
                raise FreezeFailed(
                    f"not frozen after {timeout:g} s: {_names(waiting or new)}"
                    + (f" ({', '.join(tasks)})" if tasks else "")
                )
            await asyncio.sleep(POLL)

    @staticmethod
    def _is_still(group: Path) -> bool:
        return _event(group, "frozen") or not _event(group, "populated")

    def _list(self, groups: list[Path]) -> None:
        """Lists `groups` as frozen before they are: a crash in between thaws too much, not less."""
        if not groups:
            return
        self._frozen += [group for group in groups if group not in self._frozen]
        self._write_list()

    def _write_list(self) -> None:
        self._tell_guard(b"F")
        self._record.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        draft = self._record.with_suffix(".new")
        draft.write_text("".join(f"{entry}\n" for entry in (*self._frozen, *self._held)))
        draft.rename(self._record)

    async def hold(self, mounts: Collection[str], timeout: float) -> None:
        """Freezes the file systems at these mount points, side by side, until `thaw`.

        One that cannot be frozen goes on. Raises FreezeFailed naming those that took too long.
        """
        self._ensure_guard()
        self._held += [where for where in mounts if where not in self._held]
        self._write_list()
        given_up = threading.Event()

        def hold(where: str) -> bool:
            held = fssync.hold(where)
            if held and given_up.is_set():  # by who cannot be called back
                fssync.let_go(where)
            return held

        tasks = {
            asyncio.create_task(in_daemon_thread("FIFREEZE", partial(hold, where))): where
            for where in mounts
        }
        done, pending = await asyncio.wait(tasks, timeout=timeout)
        for task in done:
            if not task.result():
                self._held.remove(tasks[task])
        for task in pending:
            given_up.set()
            task.cancel()
        if pending:
            late = ", ".join(sorted(tasks[task] for task in pending))
            raise FreezeFailed(f"file systems not frozen after {timeout:g} s: {late}")

    def thaw(self) -> None:
        """Thaws what `freeze` and `hold` froze. Harmless if nothing is frozen."""
        self._letting_go = [thread for thread in self._letting_go if thread.is_alive()]
        self._letting_go += map(_let_go, self._held)
        self._held.clear()
        for group in self._frozen:
            try:
                _ask(group, False)
            except OSError as error:
                log.error("%s: cannot be thawed: %s", group, error.strerror)
        self._frozen.clear()
        self._record.unlink(missing_ok=True)
        self._tell_guard(b"T")

    def close(self) -> None:
        """Thaws, and ends the guard."""
        self.thaw()
        for thread in self._letting_go:
            thread.join(2)  # the end of this process must not come before its system call
        self._forget_guard()
        if self._guard is not None:
            try:
                self._guard.wait(2)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
            self._guard = None


def _names(groups: Collection[Path]) -> str:
    return ", ".join(sorted(group.name for group in groups))
