# SPDX-License-Identifier: BSD-2-Clause
"""The command line against a store on a socket and made-up /sys and /run directories."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import select
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from memstore import MemStore, SocketServer
from waiting import PATIENCE, wait_for

from pvfront import figures
from pvfront.cli import main
from pvfront.sysfs import Roots
from pvfront.xenstore import Xenstore, XenstoreError


class Guest:
    """A guest with two disks and a network interface, seen through `pvfront`'s eyes."""

    def __init__(self, roots: Roots, store: MemStore) -> None:
        self.roots = roots
        self.store = store
        self.loop = asyncio.new_event_loop()
        self.servers: list[asyncio.Server] = []
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def serve(self, start: Callable[[], Any]) -> Any:
        """Runs a coroutine function in the servers' thread; its result."""
        return asyncio.run_coroutine_threadsafe(start(), self.loop).result(10)

    def end(self) -> None:
        async def over() -> None:
            for server in self.servers:
                server.close()
            # A connection that was just taken is a task, which closes it.
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others)

        self.serve(over)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    def device(self, klass: str, devid: int, states: tuple[int, int] = (4, 4)) -> None:
        front = f"/local/domain/0/device/{klass}/{devid}"
        back = f"/local/domain/0/backend/{klass}/5/{devid}"
        self.store.set(f"{front}/backend", back.encode())
        self.store.set(f"{front}/backend-id", b"0")
        self.store.set(f"{front}/state", str(states[0]).encode())
        self.store.set(f"{back}/state", str(states[1]).encode())

    def kernel_driver(self, name: str, kind: str, os_device: str) -> None:
        device = self.roots.sys / "bus/xen/devices" / name
        (device / kind / os_device).mkdir(parents=True)
        driver = self.roots.sys / "bus/xen/drivers" / name.partition("-")[0]
        driver.mkdir(parents=True)
        (device / "driver").symlink_to(driver)

    def state(self, name: str, **state: Any) -> None:
        self.roots.run.mkdir(parents=True, exist_ok=True)
        (self.roots.run / f"{name}.json").write_text(json.dumps(state))


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    roots = Roots(tmp_path / "root")
    (roots.sys / "hypervisor").mkdir(parents=True)
    (roots.sys / "hypervisor/type").write_text("xen\n")
    made = Guest(roots, MemStore())
    server = SocketServer(made.store)
    socket_path = str(tmp_path / "store")
    made.serve(lambda: server.start(socket_path))
    monkeypatch.setattr("pvfront.xenstore.DEVICE_PATH", str(tmp_path / "no-xenbus"))
    monkeypatch.setenv("XENSTORED_PATH", socket_path)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("pvfront.platform.Xen.roots", roots)
    monkeypatch.delenv("PVFRONT_HOST", raising=False)
    made.device("vbd", 51712)
    made.kernel_driver("vbd-51712", "block", "xvda")
    made.device("vbd", 51728)
    made.state("vbd-51728", phase="connected", generation=3, os_device="/dev/nbd0",
               link="/dev/pvfront/xvdb", worker_pid=0,
               geometry={"size": 64 << 20, "read_only": False})  # fmt: skip
    made.device("vif", 0, (1, 2))
    made.store.set("/local/domain/0/device/suspend/event-channel", b"")
    yield made
    made.serve(server.stop)
    made.end()


@pytest.fixture
def pvfront(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line; exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            main(list(arguments))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


Run = Callable[..., tuple[int, str, str]]


def test_list_shows_each_device_with_its_owner(guest: Guest, pvfront: Run) -> None:
    answering(guest, {"ok": True})
    code, out, err = pvfront("list")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:3] == ["CLASS", "ID", "NAME"]
    assert lines[1] == ["vbd", "51712", "xvda", "0", "Connected", "(4)", "Connected", "(4)",
                        "kernel", "xvda"]  # fmt: skip
    assert lines[2][-2:] == ["pvfront", "/dev/nbd0"]
    assert lines[3] == ["vif", "0", "vif0", "0", "Initialising", "(1)", "InitWait", "(2)",
                        "none", "-"]  # fmt: skip
    assert len(lines) == 4


def test_list_as_json_has_every_column(guest: Guest, pvfront: Run) -> None:
    answering(guest, {"ok": True})
    found = json.loads(pvfront("list", "--json")[1])
    assert found[1] == {
        "class": "vbd",
        "id": 51728,
        "name": "xvdb",
        "backend_domain": 0,
        "frontend_state": "Connected (4)",
        "backend_state": "Connected (4)",
        "owner": "pvfront",
        "os_device": "/dev/nbd0",
        "supervisor_pid": os.getpid(),
    }


