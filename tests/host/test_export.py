# SPDX-License-Identifier: BSD-2-Clause
"""The whole service on the embedded host: an xl disk, `pvfront vbd serve`, and tools of others.

Everything runs as processes of its own: store, hub, backend, supervisor, worker, clients. Nothing
here is told that there is no Xen but by $PVFRONT_HOST.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE, eventually

from pvfront.host import Host
from pvfront.host.blkback import BlkBackend

MIB = 1 << 20


class Served:
    """A host with a disk, its backend, and a supervisor of the disk."""

    def __init__(self, host: Host, backend: BlkBackend) -> None:
        self.host = host
        self.backend = backend
        self.run_dir = host.directory / "run"
        self.supervisor: asyncio.subprocess.Process | None = None
        self.log = host.directory / "supervisor.log"

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, **self.host.environ}

    def uri(self, name: str = "xvdb") -> str:
        return f"nbd+unix:///?socket={self.run_dir / name}.nbd"

    async def serve(self, *arguments: str) -> None:
        """Starts `pvfront vbd serve` and waits until it is ready."""
        notify = self.host.directory / "notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, self.log.open("ab") as log:
            sock.bind(str(notify))
            sock.setblocking(False)
            self.supervisor = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "pvfront", "vbd", "serve", *arguments,
                env={**self.environ, "NOTIFY_SOCKET": str(notify)}, stderr=log,
            )  # fmt: skip
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(PATIENCE):
                    while b"READY=1" not in await loop.sock_recv(sock, 4096):
                        pass
            except TimeoutError:
                raise AssertionError(f"never READY:\n{self.log.read_text()}") from None

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        process, self.supervisor = self.supervisor, None
        assert process is not None
        process.send_signal(how)
        return await asyncio.wait_for(process.wait(), PATIENCE)

    async def pvfront(self, *arguments: str, status: int = 0) -> str:
        return await self.run(sys.executable, "-P", "-m", "pvfront", *arguments, status=status)

    async def run(self, *command: str, status: int = 0) -> str:
        """stdout, or with another status stderr; skips where a tool is not installed."""
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed (tools/apt-packages.txt)")
        process = await asyncio.create_subprocess_exec(
            *command, env=self.environ, cwd=self.host.directory,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, errors = await asyncio.wait_for(process.communicate(), 5 * PATIENCE)
        assert process.returncode == status, (
            f"{command}: {process.returncode}\n{out.decode()}\n{errors.decode()}\n"
            f"{self.log.read_text() if self.log.exists() else ''}"
        )
        return (out if status == 0 else errors).decode()

    async def shown(self, name: str = "xvdb") -> dict[str, Any]:
        found = json.loads(await self.pvfront("status", "--json", name))
        assert isinstance(found, dict)
        return found

    async def until(self, what: str, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Waits for something that status shows."""
        found: dict[str, Any] = {}

        async def look() -> Any:
            nonlocal found
            found = await self.shown()
            return holds(found)

        await eventually(what, look, why=self.log.read_text)
        return found


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    # Not tmp_path: a socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="pvf-"))
    host = await Host.start(directory)
    backend = await BlkBackend.start(host)
    made = Served(host, backend)
    try:
        await host.create_domain(1)
        await host.attach_disk(1, "format=raw, vdev=xvdb, access=rw, target=memory:64M")
        await made.serve("xvdb")
        yield made
        if made.supervisor is not None:
            assert await made.stop() == 0, made.log.read_text()
    finally:
        if made.supervisor is not None:
            with contextlib.suppress(ProcessLookupError):
                made.supervisor.kill()
        await made.backend.stop()
        await host.stop()
        shutil.rmtree(directory, ignore_errors=True)


async def test_a_disk_is_served_to_tools_of_others(served: Served) -> None:
    found = json.loads(await served.run("nbdinfo", "--json", served.uri()))
    (export,) = found["exports"]
    assert export["export-size"] == 64 * MIB
    assert (export["can_flush"], export["can_fua"], export["can_trim"]) == (True, True, True)
    data, back = served.host.directory / "data", served.host.directory / "back"
    data.write_bytes(os.urandom(64 * MIB))
    await served.run("nbdcopy", "--flush", str(data), served.uri())
    await served.run("nbdcopy", served.uri(), str(back))
    assert back.read_bytes() == data.read_bytes()


async def test_list_and_status_show_the_socket_and_what_was_negotiated(served: Served) -> None:
    (device,) = json.loads(await served.pvfront("list", "--json"))
    assert (device["name"], device["owner"]) == ("xvdb", "pvfront")
    assert device["frontend_state"] == device["backend_state"] == "Connected (4)"
    assert device["os_device"] == served.uri()
    await served.run("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", served.uri())
    await served.until("the client gone", lambda s: not s["client"]["connected"])
    shown = await served.until(
        "the write counted", lambda s: s["statistics"]["write"]["bytes"] == MIB
    )
    assert shown["link"] == str(served.run_dir / "xvdb.nbd")
    assert shown["geometry"]["size"] == 64 * MIB
    assert shown["generation"] == 1


