# SPDX-License-Identifier: BSD-2-Clause
"""Consoles as pvfront.toml has them, on the embedded host."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from consoleworld import ConsoleWorld, console_world

import pvfront.console.pvfront_channel as helper

pytestmark = pytest.mark.asyncio


def configure(it: ConsoleWorld, text: str) -> Path:
    file = it.host.directory / "etc/pvfront.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


async def run(it: ConsoleWorld, *command: str, **environ: str) -> tuple[int | None, str]:
    """Its status, and what it says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", *command, env={**os.environ, **it.host.environ, **environ},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    return process.returncode, out.decode()


async def test_what_the_settings_name_is_served_and_offered_and_nothing_else(
    tmp_path: Path,
) -> None:
    (tmp_path / "there").write_text("in the guest")
    async with console_world() as it:
        login, files, other = [await it.attach(name) for name in ("login", "files", "other")]
        assert it.service is not None
        await it.service.end()
        configure(
            it,
            f'[console]\nclaim = ["log*", "console-{files}"]\n[console.login]\nhotkey = "^A"\n'
            f'[console.files]\nfiles = "{tmp_path}"\n',
        )
        await it.serve("--config", str(it.host.directory / "etc/pvfront.toml"))
        for devid in (login, files):
            await it.connected(devid)
        assert not it.state(other)
        async with await it.dom0(login) as dom0:
            await dom0.send(b"\x01d")
            assert b"pvfront: dump for console login" in await dom0.receive(80)
        status, said = await run(it, "-m", "pvfront", "console", "channel", "login")
        assert (status, "there is nothing to offer" in said) == (2, True)
        channel = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "pvfront", "console", "channel", "files",
            env={**os.environ, **it.host.environ},
        )  # fmt: skip
        chardev = str(it.host.directory / f"console-1-{files}.chardev")
        back = tmp_path / "back"
        got = await run(it, str(helper.__file__), chardev, "get", "there", str(back))
        assert (got, back.read_text()) == ((0, ""), "in the guest")
        status, said = await run(it, str(helper.__file__), chardev, "put", str(back), "new")
        assert (status, "only to be read" in said) == (1, True)
        channel.terminate()
        await channel.wait()


async def test_settings_that_name_no_console_end_the_service_without_an_error() -> None:
    async with console_world() as it:
        devid = await it.attach("login")
        assert it.service is not None
        await it.service.end()
        configure(it, "[console.login]\nhotkey = '^A'\n")
        serve = ("-m", "pvfront", "console", "serve")
        for status, environ in ((1, {}), (0, {"NOTIFY_SOCKET": str(it.host.directory / "none")})):
            ended, said = await run(it, *serve, **environ)
            assert (ended, "names no console to serve" in said) == (status, True), said
        assert not it.state(devid)
