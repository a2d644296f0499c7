# SPDX-License-Identifier: BSD-2-Clause
"""Secondary consoles in a real guest on real Xen: QEMU's xen_console, our service and its units.

A guest with channels in its configuration is booted for these, once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lab.guest import Guest
from lab.pvf import start_service
from lab.scenario import Lab, wait_until

import pvfront.console.pvfront_channel as helper

# Not yet run in a guest: for who asks.
pytestmark = [pytest.mark.console, pytest.mark.long]

UNIT = "pvfront-console"
TALKER = "/run/lab/talk.py"
CHANNEL = "/run/lab/pvfront-channel"
TALK = r"""
import hashlib, socket, sys, time

path, verb, argument = sys.argv[1:]
console = socket.socket(socket.AF_UNIX)
console.connect(path)
console.settimeout(120)
if verb == "send":  # so many bytes that follow from their place
    data = b"".join(b"%015d\n" % n for n in range(int(argument) // 16))
    console.sendall(data)
    print(hashlib.sha256(data).hexdigest())
elif verb == "receive":
    print("ready", flush=True)
    total, left = hashlib.sha256(), int(argument)
    while left:
        data = console.recv(min(left, 65536))
        total.update(data)
        left -= len(data)
    print(total.hexdigest())
else:  # a dialogue: "said|awaited" ...
    for turn in argument.split("\n"):
        said, _, awaited = turn.partition("|")
        console.sendall(said.encode().decode("unicode_escape").encode())
        heard = b""
        while awaited.encode() not in heard:
            heard += console.recv(4096)
    print("heard")
"""
RAW = "stty -F {tty} raw -echo; "


def sock(guest: Guest, name: str) -> str:
    return f"/run/xen/{guest.kind}-{name}.sock"


@pytest.fixture
def consoles(lab: Lab, guest: Guest) -> Guest:
    """The guest with its service, and both channels connected."""
    if not guest.has("/dev/pvfront/console/login"):
        guest.destroy()
        channels = [
            "connection=pty,name=dummy",  # xl 4.17 gives the first the primary console's number
            *(
                f"connection=socket,path={sock(guest, name)},name={name}"
                for name in ("login", "files")
            ),
        ]
        guest.create(options={"channel": channels})
    lab.dom0.write(TALKER, TALK)
    lab.dom0.write(CHANNEL, Path(helper.__file__).read_text(), 0o755)
    start_service(guest, UNIT, "PVFRONT_CONSOLES=--all")
    wait_until("both consoles connected", lambda: len(_connected(guest)) >= 2, 120)
    return guest


def _connected(guest: Guest) -> list[dict[str, Any]]:
    found = json.loads(guest.output("pvfront console list --json"))
    return [one for one in found if one["name"] in ("login", "files") and one["path"]]


def _talk(lab: Lab, guest: Guest, name: str, verb: str, argument: str) -> str:
    return lab.dom0.output(["python3", TALKER, sock(guest, name), verb, argument], timeout=300)


def test_bytes_pass_each_way_unchanged(lab: Lab, consoles: Guest) -> None:
    tty, count = "/dev/pvfront/console/files", 1 << 20
    reading = consoles.start(f"{RAW.format(tty=tty)} head -c {count} <{tty} | sha256sum")
    sent = _talk(lab, consoles, "files", "send", str(count))
    assert reading.wait(300).stdout.split()[0] == sent.strip()
    receiving = lab.dom0.start(["python3", TALKER, sock(consoles, "files"), "receive", str(count)])
    wait_until("dom0 listens", lambda: "ready" in receiving.stdout or receiving.poll()[0], 60)
    sent = consoles.output(
        f"head -c {count} /dev/urandom >/run/data; {RAW.format(tty=tty)} cat /run/data >{tty}; "
        "sha256sum </run/data",
        timeout=300,
    )
    assert receiving.wait(300).stdout.split()[-1] == sent.split()[0]


def test_a_login_comes_and_comes_back(lab: Lab, consoles: Guest) -> None:
    consoles.run("systemctl start pvfront-getty@login")
    _talk(lab, consoles, "login", "dialogue", "\\r|login:")
    consoles.run("systemctl kill -s KILL pvfront-getty@login")
    _talk(lab, consoles, "login", "dialogue", "\\r|login:")
    # The service is killed: the login goes on, its terminal is kept by systemd.
    pid = consoles.output("systemctl show -p MainPID --value pvfront-getty@login")
    consoles.run(f"systemctl kill -s KILL {UNIT}")
    wait_until("connected again", lambda: len(_connected(consoles)) >= 2, 120)
    _talk(lab, consoles, "login", "dialogue", "\\r|login:")
    assert consoles.output("systemctl show -p MainPID --value pvfront-getty@login") == pid
    consoles.run("systemctl stop pvfront-getty@login")


def test_a_file_passes_over_a_channel(lab: Lab, consoles: Guest) -> None:
    consoles.run(
        "mkdir -p /run/exchange; echo 'PVFRONT_CHANNEL=--files /run/exchange --writable' "
        ">/etc/default/pvfront-channel; systemctl start pvfront-channel@files"
    )
    lab.dom0.run("head -c 1048576 /dev/urandom >/run/lab/there")
    for words in ("put /run/lab/there name", "get name /run/lab/back"):
        lab.dom0.run(f"python3 {CHANNEL} {sock(consoles, 'files')} {words}", timeout=300)
    lab.dom0.run("cmp /run/lab/there /run/lab/back")
    consoles.run("systemctl stop pvfront-channel@files")


def test_a_console_goes_on_after_save_and_restore(lab: Lab, consoles: Guest) -> None:
    consoles.run("systemctl start pvfront-getty@login")
    _talk(lab, consoles, "login", "dialogue", "\\r|login:")
    consoles.save()
    consoles.restore()
    wait_until("connected again", lambda: len(_connected(consoles)) >= 2, 120)
    _talk(lab, consoles, "login", "dialogue", "\\r|login:")
    consoles.run("systemctl stop pvfront-getty@login")
