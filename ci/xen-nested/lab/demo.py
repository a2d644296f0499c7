# SPDX-License-Identifier: BSD-2-Clause
"""``make demo``: a disk from an xl config, served by pvfront inside a real Xen HVM guest.

Every command is shown with its output, so that it can be repeated in a guest of one's own.
"""

from __future__ import annotations

import sys
import time

from . import payload
from .client import Machine
from .errors import CommandFailed, DeadlineExceeded, LabError
from .progress import say
from .pvf import Pvfront
from .scenario import Lab, wait_until

MIB = 96


def show(machine: Machine, command: str, timeout: float = 120.0) -> str:
    """Runs a command, and prints it and what it said, as on a terminal."""
    print(f"\n[{machine.name}]# {command}", flush=True)
    result = machine.run(command, timeout=timeout)
    text = (result.stdout + result.stderr).rstrip()
    if text:
        print(text, flush=True)
    return result.stdout


def demo(lab: Lab) -> bool:
    """True if both sides agree in the end."""
    guest = lab.guest("hvm")
    backing = lab.loop_disk(MIB)
    disk = backing.spec("xvdb", stock=True)
    say(f"xl create of an HVM guest with a second disk: disk = [ ..., '{disk}' ]")
    guest.create(disks=[disk])
    pvf = Pvfront(lab, guest)

    show(lab.dom0, "xl list && xl block-list hvm")
    show(guest, "pvfront list")
    say("the kernel's blkfront has xvdb; the disk service takes it and serves it in user space")
    guest.run("mkdir -p /etc/pvfront")
    guest.write("/etc/pvfront/pvfront.toml", '[disk]\nclaim = ["xvdb"]\n')
    show(guest, "cat /etc/pvfront/pvfront.toml; systemctl start pvfront-vbd")
    pvf.wait_served()
    show(guest, "pvfront list")
    show(guest, "pvfront status xvdb")

    say("stock tools on /dev/pvfront/xvdb: partition, make a file system, fill, check")
    show(guest, "echo 'label: gpt\ntype=L' | sfdisk -q /dev/pvfront/xvdb")
    node = guest.output("readlink -f /dev/pvfront/xvdb")
    wait_until("the partition's node", lambda: guest.run(f"test -b {node}p1", check=False).ok)
    show(guest, f"mkfs.ext4 -q {node}p1", 180)
    show(guest, f"mkdir -p /mnt/demo && mount {node}p1 /mnt/demo && lsblk {node}")
    show(guest, "time cp -a /usr/lib/python3.11 /mnt/demo/ && sync && df -h /mnt/demo", 300)
    show(guest, "diff -r --no-dereference /usr/lib/python3.11 /mnt/demo/python3.11", 300)
    show(guest, "umount /mnt/demo")
    show(guest, f"e2fsck -f -n {node}p1", 180)

    say("sha256 of the whole disk, in the guest through pvfront and in dom0 on its backing store")
    ours = show(guest, "dd if=/dev/pvfront/xvdb bs=1M iflag=direct status=none | sha256sum", 300)
    theirs = show(lab.dom0, f"sha256sum {backing.device}", 300)
    equal = ours.split()[0] == theirs.split()[0]
    show(guest, "pvfront status xvdb | tail -n 12")
    say("equal" if equal else "NOT EQUAL")
    return equal


def main() -> int:
    begin = time.monotonic()
    try:
        lab = Lab.up(payload.build(), owner="demo", wait=1800)
        try:
            good = demo(lab)
            if not good:
                lab.keep_evidence(lab.run / "demo", "hvm")
        except BaseException:
            lab.keep_evidence(lab.run / "demo", "hvm")
            say(f"what the lab saw is in {lab.run}/demo")
            raise
        finally:
            lab.down()
    except (LabError, CommandFailed, DeadlineExceeded) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    spent = time.monotonic() - begin
    say(f"done in {spent:.0f} s; `make xen-shell` gives you a shell in such a guest")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
