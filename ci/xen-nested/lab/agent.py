# SPDX-License-Identifier: BSD-2-Clause
"""The lab's command agent: runs in dom0 and in every guest, speaks to lab/client.py.

Theory of operation
-------------------
A TCP server; one thread per connection; any number of requests per connection. A request is a
4-byte big-endian length, a JSON object, then `body` bytes if the object has that key; the answer
has the same form. `error` in an answer says what was wrong.

A command is a *job* with an id that the client chose. Its process, standard output, standard error
and exit status live in files below STATE/jobs/ID, so nothing depends on a connection: a client
that lost one (a suspended guest, a restored one) connects again and goes on where it was, and
`start` with a known id changes nothing.

Every job has its own session, and with --cgroups its own cgroup beside the agent's, so that
a test may freeze the client of a disk without freezing the agent.

Standard library only, Python 3.11; this file is copied into the images as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import select
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

PORT = 7777
CHUNK = 1 << 20
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/xen-4.17/bin"

# Enters the job's cgroup ($0) before anything of the job runs.
IN_CGROUP = 'echo $$ >"$0" && exec "$@"'

Header = dict[str, Any]


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, or ConnectionError."""
    parts: list[bytes] = []
    while size:
        part = sock.recv(min(size, CHUNK))
        if not part:
            raise ConnectionError("connection closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_message(sock: socket.socket) -> tuple[Header, bytes]:
    """One message: (object, body)."""
    (size,) = struct.unpack(">I", receive(sock, 4))
    if size > CHUNK:
        raise ConnectionError(f"not a message of ours: length {size}")
    header: Header = json.loads(receive(sock, size))
    return header, receive(sock, int(header.get("body", 0)))


def write_message(sock: socket.socket, header: Header, body: bytes = b"") -> None:
    """The opposite of read_message."""
    if body:
        header = {**header, "body": len(body)}
    text = json.dumps(header).encode()
    sock.sendall(struct.pack(">I", len(text)) + text + body)


class Agent:
    """The jobs and the operations on them; `op_NAME` answers the request NAME."""

    def __init__(self, state: Path, cgroups: bool) -> None:
        self.jobs = state / "jobs"
        self.jobs.mkdir(parents=True, exist_ok=True)
        self.ended: dict[str, threading.Event] = {}
        self.lock = threading.Lock()
        self.cgroup = self._own_cgroup() if cgroups else None
        self.boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    @staticmethod
    def _own_cgroup() -> Path:
        """Move into a child of the service's cgroup: a cgroup with children holds no process."""
        (line,) = (ln for ln in Path("/proc/self/cgroup").read_text().splitlines() if ":/" in ln)
        path = Path("/sys/fs/cgroup") / line.split(":", 2)[2].lstrip("/")
        if path.name == "agent":
            return path.parent
        (path / "agent").mkdir(exist_ok=True)
        (path / "agent/cgroup.procs").write_text(str(os.getpid()))
        return path

    def _job(self, request: Header) -> Path:
        name = str(request["id"])
        if not name.replace("-", "").isalnum():
            raise ValueError(f"not a job id: {name!r}")
        return self.jobs / name

    def op_hello(self, _request: Header, _body: bytes) -> tuple[Header, bytes]:
        return {"boot": self.boot, "pid": os.getpid()}, b""

    def op_start(self, request: Header, body: bytes) -> tuple[Header, bytes]:
        """{id, argv, env, cwd, wait, unit?, forget?} + standard input: start a job, then `op_poll`.

        A known id is not started again. With `unit` the job runs in a systemd scope of that name
        instead of a cgroup of the agent's. `forget`: ids of ended jobs to remove.
        """
        for name in request.get("forget", ()):
            self.op_forget({"id": name}, b"")
        job = self._job(request)
        with self.lock:
            if not job.exists():
                self._spawn(job, request, body)
        return self.op_poll({**request, "out": 0, "err": 0}, b"")

    def _spawn(self, job: Path, request: Header, body: bytes) -> None:
        fresh = Path(tempfile.mkdtemp(prefix="new.", dir=self.jobs))
        (fresh / "in").write_bytes(body)
        (fresh / "argv").write_text(json.dumps(request["argv"]))
        cgroup, argv = None, list(request["argv"])
        if request.get("unit"):
            argv = ["systemd-run", "--scope", "--quiet", "--collect",
                    f"--unit={request['unit']}", "--", *argv]  # fmt: skip
        elif self.cgroup:
            cgroup = self.cgroup / f"job-{job.name}"
            cgroup.mkdir(exist_ok=True)
            argv = ["/bin/sh", "-c", IN_CGROUP, f"{cgroup}/cgroup.procs", *argv]
        env = {"PATH": PATH, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8",
               "TERM": "dumb", **request.get("env", {})}  # fmt: skip
        with (
            (fresh / "in").open("rb") as stdin,
            (fresh / "out").open("wb") as stdout,
            (fresh / "err").open("wb") as stderr,
        ):
            try:
                process = subprocess.Popen(
                    argv, env=env, cwd=request.get("cwd") or "/root",
                    stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True,
                )  # fmt: skip
            except OSError as error:  # as a shell says it
                stderr.write(f"{error}\n".encode())
                (fresh / "rc").write_text("127")
                fresh.rename(job)
                return
        (fresh / "pid").write_text(str(process.pid))
        ended = self.ended[job.name] = threading.Event()
        fresh.rename(job)
        threading.Thread(target=self._reap, args=(job, process, cgroup, ended)).start()

    @staticmethod
    def _reap(
        job: Path, process: subprocess.Popen[bytes], cgroup: Path | None, ended: threading.Event
    ) -> None:
        code = process.wait()
        with contextlib.suppress(OSError):  # forgotten already
            # By rename: a status that exists is complete. As a shell says it: 128 + signal.
            (job / "rc.new").write_text(str(128 - code if code < 0 else code))
            (job / "rc.new").rename(job / "rc")
        ended.set()
        if cgroup:
            with contextlib.suppress(OSError):  # busy: the job left children
                cgroup.rmdir()

    def op_poll(self, request: Header, _body: bytes) -> tuple[Header, bytes]:
        """{id, out, err, wait}: wait at most `wait` s for the end; the output past the offsets.

        Answers {rc | null, out: bytes of standard output in the body, err: likewise, more}.
        """
        job = self._job(request)
        if not job.exists():
            raise LookupError(f"no job {job.name} (another boot?)")
        event = self.ended.get(job.name)
        if event:
            event.wait(float(request.get("wait", 0)))
        rc = int((job / "rc").read_text()) if (job / "rc").exists() else None
        if rc is None and event is None:
            rc = 255  # the agent was restarted: it is nobody's child now
        parts, more = [], False
        for name in ("out", "err"):
            with (job / name).open("rb") as file:
                file.seek(int(request.get(name, 0)))
                parts.append(file.read(CHUNK))
                more = more or bool(file.read(1))
        answer = {"rc": rc, "out": len(parts[0]), "err": len(parts[1]), "more": more}
        return answer, parts[0] + parts[1]

    def op_kill(self, request: Header, _body: bytes) -> tuple[Header, bytes]:
        """{id, signal}: to every process of the job's session."""
        job = self._job(request)
        number = int(request.get("signal", signal.SIGKILL))
        if (job / "rc").exists():  # its pid may be another's by now
            return {}, b""
        pid = int((job / "pid").read_text())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
        group = self.cgroup / f"job-{job.name}" if self.cgroup else None
        if group and group.exists() and number == signal.SIGKILL:
            with contextlib.suppress(OSError):
                (group / "cgroup.kill").write_text("1")
        return {}, b""

    def op_forget(self, request: Header, _body: bytes) -> tuple[Header, bytes]:
        """{id}: remove what is kept of an ended job."""
        job = self._job(request)
        shutil.rmtree(job, ignore_errors=True)
        self.ended.pop(job.name, None)
        return {}, b""

    def op_jobs(self, _request: Header, _body: bytes) -> tuple[Header, bytes]:
        running = {}
        for job in self.jobs.iterdir():
            if (job / "argv").exists() and not (job / "rc").exists():
                running[job.name] = json.loads((job / "argv").read_text())
        return {"running": running}, b""

    def op_put(self, request: Header, body: bytes) -> tuple[Header, bytes]:
        """{path, offset, mode, last}: a piece of a file; the file appears with its last piece."""
        path = Path(request["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{request['token']}.part")
        flags = os.O_CREAT | os.O_WRONLY | (os.O_TRUNC if request["offset"] == 0 else 0)
        fd = os.open(partial, flags, 0o600)
        try:
            os.lseek(fd, int(request["offset"]), os.SEEK_SET)
            view = memoryview(body)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        if request["last"]:
            partial.chmod(int(request["mode"]))
            partial.rename(path)
        return {}, b""

    def op_get(self, request: Header, _body: bytes) -> tuple[Header, bytes]:
        """{path, offset}: up to CHUNK bytes; `end` once there is no more."""
        with Path(request["path"]).open("rb") as file:
            file.seek(int(request["offset"]))
            data = file.read(CHUNK)
            return {"end": len(data) < CHUNK, "mode": os.fstat(file.fileno()).st_mode & 0o777}, data

    def op_look(self, request: Header, _body: bytes) -> tuple[Header, bytes]:
        """{paths}: of each, where its links lead, its kind as `ls -l` shows it, a file's beginning.

        Starts no process: this is what a test asks again and again while it waits.
        """
        seen: Header = {}
        for path in map(str, request["paths"]):
            seen[path] = None
            with contextlib.suppress(OSError):
                real = os.path.realpath(path, strict=True)
                kind = stat.filemode(Path(real).stat().st_mode)[0]
                text = None
                if kind == "-":
                    with Path(real).open("rb") as file:
                        text = file.read(CHUNK // 4).decode(errors="replace")
                seen[path] = {"real": real, "kind": kind, "text": text}
        return {"seen": seen}, b""


def shell(sock: socket.socket, request: Header) -> None:
    """Turn the connection into a terminal running a shell."""
    pid, master = pty.fork()
    if pid == 0:
        os.chdir("/root")
        env = {"PATH": PATH, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8",
               "TERM": request.get("term", "vt100")}  # fmt: skip
        os.execve("/bin/bash", ["-bash"], env)
    size = struct.pack("HHHH", int(request["rows"]), int(request["columns"]), 0, 0)
    import fcntl
    import termios

    fcntl.ioctl(master, termios.TIOCSWINSZ, size)
    try:
        while True:
            ready, _, _ = select.select([sock.fileno(), master], [], [])
            if sock.fileno() in ready:
                data = sock.recv(65536)
                if not data:
                    break
                os.write(master, data)
            if master in ready:
                try:
                    data = os.read(master, 65536)
                except OSError:  # EIO: the shell has ended
                    break
                sock.sendall(data)
    finally:
        os.close(master)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)
        os.waitpid(pid, 0)


class Handler(socketserver.BaseRequestHandler):
    """One connection."""

    def handle(self) -> None:
        sock: socket.socket = self.request
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        agent: Agent = self.server.agent  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            while True:
                request, body = read_message(sock)
                if request["op"] == "shell":
                    write_message(sock, {})
                    shell(sock, request)
                    return
                try:
                    operation = getattr(agent, f"op_{request['op']}")
                    answer, data = operation(request, body)
                except Exception as error:  # the client is told; the agent lives on
                    answer, data = {"error": f"{type(error).__name__}: {error}"}, b""
                write_message(sock, answer, data)


class Server(socketserver.ThreadingTCPServer):
    """Listens; holds the agent."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--listen", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--cgroups", action="store_true")
    options = parser.parse_args()
    with Server((options.listen, options.port), Handler) as server:
        server.agent = Agent(options.state, options.cgroups)  # type: ignore[attr-defined]
        print(f"lab: AGENT on port {options.port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
