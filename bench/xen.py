# SPDX-License-Identifier: BSD-2-Clause
"""pvfront beside the kernel's own drivers, in guests of the lab: build/bench-xen.json.

Networks are xen_net.py's, in the HVM guest; what follows is of disks.

Same guest, same run, same kind of backing store (RAM in dom0), for each target that the guest has:
the kernel's nbd device, ublk where the kernel has that, and the library for one program (direct:
its example polls, in the place of fio; its start is in the CPU figure). The two disks are measured
in turn, round after round, so that drift of the machine falls on both; the figure is the median of
the rounds. CPU is what the guest's processors spent on anything while the job ran, so interrupts,
copies and both of pvfront's processes are in it. Context switches and interrupts are counted in
the same way.

Without --guest and --target: nbd and direct in an HVM guest, ublk in the PVH guest whose kernel has
it and nbd in the same guest. A guest that the emulator triple-faults is started again, and its job
with it.

A figure's name is its job's, the target's if that is not nbd, what is unusual about the guest, and
what was counted if that is not the rate: "disk read 4k QD32", "disk read 4k QD32 ublk CPU",
"disk read 4k QD32 nbd 6.12", "disk read 4k QD32 nbd 2 vCPUs switches".

`--profile` measures nothing: it shows where one job's time goes, for both disks, in
build/bench-xen/: perf in the guest, system calls of the worker, its counters for each request,
interrupts in the guest and in dom0.

Emulated machines are slow: only the ratios mean something.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import plot
import xen_net
from figure import Figure
from lab import payload
from lab.errors import CommandFailed, DeadlineExceeded
from lab.guest import KINDS, Guest, Kind
from lab.progress import say
from lab.pvf import Pvfront
from lab.scenario import Lab, wait_until
from labbench import COUNTERS, counted, through_losses

OUTPUT = Path("build/bench-xen.json")
PROFILES = Path("build/bench-xen")
PEER = "kernel blkfront"
MIB = 256
SECONDS = 4
PROFILED = 16  # seconds; some go by before perf has begun
OURS, THEIRS = "/dev/pvfront/xvdb", "/dev/xvdc"
LENT = "xvdb, lent"  # no device: to a program
USUAL: Mapping[Kind, list[str]] = {"hvm": ["nbd", "direct"], "pvh612": ["ublk", "nbd"]}


@dataclass(frozen=True)
class Job:
    """What fio does."""

    title: str
    bs: str
    depth: int
    rw: str

    @property
    def unit(self) -> str:
        return "IOPS" if self.bs == "4k" else "MiB/s"

    @property
    def side(self) -> str:
        return "read" if "read" in self.rw else "write"

    def command(self, device: str, seconds: int) -> str:
        if device == LENT:
            return (
                f"pvfront vbd lend xvdb -- pvfront-disk-bench --rw {self.rw} --bs {self.bs} "
                f"--iodepth {self.depth} --ramp 1 --runtime {seconds} >/tmp/bench.json"
            )
        return (
            f"fio --name=b --filename={device} --rw={self.rw} --bs={self.bs} "
            f"--iodepth={self.depth} --ioengine=libaio --direct=1 --time_based "
            f"--runtime={seconds} --ramp_time=1 --randrepeat=1 --output-format=json "
            "--output=/tmp/bench.json"
        )


JOBS = [
    Job(f"disk {side} {bs} QD{depth}", bs, depth, order + side)
    for bs, depth, order in (("4k", 1, "rand"), ("4k", 32, "rand"), ("1M", 4, ""))
    for side in ("read", "write")
]


@dataclass
class Sample:
    rate: float  # IOPS for 4k, MiB/s for 1M
    cpu: float  # seconds per GiB
    switches: float  # of context, in the whole guest, for each request
    interrupts: float  # of the guest's processors, for each request


COUNTED = {"CPU": "s/GiB", "switches": "per request", "interrupts": "per request"}
"""Further figures of a job, less being better: their units."""


def measure(guest: Guest, device: str, job: Job, seconds: int) -> Sample:
    """One fio job; raises if fio reports an error."""
    script = (
        f"a=$({COUNTERS}); {job.command(device, seconds)} && b=$({COUNTERS}); echo $a; echo $b; "
        "cat /tmp/bench.json"
    )
    text = guest.run(script, timeout=seconds * 4 + 60).stdout
    before, after, report = text.split("\n", 2)
    used = counted(before, after)
    side = json.loads(report)["jobs"][0][job.side]
    # All is counted over ramp time as well, so is what it is divided by.
    gib = side["bw_bytes"] * (seconds + 1) / 2**30
    requests = side["iops"] * (seconds + 1)
    rate = side["iops"] if job.unit == "IOPS" else side["bw_bytes"] / 2**20
    return Sample(rate, used.cpu / gib, used.switches / requests, used.interrupts / requests)


def targets(guest: Guest) -> list[str]:
    """The kinds of device that this guest's pvfront and kernel can make."""
    text = guest.output("pvfront vbd serve --help", timeout=60)
    found = ["nbd"]
    if "ublk" in text and guest.run("modprobe -q ublk_drv", check=False).ok:
        found.append("ublk")
    found.append("direct")
    return found


