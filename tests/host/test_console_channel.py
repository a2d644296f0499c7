# SPDX-License-Identifier: BSD-2-Clause
"""Files and commands over a console, with dom0's helper as it runs there, on the embedded host."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from consoleworld import ConsoleWorld, console_world
from waiting import eventually

import pvfront.console.pvfront_channel as helper

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
COMMAND = """#!/bin/sh
echo "said to $1"
echo "and complained of $2" >&2
exit 7
"""


class Channel:
    """A guest's end that runs, and what dom0 does at the other."""

    def __init__(self, it: ConsoleWorld, devid: int, files: Path) -> None:
        self.socket = it.host.directory / f"console-1-{devid}.chardev"
        self.files = files

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        # -I: neither our package nor anything else of the environment.
        return await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(helper.__file__), str(self.socket), *arguments,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def does(self, *arguments: str) -> tuple[int | None, str, str]:
        process = await self.start(*arguments)
        out, errors = await process.communicate()
        return process.returncode, out.decode(), errors.decode()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def channel(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Channel]:
    files, commands = (tmp_path_factory.mktemp(name) for name in ("files", "commands"))
    (commands / "say").write_text(COMMAND)
    (commands / "say").chmod(0o755)
    (commands / "forever").write_text("#!/bin/sh\necho $$\nexec sleep 1000\n")
    (commands / "forever").chmod(0o755)
    (commands / "notes.txt").write_text("no program")
    async with console_world() as it:
        devid = await it.attach("files")
        guest = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "pvfront", "console", "channel", "files",
            f"--files={files}", "--writable", f"--commands={commands}",
            env={**os.environ, **it.host.environ},
        )  # fmt: skip
        yield Channel(it, devid, files)
        assert guest.returncode is None, "the guest's end has ended"
        guest.terminate()
        await guest.wait()


async def test_ten_mebibytes_pass_each_way_unchanged(channel: Channel, tmp_path: Path) -> None:
    data = os.urandom(10 * MIB)
    (tmp_path / "there").write_bytes(data)
    (tmp_path / "there").chmod(0o640)
    assert await channel.does("put", str(tmp_path / "there"), "big") == (0, "", "")
    sums = {hashlib.sha256((channel.files / "big").read_bytes()).digest()}
    assert (channel.files / "big").stat().st_mode & 0o777 == 0o640
    assert await channel.does("get", "big", str(tmp_path / "back")) == (0, "", "")
    sums |= {hashlib.sha256((tmp_path / "back").read_bytes()).digest()}
    assert sums == {hashlib.sha256(data).digest()}


async def test_a_command_runs_with_its_arguments_and_tells_what_it_said(channel: Channel) -> None:
    assert await channel.does("run", "say", "you", "that thing") == (
        7, "said to you\n", "and complained of that thing\n",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["notes.txt", "../files/x", "nothing", "", "/bin/sh", "notes"])
async def test_what_is_no_command_of_the_directory_is_refused(channel: Channel, name: str) -> None:
    status, out, errors = await channel.does("run", name)
    assert (status, out, errors.count("\n")) == (255, "", 1)
    assert errors.startswith("pvfront-channel: the guest: ")


@pytest.mark.parametrize("name", ["../outside", "link", "/../../etc/passwd", "", "."])
async def test_nothing_outside_of_the_directory_is_read_or_written(
    channel: Channel, tmp_path: Path, name: str
) -> None:
    (channel.files.parent / "outside").write_text("private")
    link = channel.files / "link"
    if not link.is_symlink():
        link.symlink_to("/etc/passwd")
    status, _, errors = await channel.does("get", name, str(tmp_path / "stolen"))
    assert (status, "outside" in errors) == (1, True)
    assert not (tmp_path / "stolen").exists()
    (tmp_path / "mine").write_text("mine")
    status, _, errors = await channel.does("put", str(tmp_path / "mine"), name)
    assert (status, "outside" in errors) == (1, True)
    assert (channel.files.parent / "outside").read_text() == "private"


