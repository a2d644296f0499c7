# SPDX-License-Identifier: BSD-2-Clause
"""Secondary consoles in a real guest on real Xen: QEMU's xen_console, our service and its units.

HVM guests have channels; of another kind one is booted for these, once. All but one are for who
asks for consoles: they are minutes of the emulator's.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect.fdpexpect
import pytest
from lab import payload
from lab.client import Machine
from lab.errors import CommandFailed, DeadlineExceeded
from lab.guest import CHANNELS, Guest, Kind
from lab.pvf import start_service
from lab.scenario import Lab, Record, wait_until

import pvfront.console.pvfront_channel as helper

pytestmark = [pytest.mark.console]

UNIT = "pvfront-console"
GETTY = "pvfront-getty@login"
CONFIG = "/etc/pvfront/pvfront.toml"
SETTINGS = """[console]
claim = ["login", "file[a-z]"]
[console.login]
hotkey = "^^"
[console.files]
files = "/run/exchange"
writable = true
"""
PATIENCE = 240.0
# Lines of 98 characters and an end: 9.9 MB, in a soak 99 MB. QEMU keeps one.
FLOOD = 1_000_000 if "PVFRONT_REPEATS" in os.environ else 100_000
TALKER = "/run/lab/talk.py"
CHANNEL = "/run/lab/pvfront-channel"
TALK = r"""
import hashlib, json, os, socket, sys, time

path, verb, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
console = socket.socket(socket.AF_UNIX)
console.connect(path)
console.settimeout(240)

def receive(most):
    data = console.recv(most)
    if not data:
        sys.exit("QEMU hung up")
    return data