@contextlib.contextmanager
def disks(lab: Lab, guest: Guest) -> Iterator[Pvfront]:
    """Two disks of the same kind: xvdb for us, xvdc for the kernel."""
    pvf = Pvfront(lab, guest)
    pvf.stop()
    ours, peers = lab.ram_disk(MIB), lab.ram_disk(MIB)
    guest.block_attach(peers.spec("xvdc"))
    wait_until("the kernel's xvdc", lambda: guest.run(f"test -b {THEIRS}", check=False).ok)
    guest.block_attach(ours.spec("xvdb"))
    try:
        pvf.start("xvdb")
        pvf.wait_served()
        for name in (OURS, THEIRS):  # the first touch of RAM is not what is measured
            guest.run(
                f"dd if=/dev/zero of={name} bs=1M oflag=direct status=none || true", timeout=300
            )
        yield pvf
    finally:
        try:
            pvf.start("xvdb")  # whoever had it last: a disk that is served is given up in order
            pvf.wait_served()
            for name in ("xvdb", "xvdc"):
                guest.block_detach(name)
            pvf.stop()
        except (CommandFailed, DeadlineExceeded):
            if guest.running():  # with a guest that is gone, they are
                raise
        ours.remove()
        peers.remove()


def serve(pvf: Pvfront, target: str, queues: int) -> None:
    """`queues` 0: what is usual for the target."""
    if target == "direct":  # lent anew for each job
        pvf.stop()
        return
    settings = f"-o max_queues={queues} " if queues else ""
    pvf.start(f"--target {target} {settings}xvdb")
    pvf.wait_served()


def title(job: Job, target: str, kind: Kind, vcpus: int, queues: int) -> str:
    guest = " 6.12" if kind == "pvh612" and target == "nbd" else ""
    if vcpus > 1:
        guest += f" {vcpus} vCPUs"
    if queues:
        guest += f" {queues} queues"
    return f"{job.title} {target}{guest}" if guest or target != "nbd" else job.title


def bench(
    pvf: Pvfront, name: str, target: str, job: Job, rounds: int, seconds: int
) -> list[Figure]:
    """A figure of the rate, called `name`, and one of each thing that was counted."""
    ours = LENT if target == "direct" else OURS
    samples: dict[str, list[Sample]] = {ours: [], THEIRS: []}
    for _ in range(rounds):
        for device, taken in samples.items():
            taken.append(measure(pvf.guest, device, job, seconds))

    def median(device: str, what: str) -> float:
        return statistics.median(float(getattr(sample, what)) for sample in samples[device])

    rate = {device: median(device, "rate") for device in samples}
    figures = [Figure(name, job.unit, rate[ours], rate[THEIRS], PEER, rate[ours] / rate[THEIRS])]
    for what, unit in COUNTED.items():
        mine, theirs = (median(device, what.lower()) for device in samples)
        figures.append(Figure(f"{name} {what}", unit, mine, theirs, PEER, theirs / mine))
    say(f"{name}: " + "; ".join(f"{f.ours:.1f} to {f.peer:.1f} {f.unit}" for f in figures))
    return figures


