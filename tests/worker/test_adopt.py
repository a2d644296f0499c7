# SPDX-License-Identifier: BSD-2-Clause
"""A supervisor that finds two workers of one disk: an upgrade was cut short."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import sys
from pathlib import Path

import psutil
from embedded import serving
from waiting import PATIENCE, wait_for

from pvfront.abi import lib
from pvfront.worker import Worker
from pvfront.workermessage import State

NAME = "vbd-51728"


def sockets(where: Path) -> list[str]:
    return [path.name for path in where.glob("vbd*")]


def test_a_worker_that_had_not_taken_over_is_ended(tmp_path: Path) -> None:
    async def cut_short() -> None:
        first = await Worker.spawn(NAME, tmp_path, change_user=False)
        second = await Worker.spawn(NAME, tmp_path, change_user=False, following=True)
        first.close()
        second.close()
        found = await Worker.adopt(NAME, tmp_path)
        assert found is not None
        assert found.pid == first.pid
        # Our child, which nobody has reaped: it stays for us to look at.
        wait_for(
            "the end of the second",
            lambda: psutil.Process(second.pid).status() == psutil.STATUS_ZOMBIE,
        )
        assert sockets(tmp_path) == [f"{NAME}.sock"]
        await found.exit()

    asyncio.run(cut_short())


def test_a_worker_that_had_taken_over_is_adopted_and_gets_the_usual_name(tmp_path: Path) -> None:
    async def adopt() -> None:
        found = await Worker.adopt(NAME, tmp_path)
        assert found is not None
        assert found.hello is not None
        assert (found.pid, found.hello.state) == (pid, State.RUNNING)
        found.close()
        again = await Worker.adopt(NAME, tmp_path)
        assert again is not None
        again.close()

    with serving(name=NAME) as host:
        pid = host.process.pid
        host.supervisor.close()
        Path(host.path).rename(tmp_path / f"{NAME}.next")
        asyncio.run(adopt())
        assert sockets(tmp_path) == [f"{NAME}.sock"]
        host.nbd().write(0, b"x" * 512)


STRANGER = """
import socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
connection, _ = listener.accept()
connection.send(bytes.fromhex(sys.argv[2]))
connection.recv(1)
listener.accept()
"""


def test_a_worker_of_another_version_of_the_protocol_is_ended(tmp_path: Path) -> None:
    hdr = struct.pack("=IHHII", lib.PVF_CTL_MAGIC, 1, lib.PVF_CTL_HELLO, 0, 16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / f"{NAME}.sock"))
        listener.listen(1)
        stranger = subprocess.Popen(
            [sys.executable, "-c", STRANGER, str(listener.fileno()), hdr.hex()],
            pass_fds=[listener.fileno()],
        )
    try:
        assert asyncio.run(Worker.adopt(NAME, tmp_path)) is None
        assert stranger.wait(PATIENCE) < 0
        assert sockets(tmp_path) == []
    finally:
        stranger.kill()
        stranger.wait()