def test_list_and_status_say_that_no_service_runs_and_what_it_has_left(
    guest: Guest, pvfront: Run
) -> None:
    absent = "pvfront: the disk service does not run"
    what = "(systemctl start pvfront-vbd)\n"
    code, out, err = pvfront("list")
    assert (code, err) == (0, f"{absent} {what}")
    assert "Connected (4)" in out
    assert {row["supervisor_pid"] for row in json.loads(pvfront("list", "--json")[1])} == {None}
    assert pvfront("status", "xvda")[2] == f"{absent} {what}"
    (guest.roots.proc / "77").mkdir(parents=True)
    guest.state("vbd-51728", phase="connected", os_device="/dev/nbd0", worker_pid=77)
    left = ": xvdb: served by what it has left, which nobody connects again "
    assert pvfront("list")[2] == absent + left + what
    assert pvfront("status", "xvdb")[2] == absent + left + what
    found = json.loads(pvfront("status", "xvdb", "--json")[1])
    assert (found["supervisor_pid"], found["worker_runs"]) == (None, True)
    assert pvfront("status", "vif-0")[2] == ""
    answering(guest, {"ok": True})
    assert pvfront("list")[2] == pvfront("status", "xvdb")[2] == ""
    assert json.loads(pvfront("status", "xvdb", "--json")[1])["supervisor_pid"] == os.getpid()


def test_the_socket_of_a_service_that_died_is_nobody(guest: Guest, pvfront: Run) -> None:
    answering(guest, {"ok": True})
    guest.servers[0].get_loop().call_soon_threadsafe(guest.servers[0].close)
    wait_for("the end of the service", lambda: "does not run" in pvfront("list")[2])


def test_hostile_store_contents_do_not_reach_the_terminal(guest: Guest, pvfront: Run) -> None:
    front = "/local/domain/0/device/vbd/51728"
    guest.store.set(f"{front}/state", b"\x1b[2J")
    guest.store.set(f"{front}/backend-id", b"\x1b[31m")
    guest.store.set("/local/domain/0/device/vbd/-5/state", b"4")
    code, out, _ = pvfront("list")
    assert code == 0
    assert "\x1b" not in out
    assert "Unknown (0)" in out
    code, out, _ = pvfront("store", "read", f"{front}/state")
    assert out == "\\x1b[2J\n"


@pytest.mark.parametrize("name", ["xvdb", "/dev/xvdb", "51728", "vbd-51728", "vbd/51728",
                                  "/dev/nbd0", "nbd0"])  # fmt: skip
def test_a_device_has_many_names(guest: Guest, pvfront: Run, name: str) -> None:
    code, out, _ = pvfront("status", name, "--json")
    assert code == 0
    assert json.loads(out)["id"] == 51728


def test_status_shows_geometry_and_link_for_people(guest: Guest, pvfront: Run) -> None:
    code, out, _ = pvfront("status", "xvdb")
    assert code == 0
    fields = dict(line.split(":", 1) for line in out.splitlines())
    assert fields["geometry size"].strip() == "67108864 (64 MiB)"
    assert fields["geometry read only"].strip() == "no"
    assert fields["link"].strip() == "/dev/pvfront/xvdb"
    assert fields["owner"].strip() == "pvfront"


def test_status_tells_times_as_people_do_and_what_a_retry_hides(guest: Guest, pvfront: Run) -> None:
    guest.state(
        "vbd-51728", phase="reconnecting", reason="", connected_since=0.0, last_trouble_at=1.5,
        last_trouble="backend Closed never came",
    )  # fmt: skip
    lines = dict(line.split(":", 1) for line in pvfront("status", "xvdb")[1].splitlines())
    moment = datetime.fromisoformat(lines["connected since"].strip())
    assert moment.timestamp() == 0
    assert lines["last trouble"].strip() == "backend Closed never came"


@pytest.mark.parametrize(
    ("klass", "names"),
    [("vbd", ["xvda", "xvdb"]), ("vif", ["vif0"]), ("console", ["console-1"])],
)
def test_list_and_status_of_one_class_have_its_devices_only(
    guest: Guest, pvfront: Run, klass: str, names: list[str]
) -> None:
    guest.device("console", 1)
    for verb in ("list", "status"):
        rows = [row for row in json.loads(pvfront(verb, "--json")[1]) if row["class"] == klass]
        assert [row["name"] for row in rows] == names
        found = json.loads(pvfront(klass, verb, "--json")[1])
        assert [{**one, **row} for one, row in zip(found, rows, strict=True)] == found
    code, out, _ = pvfront(klass, "list")
    assert code == 0
    assert [line.split()[2] for line in out.splitlines()] == ["NAME", *names]