async def test_qemu_io_and_fio_verify_their_own_data(served: Served) -> None:
    await served.run(
        "qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 4M", "-c", "flush",
        "-c", "discard 2M 1M", "-c", "read -P 0x5a 1M 1M", "-c", "read -P 0x5a 3M 2M", served.uri(),
    )  # fmt: skip
    if "nbd" not in await served.run("fio", "--enghelp"):
        pytest.skip("this fio has no nbd engine")
    await served.run(
        "fio", "--name=v", "--ioengine=nbd", f"--uri={served.uri()}", "--rw=randrw",
        "--bsrange=512-128k", "--iodepth=32", "--size=16M", "--verify=crc32c", "--verify_fatal=1",
        "--verify_state_save=0",
    )  # fmt: skip


async def test_a_client_is_a_use_and_release_names_it(served: Served) -> None:
    client = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "raw", served.uri(), stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    await served.until("the client", lambda s: s["client"]["connected"])
    refused = await served.pvfront("release", "vbd", "xvdb", status=1)
    assert f"in use: pid {client.pid} is connected" in refused
    busy = await served.run("nbdinfo", served.uri(), status=1)
    assert "nbd_opt_go" in busy
    await client.communicate(b"quit\n")
    await served.until("the client gone", lambda s: not s["client"]["connected"])
    assert "released" in await served.pvfront("release", "vbd", "xvdb")
    assert not (served.run_dir / "xvdb.nbd").exists()


async def test_a_disk_attached_later_is_served_and_a_detach_completes(served: Served) -> None:
    assert await served.stop() == 0
    await served.serve("--all")
    vdev = await served.host.attach_disk(1, "format=raw, vdev=xvdc, access=r, target=memory:1M")
    socket = served.run_dir / "xvdc.nbd"
    await eventually("the disk's socket", socket.exists, why=served.log.read_text)
    found = json.loads(await served.run("nbdinfo", "--json", served.uri("xvdc")))
    assert found["exports"][0]["is_read_only"] is True
    await served.host.detach_disk(1, vdev, timeout=PATIENCE)
    # The toolstack does not wait for what the supervisor does after the Closed.
    await eventually("no socket of the disk", lambda: not socket.exists())


async def written_by_one_that_stays(
    served: Served,
) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    """A client that has written and is told more later; what status shows then."""
    client = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "raw", served.uri(), stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert client.stdin is not None
    client.stdin.write(b"write -P 7 0 64k\n")
    return client, await served.until("the write", lambda s: s["statistics"]["write"]["bytes"])


async def test_a_restarted_supervisor_adopts_and_the_client_notices_nothing(
    served: Served,
) -> None:
    client, before = await written_by_one_that_stays(served)
    await served.stop(signal.SIGKILL)
    assert client.stdin is not None
    client.stdin.write(b"write -P 8 64k 64k\n")
    await client.stdin.drain()
    await served.serve("xvdb")
    after = await served.shown()
    assert after["worker_pid"] == before["worker_pid"]
    assert after["client"]["connected"] is True
    out, _ = await client.communicate(b"read -P 7 0 64k\nread -P 8 64k 64k\nquit\n")
    assert client.returncode == 0
    assert b"failed" not in out


async def test_a_backend_that_was_killed_serves_the_next_client_when_it_is_back(
    served: Served,
) -> None:
    await served.run("qemu-io", "-f", "raw", "-c", "write -P 3 0 64k", served.uri())
    await served.backend.kill()
    await served.backend.stop()
    served.backend = await BlkBackend.start(served.host)
    # A client with requests under way is cut off when the connection ends: not before that.
    await served.until(
        "the next connection", lambda s: s["generation"] > 1 and s["phase"] == "connected"
    )
    await served.run(
        "qemu-io", "-f", "raw", "-c", "write -P 4 0 64k", "-c", "read -P 4 0 64k", served.uri()
    )


async def test_a_walk_that_the_backend_begins_is_a_new_generation_and_a_pause_for_the_client(
    served: Served,
) -> None:
    client, before = await written_by_one_that_stays(served)
    await served.backend.state(5)
    await served.until(
        "the reconnection",
        lambda s: s["generation"] > before["generation"] and s["phase"] == "connected",
    )
    out, _ = await client.communicate(b"write -P 8 64k 64k\nread -P 7 0 64k\nquit\n")
    assert client.returncode == 0
    assert b"failed" not in out


async def test_a_disk_that_is_not_there_is_one_line(served: Served) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pvfront", "vbd", "serve", "xvdq",
        env={**served.environ, "PVFRONT_HOST": str(served.host.directory)},
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors == b"pvfront: there is no disk 'xvdq' (there are: xvdb)\n"


async def test_without_a_host_the_error_says_so(served: Served) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pvfront", "list",
        env={**served.environ, "PVFRONT_HOST": "/nowhere"}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"no embedded host runs there" in errors
