# SPDX-License-Identifier: BSD-2-Clause
"""What an admin sets, sees and is told: settings, events, refusals; the service as a process."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path

from test_negotiation import MIB, POOR, RICH, Place, place
from waiting import PATIENCE, eventually

from pvfront.host.service import DiskService

DISK = "/local/domain/0/backend/vbd/1/51728"


def write_config(it: Place, text: str) -> None:
    directory = it.host.directory / "etc"
    directory.mkdir(exist_ok=True)
    (directory / "pvfront.toml").write_text(text)


def write_hook(it: Place) -> Path:
    """A hook that appends one line for each event; the file it appends to."""
    directory = it.host.directory / "etc/hooks.d"
    directory.mkdir(parents=True)
    out = it.host.directory / "told"
    hook = directory / "tell"
    hook.write_text(
        "#!/bin/sh\n"
        f'echo "$PVFRONT_EVENT $PVFRONT_NAME $PVFRONT_OLD_SIZE $PVFRONT_SIZE" >> {out}\n'
        "echo said by the hook\n"
    )
    hook.chmod(0o755)
    return out


async def come(path: Path, lines: list[str], it: Place) -> None:
    await eventually(
        f"{lines}", lambda: content(path) == lines, why=lambda: f"{content(path)}\n{it.log()}"
    )


def content(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


async def pvfront(it: Place, *arguments: str, status: int = 0) -> str:
    """What the command prints, on stdout or stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pvfront", *arguments,
        env={**os.environ, **it.host.environ},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == status, out.decode()
    return out.decode()


async def test_a_resize_in_both_directions_is_an_event_with_a_hook() -> None:
    async with place(RICH) as it:
        told = write_hook(it)
        await it.backend.resize(48 * MIB)
        await it.until("more", lambda s: s["geometry"]["size"] == 48 * MIB)
        await it.verify()
        await it.backend.resize(16 * MIB)
        await it.until("less", lambda s: s["geometry"]["size"] == 16 * MIB)
        await come(
            told,
            [
                f"resize xvdb {32 * MIB} {48 * MIB}",
                f"resize xvdb {48 * MIB} {16 * MIB}",
            ],
            it,
        )
        await it.says("hook tell: said by the hook")
        assert (await it.status())["generation"] == 1
        said = await it.run("qemu-io", "-f", "raw", "-c", f"read {20 * MIB} 4k", it.uri, status=1)
        assert "read failed" in said


