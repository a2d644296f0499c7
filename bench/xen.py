# SPDX-License-Identifier: BSD-2-Clause
"""Disks through pvfront beside disks through the kernel's blkfront: build/bench-xen.json.

Same guest, same run, same kind of backing store (RAM in dom0). The two are measured in turn,
round after round, so that drift of the machine falls on both; the figure is the median of the
rounds. CPU is what the guest's processors spent on anything while the job ran, so interrupts,
copies and both of pvfront's processes are in it.

Emulated machines are slow: only the ratios mean something.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import payload
from lab.guest import Guest
from lab.progress import say
from lab.pvf import Pvfront
from lab.scenario import Lab, wait_until

OUTPUT = Path("build/bench-xen.json")
PEER = "kernel blkfront"
MIB = 256
SECONDS = 6
JOBS = [
    ("4k QD1", "4k", 1, "rand"),
    ("4k QD32", "4k", 32, "rand"),
    ("1M QD4", "1M", 4, ""),
]


@dataclass
class Figure:
    """One line of the result; ratio above 1: ours is better."""

    figure: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float


@dataclass
class Sample:
    rate: float  # IOPS for 4k, MiB/s for 1M
    cpu_per_gib: float  # seconds


def measure(guest: Guest, device: str, rw: str, bs: str, depth: int, seconds: int) -> Sample:
    """One fio job; raises if fio reports an error."""
    stat = "awk '/^cpu /{print $2+$3+$4+$7+$8+$9}' /proc/stat"
    fio = (
        f"fio --name=b --filename={device} --rw={rw} --bs={bs} --iodepth={depth} "
        f"--ioengine=libaio --direct=1 --time_based --runtime={seconds} --ramp_time=1 "
        f"--randrepeat=1 --output-format=json --output=/tmp/bench.json"
    )
    script = f"a=$({stat}); {fio} && b=$({stat}); echo $((b-a)); cat /tmp/bench.json"
    text = guest.run(script, timeout=seconds * 4 + 60).stdout
    ticks, _, report = text.partition("\n")
    job = json.loads(report)["jobs"][0]
    side = job["read" if "read" in rw else "write"]
    # CPU is counted over ramp time as well, so are the bytes that it is divided by.
    gib = side["bw_bytes"] * (seconds + 1) / 2**30
    rate = side["iops"] if bs == "4k" else side["bw_bytes"] / 2**20
    return Sample(rate, int(ticks) / 100 / gib)


def bench(lab: Lab, guest: Guest, rounds: int, seconds: int) -> list[Figure]:
    pvf = Pvfront(lab, guest)
    pvf.stop()
    ours, peers = lab.ram_disk(MIB), lab.ram_disk(MIB)
    guest.block_attach(peers.spec("xvdc"))
    wait_until("the kernel's xvdc", lambda: guest.run("test -b /dev/xvdc", check=False).ok)
    guest.block_attach(ours.spec("xvdb"))
    figures = []
    try:
        pvf.start("xvdb")
        pvf.wait_served()
        devices = {"ours": "/dev/pvfront/xvdb", "peer": "/dev/xvdc"}
        for name in devices.values():  # the first touch of RAM is not what is measured
            guest.run(
                f"dd if=/dev/zero of={name} bs=1M oflag=direct status=none || true", timeout=300
            )
        for title, bs, depth, order in JOBS:
            for direction in ("read", "write"):
                samples: dict[str, list[Sample]] = {"ours": [], "peer": []}
                for _ in range(rounds):
                    for who, device in devices.items():
                        samples[who].append(
                            measure(guest, device, order + direction, bs, depth, seconds)
                        )
                rate = {w: statistics.median(s.rate for s in ss) for w, ss in samples.items()}
                cpu = {w: statistics.median(s.cpu_per_gib for s in ss) for w, ss in samples.items()}
                name = f"disk {direction} {title}"
                unit = "IOPS" if bs == "4k" else "MiB/s"
                figures.append(
                    Figure(
                        name, unit, rate["ours"], rate["peer"], PEER, rate["ours"] / rate["peer"]
                    )
                )
                figures.append(
                    Figure(
                        f"{name} CPU", "s/GiB", cpu["ours"], cpu["peer"], PEER,
                        cpu["peer"] / cpu["ours"],
                    )
                )  # fmt: skip
                say(
                    f"{name}: {rate['ours']:.0f} {unit}, {PEER} {rate['peer']:.0f}: "
                    f"ratio {rate['ours'] / rate['peer']:.2f}; CPU s/GiB {cpu['ours']:.1f}, "
                    f"{PEER} {cpu['peer']:.1f}"
                )
    finally:
        pvf.stop()
        for name in ("xvdb", "xvdc"):
            guest.block_detach(name)
        ours.remove()
        peers.remove()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guest", default="hvm", choices=("hvm", "pvh", "pv"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--lab-attach", action="store_true", help="use the lab that runs already")
    options = parser.parse_args()
    if options.lab_attach:
        lab = Lab.attach()
    else:
        lab = Lab.up(payload.build(payload.find_wheel()), owner="bench", wait=1800)
    try:
        guest = lab.guest(options.guest)
        if not guest.running():
            guest.create()
        figures = bench(lab, guest, options.rounds, options.seconds)
    finally:
        if not options.lab_attach:
            lab.down()
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps([asdict(f) for f in figures], indent=1) + "\n")
    width = max(len(f.figure) for f in figures)
    for f in figures:
        print(f"{f.figure:{width}}  {f.ours:10.1f} {f.peer:10.1f} {f.unit:6}  ratio {f.ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
