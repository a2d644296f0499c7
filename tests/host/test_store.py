# SPDX-License-Identifier: BSD-2-Clause
"""The host as a whole: it starts, it ends, and nothing outlives it. Its store is the real one."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE, wait_for

from pvfront.errors import PvfrontError
from pvfront.host import Host, store
from pvfront.host.child import Child
from pvfront.platform import platform


def alive(pid):
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_temporary_host_leaves_neither_processes_nor_files():
    async with await Host.start() as host:
        assert all(map(alive, host.pids))
        assert len(host.pids) == 2
        await host.store.write("/test", "x")
    assert not any(map(alive, host.pids))
    assert not host.directory.exists()
    await host.stop()


async def test_a_directory_can_be_used_again_and_begins_empty(tmp_path):
    for _ in range(2):
        async with await Host.start(tmp_path / "host", gntalloc_limit=77) as host:
            assert await host.store.read_opt("/test") is None
            await host.store.write("/test", "x")
            assert (tmp_path / "host" / "limits.json").read_text() == '{"gntalloc": 77}\n'


async def test_two_hosts_cannot_share_a_directory(tmp_path):
    async with await Host.start(tmp_path) as first:
        with pytest.raises(PvfrontError, match="runs at"):
            await Host.start(tmp_path)
        await first.store.write("/test", "x")
        assert all(map(alive, first.pids))


async def test_two_hosts_are_apart():
    async with await Host.start() as one, await Host.start() as two:
        await one.store.write("/test", "x")
        assert await two.store.read_opt("/test") is None


async def test_the_platform_of_a_host_has_a_home_in_the_store(monkeypatch):
    async with await Host.start() as host:
        await host.create_domain()
        here = platform(host.environ)
        here.require()
        assert (here.name, here.default_target) == ("embedded", "socket")
        assert here.run_dir == host.directory / "run" == here.roots.run
        async with await here.store() as guest:
            assert await guest.read("domid") == "1"
            async with guest.watch("data") as relative, guest.watch("/local/domain/1") as absolute:
                assert await asyncio.wait_for(anext(relative), PATIENCE) == "data"
                assert await asyncio.wait_for(anext(absolute), PATIENCE) == "/local/domain/1"
                await host.store.write("/local/domain/1/data/x", "1")
                assert await asyncio.wait_for(anext(relative), PATIENCE) == "data/x"
                assert await asyncio.wait_for(anext(absolute), PATIENCE) == "/local/domain/1/data/x"
            async with guest.watch("@releaseDomain") as special:
                assert await asyncio.wait_for(anext(special), PATIENCE) == "@releaseDomain"
            async for txn in guest.transaction():
                async with txn:
                    await txn.write("data/y", "2")
            assert sorted(await guest.directory("data")) == ["x", "y"]
        assert await host.store.read("/local/domain/1/data/y") == "2"


async def test_without_a_host_the_error_says_how_to_start_one(tmp_path):
    with pytest.raises(PvfrontError, match="no embedded host runs there") as caught:
        platform({"PVFRONT_HOST": str(tmp_path)}).require()
    assert f"pvfront-host {tmp_path}" in caught.value.hint


def test_without_the_variable_it_is_xen():
    assert (platform({}).name, platform({"PVFRONT_HOST": ""}).name) == ("xen", "xen")


async def test_a_missing_oxenstored_is_named_with_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("OXENSTORED", "/no/such/oxenstored")
    with pytest.raises(PvfrontError, match="/no/such/oxenstored") as caught:
        await Host.start(tmp_path)
    assert "apt-get install xen-utils-4.17" in caught.value.hint
    assert not (tmp_path / "hub.sock").exists(), "the hub was left behind"


async def test_an_oxenstored_that_ends_at_once_is_told_with_its_last_words(monkeypatch, tmp_path):
    program = tmp_path / "oxenstored"
    program.write_text("#!/bin/sh\necho no licence; exit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("OXENSTORED", str(program))
    with pytest.raises(PvfrontError, match="ended with status 3: no licence"):
        await store.start(tmp_path)


async def test_a_process_that_misses_its_first_signal_is_told_again(tmp_path):
    ready = tmp_path / "ready"
    script = f"trap 'trap - TERM' TERM; : > {ready}; while :; do sleep 0.1; done"
    child = Child("deaf", ["sh", "-c", script], tmp_path / "log", tell_again=0.2)
    wait_for("its trap", ready.exists)
    assert await child.stop() == -signal.SIGTERM


async def test_a_path_that_is_too_long_for_a_socket_is_said_so(tmp_path):
    with pytest.raises(PvfrontError, match="too long"):
        await Host.start(tmp_path / ("x" * 100))


@pytest.fixture
def foreground(tmp_path):
    """`pvfront-host`, started as a user would."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "pvfront.host", str(tmp_path / "h")),
            *("--disk", "vdev=xvdb,target=memory:8M", "--disk", "vdev=xvdc,target=memory:8M"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, tmp_path / "h"
    process.kill()
    process.communicate(timeout=PATIENCE)


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


async def test_the_command_prints_what_to_export_and_ends_with_sigterm(foreground):
    process, directory = foreground
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines[:3] == [
        "# domain 1 has disk xvdb\n",
        "# domain 1 has disk xvdc\n",
        f"export PVFRONT_HOST={directory}\n",
    ]
    async with await Host.connect(directory) as host:
        found = await host.store.directory("/local/domain/1/device/vbd")
        assert sorted(found) == ["51728", "51744"]
    offspring = children(process.pid)
    assert len(offspring) == 2
    process.terminate()
    assert process.wait(PATIENCE) == 0
    assert not any(map(alive, offspring))


async def test_nothing_outlives_a_host_that_is_killed(foreground):
    process, _ = foreground
    for _ in range(4):
        process.stdout.readline()
    offspring = children(process.pid)
    assert len(offspring) == 2
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    wait_for("the end of hub and store", lambda: not any(map(alive, offspring)))


def test_the_command_names_what_is_wrong_with_a_disk(tmp_path):
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pvfront.host", str(tmp_path), "--disk", "vdev=xvdb"],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
    )
    assert run.returncode == 1
    assert "target is missing" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_host_needs_no_privilege(tmp_path):
    command = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path)]
    if os.geteuid() == 0:
        # Not another user: the interpreter may be where only root can look.
        command[:0] = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 3)
    assert (run.returncode, run.stdout) == (0, "51728 [3] 0000000000000000\n"), run.stderr


PROGRAM = """
import asyncio, os, sys
from pathlib import Path
from pvfront.host import Host
from pvfront.platform import platform

async def main():
    async with await Host.start(Path(sys.argv[1])) as host:
        await host.create_domain()
        vdev = await host.attach_disk(1, "vdev=xvdb,target=memory:8M")
        with platform(host.environ).event_channels() as channels:
            channels.bind_unbound(0)
            status = Path("/proc/self/status").read_text()
            capabilities = status.partition("CapEff:")[2].split()[0]
            print(vdev, sorted(channels.ports), capabilities)

asyncio.run(main())
"""
