# SPDX-License-Identifier: BSD-2-Clause
"""Networks through pvfront beside networks through the kernel's netfront, for bench/xen.py.

Two vifs of one guest, each a network of two with dom0: one is pvfront's, the other the kernel's.
They are measured in turn, round after round; a figure is the median of the rounds. iperf3's client
and the asking end are in the guest, so "out" is what the guest sends.

    net TCP out, net TCP in       one connection
    ... CPU                       of the guest's processors, for anything, while it ran
    net UDP 64B, net UDP 1400B    datagrams that arrive while one sender sends all that it can, out
    net UDP 64B in, ...           and in
    ... delivered                 of what was sent
    net RR latency, ... p99       a datagram there and back: the median, the slowest hundredth

The peer "dom0 to itself" is one TCP connection between two namespaces of dom0, joined by veth: the
most that dom0 can take, since it is one end of all the others.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figure import Figure, less, more
from lab import payload
from lab.errors import CommandFailed, DeadlineExceeded
from lab.guest import Kind
from lab.progress import say
from lab.scenario import Lab, wait_until
from lab.vifs import Networks, Vif, checker, iperf_refused, report
from labbench import COUNTERS, counted

PEER, LIMIT = "kernel netfront", "dom0 to itself"


@dataclass(frozen=True)
class Job:
    """What iperf3 does; `options` of None: a round trip."""

    title: str
    options: tuple[str, ...] | None

    @property
    def udp(self) -> bool:
        return self.options is not None and "-u" in self.options


JOBS = [
    Job("net TCP out", ()),
    Job("net TCP in", ("-R",)),
    Job("net UDP 64B", ("-u", "-b", "0", "-l", "64")),
    Job("net UDP 64B in", ("-u", "-b", "0", "-l", "64", "-R")),
    Job("net UDP 1400B", ("-u", "-b", "0", "-l", "1400")),
    Job("net UDP 1400B in", ("-u", "-b", "0", "-l", "1400", "-R")),
    Job("net RR latency", None),
]

Sample = dict[str, float]


def measure(vif: Vif, job: Job, seconds: int) -> Sample:
    if job.options is None:
        asked = checker(vif.guest, "ask", vif.dom0, vif.port, seconds)
        times = report(asked, seconds * 4 + 60)
        return {"median": times["median"] * 1e6, "p99": times["p99"] * 1e6}
    line = " ".join(vif.iperf_line("-J", "-t", str(seconds), *job.options))
    script = f"a=$({COUNTERS}); {line} >/tmp/bench.json; b=$({COUNTERS}); echo $a; echo $b; "
    deadline = time.monotonic() + 60
    while True:
        text = vif.guest.run(f"{script} cat /tmp/bench.json", timeout=seconds * 4 + 60).stdout
        before, after, told_text = text.split("\n", 2)
        told: dict[str, Any] = json.loads(told_text)
        if not iperf_refused(told, time.monotonic() > deadline):
            break
    end, used = told["end"], counted(before, after)
    if job.udp:
        sent, lost = end["sum"]["packets"], end["sum"]["lost_packets"]
        return {
            "rate": (sent - lost) / end["sum"]["seconds"],
            "delivered": 100 * (sent - lost) / sent,
        }
    received = end["sum_received"]
    return {
        "rate": received["bits_per_second"] / 1e6,
        "cpu": used.cpu / (received["bytes"] / 2**30),
    }


def figures(job: Job, ours: Sample, peer: Sample, limit: float) -> list[Figure]:
    if job.options is None:
        return [
            less(job.title, "us", ours["median"], peer["median"], PEER),
            less(f"{job.title} p99", "us", ours["p99"], peer["p99"], PEER),
        ]
    if job.udp:
        return [
            more(job.title, "packets/s", ours["rate"], peer["rate"], PEER),
            more(f"{job.title} delivered", "%", ours["delivered"], peer["delivered"], PEER),
        ]
    return [
        more(job.title, "Mbit/s", ours["rate"], peer["rate"], PEER),
        more(job.title, "Mbit/s", ours["rate"], limit, LIMIT),
        less(f"{job.title} CPU", "s/GiB", ours["cpu"], peer["cpu"], PEER),
    ]


def dom0_to_itself(lab: Lab, seconds: int) -> float:
    """Mbit/s of a TCP connection between two namespaces of dom0."""
    lab.dom0.run(
        "ip netns add bench && ip link add bench0 type veth peer name bench1 netns bench && "
        "ip address add 10.99.0.1/24 dev bench0 && ip link set bench0 up && "
        "ip -n bench address add 10.99.0.2/24 dev bench1 && ip -n bench link set bench1 up"
    )
    server = lab.dom0.start("ip netns exec bench iperf3 -s -1 -p 5999")
    try:
        listens = "ip netns exec bench ss -Hltn 'sport = 5999' | grep -q ."
        wait_until("iperf3", lambda: lab.dom0.run(listens, check=False).ok)
        told = lab.dom0.output(f"iperf3 -J -c 10.99.0.2 -p 5999 -t {seconds}", timeout=120)
        rate: float = json.loads(told)["end"]["sum_received"]["bits_per_second"]
        return rate / 1e6
    finally:
        server.kill()
        lab.dom0.run("ip netns del bench; ip link del bench0", check=False)


@contextlib.contextmanager
def two_vifs(lab: Lab, kind: Kind) -> Iterator[tuple[Networks, Vif, Vif]]:
    """Ours and the kernel's, with servers in dom0."""
    guest = lab.guest(kind)
    net = Networks(lab, guest)
    net.stop()
    vifs = [net.attach(served=False) for _ in range(2)]
    echoes = []
    try:
        net.start(str(vifs[0].devid))
        net.wait_served(vifs[0])
        for vif in vifs:
            vif.configure(vif.name)
            vif.ping()
            vif.iperf("-n", "4M")
            echoes.append(checker(lab.dom0, "echo", vif.dom0, vif.port, ready=True))
        yield net, vifs[0], vifs[1]
    finally:
        for job in echoes:
            job.kill()
        try:
            for vif in vifs:
                net.detach(vif)
            net.stop()
        except (CommandFailed, DeadlineExceeded):
            if guest.running():  # with a guest that is gone, they are
                raise


