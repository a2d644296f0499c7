# SPDX-License-Identifier: BSD-2-Clause
"""Disks on the embedded host beside other NBD servers: build/bench.json and build/bench.svg.

What is measured is the socket export: a client of somebody else's (fio's nbd engine, `qemu-img
bench`), the worker, the ring, and a block backend in memory as a process of its own. Beside it, in
the same run, `nbdkit memory`, which has the disk in its own process, and two servers that have no
disk at all: `nbdkit null`, and null_server.c, the roof of what one thread behind a socket can do.

Networks are host_net.py's: a vif beside two TAPs alone.

Beside the socket stands the library for one program (docs/direct.md), with its example as the
client: no socket, and no process between the program and the ring.

All are measured in turn, round after round, so that drift of the machine falls on all; a figure is
the median of the rounds. Server CPU is that of every process of the server's side (worker and
backend together), not the client's. The disks are filled first: memory that was never touched is
not what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import host_net
import plot
from figure import Figure, less, more

from pvfront.blkfront.vdev import vdev_name
from pvfront.errors import PvfrontError
from pvfront.host import Host
from pvfront.host.blkback import BlkBackend
from pvfront.host.child import Child, answers
from pvfront.host.service import DiskService

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
NULL_SERVER = BUILD / "null_server"
TAP_PAIR = BUILD / "tap_pair"
OURS, PEER, PEER_NULL, ROOF = "pvfront", "nbdkit memory", "nbdkit null", "empty server"
MIB = 1 << 20
DISK = 256 * MIB
GRANTS = 16384  # what systemd/modprobe.d/pvfront.conf sets in a guest
DEADLINE = 60.0
TICK = 1 / os.sysconf("SC_CLK_TCK")  # CPU time is counted in these

SMALL, LARGE = "IOPS", "MiB/s"


@dataclass(frozen=True)
class Job:
    title: str
    block: int  # bytes
    depth: int
    unit: str


JOBS = [
    Job("4k QD1", 4096, 1, SMALL),
    Job("4k QD32", 4096, 32, SMALL),
    Job("4k QD128", 4096, 128, SMALL),
    Job("64k QD16", 65536, 16, LARGE),
    Job("1M QD4", MIB, 4, LARGE),
]
QEMU_JOBS = [JOBS[0], JOBS[1], JOBS[4]]
DISKS = [1, 2, 4, 8, 16, 32, 64]


Jobs = Sequence[tuple[str, Job, str]]
"""client, job, direction"""


class Failed(Exception):
    """A tool that is not ours did not do what it was asked."""


# Servers


@dataclass
class Server:
    """Something that serves a disk at `uri`; `pids`: all processes that work for it."""

    name: str
    uri: str
    pids: tuple[int, ...]

    def cpu(self) -> float:
        """Seconds of CPU that its processes have used."""
        return sum(cpu_of(pid) for pid in self.pids)


def cpu_of(pid: int) -> float:
    """Of threads that have ended, too: utime and stime of proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """MiB that would be freed if the process ended: its private pages, and its share of others."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


async def until(what: str, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not holds():
        if time.monotonic() > end:
            raise Failed(f"this did not come in {DEADLINE:.0f} s: {what}")
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def others(directory: Path, servers: Mapping[str, list[str]]) -> AsyncIterator[list[Server]]:
    """Servers by name and command, in which SOCKET stands for where they listen."""
    children: list[tuple[str, Path, Child]] = []
    try:
        for name, command in servers.items():
            path = directory / f"{name.replace(' ', '-')}.sock"
            words = [word.replace("SOCKET", str(path)) for word in command]
            children.append((name, path, Child(name, words, path.with_suffix(".log"))))
        for name, path, _ in children:
            await until(f"{name} listens", partial(answers, path, socket.SOCK_STREAM))
        yield [
            Server(name, f"nbd+unix:///?socket={path}", (child.pid,))
            for name, path, child in children
        ]
    finally:
        for _, _, child in children:
            await child.stop()


def nbdkit(plugin: str, size: int) -> list[str]:
    return ["nbdkit", "-f", "-U", "SOCKET", plugin, str(size)]


@contextlib.asynccontextmanager
async def lendable(size: int) -> AsyncIterator[Host]:
    """A host with the disk xvda, which nobody serves."""
    async with await Host.start() as host:
        await host.create_domain()
        await host.attach_disk(1, f"vdev=xvda,access=rw,target=memory:{size}")
        async with await BlkBackend.start(host, populate=True):
            yield host


@contextlib.asynccontextmanager
async def ours(size: int, disks: int = 1) -> AsyncIterator[tuple[BlkBackend, DiskService, float]]:
    """A host with disks xvda..., and how many seconds the service took to serve all of them."""
    async with await Host.start(gntalloc_limit=GRANTS) as host:
        await host.create_domain()
        # libxl's two kinds of device numbers: 16 disks of the old one, then the extended.
        numbers = [202 << 8 | n << 4 if n < 16 else 1 << 28 | n << 8 for n in range(disks)]
        for number in numbers:
            spec = f"vdev={vdev_name(number)},access=rw,target=memory:{size}"
            await host.attach_disk(1, spec)
        async with await BlkBackend.start(host, populate=disks == 1) as backend:
            begin = time.monotonic()
            service = await DiskService.start(host, timeout=DEADLINE)
            try:
                for number in numbers:
                    path = service.socket(vdev_name(number))
                    await until(f"{path.name}", path.exists)
                yield backend, service, time.monotonic() - begin
            finally:
                await service.end()


# Clients


@dataclass
class Sample:
    rate: float  # in the job's unit
    per_cpu: float  # requests per second of server CPU


def run(*command: str, environ: Mapping[str, str] | None = None) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **(environ or {})},
    )  # fmt: skip
    if result.returncode:
        raise Failed(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def fio(server: Server, job: Job, direction: str, seconds: float) -> Sample:
    order = "rand" if job.unit == SMALL else ""
    before = server.cpu()
    report = run(
        "fio", "--name=b", "--ioengine=nbd", f"--uri={server.uri}", f"--rw={order}{direction}",
        f"--bs={job.block}", f"--iodepth={job.depth}", f"--size={DISK}", "--randrepeat=1",
        "--norandommap", "--time_based", f"--runtime={int(seconds * 1000)}ms",
        "--output-format=json",
    )  # fmt: skip
    cpu = server.cpu() - before
    (found,) = json.loads(report[report.index("{") :])["jobs"]
    side = found[direction]
    if found["error"] or not side["total_ios"]:
        raise Failed(f"fio on {server.name}: error {found['error']}")
    rate = side["iops"] if job.unit == SMALL else side["bw_bytes"] / MIB
    return Sample(rate, side["total_ios"] / max(cpu, TICK))


def qemu_img(server: Server, job: Job, direction: str, seconds: float) -> Sample:
    """A fixed number of requests, as many as take about `seconds`."""
    count = max(200, int(seconds * (40_000 if job.unit == SMALL else 2_000)))
    if job.depth == 1:
        count //= 3
    before = server.cpu()
    text = run(
        "qemu-img", "bench", "-f", "raw", *(["-w"] if direction == "write" else []),
        "-c", str(count), "-d", str(job.depth), "-s", str(job.block), server.uri,
    )  # fmt: skip
    cpu = server.cpu() - before
    found = re.search(r"completed in ([\d.]+) seconds", text)
    if found is None:
        raise Failed(f"qemu-img bench on {server.name} said: {text}")
    rate = count / float(found[1])
    return Sample(rate if job.unit == SMALL else rate * job.block / MIB, count / max(cpu, TICK))


def direct(host: Host, job: Job, direction: str, seconds: float, how: str) -> float:
    """The example of the library, which has the disk lent. In the job's unit."""
    order = "rand" if job.unit == SMALL else ""
    report = run(
        sys.executable, "-P", "-m", "pvfront", "vbd", "lend", "xvda", "--", "pvfront-disk-bench",
        "--rw", f"{order}{direction}", "--bs", str(job.block), "--iodepth", str(job.depth),
        "--runtime", str(seconds), "--how", how, environ=host.environ,
    )  # fmt: skip
    (found,) = json.loads(report)["jobs"]
    side = found[direction]
    rate: float = side["iops"] if job.unit == SMALL else side["bw_bytes"] / MIB
    return rate