def test_the_list_of_consoles_says_who_has_one_open_and_who_writes(
    guest: Guest, pvfront: Run
) -> None:
    guest.device("console", 1)
    guest.device("console", 2)
    guest.state("console-1", os_device="/dev/pvfront/console/x", pty_in_use=True, writer="who")
    header, *rows = [line.split() for line in pvfront("console", "list")[1].splitlines()]
    assert header[-3:] == ["IN", "USE", "WRITER"]
    assert rows[0][-3:] == ["/dev/pvfront/console/x", "yes", "who"]
    assert rows[1][-3:] == ["-", "no", "-"]


def test_a_number_means_a_device_of_the_class_that_is_asked(guest: Guest, pvfront: Run) -> None:
    guest.device("console", 0)
    assert json.loads(pvfront("vif", "status", "--json", "0")[1])["name"] == "vif0"
    code, out, err = pvfront("vif", "status", "xvdb")
    assert (code, out, err) == (1, "", "pvfront: there is no vif 'xvdb' (there are: vif0)\n")
    assert pvfront("vbd", "status", "xvdb")[1].startswith("name:")


def test_status_without_a_device_shows_each(guest: Guest, pvfront: Run) -> None:
    code, out, err = pvfront("status")
    assert code == 0
    assert err.count("the disk service does not run") == 1
    blocks = [
        dict(line.split(":", 1) for line in block.splitlines()) for block in out.split("\n\n")
    ]
    assert [block["name"].strip() for block in blocks] == ["xvda", "xvdb", "vif0"]
    assert blocks[1]["link"].strip() == "/dev/pvfront/xvdb"
    rows = json.loads(pvfront("status", "--json")[1])
    assert rows == [
        json.loads(pvfront("status", "--json", name)[1]) for name in ("xvda", "xvdb", "vif0")
    ]


