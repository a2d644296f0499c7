# SPDX-License-Identifier: BSD-2-Clause
"""Programs of the admin's that are run when something happens to a device, or to the domain.

As run-parts(8): every executable file of one directory whose name has nothing but letters, digits,
`_` and `-`, in the order of their names, with nothing on standard input. What happened is told in
the environment. Events of a device are told one after the other; a device never waits for them:
to the programs of the directory itself, and to those of `post-EVENT.d` below it. A moment in the
domain's life (`pre-suspend`) has the programs of `MOMENT.d`, and somebody who waits for them.

A hook has `LIMIT` seconds; then it and what it started are killed. What it prints goes to the log,
line by line. It does not inherit what makes this process the last that memory pressure ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

LIMIT = 60.0  # seconds of one hook
LINES = 100  # of one hook that are logged
WAITING = 64  # events that wait; more are dropped, and said
MOMENTS = (
    "pre-suspend", "pre-resume", "post-suspend", "post-resume", "pre-shutdown", "post-shutdown",
    "post-link", "post-resize", "post-eject", "post-insert", "post-console-key",
)  # fmt: skip
"""Those that there are: docs/agent.md says when each is."""
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_WIDTH = 1000  # characters of a line of a hook's that is logged


class Hooks:
    """Tells the programs of `directory`. Nothing happens where there is no such directory."""

    def __init__(self, directory: Path, *, limit: float = LIMIT) -> None:
        self.directory = directory
        self.limit = limit
        self._waiting: list[tuple[str, dict[str, str]]] = []
        self._task: asyncio.Task[None] | None = None

    def programs(self, below: str = "") -> list[Path]:
        """What there is to run now; `below`: of a directory in the directory."""
        try:
            found = sorted((self.directory / below).iterdir())
        except OSError:
            return []
        return [
            path
            for path in found
            if _NAME.fullmatch(path.name) and path.is_file() and os.access(path, os.X_OK)
        ]

    def tell(self, event: str, facts: Mapping[str, object]) -> None:
        """`event`: "resize"; `facts`: NAME to value, which become PVFRONT_NAME. Never waits."""
        if len(self._waiting) >= WAITING:
            log.warning("hooks: %s dropped: %d events wait already", event, WAITING)
            return
        values = {f"PVFRONT_{name}": str(value) for name, value in facts.items()}
        self._waiting.append((event, {"PVFRONT_EVENT": event, **values}))
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="hooks")

    async def run(
        self, moment: str, facts: Mapping[str, object] | None = None, *, within: float | None = None
    ) -> list[str]:
        """Runs the programs of `moment`.d ("pre-suspend") and returns when all have ended.

        within: seconds for all of them; what is not done then is killed, or not begun. Returns a
        line for each that failed; nothing else comes of a failure.
        """
        values = {f"PVFRONT_{name}": str(value) for name, value in (facts or {}).items()}
        values["PVFRONT_EVENT"] = moment
        loop = asyncio.get_running_loop()
        end = None if within is None else loop.time() + within
        failures = []
        for program in self.programs(f"{moment}.d"):
            limit = self.limit if end is None else min(self.limit, end - loop.time())
            if limit <= 0:
                failures.append(f"{program.name}: not begun: no time is left for {moment}")
                log.warning("hook %s", failures[-1])
            elif failure := await self._tried(program, moment, values, limit):
                failures.append(f"{program.name}: {failure}")
        return failures

    async def told(self) -> None:
        """Returns when every event so far has been told."""
        while (task := self._task) is not None:
            await asyncio.wait({task})

    async def close(self) -> None:
        """Ends what runs; what waits is dropped. Idempotent."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while self._waiting:
                event, values = self._waiting.pop(0)
                for program in (*self.programs(), *self.programs(f"post-{event}.d")):
                    await self._tried(program, event, values, self.limit)
        finally:
            self._task = None

    async def _tried(
        self, program: Path, event: str, values: Mapping[str, str], limit: float
    ) -> str:
        """Runs one; why it failed, "" if it did not. The log has been told."""
        try:
            failure = await _one(program, event, values, limit)
        except OSError as error:
            failure = str(error)
        if failure:
            log.warning("hook %s: %s", program.name, failure)
        return failure


async def _one(program: Path, event: str, values: Mapping[str, str], limit: float) -> str:
    process = await asyncio.create_subprocess_exec(
        str(program),
        cwd="/",
        env={**os.environ, **values},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    _make_common(process.pid)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(limit):
            await _log_lines(program.name, process.stdout)
            status = await process.wait()
    except TimeoutError:
        return f"killed: not done with {event} in {limit:g} s"
    finally:
        # Whatever it has left behind too: the group is its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return f"{event}: ended with status {status}" if status else ""


def _make_common(pid: int) -> None:
    """A process like any other for the one that ends processes when memory runs out."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("0")


async def _log_lines(name: str, output: asyncio.StreamReader) -> None:
    """To the end of `output`; lines beyond `LINES` are read and dropped."""
    count = 0
    while True:
        try:
            line = await output.readline()
        except ValueError:  # longer than the reader's limit, which has dropped it
            continue
        if not line:
            return
        count += 1
        if count <= LINES:
            log.info("hook %s: %s", name, _harmless(line.decode(errors="replace")))


def _harmless(line: str) -> str:
    """One line for the log: a hook may pass on what it was sent."""
    line = line.rstrip().expandtabs()[:_WIDTH]
    return "".join(char if char.isprintable() else "?" for char in line)


def trouble(directory: Path) -> list[tuple[str, str]]:
    """What is in `directory` and never run, or not safe to be: what is wrong, and what to do."""
    found: list[tuple[str, str]] = []
    for path in _inside(directory):
        if not path.is_dir():
            found += _trouble(path)
        elif path.name in {f"{moment}.d" for moment in MOMENTS}:
            found += [one for program in _inside(path) for one in _trouble(program)]
        else:
            there = ", ".join(f"{moment}.d" for moment in MOMENTS)
            found.append((f"nothing in {path} is ever run", f"these directories are: {there}"))
    return found


def _inside(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _trouble(path: Path) -> list[tuple[str, str]]:
    named, may_run = _NAME.fullmatch(path.name), os.access(path, os.X_OK)
    if not path.is_file() or (not may_run and (not named or path.name == "README")):
        return []  # nobody takes it for a hook
    if not named:
        why = "its name may have letters, digits, _ and - only"
        return [(f"{path} is never run: {why}", "rename it")]
    if not may_run:
        return [(f"{path} is never run: it is not executable", f"chmod +x {path}")]
    if path.stat().st_mode & 0o022:
        why = "others than root may write it"
        return [(f"{path} is run as root, and {why}", f"chmod go-w {path}")]
    return []