async def test_a_medium_that_is_taken_out_leaves_the_disk_empty_until_there_is_another() -> None:
    async with place(RICH) as it:
        told = write_hook(it)
        sectors = str(32 * MIB // 512)
        await it.backend.write({"sectors": "0"})
        await it.backend.state(4)
        status = await it.until("empty", lambda s: s["geometry"]["size"] == 0)
        assert (status["phase"], status["generation"]) == ("connected", 1)
        await it.backend.write({"sectors": sectors})
        await it.backend.state(4)
        await it.until("full", lambda s: s["geometry"]["size"] == 32 * MIB)
        await come(told, [f"eject xvdb {32 * MIB} 0", f"insert xvdb 0 {32 * MIB}"], it)
        await it.verify()


async def test_what_is_no_disk_is_refused_with_its_reason_in_log_status_and_exit_code() -> None:
    async with place(POOR) as it:
        store = it.host.store
        for kind in ("cdrom", "floppy"):
            await it.service.stop()
            await store.write("/local/domain/1/device/vbd/51728/device-type", kind)
            refused = await pvfront(it, "vbd", "serve", "xvdb", status=1)
            assert f"it is a {kind}, not a disk; pvfront serves disks" in refused
            it.service = await DiskService.start(it.host)
            await it.says(f"xvdb: not served: it is a {kind}, not a disk")
            shown = json.loads(await pvfront(it, "status", "--json", "xvdb"))
            assert shown["refused"] == f"it is a {kind}, not a disk; pvfront serves disks"
            assert shown["owner"] == "none"
        await it.service.stop()
        await store.write("/local/domain/1/device/vbd/51728/device-type", "disk")
        it.service = await DiskService.start(it.host)
        assert "refused" not in await it.status()


async def test_settings_of_the_file_and_of_one_disk_are_used() -> None:
    async with place(RICH) as it:
        await it.service.stop()
        write_config(
            it,
            "[disk]\nmax_ring_page_order = 3\nmax_indirect_segments = 128\n"
            "[disk.xvdb]\nmax_indirect_segments = 32\nmax_pool_pages = 100\n"
            "feature_persistent = false\n",
        )
        it.service = await DiskService.start(it.host, "xvdb")
        rings = (await it.status())["rings"]
        assert (rings["slots"], rings["pool_pages"], rings["segments"]) == (256, 100, 24)
        assert rings["persistent"] is False
        assert (await it.keys(""))["feature-persistent"] == "0"
        await it.verify()


async def test_a_mistake_in_the_file_is_one_line_with_its_place() -> None:
    async with place(POOR) as it:
        await it.service.stop()
        write_config(it, "[disk]\nmax_queues = 2\nmax_qeues = 3\n")
        said = await pvfront(it, "vbd", "serve", "--all", status=1)
        path = it.host.directory / "etc/pvfront.toml"
        assert f"pvfront: {path}:3: max_qeues: no such setting (there are: max_ring_page" in said
        assert "Traceback" not in said
        said = await pvfront(it, "vbd", "serve", "--all", "-o", "max_queues=many", status=2)
        assert "max_queues = 'many': must be a number from 0 to 16" in said
        said = await pvfront(it, "vbd", "serve", "--all", "--config", "/none", status=1)
        assert "pvfront: /none: there is no such file" in said


async def test_without_a_name_what_the_file_names_is_served_also_if_it_comes_later() -> None:
    async with place(POOR) as it:
        await it.service.stop()
        said = await pvfront(it, "vbd", "serve", status=1)
        assert "pvfront.toml names no disk to serve" in said
        assert 'claim = ["xvdb"]' in said
        write_config(it, '[disk]\nclaim = ["xvd[b-d]", "xvdq"]\n')
        it.service = await DiskService.start(it.host, "--verbose")  # and no name
        await it.until("served", lambda s: s["phase"] == "connected")
        await it.says("xvdq: named in")
        await it.verify()


async def test_a_service_of_systemd_that_has_nothing_to_serve_is_ready_and_ends(
    tmp_path: Path,
) -> None:
    async with place(POOR) as it:
        await it.service.stop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.bind(str(tmp_path / "notify"))
            os.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
            try:
                await pvfront(it, "vbd", "serve", status=0)
            finally:
                del os.environ["NOTIFY_SOCKET"]
            assert told.recv(4096).startswith(b"READY=1\nSTATUS=")


async def test_systemd_is_told_that_the_event_loop_runs(tmp_path: Path) -> None:
    async with place(POOR) as it:
        await it.service.stop()
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as told:
            told.bind(str(tmp_path / "notify"))
            watched = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "pvfront", "vbd", "serve", "--all",
                env={**os.environ, **it.host.environ, **watched},
            )  # fmt: skip
            try:
                said = b""
                while not (b"READY=1" in said and said.count(b"WATCHDOG=1") > 2):
                    said += await asyncio.wait_for(loop.sock_recv(told, 4096), PATIENCE)
            finally:
                process.terminate()
                await asyncio.wait_for(process.wait(), PATIENCE)


async def test_status_shows_counters_for_people() -> None:
    async with place(RICH) as it:
        await it.verify()
        shown = await pvfront(it, "status", "xvdb")
        head, _, counters = shown.partition("statistics:\n")
        assert "rings granted asked: " in head
        lines = [line.split() for line in counters.splitlines()]
        operations = {line[1]: line for line in lines if len(line) > 1}
        assert "read" in operations
        assert operations["write"][0] == "0"
        assert "P99" in lines[0]
        found = await it.until(
            "the writes counted", lambda s: s["statistics"]["write"]["requests"] >= 3
        )
        assert [queue["queue"] for queue in found["statistics_queues"]] == [0]
        assert sum(found["statistics_queues"][0]["write"]["latency"]) >= 3


async def test_the_doctor_finds_nothing_wrong_with_a_served_disk_and_then_what_is() -> None:
    async with place(RICH) as it:
        await it.status()
        found = {one["subject"]: one for one in json.loads(await pvfront(it, "doctor", "--json"))}
        assert {one["level"] for one in found.values()} == {"OK"}, found
        assert found["xvdb"]["text"].startswith("served as nbd+unix://")
        assert found["worker"]["text"] == "it starts, confines itself and answers"
        (it.host.directory / "limits.json").write_text('{"gntalloc": 300}')
        write_config(it, "max_queues = 2\n")
        said = await pvfront(it, "doctor", status=1)
        assert "FAIL  settings" in said
        assert "pvfront.toml:1: [max_queues]: no such section" in said
        assert "WARN  limits" in said