def beside_the_socket(
    host: Host, socket_server: Server, jobs: Jobs, rounds: int, seconds: float
) -> Iterable[Figure]:
    """The library, polling and sleeping, beside fio on the socket export."""
    for client, job, direction in jobs:
        if client != "fio" or job.depth not in (1, 4, 32):
            continue
        rates: dict[str, list[float]] = {"poll": [], "wait": [], OURS: []}
        for _ in range(rounds):
            for how in ("poll", "wait"):
                rates[how].append(direct(host, job, direction, seconds, how))
            rates[OURS].append(fio(socket_server, job, direction, seconds).rate)
        rate = {name: statistics.median(found) for name, found in rates.items()}
        name = f"disk direct {direction} {job.title}"
        yield more(name, job.unit, rate["poll"], rate[OURS], f"{OURS} socket")
        yield more(f"{name} asleep", job.unit, rate["wait"], rate[OURS], f"{OURS} socket")


CLIENTS = {"fio": fio, "qemu-img": qemu_img}


def compare(servers: Sequence[Server], jobs: Jobs, rounds: int, seconds: float) -> Iterable[Figure]:
    for client, job, direction in jobs:
        samples: dict[str, list[Sample]] = {server.name: [] for server in servers}
        for number in range(rounds):
            # Another order each round: who follows whom is no advantage.
            turn = [*servers[number % len(servers) :], *servers[: number % len(servers)]]
            for server in turn:
                samples[server.name].append(CLIENTS[client](server, job, direction, seconds))
        rate = {n: statistics.median(s.rate for s in found) for n, found in samples.items()}
        per_cpu = {n: statistics.median(s.per_cpu for s in found) for n, found in samples.items()}
        name = f"disk {direction} {job.title}" + ("" if client == "fio" else f" {client}")
        for peer in (server.name for server in servers if server.name != OURS):
            yield more(name, job.unit, rate[OURS], rate[peer], peer)
        for peer in (server.name for server in servers if server.name != OURS):
            yield more(f"{name} per CPU", "requests/s", per_cpu[OURS], per_cpu[peer], peer)


