# SPDX-License-Identifier: BSD-2-Clause
"""The embedded host as a world: every part a process on this machine, no Xen, no root.

Users of a disk are NBD clients that nobody here wrote, on its socket. Disks are files, so that what
the backend has can be looked at while it serves. Between tests nothing may be left: no port, grant,
worker or file, and no exception in a log.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from waiting import PATIENCE, wait_for
from world import Backing, Mode, Seen

from pvfront.blkfront.vdev import parse_name
from pvfront.host import Host
from pvfront.host.blkback import BlkBackend, Fault

T = TypeVar("T")

MIB = 1 << 20
BAD = ("Traceback", "Sanitizer", "the device loop failed")

FIO = (
    "fio --name=verify --ioengine=nbd --verify=crc32c --verify_fatal=1 --verify_state_save=0 "
    "--randrepeat=0 --output-format=terse"
)
FIO_INTERRUPTED = 128
"""fio's status when a signal ended it and nothing else was wrong."""


@dataclass(frozen=True)
class Ended:
    """`world.Result`."""

    command: Sequence[str]
    code: int
    stdout: str
    stderr: str


def needs(tool: str) -> None:
    """Skips the test where a tool of others is not installed."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (tools/apt-packages.txt)")


class EmbeddedLoad:
    def __init__(self, fio: subprocess.Popen[str], between: subprocess.Popen[str] | None) -> None:
        self.fio = fio
        self.between = between

    def end(self) -> None:
        try:
            assert self.fio.poll() is None, f"it ended by itself: {self.fio.communicate()}"
            self.fio.send_signal(signal.SIGINT)
            out, errors = self.fio.communicate(timeout=PATIENCE)
            assert self.fio.returncode in (0, FIO_INTERRUPTED), (out, errors)
            failed = [line.split(";")[4] for line in out.splitlines() if line.startswith("3;")]
            assert failed == ["0"], (out, errors)
        finally:
            self.kill()

    def kill(self) -> None:
        """Twice is harmless."""
        for process in (self.fio, self.between):
            if process is None:
                continue
            if process.poll() is None:
                process.kill()
            process.communicate()


class EmbeddedBacking:
    def __init__(self, world: EmbeddedWorld, path: Path, *, discard: bool) -> None:
        self.world = world
        self.path = path
        self.discard = discard

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def sha256(self) -> str:
        return sha256(self.path)

    def hold(self) -> None:
        self.world.do(self.world.backend.fault(Fault.stall()))

    def in_flight(self) -> int:
        return self.world.do(self.world.backend.stats())["in_flight"]

    def release(self) -> None:
        self.world.do(self.world.backend.clear())

    def resize(self, mib: int) -> None:
        self.world.do(self.world.backend.resize(mib * MIB))

    def remove(self) -> None:
        self.path.unlink()


class EmbeddedDisk:
    def __init__(self, world: EmbeddedWorld, backing: EmbeddedBacking, name: str) -> None:
        self.name = name
        self.backing = backing
        self.world = world
        self.vdev = vdev(name)
        self.socket = world.run_dir / f"{name}.nbd"
        self.uri = uri(self.socket)
        self.loads: list[EmbeddedLoad] = []

    # -- what is said of it --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        try:
            text = (self.world.run_dir / f"vbd-{self.vdev}.json").read_text()
        except FileNotFoundError:
            return {}
        found: dict[str, Any] = json.loads(text)
        return found

    def status(self) -> dict[str, Any]:
        ended = self.world.pvfront("status", self.name, "--json")
        found: dict[str, Any] = json.loads(ended.stdout) if not ended.code else {}
        return found

    def written(self) -> int:
        counters = self.status().get("statistics")
        return int(counters["write"]["requests"]) if counters else 0

    def served(self) -> bool:
        return self.socket.exists() and self.state().get("phase") == "connected"

    def worker(self) -> int:
        return int(self.state()["worker_pid"])

    def os_device(self) -> str:
        return self.uri

    def backend_keys(self) -> dict[str, str]:
        return self.world.do(self._backend_keys())

    async def _backend_keys(self) -> dict[str, str]:
        store, path = self.world.host.store, f"/local/domain/0/backend/vbd/1/{self.vdev}"
        found = {}
        for key in await store.directory(path):
            found[key] = await store.read_opt(f"{path}/{key}") or ""
        return found

    # -- its users -----------------------------------------------------------------------------

    def seen(self) -> Seen:
        (export,) = json.loads(self.world.run("nbdinfo", "--json", self.uri))["exports"]
        return Seen(
            size=export["export-size"],
            read_only=export["is_read_only"],
            flush=export["can_flush"],
            discard=export["can_trim"],
        )

    def sha256(self) -> str:
        copy = self.world.directory / "copy"
        try:
            self.world.run("nbdcopy", self.uri, str(copy))
            return sha256(copy)
        finally:
            copy.unlink(missing_ok=True)

    def fio(
        self,
        *,
        rw: str = "randwrite",
        bs: str = "4k",
        depth: int = 8,
        size: str = "16M",
        extra: str = "",
    ) -> None:
        self.world.run(*fio(self.uri, rw=rw, bs=bs, depth=depth, size=size, extra=extra))

    def load(self, *, depth: int, size: str = "16M", reconnects: bool = False) -> EmbeddedLoad:
        between, where = self._between() if reconnects else (None, self.uri)
        extra = "--time_based --runtime=1000 --verify_backlog=64"
        command = fio(where, rw="randwrite", bs="4k", depth=depth, size=size, extra=extra)
        load = EmbeddedLoad(self.world.start_process(*command), between)
        self.loads.append(load)
        return load

    def _between(self) -> tuple[subprocess.Popen[str], str]:
        """A server that is a client of the disk, comes again when that hangs up, and sends what
        was not answered once more. It has 16 requests in flight at most.
        """
        path = self.world.directory / "between.nbd"
        path.unlink(missing_ok=True)
        image = f"driver=nbd,server.type=unix,server.path={self.socket},reconnect-delay=600"
        process = self.world.start_process(
            "qemu-nbd", "--image-opts", image, "--socket", str(path), "--persistent"
        )
        self.world.wait_until("qemu-nbd", lambda: path.exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return process, uri(path)

    def discard(self) -> None:
        size = str(self.backing.size)
        self.world.run(
            "qemu-io", "-f", "raw", "-c", f"discard 0 {size}", "-c", f"write -z 0 {size}", self.uri
        )

    def can_be_written(self) -> bool:
        needs("qemu-io")
        return not self.world.try_("qemu-io", "-f", "raw", "-c", "write 0 4k", self.uri).code

    # -- its end -------------------------------------------------------------------------------

    def detach(self) -> None:
        worker = self.state().get("worker_pid") or 0
        for load in self.loads:
            load.kill()
        self.world.do(self.world.host.detach_disk(1, self.vdev, timeout=PATIENCE))
        assert not self.world.do(self._backend_state())
        # The toolstack does not wait for what the supervisor does after the Closed.
        self.world.wait_until(
            f"the end of what served {self.name}",
            lambda: not self.state() and worker not in self.world.workers(),
        )

    async def _backend_state(self) -> str | None:
        path = f"/local/domain/0/backend/vbd/1/{self.vdev}/state"
        return await self.world.host.store.read_opt(path)


class EmbeddedWorld:
    """Made by `begin`. Its own processes are driven from a loop that runs only in calls here."""

    kernel_has: Sequence[str] = ()
    cycles = 20
    given_to = "none"
    idle_seconds = 3

    def __init__(self, runner: asyncio.Runner, host: Host, backend: BlkBackend) -> None:
        self._runner = runner
        self.host = host
        self.backend = backend
        self.directory = host.directory
        self.run_dir = host.directory / "run"
        self.log = host.directory / "supervisor.log"
        self.environ = {**os.environ, **host.environ}
        self._service: subprocess.Popen[bytes] | None = None
        self._orphans: set[int] = set()
        self._disks = 0

    @classmethod
    @contextlib.contextmanager
    def begin(cls, *, gntalloc_limit: int = 16384) -> Iterator[EmbeddedWorld]:
        """A host with a backend and a supervisor of all disks; it must be idle in the end."""
        # Not tmp_path: a socket's path has at most 107 bytes. A loop of our own that is nobody
        # else's current one.
        with (
            tempfile.TemporaryDirectory(prefix="pvf-") as directory,
            asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner,
        ):
            start = Host.start(Path(directory), gntalloc_limit=gntalloc_limit)
            host = runner.run(start)
            try:
                backend = runner.run(BlkBackend.start(host))
                try:
                    runner.run(host.create_domain(1))
                    world = cls(runner, host, backend)
                    try:
                        world.start()
                        yield world
                        if world.running() and world.is_clean():
                            world.stop()
                    finally:
                        world._kill_all()
                finally:
                    runner.run(backend.stop())
            finally:
                runner.run(host.stop())

    # -- processes -----------------------------------------------------------------------------

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def try_(self, *command: str) -> Ended:
        """Runs a command in the domain, whatever its status."""
        done = subprocess.run(
            command, env=self.environ, cwd=self.directory, capture_output=True, text=True,
            timeout=5 * PATIENCE, check=False,
        )  # fmt: skip
        return Ended(command, done.returncode, done.stdout, done.stderr)

    def run(self, *command: str) -> str:
        """stdout of a tool that must succeed; the test is skipped where there is none."""
        needs(command[0])
        ended = self.try_(*command)
        assert ended.code == 0, f"{ended}\n{self.log.read_text()}"
        return ended.stdout

    def start_process(self, *command: str) -> subprocess.Popen[str]:
        needs(command[0])
        return subprocess.Popen(
            command, env=self.environ, cwd=self.directory, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    # -- the service ---------------------------------------------------------------------------

    def start(self) -> None:
        if self.running():
            return
        notify = self.directory / "notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, self.log.open("ab") as log:
            sock.bind(str(notify))
            sock.settimeout(PATIENCE)
            self._service = subprocess.Popen(
                [*PVFRONT, "vbd", "serve", "--all"], stdout=log, stderr=log,
                env={**self.environ, "NOTIFY_SOCKET": str(notify)},
            )  # fmt: skip
            try:
                while b"READY=1" not in sock.recv(4096):
                    pass
            except TimeoutError:
                raise AssertionError(f"never READY:\n{self.log.read_text()}") from None

    def stop(self) -> None:
        service = self._service
        assert service is not None
        self._orphans.update(self.workers())  # one whose disk is in use stays
        service.terminate()
        assert service.wait(2 * PATIENCE) == 0, self.log.read_text()

    def running(self) -> bool:
        return self._service is not None and self._service.poll() is None

    def supervisor(self) -> int:
        assert self._service is not None
        return self._service.pid

    def kill_supervisor(self) -> None:
        assert self._service is not None
        self._orphans.update(self.workers())
        self._service.kill()
        self._service.wait()
        self.start()

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def pvfront(self, *arguments: str) -> Ended:
        return self.try_(*PVFRONT, *arguments)

    def devices(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run(*PVFRONT, "list", "--json"))
        return found

    # -- disks ---------------------------------------------------------------------------------

    def backing(
        self, mib: int = 64, *, discard: bool = True, slow: bool = False
    ) -> EmbeddedBacking:
        self._disks += 1
        path = self.directory / f"disk{self._disks}.img"
        with path.open("wb") as file:
            file.truncate(mib * MIB)
        return EmbeddedBacking(self, path, discard=discard)

    def attach(
        self,
        backing: Backing,
        *,
        mode: Mode = "w",
        stock: bool = False,
        name: str = "xvdb",
        wait: bool = True,
    ) -> EmbeddedDisk:
        """`wait`: until it is served."""
        assert isinstance(backing, EmbeddedBacking)
        spec = f"format=raw, vdev={name}, access={mode}"
        spec += "" if backing.discard else ", no-discard"
        self.do(self.host.attach_disk(1, f"{spec}, target={backing.path}"))
        disk = EmbeddedDisk(self, backing, name)
        if wait:
            self.wait_until(f"{name} served", disk.served)
        return disk

    @contextlib.contextmanager
    def disk(
        self,
        mib: int = 64,
        *,
        mode: Mode = "w",
        discard: bool = True,
        slow: bool = False,
        stock: bool = False,
    ) -> Iterator[EmbeddedDisk]:
        backing = self.backing(mib, discard=discard, slow=slow)
        try:
            disk = self.attach(backing, mode=mode, stock=stock)
            try:
                yield disk
            finally:
                backing.release()
                disk.detach()
        finally:
            backing.remove()

    # -- what is held --------------------------------------------------------------------------

    def workers(self) -> list[int]:
        """The pids of this host's workers: children of its supervisor, or of one before."""
        parent = self._service.pid if self._service is not None else 0
        return [
            child.pid
            for child in psutil.process_iter(["name", "ppid"])
            if child.info["name"] == "pvfront-worker"
            and (child.info["ppid"] == parent or child.pid in self._orphans)
        ]

    def held(self) -> dict[str, int]:
        dump = self.host.dump()
        return {
            "workers": len(self.workers()),
            "event channels": len(dump["ports"]),
            "granted areas": len(dump["grants"]),
            "areas still mapped": dump["deferred"],
            "files": len([path for path in self.run_dir.iterdir() if "vbd-" in path.name]),
        }

    def supervisor_holds(self) -> tuple[int, int]:
        process = Path(f"/proc/{self.supervisor()}")
        return len(list((process / "fd").iterdir())), kib(process / "status", "VmRSS")

    def grant_every_page(self) -> None:
        limit = json.loads((self.directory / "limits.json").read_text())["gntalloc"]
        probe = (
            "from pvfront.platform import platform\n"
            f"with platform().grant_allocator() as grants: grants.alloc(0, {limit})\n"
        )
        self.run(sys.executable, "-P", "-c", probe)

    def cpu(self, pids: Sequence[int], seconds: float) -> list[int]:
        before = [ticks(pid) for pid in pids]
        time.sleep(seconds)
        return [ticks(pid) - old for pid, old in zip(pids, before, strict=True)]

    # -- waiting -------------------------------------------------------------------------------

    def wait_until(self, what: str, holds: Callable[[], T], deadline: float = PATIENCE) -> T:
        def why() -> str:
            return self.log.read_text() if self.log.exists() else ""

        found: T = wait_for(what, holds, why=why, seconds=deadline)
        return found

    def assert_no_io_errors(self) -> None:
        stats = self.do(self.backend.stats())
        assert (stats["io_errors"], stats["rejected"], stats["map_errors"]) == (0, 0, 0), stats

    def is_clean(self) -> bool:
        """Whether another test may run here."""
        try:
            attached = self.do(self.host.store.read_opt("/local/domain/1/device/vbd"))
            return attached is None and not any(self.held().values())
        except OSError:
            return False  # a part of the host has gone

    def assert_nothing_left(self, deadline: float = PATIENCE) -> None:
        """After a test."""
        self.wait_until(
            "nothing of its disks left", lambda: not any(self.held().values()), deadline
        )
        for log in self.directory.glob("*.log"):
            text = log.read_text(errors="replace")
            bad = [line for line in text.splitlines() if any(word in line for word in BAD)]
            assert not bad, f"{log.name}:\n{text}"

    def _kill_all(self) -> None:
        """What a failed test left running."""
        left = self.workers()
        if self._service is not None and self._service.poll() is None:
            self._service.kill()
            self._service.wait()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


PVFRONT = (sys.executable, "-P", "-m", "pvfront")


def fio(where: str, *, rw: str, bs: str, depth: int, size: str, extra: str) -> list[str]:
    """The command that writes, reads back and verifies by checksum."""
    needs("fio")
    if "nbd" not in subprocess.run(["fio", "--enghelp"], capture_output=True, text=True).stdout:
        pytest.skip("this fio has no nbd engine")
    return shlex.split(
        f"{FIO} --uri={where} --rw={rw} --bs={bs} --iodepth={depth} --size={size} {extra}"
    )


def uri(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


def vdev(name: str) -> int:
    number = parse_name(name)
    assert number is not None
    return number


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kib(path: Path, field: str) -> int:
    """A line `field:  N kB` of a file in /proc."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise AssertionError(f"{path} has no {field}")


def ticks(pid: int) -> int:
    """utime and stime of proc_pid_stat(5)."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
