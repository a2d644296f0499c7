# SPDX-License-Identifier: BSD-2-Clause
"""The worker's program and its processes: which it is, how one is started and ended."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pwd
import signal
import socket
import stat
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from . import __version__
from .errors import PvfrontError

USER = "pvfront"
STATS_NAME = "/memfd:pvfront-stats"
_HELLO_WITHIN = 10.0  # seconds


def binary() -> Path:
    """The worker's executable; PVFRONT_WORKER names another one."""
    path = Path(os.environ.get("PVFRONT_WORKER") or str(resources.files(__package__)))
    if path.is_dir():
        path = path / "pvfront-worker"
    if not os.access(path, os.X_OK):
        raise PvfrontError(
            f"the worker program {path} is missing or not executable",
            hint="install the pvfront wheel anew",
        )
    return path


def build_of(program: Path) -> str:
    """Which build of the worker the file `program` is: our version and a digest of its bytes."""
    found = program.stat()
    return _build(program, found.st_ino, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=8)
def _build(program: Path, *_: int) -> str:
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    return f"{__version__[:14]}-{digest[:16]}"


def worker_ids() -> tuple[int, int]:
    """uid and gid of the user that workers run as."""
    try:
        entry = pwd.getpwnam(USER)
    except KeyError:
        raise PvfrontError(
            f"there is no user {USER!r} to run workers as",
            hint=f"run `systemd-sysusers`, or `useradd --system --no-create-home {USER}`",
        ) from None
    return entry.pw_uid, entry.pw_gid


def start(
    name: str,
    path: Path,
    *,
    queues: int,
    change_user: bool,
    options: Sequence[str],
    stderr: int = 2,
) -> int:
    """Starts a worker that listens at `path`, and returns its pid; see `Worker.spawn`."""
    program = binary()
    argv = [str(program), "--name", name, "--queues", str(queues)]
    argv += ["--build", build_of(program), *options]
    if change_user and os.geteuid() == 0:
        uid, gid = worker_ids()
        root = path.parent / "empty"
        root.mkdir(mode=0o555, exist_ok=True)
        argv += ["--uid", str(uid), "--gid", str(gid), "--chroot", str(root)]
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(4)
        env = {k: v for k, v in os.environ.items() if k.startswith(("ASAN_", "UBSAN_"))}
        return os.posix_spawn(
            str(program),
            argv,
            env,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, listener.fileno(), 3),
                (os.POSIX_SPAWN_DUP2, stderr, 2),
            ],
            setsid=True,
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
            setsigmask=(),
        )


def try_start(*, change_user: bool) -> None:
    """Starts a worker that is nobody's, and ends it when it has confined itself and said HELLO.

    `change_user`: as for `start`. Raises PvfrontError with what it said instead: a library is
    missing, a privilege.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "try.sock"
        with tempfile.TemporaryFile() as said:
            pid = start(
                "try", path, queues=1, change_user=change_user, options=(), stderr=said.fileno()
            )
            hello = b""
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
                    link.settimeout(_HELLO_WITHIN)
                    with contextlib.suppress(OSError):  # it has ended, or says nothing
                        link.connect(str(path))
                        hello = link.recv(1 << 16)
            finally:
                ended = kill_and_reap(pid)
            said.seek(0)
            text = " ".join(said.read(4096).decode(errors="replace").split())
    if not hello:
        hint = "apt-get install libseccomp2" if "libseccomp" in text else None
        raise PvfrontError(f"the worker program does not run: {text or ended}", hint=hint)


def kill_and_reap(pid: int) -> str:
    """Ends our child `pid`, which SIGKILL cannot fail to do; says how it ended.

    Nothing if it is reaped already.
    """
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code >= 0:
            return f"ended with status {code}"
        return f"ended by signal {-code} ({signal.strsignal(-code)})"
    return "has been reaped"


def stats_path(pid: int) -> Path | None:
    """The worker's statistics as a path that root can open; None if there is none."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(entry.readlink())
                if target.startswith(STATS_NAME) and stat.S_ISREG(entry.stat().st_mode):
                    return entry
    return None
