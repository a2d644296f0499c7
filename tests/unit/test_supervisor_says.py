# SPDX-License-Identifier: BSD-2-Clause
"""What a supervisor says: to who asks on its socket, to systemd, and in the files that it keeps."""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from supervisorworld import B, C, D, Notified, World, back, notified, world
from vclock import VirtualLoop
from waiting import PATIENCE

from pvfront import supervisor as module
from pvfront.device import Phase
from pvfront.errors import PvfrontError
from pvfront.service import sd_notify
from pvfront.statefile import write_json

LOOP_FACTORY = VirtualLoop


# -- questions -------------------------------------------------------------------------------------


async def test_list_tells_both_states_generation_and_what_the_frontend_adds(
    world: World,
) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    [device] = (await world.ask({"verb": "list"}))["devices"]
    assert device["name"] == f"vbd-{B}"
    assert (device["class"], device["id"]) == ("vbd", B)
    assert (device["backend"], device["backend_id"]) == (back(B), 0)
    assert (device["phase"], device["generation"], device["reconnects"]) == ("connected", 1, 0)
    assert (device["frontend_state"], device["backend_state"]) == ("Connected (4)",) * 2
    assert device["os_device"] == f"/dev/vbd-{B}"
    assert 0 <= asyncio.get_running_loop().time() - device["connected_since"] < 60


async def test_a_released_device_is_given_back_and_not_taken_again(world: World) -> None:
    world.plug(B, C)
    world.serve()
    await world.connected(B, C)
    answer = await world.ask({"verb": "release", "id": B})
    assert answer == {"ok": True, "text": f"vbd-{B}: given back to the kernel"}
    assert [d["id"] for d in (await world.ask({"verb": "list"}))["devices"]] == [C]
    assert not (world.run_dir / f"vbd-{B}.json").exists()
    world.plug(D)  # the list is read once more
    await world.connected(D)
    assert world.klass.count("take", B) == 1


async def test_a_device_in_use_is_not_released(world: World) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    world.klass.disks[f"vbd-{B}"].in_use = "mounted at /srv"
    answer = await world.ask({"verb": "release", "id": B})
    assert answer == {
        "ok": False, "error": "xvdb: in use: mounted at /srv", "hint": "end that use first",
    }  # fmt: skip
    assert world.supervisor.served[B].loop.phase is Phase.CONNECTED


async def test_an_upgrade_is_answered_with_how_it_went_or_why_not(world: World) -> None:
    world.plug(B, C)
    world.serve()
    await world.connected(B, C)
    answer = await world.ask({"verb": "upgrade", "id": B})
    assert answer == {"ok": True, "text": "xvdb: worker 2 took over from 1"}
    world.klass.disks[f"vbd-{C}"].stays = PvfrontError("a ublk device", hint="kill -9 7")
    answer = await world.ask({"verb": "upgrade", "id": C})
    assert answer == {"ok": False, "error": "a ublk device", "hint": "kill -9 7"}
    answer = await world.ask({"verb": "upgrade", "id": D})
    assert answer["error"] == "xvdd: not served by this supervisor"
    world.supervisor.served[B].loop.phase = Phase.PARKED
    answer = await world.ask({"verb": "upgrade", "id": B})
    assert answer["error"] == "xvdb: only a connected device can be upgraded; it is parked"


async def test_a_reload_upgrades_the_workers_of_another_program_and_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def at_once(name: str, function: Callable[[], bool]) -> bool:
        return function()

    monkeypatch.setattr(module, "in_daemon_thread", at_once)
    world.plug(B, C, D)
    world.serve()
    await world.connected(B, C, D)
    disks = [world.klass.disks[f"vbd-{devid}"] for devid in (B, C, D)]
    disks[0].old_program = disks[2].old_program = True
    disks[0].stays = PvfrontError("xvdb: a ublk device")
    world.supervisor.reload()
    await world.eventually("the reload", lambda: "upgrade" in disks[2].calls)
    assert ["upgrade" in disk.calls for disk in disks] == [True, False, True]
    assert "its worker stays: xvdb: a ublk device" in caplog.text
    assert not disks[2].old_program


async def test_what_is_not_served_is_not_released(world: World) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    answer = await world.ask({"verb": "release", "id": C})
    assert answer["ok"] is False
    assert answer["error"] == "xvdc: not served by this supervisor"


@pytest.mark.parametrize(
    "raw",
    [
        b"\n",
        b"nonsense\n",
        b"\xff\xfe\n",
        b"[]\n",
        b'"list"\n',
        b"null\n",
        b"[" * 60000 + b"\n",
        b'{"verb": 3}\n',
        b'{"verb": ["list"]}\n',
        b'{"verb": "explode"}\n',
        b'{"verb": "release"}\n',
        b'{"verb": "release", "id": "xvdb"}\n',
        b'{"verb": "release", "id": null}\n',
        b'{"verb": "release", "id": 1e999}\n',
    ],
    ids=lambda raw: raw[:32].decode("latin-1").strip(),
)
async def test_a_request_of_nonsense_gets_an_error_and_the_supervisor_goes_on(
    world: World, raw: bytes
) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    answer = await world.ask(None, raw=raw)
    assert answer["ok"] is False
    assert answer["error"]
    assert (await world.ask({"verb": "list"}))["ok"] is True