def test_a_disk_that_goes_while_the_list_is_made_is_not_in_it(
    guest: Guest, pvfront: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name was read, its keys no more; what its backend had is not ours to read then."""
    usual = Xenstore.read_opt

    async def read_opt(store: Xenstore, path: str, *, timeout: float | None = None) -> str | None:
        if path == "device/vbd/51712/backend":
            guest.store.tree.drop(b"/local/domain/0/device/vbd/51712", 0)
        if path.startswith("/local/domain/0/backend/vbd/5/51728"):
            raise XenstoreError(errno.EACCES, "read", path)
        return await usual(store, path, timeout=timeout)

    monkeypatch.setattr(Xenstore, "read_opt", read_opt)
    code, out, _ = pvfront("list", "--json")
    assert code == 0
    found = {row["name"]: row["backend_state"] for row in json.loads(out)}
    assert found == {"xvdb": "Unknown (0)", "vif0": "InitWait (2)"}


def test_status_says_why_a_device_is_not_served(guest: Guest, pvfront: Run) -> None:
    guest.state("refused-vbd", **{"51712": "xvda is in use"})
    assert json.loads(pvfront("status", "--json", "xvda")[1])["refused"] == "xvda is in use"
    assert "refused" not in json.loads(pvfront("status", "--json", "xvdb")[1]), "it is served"


def test_status_of_a_kernel_device_needs_no_supervisor(guest: Guest, pvfront: Run) -> None:
    found = json.loads(pvfront("status", "xvda", "--json")[1])
    assert found["owner"] == "kernel"
    assert "generation" not in found


def test_an_unknown_device_is_one_line_that_names_those_there_are(
    guest: Guest, pvfront: Run
) -> None:
    code, out, err = pvfront("status", "xvdz")
    assert (code, out) == (1, "")
    assert err == "pvfront: there is no device 'xvdz' (there are: xvda, xvdb, vif0)\n"


def test_a_number_of_several_classes_must_be_told_apart(guest: Guest, pvfront: Run) -> None:
    guest.device("console", 0)
    code, _, err = pvfront("status", "0")
    assert code == 1
    assert "console-0, vif-0" in err


def test_release_asks_the_supervisor_and_prints_its_answer(guest: Guest, pvfront: Run) -> None:
    asked = answering(guest, {"ok": True, "text": "xvdb: given back"})
    code, out, _ = pvfront("release", "vbd", "xvdb")
    assert (code, out) == (0, "xvdb: given back\n")
    assert asked == [{"verb": "release", "id": 51728}]


def test_release_shows_the_supervisors_reason(guest: Guest, pvfront: Run) -> None:
    answering(guest, {"ok": False, "error": "xvdb: in use: nbd0p1 is mounted at /srv"})
    code, out, err = pvfront("release", "vbd", "xvdb")
    assert (code, out) == (1, "")
    assert err == "pvfront: xvdb: in use: nbd0p1 is mounted at /srv\n"


def test_upgrade_asks_for_each_served_disk_and_goes_on_after_one_that_stays(
    guest: Guest, pvfront: Run
) -> None:
    guest.device("vbd", 51744)
    guest.state("vbd-51744", phase="connected", generation=1, os_device="/dev/nbd1",
                link="/dev/pvfront/xvdc", worker_pid=0)  # fmt: skip
    asked = answering(guest, {"ok": False, "error": "xvdb: a ublk device", "hint": "kill -9 7"})
    code, out, err = pvfront("upgrade")
    assert sorted(asked, key=str) == [
        {"verb": "upgrade", "id": 51728}, {"verb": "upgrade", "id": 51744},
    ]  # fmt: skip
    assert (code, out) == (1, "")
    assert err == "pvfront: xvdb: a ublk device (kill -9 7)\n" * 2


def test_upgrade_of_one_disk_prints_how_it_went(guest: Guest, pvfront: Run) -> None:
    asked = answering(guest, {"ok": True, "text": "xvdb: worker 2 took over from 1"})
    assert pvfront("upgrade", "xvdb") == (0, "xvdb: worker 2 took over from 1\n", "")
    assert asked == [{"verb": "upgrade", "id": 51728}]


def test_upgrade_without_a_supervisor_says_so(guest: Guest, pvfront: Run) -> None:
    code, _, err = pvfront("upgrade", "xvdb")
    assert code == 1
    what = "systemctl start pvfront-vbd; it replaces workers of another version by itself"
    assert err == f"pvfront: xvdb: the disk service does not run ({what})\n"


def test_release_without_a_supervisor_says_that_the_worker_goes_on(
    guest: Guest, pvfront: Run
) -> None:
    (guest.roots.proc / "77").mkdir(parents=True)
    guest.state("vbd-51728", phase="connected", os_device="/dev/nbd0", worker_pid=77)
    code, _, err = pvfront("release", "vbd", "xvdb")
    assert code == 1
    assert "xvdb: the disk service does not run, but its worker (pid 77) does (systemctl" in err


def test_a_supervisor_that_ends_while_it_is_asked_is_said(guest: Guest, pvfront: Run) -> None:
    guest.roots.run.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(guest.roots.run / "supervisor-vbd.sock"))
        listener.listen()

        def end() -> None:
            listener.accept()[0].close()  # only looked whether anybody is there
            select.select([listener], [], [], PATIENCE)
            listener.close()  # the next has connected, and is reset

        ending = threading.Thread(target=end)
        ending.start()
        code, out, err = pvfront("upgrade", "xvdb")
        ending.join()
    assert (code, out) == (1, "")
    assert "ended without an answer" in err


def test_release_of_a_kernel_device_says_whose_it_is(guest: Guest, pvfront: Run) -> None:
    code, _, err = pvfront("release", "vbd", "xvda")
    assert code == 1
    assert "pvfront does not have it (its owner: kernel)" in err


def test_release_in_the_wrong_class_says_the_right_one(guest: Guest, pvfront: Run) -> None:
    code, _, err = pvfront("release", "vif", "xvdb")
    assert code == 1
    assert "pvfront release vbd xvdb" in err


def test_store_write_read_ls_rm_follow_each_other(guest: Guest, pvfront: Run) -> None:
    base = "/local/domain/0/data"
    assert pvfront("store", "write", f"{base}/a", "1", f"{base}/b/c", "two words") == (0, "", "")
    assert pvfront("store", "read", f"{base}/a", f"{base}/b/c")[1] == "1\ntwo words\n"
    assert pvfront("store", "read", "-p", f"{base}/a")[1] == f"{base}/a: 1\n"
    assert pvfront("store", "ls", base)[1] == 'a = "1"\nb = ""\n c = "two words"\n'
    assert pvfront("store", "ls", "-f", base)[1].splitlines()[2] == f'{base}/b/c = "two words"'
    assert "(n0)" in pvfront("store", "ls", "-p", base)[1]
    assert pvfront("store", "rm", f"{base}/b") == (0, "", "")
    assert pvfront("store", "ls", base)[1] == 'a = "1"\n'


def test_store_ls_without_a_path_lists_the_guests_own_directory(guest: Guest, pvfront: Run) -> None:
    out = pvfront("store", "ls")[1]
    assert out.splitlines()[0].startswith(("backend", "device"))
    assert ' vbd = ""' in out.splitlines()


def test_store_ls_as_json_has_paths_and_values(guest: Guest, pvfront: Run) -> None:
    guest.store.set("/local/domain/0/data/x", b"\xff1")
    out = pvfront("store", "ls", "--json", "/local/domain/0/data")[1]
    assert json.loads(out) == [{"path": "/local/domain/0/data/x", "value": "\\xff1"}]


def test_store_read_raw_writes_the_bytes(
    guest: Guest, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    guest.store.set("/local/domain/0/data/x", b"\xff\n")
    with pytest.raises(SystemExit) as end:
        main(["store", "read", "--raw", "/local/domain/0/data/x"])
    assert not end.value.code
    assert capfdbinary.readouterr().out == b"\xff\n"


def test_store_errors_name_path_and_errno(guest: Guest, pvfront: Run) -> None:
    code, out, err = pvfront("store", "read", "/nothing/here")
    assert (code, out) == (1, "")
    assert err.startswith("pvfront: ")
    assert "/nothing/here" in err
    assert "ENOENT" in err
    assert err.count("\n") == 1
    missing = "/local/domain/0/nothing"
    assert pvfront("store", "rm", missing) == (
        1, "", f"pvfront: xenstore: rm {missing}: ENOENT (No such file or directory)\n"
    )  # fmt: skip


def test_a_write_that_fails_writes_nothing(guest: Guest, pvfront: Run) -> None:
    code, _, err = pvfront("store", "write", "/local/domain/0/data/a", "1", "bad//path", "2")
    assert code == 1
    assert "bad//path" in err
    assert pvfront("store", "read", "/local/domain/0/data/a")[0] == 1


def test_store_watch_prints_the_path_at_once_and_then_changes(guest: Guest, pvfront: Run) -> None:
    path = "/local/domain/0/device/vif/0"
    code, out, _ = pvfront("store", "watch", "-n", "1", path)
    assert (code, out) == (0, f"{path}\n")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["list", "--nonsense"], ["status", "a", "b"], ["store", "write", "path"],
     ["store", "read"], ["release", "vbd"], ["store", "watch", "-n", "0", "x"]],
)  # fmt: skip
def test_wrong_usage_is_status_2(guest: Guest, pvfront: Run, arguments: list[str]) -> None:
    code, out, err = pvfront(*arguments)
    assert (code, out) == (2, "")
    assert "Error:" in err


def test_help_is_there_for_every_verb(pvfront: Run) -> None:
    for verb in ([], ["list"], ["status"], ["release"], ["store"], ["store", "ls"], ["vbd"]):
        code, out, _ = pvfront(*verb, "--help")
        assert code == 0
        assert "Usage: pvfront" in out


@pytest.mark.parametrize(
    "group", [[], ["vbd"], ["vif"], ["console"], ["agent"], ["config"], ["store"]], ids=" ".join
)
def test_a_group_tells_each_of_its_verbs_in_a_whole_sentence(
    pvfront: Run, group: list[str]
) -> None:
    listed = pvfront(*group, "--help")[1].partition("Commands:\n")[2].splitlines()
    assert listed
    assert [line for line in listed if not re.search(r"[^.]\.$", line)] == []


def test_outside_of_a_xen_guest_the_error_says_so(guest: Guest, pvfront: Run) -> None:
    (guest.roots.sys / "hypervisor/type").unlink()
    code, _, err = pvfront("list")
    assert code == 1
    assert err.startswith("pvfront: this is not a Xen guest")
    assert err.count("\n") == 1


def test_anybody_but_root_is_told_to_be_root(
    guest: Guest, pvfront: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    code, _, err = pvfront("list")
    assert code == 1
    assert "only root" in err
    assert "sudo" in err


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (64 << 20, "64 MiB"), (1 << 62, "4096 PiB")],
)
def test_sizes_are_told_in_binary_units(size: int, text: str) -> None:
    assert figures.amount(size) == text


def answering(guest: Guest, answer: dict[str, Any]) -> list[Any]:
    """A supervisor that gives one answer; returns the list of what it was asked."""
    asked: list[Any] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if line := await reader.readline():  # else it only looked whether anybody is there
                asked.append(json.loads(line))
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        finally:
            writer.close()
            await writer.wait_closed()

    guest.roots.run.mkdir(parents=True, exist_ok=True)
    path = str(guest.roots.run / "supervisor-vbd.sock")
    guest.servers.append(guest.serve(lambda: asyncio.start_unix_server(talk, path)))
    return asked
