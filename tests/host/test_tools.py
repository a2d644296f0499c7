# SPDX-License-Identifier: BSD-2-Clause
"""The tools that watch devices, while one does something: `top` and `metrics`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import socket
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from test_admin import pvfront
from test_negotiation import RICH, Place, place
from waiting import PATIENCE, eventually, wait_for

from pvfront.host.child import answers
from pvfront.metrics import OPENMETRICS

PVFRONT = [sys.executable, "-P", "-m", "pvfront"]


@contextlib.asynccontextmanager
async def busy(it: Place) -> AsyncIterator[None]:
    """Reads and writes all the while."""
    process = await asyncio.create_subprocess_exec(
        "qemu-img", "bench", "-f", "raw", "-c", "100000000", "-d", "4", "-s", "4096", it.uri,
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        await process.wait()


async def test_top_tells_what_a_disk_does_and_that_it_has_gone() -> None:
    async with place(RICH) as it:
        await it.status()
        process = await asyncio.create_subprocess_exec(
            *PVFRONT, "top", "--json", "-i", "0.3", env={**os.environ, **it.host.environ},
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None

        async def until(holds: object) -> dict[str, object]:
            """The first interval that has a disk like this."""
            while True:
                line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)  # type: ignore[union-attr]
                found: dict[str, object] = json.loads(line)
                if holds(found["devices"]):  # type: ignore[operator]
                    return found

        try:
            async with busy(it):
                # An interval of a machine that hardly runs may have the answers alone.
                found = await until(
                    lambda devices: (
                        devices
                        and (devices[0]["read_iops"] or 0) > 0
                        and (devices[0]["notifies_per_second"] or 0) > 0
                    )
                )
                (disk,) = found["devices"]  # type: ignore[misc]
                assert disk["name"] == "xvdb"
                assert disk["read_bytes_per_second"] == pytest.approx(4096 * disk["read_iops"])
                assert disk["cpu_percent"] is not None
                assert disk["latency_p50_us"] <= disk["latency_p99_us"]
            await until(lambda devices: devices and devices[0]["read_iops"] == 0)
            table = await pvfront(it, "top", "-i", "0.1", "-c", "1")
            assert "READ MB/S" in table
            assert "xvdb" in table
            assert "\x1b" not in table, "no terminal"
            await it.host.detach_disk(1, 51728, timeout=PATIENCE)
            await until(lambda devices: devices == [])
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            assert await process.wait() == 0


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, master: int, slave: int) -> None:
        self.master, self.slave = master, slave
        self.said = b""

    def read(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            self.said += os.read(self.master, 1 << 16)
        return self.said


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    os.set_blocking(master, False)
    try:
        yield Terminal(master, slave)
    finally:
        os.close(master)
        os.close(slave)


async def test_on_a_terminal_top_is_one_screen_and_leaves_it_as_it_was_however_it_ends() -> None:
    async with place(RICH) as it:
        await it.status()
        for end, status in ((None, 0), (signal.SIGINT, 0), (signal.SIGTERM, 143)):
            with terminal() as shown:
                await watched(it, shown, end, status)


async def watched(it: Place, shown: Terminal, end: signal.Signals | None, status: int) -> None:
    """Watches the disk until `end`, None: the key."""
    before = termios.tcgetattr(shown.slave)
    process = await asyncio.create_subprocess_exec(
        *PVFRONT, "top", "-i", "0.2",
        env={**os.environ, **it.host.environ, "TERM": "xterm"},
        stdin=shown.slave, stdout=shown.slave, stderr=shown.slave,
    )  # fmt: skip
    await eventually("the disk", lambda: b"xvdb" in shown.read(), why=shown.read)
    assert b"\x1b[?1049h" in shown.said, "the other screen"
    assert termios.tcgetattr(shown.slave)[3] & termios.ICANON == 0, "key by key"
    if end is None:
        os.write(shown.master, b"q")
    else:
        process.send_signal(end)
    assert await asyncio.wait_for(process.wait(), PATIENCE) == status
    wait_for("the usual screen", lambda: b"\x1b[?1049l" in shown.read())
    assert termios.tcgetattr(shown.slave) == before


async def test_metrics_are_those_of_the_device_printed_in_a_file_and_on_a_socket(
    tmp_path: Path,
) -> None:
    async with place(RICH) as it:
        await it.status()
        await it.verify()
        await it.until("writes", lambda s: s["statistics"]["write"]["requests"] >= 3)
        printed = written(await pvfront(it, "metrics"))
        assert printed >= 3
        file = tmp_path / "pvfront.prom"
        await pvfront(it, "metrics", "--textfile", str(file))
        line = 'pvfront_vbd_requests_total{device="xvdb",operation="write",queue="0"}'
        assert f"{line} {printed}" in file.read_text()
        assert "cannot" not in await pvfront(it, "metrics", "--textfile", str(file))
        said = await pvfront(it, "metrics", "--textfile", "/none/x.prom", status=1)
        assert said == "pvfront: /none/x.prom: ENOENT (No such file or directory)\n"
        path = it.host.directory / "metrics.sock"
        process = await asyncio.create_subprocess_exec(
            *PVFRONT, "metrics", "--listen", str(path), env={**os.environ, **it.host.environ}
        )
        await eventually("the socket", lambda: answers(path, socket.SOCK_STREAM))
        assert path.stat().st_mode & 0o777 == 0o600
        for _ in range(2):
            head, _, body = (await asked(path, "/metrics")).partition("\r\n\r\n")
            assert head.startswith("HTTP/1.1 200 OK\r\n")
            assert f"Content-Type: {OPENMETRICS}" in head
            assert written(body) == printed
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
        assert not path.exists()


async def asked(path: Path, target: str) -> str:
    """What an HTTP client gets there."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\nAccept: {OPENMETRICS}\r\n\r\n".encode())
    said = await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    await writer.wait_closed()
    return said.decode()


def written(text: str) -> float:
    """Writes of the disk, in OpenMetrics."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return sum(
        sample.value
        for sample in families["pvfront_vbd_requests"].samples
        if sample.labels["operation"] == "write" and sample.labels["device"] == "xvdb"
    )