async def test_a_file_that_is_not_there_is_said(channel: Channel, tmp_path: Path) -> None:
    status, _, errors = await channel.does("get", "nowhere", str(tmp_path / "x"))
    assert status == 1
    assert "No such file" in errors
    assert not (tmp_path / "x").exists()


async def test_after_a_client_that_was_killed_midway_the_next_begins_anew(
    channel: Channel, tmp_path: Path
) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1024 * MIB)  # no machine is done before we look
    process = await channel.start("put", str(tmp_path / "large"), "half")
    await eventually("it is under way", lambda: any(channel.files.glob(".pvfront-channel-*")))
    process.kill()
    await process.wait()
    assert (await channel.does("run", "say", "a", "b"))[0] == 7
    assert not (channel.files / "half").exists()
    assert list(channel.files.glob(".pvfront-channel-*")) == []


async def test_a_command_of_a_client_that_was_killed_ends_with_the_next(channel: Channel) -> None:
    process = await channel.start("run", "forever")
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    process.kill()
    await process.wait()
    assert (await channel.does("run", "say", "a", "b"))[0] == 7
    await eventually("its end", lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_command_ends_with_who_has_asked_for_it(channel: Channel, number: int) -> None:
    process = await channel.start("run", "forever")
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    process.send_signal(number)
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (128 + number, b"")
    await eventually("its end", lambda: not Path(f"/proc/{pid}").exists())


async def test_a_copy_that_is_interrupted_leaves_nothing_in_dom0(
    channel: Channel, tmp_path: Path
) -> None:
    (channel.files / "huge").touch()
    os.truncate(channel.files / "huge", 1024 * MIB)
    (tmp_path / "here").mkdir()
    process = await channel.start("get", "huge", str(tmp_path / "here" / "half"))
    await eventually(
        "it is under way", lambda: any(one.stat().st_size for one in (tmp_path / "here").iterdir())
    )
    process.send_signal(signal.SIGINT)
    assert await process.communicate() == (b"", b"")
    assert list((tmp_path / "here").iterdir()) == []
    (channel.files / "huge").unlink()


async def test_a_terminal_shows_how_far_a_copy_is_and_a_pipe_does_not(
    channel: Channel, tmp_path: Path
) -> None:
    (tmp_path / "there").write_bytes(bytes(MIB // 4))
    master, slave = os.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(helper.__file__), str(channel.socket),
            "put", str(tmp_path / "there"), "small", stderr=slave,
        )  # fmt: skip
        assert await process.wait() == 0
        os.set_blocking(master, False)
        shown = ""
        with contextlib.suppress(BlockingIOError):
            while True:
                shown += os.read(master, 4096).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert f"\r{tmp_path}/there: 16 KiB of 256 (6 %), " in shown
    assert shown.endswith("\r\x1b[K")


async def test_what_is_no_console_is_not_written_to(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "sock"))
    for name, why in (
        ("file", "neither a Unix socket nor a terminal"),
        ("sock", "Connection refused"),
        ("nowhere", "No such file"),
    ):
        other = Channel.__new__(Channel)
        other.socket = tmp_path / name
        status, _, errors = await other.does("get", "x", str(tmp_path / "y"))
        assert (status, errors.count("\n"), why in errors) == (1, 1, True), errors
        assert errors.startswith(f"pvfront-channel: {tmp_path / name}")
    stale.close()
    assert (tmp_path / "file").read_text() == "text"


async def test_what_a_guest_lets_everybody_do_with_a_file_dom0_s_umask_says_too(
    channel: Channel, tmp_path: Path
) -> None:
    (channel.files / "open").write_text("text")
    (channel.files / "open").chmod(0o777)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", str(helper.__file__), str(channel.socket),
        "get", "open", str(tmp_path / "got"), umask=0o027,
    )  # fmt: skip
    assert await process.wait() == 0
    assert (tmp_path / "got").stat().st_mode & 0o777 == 0o750
