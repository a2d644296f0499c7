# SPDX-License-Identifier: BSD-2-Clause
"""Commands and files in dom0 and in guests, from the host.

Why this transport: QEMU's user-mode network forwards a port on 127.0.0.1 to the agent in dom0 and
one to each guest's agent, which stands on the same bridge with its control vif: no bridge, no
address and no privilege on the host, and no program of ours in between. Serial lines were the
alternative: one shared stream without framing, slow under emulation, and the guest's console is
itself under test. TCP connections break when a guest is restarted, and stall while it is suspended,
so nothing is tied to one: a command is a job with an id chosen here, its output is fetched by
offset, a file is written piece by piece. Every request may be sent again, and is, on a new
connection, until the caller's deadline.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .agent import CHUNK, Header, read_message, write_message
from .errors import CommandFailed, DeadlineExceeded

Command = str | Sequence[str]
"""A string goes to bash -c, a sequence is executed as it is."""

RESPONSE_TIMEOUT = 15.0
"""Seconds a healthy agent may take to answer, waiting in op_poll not counted."""

REQUEST_DEADLINE = 120.0
"""Seconds in which a request is sent again and again that has no deadline of its own."""

COMMAND_DEADLINE = 300.0
"""Seconds for a command of which nothing is said; on an idle machine none here takes a tenth."""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    command: str
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.code == 0

    def __str__(self) -> str:
        return f"{self.command!r} ended with {self.code}\n{self.stdout}{self.stderr}"


@dataclass(frozen=True)
class Seen:
    """A path that exists."""

    real: str
    """Where its links lead."""
    kind: str
    """As `ls -l` shows it: - d b c s p."""
    text: str | None
    """The beginning of a regular file, 256 KiB at most."""


LOST_AFTER = 20.0
"""Seconds of silence after which it is worth asking whether the machine is still there."""


class AgentError(Exception):
    """The agent answered that it could not do what was asked."""


class Machine:
    """dom0 or a guest, as something that runs commands. Safe to use from several threads."""

    def __init__(self, name: str, port: int, log: Path | None = None) -> None:
        """`port`: on 127.0.0.1, forwarded to the machine's agent; `log`: what it did, and how long
        that took."""
        self.name = name
        self.port = port
        self._log = log
        self._idle: list[socket.socket] = []
        self._forget: list[str] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<{self.name}>"

    # -- requests ---------------------------------------------------------------------------

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=RESPONSE_TIMEOUT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def request(
        self, header: Header, body: bytes = b"", deadline: float | None = None, wait: float = 0
    ) -> tuple[Header, bytes]:
        """One request, sent again on new connections until answered or `deadline` (monotonic)."""
        deadline = time.monotonic() + REQUEST_DEADLINE if deadline is None else deadline
        look = time.monotonic() + LOST_AFTER
        while True:
            sock = None
            try:
                with self._lock:
                    sock = self._idle.pop() if self._idle else None
                sock = sock or self._connect()
                sock.settimeout(RESPONSE_TIMEOUT + wait)
                write_message(sock, header, body)
                answer, data = read_message(sock)
            except (OSError, ValueError) as error:
                if sock:
                    sock.close()
                with self._lock:
                    stale, self._idle = self._idle, []
                for other in stale:
                    other.close()
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"{self.name}: the agent did not answer {header['op']!r}: {error}"
                    ) from error
                if time.monotonic() > look:
                    look = time.monotonic() + LOST_AFTER
                    if why := self.lost():
                        raise DeadlineExceeded(f"{self.name}: {why}") from error
                time.sleep(0.2)
                continue
            with self._lock:
                self._idle.append(sock)
            if "error" in answer:
                raise AgentError(f"{self.name}: {answer['error']}")
            return answer, data

    def lost(self) -> str | None:
        """Why no answer will ever come; None if one may."""
        return None

    def note(self, seconds: float, how: object, what: str) -> None:
        """A line of the log: when it ended, where, how long it took, how it ended, what it was."""
        if self._log:
            stamp, line = time.strftime("%H:%M:%S"), " ".join(what.split())[:160]
            with self._log.open("a") as log:
                log.write(f"{stamp} {self.name:6} {seconds:7.2f} {how} {line}\n")

    def close(self) -> None:
        """Drop the kept connections; the object stays usable."""
        with self._lock:
            for sock in self._idle:
                sock.close()
            self._idle = []

    def alive(self, timeout: float = 2.0) -> bool:
        """Whether the agent answers within `timeout` s."""
        sock = None
        try:
            sock = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
            write_message(sock, {"op": "hello"})
            return "boot" in read_message(sock)[0]
        except (OSError, ValueError):
            return False
        finally:
            if sock:
                sock.close()

    def boot_id(self) -> str:
        """Changes with every boot of the machine, not with save and restore."""
        return str(self.request({"op": "hello"})[0]["boot"])

    # -- commands ---------------------------------------------------------------------------

    def start(
        self,
        command: Command,
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        unit: str | None = None,
        wait: float | None = None,
    ) -> Job:
        """Start a job; return at once, or with `wait` at its end or after so many seconds.

        `unit`: run it in a systemd scope of that name.
        """
        argv = ["/bin/bash", "-c", command] if isinstance(command, str) else list(command)
        shown = command if isinstance(command, str) else shlex.join(command)
        job = Job(self, secrets.token_hex(6), shown)
        with self._lock:
            forget, self._forget = self._forget, []
        header: dict[str, Any] = {"op": "start", "id": job.id, "argv": argv, "wait": wait or 0,
                                  "env": dict(env or {}), "forget": forget}  # fmt: skip
        if cwd:
            header["cwd"] = cwd
        if unit:
            header["unit"] = unit
        answer = self.request(header, stdin, wait=wait or 0)
        if wait is not None:
            job.take(*answer)
        return job

    def forget(self, job: Job) -> None:
        """Let the agent remove what it keeps of an ended job, with the next command."""
        with self._lock:
            self._forget.append(job.id)

    def run(
        self,
        command: Command,
        *,
        timeout: float = COMMAND_DEADLINE,
        check: bool = True,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        unit: str | None = None,
    ) -> Result:
        """Run a command to its end.

        Raises CommandFailed on a status other than 0 (unless check=False) and DeadlineExceeded,
        after killing it, when it takes more than `timeout` s.
        """
        job = self.start(command, stdin=stdin, env=env, cwd=cwd, unit=unit, wait=min(5.0, timeout))
        try:
            result = job.wait(timeout)
        except DeadlineExceeded:
            with contextlib.suppress(DeadlineExceeded, AgentError):
                job.kill()
            raise
        self.forget(job)
        if check and not result.ok:
            raise CommandFailed(f"{self.name}: {result}")
        return result

    def output(self, command: Command, *, timeout: float = COMMAND_DEADLINE) -> str:
        """Standard output of a command that must succeed, stripped."""
        return self.run(command, timeout=timeout).stdout.strip()

    # -- files ------------------------------------------------------------------------------

    def has(self, path: str, kind: str = "") -> bool:
        """Whether the path is there, as what `ls -l` shows as `kind` if one is named. As `look`."""
        (seen,) = self.look(path)
        return seen is not None and kind in ("", seen.kind)

    def look(self, *paths: str) -> list[Seen | None]:
        """What is at these paths, None for nothing. No process is started for it: for waiting."""
        seen = self.request({"op": "look", "paths": paths})[0]["seen"]
        return [Seen(**seen[path]) if seen[path] else None for path in paths]

    def write(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """Create or replace a file there; it appears complete or not at all."""
        data = data.encode() if isinstance(data, str) else data
        token = secrets.token_hex(4)
        offset = 0
        while True:
            piece = data[offset : offset + CHUNK]
            last = offset + len(piece) >= len(data)
            self.request(
                {"op": "put", "path": path, "offset": offset, "mode": mode, "last": last,
                 "token": token},
                piece, time.monotonic() + 60,
            )  # fmt: skip
            offset += len(piece)
            if last:
                return

    def read(self, path: str) -> bytes:
        """The contents of a file there."""
        parts: list[bytes] = []
        offset = 0
        while True:
            answer, data = self.request({"op": "get", "path": path, "offset": offset})
            parts.append(data)
            offset += len(data)
            if answer["end"]:
                return b"".join(parts)

    def push(self, source: str | Path, target: str) -> None:
        """Copy a host file (or a directory, recursively) there; `target` is the new name."""
        source = Path(source)
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    self.push(path, f"{target}/{path.relative_to(source)}")
            return
        token = secrets.token_hex(4)
        mode = source.stat().st_mode & 0o777
        size = source.stat().st_size
        offset = 0
        with source.open("rb") as file:
            while True:
                piece = file.read(CHUNK)
                last = offset + len(piece) >= size
                self.request(
                    {"op": "put", "path": target, "offset": offset, "mode": mode, "last": last,
                     "token": token},
                    piece, time.monotonic() + 60,
                )  # fmt: skip
                offset += len(piece)
                if last:
                    return

    def pull(self, source: str, target: str | Path) -> None:
        """Copy a file from there to the host."""
        offset = 0
        with Path(target).open("wb") as file:
            while True:
                answer, data = self.request({"op": "get", "path": source, "offset": offset})
                file.write(data)
                offset += len(data)
                if answer["end"]:
                    break
        Path(target).chmod(answer["mode"])

    def open_shell(self, rows: int = 24, columns: int = 80, term: str = "vt100") -> socket.socket:
        """An interactive shell on a terminal of its own: what it shows, and what is typed."""
        sock = self._connect()
        write_message(sock, {"op": "shell", "rows": rows, "columns": columns, "term": term})
        read_message(sock)
        sock.settimeout(None)
        return sock

    def shell(self) -> int:
        """An interactive shell on this terminal, until it ends."""
        import select
        import termios
        import tty

        size = os.get_terminal_size() if sys.stdin.isatty() else os.terminal_size((80, 24))
        sock = self.open_shell(size.lines, size.columns, os.environ.get("TERM", "vt100"))
        stdin = sys.stdin.fileno()
        saved = termios.tcgetattr(stdin) if sys.stdin.isatty() else None
        try:
            if saved:
                tty.setraw(stdin)
            sources: list[Any] = [sock, stdin]
            while True:
                ready, _, _ = select.select(sources, [], [])
                if sock in ready:
                    data = sock.recv(65536)
                    if not data:
                        return 0
                    os.write(sys.stdout.fileno(), data)
                if stdin in ready:
                    data = os.read(stdin, 65536)
                    if not data:
                        sources.remove(stdin)
                        data = b"\x04"
                    sock.sendall(data)
        finally:
            if saved:
                termios.tcsetattr(stdin, termios.TCSADRAIN, saved)
            sock.close()


class Job:
    """A command that runs, or ran, on a machine."""

    def __init__(self, machine: Machine, job_id: str, command: str) -> None:
        self.machine = machine
        self.id = job_id
        self.command = command
        self.code: int | None = None
        self._output = {"out": b"", "err": b""}
        self._begin = time.monotonic()

    @property
    def stdout(self) -> str:
        """What came so far, as of the last poll."""
        return self._output["out"].decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self._output["err"].decode(errors="replace")

    def poll(self, wait: float = 0.0, deadline: float | None = None) -> tuple[bytes, bytes]:
        """Fetch new output, waiting up to `wait` s for the end; `code` is set once it ended."""
        answer, data = self.machine.request(
            {"op": "poll", "id": self.id, "wait": wait or 0,
             "out": len(self._output["out"]), "err": len(self._output["err"])},
            deadline=deadline, wait=wait,
        )  # fmt: skip
        return self.take(answer, data)

    def take(self, answer: Header, data: bytes) -> tuple[bytes, bytes]:
        """What an answer to start or poll brought."""
        out, err = data[: answer["out"]], data[answer["out"] :]
        self._output["out"] += out
        self._output["err"] += err
        if answer["rc"] is not None and not answer["more"]:
            self.code = int(answer["rc"])
        return out, err

    @property
    def running(self) -> bool:
        """Whether it still runs (asks)."""
        if self.code is None:
            self.poll()
        return self.code is None

    def wait(self, timeout: float = COMMAND_DEADLINE) -> Result:
        """Wait for the end. The status is the caller's to judge. Raises DeadlineExceeded."""
        deadline = time.monotonic() + timeout
        while self.code is None:
            left = deadline - time.monotonic()
            if left < 0:
                self.machine.note(timeout, "late", self.command)
                raise DeadlineExceeded(
                    f"{self.machine.name}: {self.command!r} did not end within {timeout:.0f} s\n"
                    f"{self.stdout[-4000:]}{self.stderr[-4000:]}"
                )
            self.poll(min(5.0, left), deadline)
        seconds = time.monotonic() - self._begin
        self.machine.note(seconds, self.code, self.command)
        return Result(self.command, self.code, self.stdout, self.stderr, seconds)

    def kill(self, signal: int = 9) -> None:
        """Send a signal to every process of the job."""
        self.machine.request({"op": "kill", "id": self.id, "signal": signal})