# -- where the time goes ----------------------------------------------------------------------


def totals(pvf: Pvfront) -> dict[str, int]:
    """The worker's counters, of all queues and as plain names: "write.requests"."""
    found = pvf.status()["statistics"]
    sums: dict[str, int] = {}
    for queue in found if isinstance(found, list) else [found]:
        for name, value in queue.items():
            inner = value if isinstance(value, dict) else {"": value}
            for key, number in inner.items():
                if isinstance(number, int):
                    full = f"{name}.{key}".rstrip(".")
                    sums[full] = sums.get(full, 0) + number
    return sums


def profile(pvf: Pvfront, job: Job, seconds: int) -> str:
    """Text: both disks, each under the same job."""
    guest, dom0 = pvf.guest, pvf.lab.dom0
    parts = []
    interrupts = "grep -E 'xen-dyn|IPI|LOC|RES|CAL|HYP' /proc/interrupts"
    threads = "ps -eLo comm,cputimes | grep -E 'xvd|blkback|kworker|qemu' | sort -k2nr | head -12"
    for device in (OURS, THEIRS):
        begin = totals(pvf)
        look = f"{interrupts} >/tmp/i0"
        script = (
            f"{look}; (sleep 2; perf record -q -a -g -F 499 -o /tmp/perf.data sleep {seconds // 2} "
            f"2>/dev/null) & {job.command(device, seconds)}; wait; {interrupts} >/tmp/i1; "
            f"cat /tmp/bench.json"
        )
        dom0.run(f"{interrupts} >/tmp/i0; {threads} >/tmp/t0")
        report = guest.run(script, timeout=seconds * 4 + 60).stdout
        side = json.loads(report)["jobs"][0][job.side]
        dom0.run(f"{interrupts} >/tmp/i1; {threads} >/tmp/t1")
        parts.append(f"== {job.title} on {device}: {side['iops']:.0f}/s\n")
        requests = side["total_ios"]
        parts.append(f"requests {requests} (without ramp)\n")
        if device == OURS:
            end = totals(pvf)
            changes = {k: end[k] - begin.get(k, 0) for k in end if end[k] != begin.get(k, 0)}
            parts.append("worker's counters, and by request of the kernel:\n")
            done = max(changes.get(f"{job.side}.requests", 1), 1)
            parts += [f"  {k:28} {v:10} {v / done:8.3f}\n" for k, v in changes.items()]
            trace = (
                f"{job.command(device, 4)} & sleep 2; "
                f"timeout -s INT 2 strace -f -c -p {pvf.worker()} 2>&1; wait"
            )
            parts.append(guest.run(trace, check=False, timeout=60).stdout)
        parts.append("guest's interrupts before and after:\n")
        parts.append(guest.run("diff /tmp/i0 /tmp/i1", check=False).stdout)
        parts.append("dom0's interrupts and threads before and after:\n")
        parts.append(dom0.run("diff /tmp/i0 /tmp/i1; diff /tmp/t0 /tmp/t1", check=False).stdout)
        for sort in ("comm", "comm,dso,symbol"):
            view = f"perf report -i /tmp/perf.data --no-children --stdio -g none -s {sort}"
            parts.append(
                guest.run(f"{view} 2>/dev/null | grep -v '^$' | head -70", timeout=120).stdout
            )
    return "".join(parts)


def save(figures: list[Figure]) -> None:
    OUTPUT.parent.mkdir(exist_ok=True)
    found = [asdict(figure) for figure in figures]
    disks = [figure for figure in found if figure["figure"].startswith("disk")]
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n")
    OUTPUT.with_suffix(".svg").write_text(plot.ratios(disks, PEER))


