# SPDX-License-Identifier: BSD-2-Clause
"""Processes of the embedded host: they die with whoever started them, and say why they died."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pvfront.errors import PvfrontError

START_SECONDS = 60.0
"""As every deadline of the host's processes for each other: for what hangs. Where a machine has no
time for them, a tenth of a second's work takes many."""
STOP_SECONDS = 70.0
"""More than a supervisor takes for its own end (supervisor.STOP_DEADLINE)."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    # Between fork and exec: one system call, and nothing that takes a lock.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """One process. Its output goes to a file, the tail of which is told when it fails.

    It is killed when the thread that started it ends: start it from the main thread.
    """

    def __init__(
        self,
        what: str,
        command: Sequence[str],
        log: Path,
        environ: Mapping[str, str] | None = None,
        *,
        tell_again: float | None = None,
    ) -> None:
        """Starts `command`. what: its name in errors. Raises PvfrontError.

        tell_again: seconds after which the signal that ends it is sent once more, for a program
        that misses one which comes just before it sleeps.
        """
        self.what = what
        self.log = log
        self.tell_again = tell_again
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    list(command),
                    env={**os.environ, **(environ or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # Signals of a terminal are for whoever started it, who then stops it in order.
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
        except OSError as exc:
            raise PvfrontError(f"{what} cannot be started: {exc}") from exc

    @property
    def pid(self) -> int:
        return self.process.pid

    async def saying(self, text: str) -> None:
        """Waits until its output has `text`. Raises PvfrontError."""
        deadline = time.monotonic() + START_SECONDS
        while text not in self.log.read_text(errors="replace"):
            status = self.process.poll()
            if status is not None:
                raise PvfrontError(f"{self.what} ended with status {status}: {self.said()}")
            if time.monotonic() > deadline:
                raise PvfrontError(f"{self.what} never said {text!r}: {self.said()}")
            await asyncio.sleep(0.01)

    async def listening(self, path: Path, kind: socket.SocketKind) -> None:
        """Waits until it accepts connections at `path`. Raises PvfrontError."""
        deadline = time.monotonic() + START_SECONDS
        while not answers(path, kind):
            status = self.process.poll()
            if status is not None:
                raise PvfrontError(f"{self.what} ended with status {status}: {self.said()}")
            if time.monotonic() > deadline:
                raise PvfrontError(
                    f"{self.what} did not listen at {path} in {START_SECONDS:.0f} s: {self.said()}"
                )
            await asyncio.sleep(0.01)

    def said(self) -> str:
        """The last thing that it wrote, for an error's line."""
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "it said nothing"

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends it, by force if it does not end; its status. Twice is harmless."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            told = time.monotonic()
            deadline = told + STOP_SECONDS
            while self.process.poll() is None:
                now = time.monotonic()
                if now > deadline:
                    self.process.kill()
                    break
                if self.tell_again is not None and now - told > self.tell_again:
                    self.process.send_signal(number)
                    told = now
                await asyncio.sleep(0.005)
        return self.process.wait()


def answers(path: Path, kind: socket.SocketKind) -> bool:
    """Whether somebody accepts connections at a Unix socket. Never waits."""
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True  # the queue is full, so there is one
        except OSError:
            return False
    return True


async def said_by(
    *command: str,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> tuple[int, str]:
    """Runs a command to its end: its status, and what it said. It is ended if we are."""
    process = await asyncio.create_subprocess_exec(
        *command, env=environ, cwd=cwd, pass_fds=pass_fds,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        out, _ = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    return await process.wait(), out.decode(errors="replace")
