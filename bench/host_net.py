# SPDX-License-Identifier: BSD-2-Clause
"""Networks on the embedded host, for bench/host.py: a vif beside what its TAP alone can do.

iperf3 in one network namespace, its server in another. Between them a vif, with pvfront's worker
and the embedded netback, each of which has a TAP; or two TAPs alone: tap_pair.c, whose threads
do nothing but read from one and write to the other. Both copy a packet twice. The guest's end is
the client's, so "out" is what the guest sends; rounds are in turn, a figure is their median.

    net TCP out, net TCP in       Gbit/s of one connection
    net UDP 64B, net UDP 1400B    datagrams that arrive while one sender sends all that it can, out
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pvfront.host import Host, iperf
from pvfront.host.child import Child
from pvfront.host.netback import NetBackend
from pvfront.host.netns import NetNamespace
from pvfront.host.service import NetService

OURS, PEER = "pvfront", "two TAPs alone"
SERVER, CLIENT = "10.7.0.1", "10.7.0.2"
DEADLINE = 60.0


@dataclass(frozen=True)
class Job:
    title: str
    unit: str
    options: tuple[str, ...]


JOBS = [
    Job("net TCP out", "Gbit/s", ()),
    Job("net TCP in", "Gbit/s", ("-R",)),
    Job("net UDP 64B", "packets/s", ("-u", "-b0", "-l64")),
    Job("net UDP 1400B", "packets/s", ("-u", "-b0", "-l1400")),
]


class Failed(Exception):
    """What was to be measured did not come about."""


async def until_answered(guest: NetNamespace) -> None:
    end = asyncio.get_running_loop().time() + DEADLINE
    while "1 received" not in await guest.run("ping", "-c1", "-W1", SERVER, check=False):
        if asyncio.get_running_loop().time() > end:
            raise Failed(f"nobody answered at {SERVER} within {DEADLINE:.0f} s")


@contextlib.asynccontextmanager
async def serving(far: NetNamespace, directory: Path) -> AsyncIterator[None]:
    log = directory / "iperf3.log"
    server = far.start_command("iperf3", ["iperf3", "-s", "--forceflush"], log)
    try:
        end = asyncio.get_running_loop().time() + DEADLINE
        while "listening" not in log.read_text():
            if asyncio.get_running_loop().time() > end:
                raise Failed(f"iperf3 does not listen: {log.read_text()}")
            await asyncio.sleep(0.01)
        yield
    finally:
        await server.stop(signal.SIGKILL)


@contextlib.asynccontextmanager
async def a_vif() -> AsyncIterator[NetNamespace]:
    """The client's namespace."""
    with tempfile.TemporaryDirectory(prefix="pvf-bench-") as name:
        directory = Path(name)
        async with (
            await Host.start(directory) as host,
            await NetNamespace.start(directory, "backend") as far,
            await NetNamespace.start(directory, "guest") as near,
        ):
            await host.create_domain()
            async with await NetBackend.start(host, far):
                await host.attach_vif(1, f"mac=00:16:3e:07:00:02,ip={SERVER}/24")
                async with await NetService.start(host, near, "--all"):
                    await near.run("ip", "address", "add", f"{CLIENT}/24", "dev", "enX0")
                    await near.run("ip", "link", "set", "enX0", "up")
                    await until_answered(near)
                    async with serving(far, directory):
                        yield near


@contextlib.asynccontextmanager
async def two_taps(program: Path) -> AsyncIterator[NetNamespace]:
    """The same without pvfront."""
    with tempfile.TemporaryDirectory(prefix="pvf-bench-") as name:
        directory = Path(name)
        async with (
            await NetNamespace.start(directory, "backend") as far,
            await NetNamespace.start(directory, "guest") as near,
        ):
            ends = [(near, "near", CLIENT), (far, "far", SERVER)]
            where = [word for end, tap, _ in ends for word in (f"/proc/{end.pid}/ns/net", tap)]
            log = directory / "tap_pair.log"
            pair = Child("tap_pair", [str(program), *where], log)
            try:
                end_ = asyncio.get_running_loop().time() + DEADLINE
                while "ready" not in log.read_text():
                    if pair.process.poll() is not None or asyncio.get_running_loop().time() > end_:
                        raise Failed(f"tap_pair has not begun: {log.read_text()}")
                    await asyncio.sleep(0.01)
                for end, tap, address in ends:
                    await end.run("ip", "address", "add", f"{address}/24", "dev", tap)
                    await end.run("ip", "link", "set", tap, "up")
                await until_answered(near)
                async with serving(far, directory):
                    yield near
            finally:
                await pair.stop(signal.SIGKILL)


async def measure(near: NetNamespace, job: Job, seconds: float) -> float:
    """In the job's unit."""
    client = ["iperf3", "-J", "-c", SERVER, f"-t{max(1, round(seconds))}", *job.options]
    told = (await iperf.report(lambda: near.run(*client)))["end"]
    if job.unit == "Gbit/s":
        return float(told["sum_received"]["bits_per_second"]) / 1e9
    arrived = told["sum"]["packets"] - told["sum"]["lost_packets"]
    return float(arrived / told["sum"]["seconds"])


async def rates(
    jobs: Sequence[Job], rounds: int, seconds: float, tap_pair: Path
) -> AsyncIterator[tuple[Job, float, float]]:
    """Of each job: ours, and what two TAPs alone can do."""
    async with a_vif() as ours, two_taps(tap_pair) as taps:
        for job in jobs:
            samples: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                for near, taken in zip((ours, taps), samples, strict=True):
                    taken.append(await measure(near, job, seconds))
            yield job, statistics.median(samples[0]), statistics.median(samples[1])