@dataclass
class Options:
    rounds: int
    seconds: int
    profile: bool
    vcpus: int
    queues: int


def one_life(
    lab: Lab, kind: Kind, wanted: list[str], jobs: list[Job], options: Options, done: set[str]
) -> Iterator[list[Figure]]:
    """What a guest of that kind gives, job by job, but for those already `done`: their titles."""
    guest = lab.guest(kind)
    if options.vcpus > 1:
        if guest.running():
            guest.destroy()
        guest.create(options={"vcpus": options.vcpus})
    elif not guest.running():
        guest.create()
    payload.install_if_other(guest)
    with disks(lab, guest) as pvf:
        for target in wanted or targets(guest):
            names = {title(job, target, kind, options.vcpus, options.queues): job for job in jobs}
            left = {name: job for name, job in names.items() if name not in done}
            if left:
                serve(pvf, target, options.queues)
            for name, job in left.items():
                if not options.profile:
                    yield bench(pvf, name, target, job, options.rounds, options.seconds)
                elif target != "direct":
                    PROFILES.mkdir(parents=True, exist_ok=True)
                    path = PROFILES / f"{target}-{job.title.replace(' ', '-')}.txt"
                    path.write_text(profile(pvf, job, max(options.seconds, PROFILED)))
                    say(f"{path}")
                done.add(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guest", action="append", choices=KINDS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--target", action="append", help="nbd, ublk, direct; default: all")
    parser.add_argument("--vcpus", type=int, default=1, help="of a guest (default: 1)")
    parser.add_argument("--queues", type=int, default=0, help="of a disk over nbd (default: usual)")
    parser.add_argument("--match", default="", help="only the jobs with this in their title")
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    parser.add_argument("--lab-attach", action="store_true", help="use the lab that runs already")
    parser.add_argument("--add", action="store_true", help="keep what else is in the result")
    given = parser.parse_args()
    jobs = [job for job in JOBS if given.match in job.title]
    nets = [job for job in xen_net.JOBS if given.match in job.title and not given.target]
    if not (jobs or nets):
        titles = [*(job.title for job in JOBS), *(job.title for job in xen_net.JOBS)]
        parser.error(f"--match: there are {', '.join(titles)}")
    kinds: list[Kind] = given.guest or list(USUAL)
    if given.lab_attach:
        lab = Lab.attach()
    else:
        image = payload.build()
        lab = Lab.up(image, owner="bench", wait=1800, kinds=kinds)
    options = Options(given.rounds, given.seconds, given.profile, given.vcpus, given.queues)
    figures: dict[tuple[str, str], Figure] = {}

    def keep(found: Iterable[Figure]) -> None:
        figures.update({(figure.figure, figure.peer_name): figure for figure in found})

    if given.add and OUTPUT.exists():
        keep(Figure(**found) for found in json.loads(OUTPUT.read_text()))
    try:
        for kind in kinds:
            wanted = given.target or ([] if given.guest else USUAL[kind])
            lives = [partial(one_life, lab, kind, wanted, jobs, options)] if jobs else []
            if nets and (kind == "hvm" or given.guest) and not given.profile:
                more = (options.rounds, options.seconds)
                lives.append(partial(xen_net.bench, lab, kind, nets, *more))
            for life in lives:
                for found in through_losses(lab, kind, life):
                    keep(found)
                    save(list(figures.values()))
            if nets and given.profile:
                xen_net.profile(lab, kind, nets, max(options.seconds, PROFILED), PROFILES)
            if kind != kinds[-1]:
                lab.guest(kind).destroy()
    finally:
        if not given.lab_attach:
            lab.down()
    if not given.profile:
        width = max(len(name) for name, _ in figures)
        for f in figures.values():
            print(
                f"{f.figure:{width}}  {f.ours:10.2f} {f.peer:10.2f} {f.unit:11}  "
                f"ratio {f.ratio:.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