print("ready", flush=True)
if verb == "send":
    # QEMU drops what it has not read from who hangs up: so wait for the guest's word, a line.
    data = b"".join(b"%015d\n" % n for n in range(count // 16))
    console.sendall(data)
    print(hashlib.sha256(data).hexdigest())
    said = b""
    while b"\n" not in said:
        said += receive(4096)
    print(said.decode().split()[0])
elif verb == "receive":
    total, left = hashlib.sha256(), count
    while left:
        data = receive(min(left, 65536))
        total.update(data)
        left -= len(data)
    print(total.hexdigest())
else:
    # Lines with a number twice, of which some are missing: we said so, or QEMU did not, which keeps
    # 1 MiB for who does not read and drops the middle. Nothing is read before there is a file "go".
    while not os.path.exists("/run/lab/go"):
        time.sleep(0.2)
    kept, dropped, damaged, last, rest = 0, 0, 0, -1, b""
    while rest != b"that was all":
        *lines, rest = (rest + receive(65536)).split(b"\r\n")
        for line in lines:
            one, _, two = line.partition(b" ")
            if line.startswith(b"--- "):
                dropped += int(line.split()[1])
            elif len(line) != 98 or one != two[1:]:
                damaged += 1
            elif int(one) <= last:
                sys.exit("after %d came %r" % (last, line))
            else:
                last, kept = int(one), kept + 1
    print(json.dumps({"kept": kept, "dropped": dropped, "damaged": damaged}))
"""


class Screen:
    """Somebody at a terminal: of a shell in dom0 or in the guest, or of what that has started."""

    def __init__(self, machine: Machine) -> None:
        self._sock = machine.open_shell()
        self.end = pexpect.fdpexpect.fdspawn(self._sock.fileno(), timeout=PATIENCE)

    def close(self) -> None:
        self._sock.close()

    def type(self, text: str) -> None:
        self.end.send(text)

    def expect(self, *texts: str) -> int:
        """Waits for one of the texts; which it was."""
        return int(self.end.expect_exact(list(texts)))

    def expect_after(self, typed: str, *texts: str) -> int:
        """Types something, again every few seconds, until one of the texts is shown: who is to
        read it may not be there yet, or throw away what was typed before.
        """
        until = time.monotonic() + PATIENCE
        while True:
            self.type(typed)
            found = int(self.end.expect_exact([*texts, pexpect.TIMEOUT], timeout=5))
            if found < len(texts):
                return found
            assert time.monotonic() < until, f"never came: {texts}; last: {self.end.before!r}"

    def log_in(self) -> None:
        """To a shell, through getty and login; of one that is logged in already, nothing."""
        if self.expect_after("\r", "login: ", "ready> ") == 0:
            self.type("root\r")
            self.expect("Password: ")
            self.type("lab\r")
            self.expect("# ")
            self.type("PS1='rea''dy> '\r")
            self.expect("ready> ")

    def ask(self, command: str) -> str:
        """What a command says, of a shell that was logged in to."""
        self.type(f"echo be''gin; {command}; echo e''nd\r")
        self.expect("begin\r\n")
        self.expect("end\r\n")
        said: bytes = self.end.before
        self.expect("ready> ")
        return said.decode().strip()


@contextlib.contextmanager
def seat(lab: Lab, guest: Guest, name: str) -> Iterator[Screen]:
    """Somebody in dom0 at a console of the guest, as with `xl console`: raw, and not echoed."""
    screen = Screen(lab.dom0)
    try:
        socat = f"exec socat -,raw,echo=0 UNIX:{guest.channel_path(name)}"
        screen.type(f"stty raw -echo; echo sea''ted; {socat}\r")
        screen.expect("seated\n")
        yield screen
    finally:
        screen.close()


@pytest.fixture
def consoles(lab: Lab, guest: Guest) -> Guest:
    """The guest with its service, and both channels connected."""
    if not {1, 2} <= set(guest.vdevs("console")):
        guest.destroy()
        guest.create(options={"channel": guest.channels()})
        payload.install_if_other(guest)
        guest.dirty = False  # nobody minds consoles
    lab.dom0.write(TALKER, TALK)
    lab.dom0.write(CHANNEL, Path(helper.__file__).read_text(), 0o755)
    guest.write(CONFIG, SETTINGS)
    guest.run("echo root:lab | chpasswd; mkdir -p /run/exchange")
    start_service(guest, UNIT, "PVFRONT_CONSOLES=")
    wait_connected(guest)
    return guest


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left(lab: Lab, pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    kind: Kind = pytestconfig.getoption("--guest")
    with contextlib.suppress(CommandFailed, DeadlineExceeded):
        if (guest := lab.guest(kind)).alive():
            guest.run(f"systemctl stop '{GETTY}' pvfront-channel@files {UNIT}; rm -f {CONFIG}")


def wait_connected(guest: Guest) -> None:
    def connected() -> bool:
        found = guest.look(*(f"/run/pvfront/console-{number}.json" for number in (1, 2)))
        states: list[dict[str, Any]] = [json.loads(seen.text or "{}") for seen in found if seen]
        return [one["label"] for one in states if one["phase"] == "connected"] == [*CHANNELS]

    wait_until("both consoles connected", connected)


def sums(lab: Lab, guest: Guest, verb: str, count: int) -> list[str]:
    """What the talker says at its end."""
    command = ["python3", TALKER, guest.channel_path("files"), verb, str(count)]
    return lab.dom0.output(command, timeout=900).split()[1:]


@pytest.mark.area
def test_dom0_logs_in_over_a_second_console_and_edits_a_file(lab: Lab, consoles: Guest) -> None:
    consoles.run(f"rm -f /root/note; systemctl restart {GETTY}")
    with seat(lab, consoles, "login") as here:
        here.log_in()
        assert here.ask("stty size") == "24 80"
        here.type("busybox vi /root/note\r")
        here.expect("- /root/note")  # its line at the bottom; I: inserts
        here.type("i")
        here.expect("I /root/note")
        here.type("written in dom0")
        here.expect("written in dom0")
        here.type("\x1b")
        here.expect("- /root/note")
        here.type(":wq\r")
        here.expect("ready> ")
        here.type("exit\r")
        here.log_in()  # another getty has come
    assert consoles.output("cat /root/note") == "written in dom0"
    consoles.run(f"systemctl stop {GETTY}; rm -f /root/note")


@pytest.mark.area
def test_a_mebibyte_passes_each_way_unchanged(lab: Lab, consoles: Guest) -> None:
    tty, count = "/dev/pvfront/console/files", 1 << 20
    consoles.run(f"stty -F {tty} raw -echo")
    begin = time.monotonic()
    reading = consoles.start(f"exec 9<>{tty}; head -c {count} <&9 | sha256sum >&9")
    sent, came = sums(lab, consoles, "send", count)
    assert sent == came
    assert reading.wait().ok
    middle = time.monotonic()
    receiving = lab.dom0.start(
        ["python3", TALKER, consoles.channel_path("files"), "receive", str(count)]
    )
    wait_until("dom0 listens", lambda: receiving.poll()[0] or "ready" in receiving.stdout)
    sent = consoles.output(
        f"head -c {count} /dev/urandom >/run/data; cat /run/data >{tty}; sha256sum </run/data",
        timeout=900,
    )
    assert receiving.wait(900).stdout.split()[-1] == sent.split()[0]
    print(f"in {middle - begin:.1f} s, out {time.monotonic() - middle:.1f} s")


def test_a_login_is_killed_and_comes_back_and_outlives_its_service(
    lab: Lab, consoles: Guest
) -> None:
    consoles.run(f"systemctl restart {GETTY}")
    with seat(lab, consoles, "login") as here:
        here.log_in()
        consoles.run(f"systemctl kill -s KILL {GETTY}")
        here.expect("login: ")
        here.log_in()
        shell = here.ask("echo $$")
        consoles.run(f"systemctl kill -s KILL --kill-whom=main {UNIT}")
        assert here.ask("echo $$") == shell
        wait_connected(consoles)
        consoles.run(f"systemctl restart {UNIT}")
        assert here.ask("echo $$") == shell
        wait_connected(consoles)
        consoles.run("kill -KILL $(pgrep -x pvfront-worker)", check=False)
        here.expect_after('echo "=$(($$ + 0))="\r', f"={shell}=\r")
        here.type("exit\r")
    consoles.run(f"systemctl stop {GETTY}")


@pytest.mark.area
def test_two_readers_see_the_same_and_one_leaves_and_comes_back(lab: Lab, consoles: Guest) -> None:
    attach = "pvfront console attach files --history=0"
    readers = [consoles.start(f"sleep 600 | {attach} -r >/run/{name}") for name in ("a", "b")]

    def attached() -> int:
        (seen,) = consoles.look("/run/pvfront/console-2.json")
        return len(json.loads(seen.text or "{}").get("clients", ())) if seen else 0

    wait_until("both read", lambda: attached() == 2)
    one = Screen(consoles)
    with seat(lab, consoles, "files") as dom0:
        one.type(f"{attach}\r")
        wait_until("a third one reads", lambda: attached() == 3)
        dom0.type("".join(f"{number:015d}\r" for number in range(512)) + "to all of you\r")
        one.expect("to all of you")
        one.type("and back\r")
        dom0.expect("and back\r")
        one.type("\x1d")
        wait_until("it has left", lambda: attached() == 2)
        dom0.type("said meanwhile\r")
        one.type("pvfront console attach files\r")
        one.expect("to all of you\rsaid meanwhile\r")
        one.type("still there\r")
        dom0.expect("still there\r")
        one.type("\x1d")
    one.close()
    wait_until("as much", lambda: b"meanwhile\r" in consoles.read("/run/a"))
    wait_until("as much", lambda: b"meanwhile\r" in consoles.read("/run/b"))
    for reader in readers:
        reader.kill()
    text = consoles.read("/run/a")
    assert text == consoles.read("/run/b")
    assert len(text) == 512 * 16 + len("to all of you\rsaid meanwhile\r")


@pytest.mark.area
def test_a_hot_key_in_dom0_brings_a_dump(lab: Lab, consoles: Guest) -> None:
    with seat(lab, consoles, "login") as here:
        here.expect_after("\x1ed", "--- end of the dump")
        assert b"console-1" in here.end.before


@pytest.mark.area
def test_a_session_goes_on_after_save_and_restore(lab: Lab, consoles: Guest) -> None:
    consoles.run(f"systemctl restart {GETTY}")
    with seat(lab, consoles, "login") as here:
        here.log_in()
        assert here.ask("kept=$$; echo $kept") != ""
        shell = here.ask("echo $kept")
    consoles.save()
    consoles.restore()
    wait_connected(consoles)
    with seat(lab, consoles, "login") as here:
        here.expect_after("\r", "ready> ")
        here.expect_after('echo "=$kept $$="\r', f"={shell} {shell}=\r")
        here.type("exit\r")
    consoles.run(f"systemctl stop {GETTY}")


@pytest.mark.area
def test_a_file_of_ten_mebibytes_passes_over_a_channel_both_ways(
    lab: Lab, consoles: Guest, record: Record
) -> None:
    consoles.run("systemctl start pvfront-channel@files")
    lab.dom0.run("head -c 10485760 /dev/urandom >/run/lab/there; rm -f /run/lab/back")
    for words in ("put /run/lab/there name", "get name /run/lab/back"):
        begin = time.monotonic()
        # Who reads stands still in the middle, for longer than QEMU's 1 MiB takes.
        lab.dom0.run(
            f"python3 {CHANNEL} {consoles.channel_path('files')} {words} & "
            "sleep 15; kill -STOP $!; sleep 30; kill -CONT $!; wait $!",
            timeout=1100,
        )
        record(f"channel: {words.split()[0]} 10 MiB", f"{time.monotonic() - begin:.0f} s")
    lab.dom0.run("cmp /run/lab/there /run/lab/back")
    consoles.run("systemctl stop pvfront-channel@files; rm /run/exchange/name")


@pytest.mark.area
@pytest.mark.timeout(2400)
def test_a_flood_of_log_lines_neither_holds_the_guest_up_nor_is_it_reordered(
    lab: Lab, consoles: Guest, record: Record
) -> None:
    count, tty = FLOOD, "/dev/pvfront/console/files"
    lab.dom0.run("rm -f /run/lab/go")
    collecting = lab.dom0.start(
        ["python3", TALKER, consoles.channel_path("files"), "collect", str(count)]
    )
    wait_until("dom0 listens", lambda: collecting.poll()[0] or "ready" in collecting.stdout)
    begin = time.monotonic()
    lines = f"awk 'BEGIN {{ for (n = 0; n < {count}; n++) printf \"%048d %049d\\n\", n, n }}'"
    flood = consoles.start(
        f"rm -f /run/written; ({lines}; touch /run/written) | pvfront console log files --stdin"
    )
    # Who writes is not held up by dom0, which does not read yet.
    wait_until("all lines written", lambda: consoles.has("/run/written"), 1800, every=2)
    written = f"log flood: {count * 99 / 1e6:.0f} MB written, with nobody reading"
    record(written, f"{time.monotonic() - begin:.0f} s")
    lab.dom0.run("touch /run/lab/go")
    assert flood.wait(600).ok
    consoles.run(f"stty -F {tty} raw; printf 'that was all' >{tty}")
    found = json.loads(collecting.wait(600).stdout.split("\n")[1])
    assert 0 < found["kept"] <= count - found["dropped"]
    record("log flood: lines", found)