def bench(
    lab: Lab, kind: Kind, jobs: list[Job], rounds: int, seconds: int, done: set[str]
) -> Iterator[list[Figure]]:
    """The figures of each job that is not yet `done`."""
    guest = lab.guest(kind)
    if not guest.running():
        guest.create()
    payload.install_if_other(guest)
    limit = dom0_to_itself(lab, seconds) if any("TCP" in job.title for job in jobs) else 0.0
    with two_vifs(lab, kind) as (_, ours, peer):
        for job in jobs:
            if job.title in done:
                continue
            samples: tuple[list[Sample], list[Sample]] = ([], [])
            for _ in range(rounds):
                for vif, taken in zip((ours, peer), samples, strict=True):
                    taken.append(measure(vif, job, seconds))
            mine, theirs = (
                {name: statistics.median(s[name] for s in taken) for name in taken[0]}
                for taken in samples
            )
            found = figures(job, mine, theirs, limit)
            say("; ".join(f"{f.figure}: {f.ours:.1f} to {f.peer:.1f} {f.unit}" for f in found))
            yield found
            done.add(job.title)


def profile(lab: Lab, kind: Kind, jobs: list[Job], seconds: int, folder: Path) -> None:
    """Where the time of each job goes, on both vifs: a file each in `folder`."""
    guest = lab.guest(kind)
    if not guest.running():
        guest.create()
    payload.install_if_other(guest)
    folder.mkdir(parents=True, exist_ok=True)
    with two_vifs(lab, kind) as (net, ours, peer):
        for job in jobs:
            parts = list(_profiled(net, ours, job, seconds, ours=True))
            parts += _profiled(net, peer, job, seconds, ours=False)
            path = folder / f"{job.title.replace(' ', '-')}.txt"
            path.write_text("".join(parts))
            say(str(path))


def _profiled(net: Networks, vif: Vif, job: Job, seconds: int, *, ours: bool) -> Iterator[str]:
    guest, dom0 = vif.guest, vif.lab.dom0
    interrupts = "grep -E 'xen-dyn|LOC|RES|CAL|HYP' /proc/interrupts"
    threads = "ps -eLo comm,cputimes | grep -E 'vif|ksoftirq|iperf|kworker|python' | sort -k2nr"
    before = net.counters(vif) if ours else {}
    load = (
        f"python3 /run/lab/netcheck.py ask {vif.dom0} {vif.port} {seconds}"
        if job.options is None
        else " ".join(vif.iperf_line("-t", str(seconds), *job.options))
    )
    dom0.run(f"{interrupts} >/tmp/i0; {threads} >/tmp/t0")
    yield f"== {job.title}, {'pvfront' if ours else PEER}\n"
    yield guest.run(
        f"{interrupts} >/tmp/i0; (sleep 2; perf record -q -a -g -F 499 -o /tmp/perf.data "
        f"sleep {seconds // 2} 2>/dev/null) & {load}; wait; {interrupts} >/tmp/i1; "
        "diff /tmp/i0 /tmp/i1",
        timeout=seconds * 4 + 60,
        check=False,
    ).stdout
    yield "dom0's interrupts and threads, before and after\n"
    yield dom0.run(
        f"{interrupts} >/tmp/i1; {threads} >/tmp/t1; diff /tmp/i0 /tmp/i1; diff /tmp/t0 /tmp/t1",
        check=False,
    ).stdout
    if ours:
        changes = {key: value - before[key] for key, value in net.counters(vif).items()}
        packets = max(changes["tx.packets"], changes["rx.packets"], 1)
        yield "worker's counters, and by packet of the larger way\n"
        for key, value in changes.items():
            if value:
                yield f"  {key:28} {value:10} {value / packets:8.3f}\n"
        pid = net.state(vif)["worker_pid"]
        yield guest.run(
            f"{load} >/dev/null & sleep 3; timeout -s INT 3 strace -f -c -p {pid} 2>&1; wait",
            check=False,
            timeout=seconds * 4 + 60,
        ).stdout
    for sort in ("comm", "comm,dso,symbol"):
        view = f"perf report -i /tmp/perf.data --no-children --stdio -g none -s {sort}"
        yield guest.run(
            f"{view} 2>/dev/null | grep -v '^$' | head -60", timeout=300, check=False
        ).stdout