@pytest.mark.parametrize("raw", [b"", b"x" * 200000])
async def test_who_asks_nothing_or_without_end_is_hung_up_on(world: World, raw: bytes) -> None:
    world.plug(B)
    world.serve()
    await world.connected(B)
    reader, writer = await asyncio.open_unix_connection(str(world.run_dir / "supervisor-vbd.sock"))
    try:
        writer.write(raw)
        writer.write_eof()
        line = await asyncio.wait_for(reader.read(), PATIENCE)
        assert not line or json.loads(line)["ok"] is False
    except ConnectionError:
        pass  # hung up with half of it unread
    finally:
        writer.close()
    assert (await world.ask({"verb": "list"}))["ok"] is True


# -- systemd and the state file --------------------------------------------------------------------


async def test_ready_is_said_once_every_device_has_a_result(
    world: World, notified: Notified
) -> None:
    world.plug(B, C)
    world.klass.refuses[f"vbd-{C}"] = PvfrontError("in use")
    world.klass.taking = asyncio.Event()
    world.serve()
    await world.eventually("the take", lambda: world.klass.count("take", B))
    await asyncio.sleep(0.05)
    assert "READY=1" not in notified.lines()
    world.klass.taking.set()
    await world.eventually("READY", lambda: "READY=1" in notified.lines())
    assert world.supervisor.served[B].loop.phase is Phase.CONNECTED
    assert "STATUS=serving 1 of 1 devices" in notified.lines()
    assert "STATUS=serving 0 of 1 devices: xvdb connecting" in notified.lines()
    assert "STOPPING=1" not in notified.lines()
    await world.stopped()
    lines = notified.lines()
    assert lines.index("STOPPING=1") < lines.index("STATUS=serving 0 of 1 devices: xvdb closing")
    assert lines.count("READY=1") == 1


async def test_ready_does_not_wait_for_a_backend_for_ever(
    world: World, notified: Notified, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READY_DEADLINE", 0.2)
    world.plug(B)
    world.backends[B].cancel()
    world.serve([B])
    await world.eventually("READY", lambda: "READY=1" in notified.lines())
    assert "STATUS=serving 0 of 1 devices: xvdb connecting" in notified.lines()


async def test_the_status_names_a_few_of_those_that_are_not_served(
    world: World, notified: Notified
) -> None:
    devids = range(B, B + 6 * 16, 16)
    world.plug(*devids)
    for devid in devids:
        world.backends[devid].cancel()
    world.serve()
    names = "xvdb connecting, xvdc connecting, xvdd connecting, 51776 connecting, 2 more"
    await world.eventually(
        "a status of all", lambda: f"STATUS=serving 0 of 6 devices: {names}" in notified.lines()
    )


async def test_ready_is_said_without_any_device(world: World, notified: Notified) -> None:
    world.serve()
    await world.eventually("READY", lambda: "READY=1" in notified.lines())
    assert "STATUS=serving 0 of 0 devices" in notified.lines()


async def test_a_notify_socket_that_nobody_reads_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, notified: Notified, tmp_path: Path
) -> None:
    started = time.monotonic()
    for _ in range(2000):
        sd_notify("STATUS=" + "x" * 1000)
    assert time.monotonic() - started < PATIENCE
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    sd_notify("READY=1")


async def test_an_abstract_notify_socket_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0pvfront-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@pvfront-test-{os.getpid()}")
        sd_notify("READY=1", "STATUS=x")
        sock.setblocking(False)
        assert sock.recv(100) == b"READY=1\nSTATUS=x"


async def test_the_state_file_follows_every_phase_and_goes_with_the_device(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.plug(B)
    path = world.run_dir / f"vbd-{B}.json"
    phases: list[str] = []
    save = module.save_state

    def save_and_look(*of: Any) -> None:
        save(*of)
        if path.exists():
            phases.append(json.loads(path.read_text())["phase"])

    monkeypatch.setattr(module, "save_state", save_and_look)
    world.serve()
    await world.connected(B)
    assert await world.stopped() == 0
    assert set(phases) >= {"connecting", "connected", "closing"}
    assert phases.index("connecting") < phases.index("connected") < phases.index("closing")
    assert not path.exists()


def test_who_reads_a_state_file_while_it_is_written_finds_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"turn": 0, "long": "x" * 100_000})
    done = threading.Event()

    def write() -> None:
        for turn in range(200):
            write_json(path, {"turn": turn, "long": "x" * 100_000})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert len(json.loads(path.read_text())["long"]) == 100_000
    writer.join()


async def test_a_full_run_directory_costs_the_state_file_and_not_the_disk(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_state", full)
    world.plug(B)
    world.serve()
    await world.connected(B)
    assert "No space left" in caplog.text