async def many(count: int, idle_seconds: float) -> list[Figure]:
    """So many disks: memory, start, idle CPU, beside as many nbdkit processes.

    Ours is the service with its workers: in a guest the backend is another domain's. A worker is
    charged the pages that it granted; nbdkit has none of its disk's in memory yet.
    """
    size = 4 * MIB
    with tempfile.TemporaryDirectory(prefix="pvf-bench-") as directory:
        begin = time.monotonic()
        kits = {f"nbdkit {n}": nbdkit("memory", size) for n in range(count)}
        async with others(Path(directory), kits) as servers:
            their_start = time.monotonic() - begin
            their_memory = sum(resident(pid) for server in servers for pid in server.pids)
    async with ours(size, count) as (_, service, start):
        workers = service.workers()
        if len(workers) != count:
            raise Failed(f"{len(workers)} workers for {count} disks")
        pids = [service.pid, *workers]
        memory = sum(resident(pid) for pid in pids)
        before = sum(cpu_of(pid) for pid in pids)
        await asyncio.sleep(idle_seconds)
        idle = (sum(cpu_of(pid) for pid in pids) - before) / idle_seconds * 100
        worker = statistics.mean(resident(pid) for pid in workers)
    name, peer = f"{count} disk{'s' if count > 1 else ''}", f"{count} x nbdkit memory"
    return [
        less(f"{name} resident", "MiB", memory, their_memory, peer),
        less(f"{name} resident, a worker", "MiB", worker, their_memory / count, "nbdkit memory"),
        less(f"{name} start", "s", start, their_start, peer),
        Figure(f"{name} idle CPU", "%", idle, 0.0, "none", 1.0 if not idle else 0.0),
    ]


# All of it


async def bench(
    rounds: int, seconds: float, counts: Sequence[int], jobs: Jobs, null_server: Path
) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory(prefix="pvf-bench-") as directory:
        commands = {
            PEER: nbdkit("memory", DISK),
            PEER_NULL: nbdkit("null", DISK),
            ROOF: [str(null_server), "SOCKET", str(DISK)],
        }
        async with (
            ours(DISK) as (backend, service, _),
            others(Path(directory), commands) as servers,
        ):
            mine = Server(OURS, service.uri("xvda"), (backend.pid, *service.workers()))
            data = Path(directory) / "random"
            with data.open("wb") as file:
                for _ in range(DISK // MIB):
                    file.write(os.urandom(MIB))
            for server in (mine, *servers):
                run("nbdcopy", str(data), server.uri)
            for figure in compare([mine, *servers], jobs, rounds, seconds):
                show(figure)
                figures.append(figure)
            async with lendable(DISK) as host:
                for figure in beside_the_socket(host, mine, jobs, rounds, seconds):
                    show(figure)
                    figures.append(figure)
    for count in counts:
        for figure in await many(count, 2.0):
            show(figure)
            figures.append(figure)
    return figures


async def networks(
    jobs: Sequence[host_net.Job], rounds: int, seconds: float, tap_pair: Path
) -> list[Figure]:
    figures = []
    async for job, ours, taps in host_net.rates(jobs, rounds, seconds, tap_pair):
        figures.append(more(job.title, job.unit, ours, taps, host_net.PEER))
        show(figures[-1])
    return figures


def show(f: Figure) -> None:
    print(
        f"{f.figure:36} {f.ours:11.1f} {f.unit:10} {f.peer_name:18} {f.peer:11.1f}  "
        f"ratio {f.ratio:.2f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each job")
    parser.add_argument("--quick", action="store_true", help="one short round: does it work?")
    parser.add_argument("--match", default="", help="only jobs whose name contains this")
    parser.add_argument("--null-server", type=Path, default=NULL_SERVER, help="the program")
    parser.add_argument("--tap-pair", type=Path, default=TAP_PAIR, help="the program")
    parser.add_argument("--output", type=Path, default=BUILD, help="directory")
    options = parser.parse_args()
    every = [("fio", job, d) for job in JOBS for d in ("read", "write")]
    every += [("qemu-img", job, d) for job in QEMU_JOBS for d in ("read", "write")]
    jobs = [j for j in every if options.match in f"{j[2]} {j[1].title} {j[0]}"]
    nets = [job for job in host_net.JOBS if options.match in job.title]
    counts = DISKS if not options.match else []
    rounds, seconds = options.rounds, options.seconds
    if options.quick:
        rounds, seconds, counts = 1, 0.1, counts[:2]
    try:
        figures = []
        if jobs or counts:
            figures = asyncio.run(bench(rounds, seconds, counts, jobs, options.null_server))
        if nets:
            figures += asyncio.run(networks(nets, rounds, seconds, options.tap_pair))
    except (Failed, host_net.Failed, PvfrontError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    options.output.mkdir(exist_ok=True)
    found = [asdict(figure) for figure in figures]
    (options.output / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "bench.svg").write_text(plot.svg(found, OURS, "on the embedded host"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
