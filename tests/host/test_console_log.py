# SPDX-License-Identifier: BSD-2-Clause
"""The console as a log sink, and hot keys from dom0, on the embedded host."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path

import pytest
import pytest_asyncio
from consoleworld import ConsoleWorld, console_world
from waiting import PATIENCE, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

FLOOD = int(os.environ.get("PVFRONT_CONSOLE_FLOOD", str(6 << 20)))  # bytes
LINE = re.compile(rb"\d{15} x{47}")
HOOK = """#!/bin/sh
echo "$PVFRONT_EVENT $PVFRONT_DEVICE $PVFRONT_KEY" >{path}
"""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def it():
    async with console_world("--all", "-o", "hotkey.keys=^^") as made:
        made.log_id = await made.attach("log")
        made.keys_id = await made.attach("keys")
        yield made


async def _log(it: ConsoleWorld) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pvfront", "console", "log", "log", "--stdin",
        env={**os.environ, **it.host.environ}, stdin=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_lines_come_to_dom0_as_they_were_written(it: ConsoleWorld) -> None:
    async with await it.dom0(it.log_id) as dom0:
        process = await _log(it)
        await process.communicate(b"one\ntwo \x1b[31mred\nthe end")
        assert process.returncode == 0
        want = b"one\r\ntwo \\x1b[31mred\r\nthe end\r\n"
        assert await dom0.receive(len(want)) == want


def _accounted(heard: bytes) -> int:
    """Lines that have come, or are said to be dropped."""
    lines = heard.split(b"\r\n")[:-1]
    dropped = [int(line.split()[1]) for line in lines if line.startswith(b"--- ")]
    return len(lines) - len(dropped) + sum(dropped)


async def test_a_flood_waits_for_nobody_and_what_is_kept_is_whole_and_in_order(
    it: ConsoleWorld,
) -> None:
    process = await _log(it)
    assert process.stdin is not None
    count = FLOOD // 64
    async with asyncio.timeout(PATIENCE * 4):
        for first in range(0, count, 1024):
            lines = (b"%015d %s\n" % (n, b"x" * 47) for n in range(first, first + 1024))
            process.stdin.write(b"".join(lines))
            await process.stdin.drain()  # nobody is at the other end: it goes on all the same
        process.stdin.close()
    async with await it.dom0(it.log_id) as dom0:

        async def all_of_it() -> bool:
            dom0.listen()
            return process.returncode is not None

        await eventually("the end of the log", all_of_it, why=lambda: it.log, seconds=PATIENCE * 4)
        # Which line is the last is not said: a busy worker may make room just before the end.
        sent = -(-count // 1024) * 1024
        await eventually("an account of each line", lambda: _accounted(dom0.listen()) >= sent)
        lines = dom0.heard.split(b"\r\n")[:-1]
    kept = [int(line[:15]) for line in lines if LINE.fullmatch(line)]
    dropped = [int(line.split()[1]) for line in lines if line.startswith(b"--- ")]
    assert len(kept) + len(dropped) == len(lines)
    assert kept == sorted(set(kept))
    assert dropped
    assert len(kept) + sum(dropped) == sent
    assert len(kept) * 64 > 1 << 20


async def test_a_hot_key_of_dom0_s_brings_a_dump(it: ConsoleWorld) -> None:
    async with await it.dom0(it.keys_id) as dom0:
        await dom0.send(b"\x1ed")
        await eventually("a dump", lambda: b"end of the dump\r\n" in dom0.listen())
        text = dom0.heard.decode()
        assert f"console-{it.keys_id}: label keys, phase connected" in text
        with it.terminal("keys") as terminal:
            await dom0.send(b"x")
            assert await terminal.receive(1) == b"x"  # and nothing of the keys before it


async def test_another_key_is_the_hooks(it: ConsoleWorld, tmp_path: Path) -> None:
    hooks = it.host.directory / "etc" / "hooks.d"
    hooks.mkdir(parents=True)
    (hooks / "key").write_text(HOOK.format(path=tmp_path / "said"))
    (hooks / "key").chmod(0o755)
    async with await it.dom0(it.keys_id) as dom0:
        await dom0.send(b"\x1e7")
        said = await eventually(
            "the hook", lambda: (tmp_path / "said").exists() and (tmp_path / "said").read_text(),
            why=lambda: it.log,
        )  # fmt: skip
    assert said == "console-key keys 7\n"


async def test_a_console_without_hot_keys_passes_everything(it: ConsoleWorld) -> None:
    every = bytes(range(256))
    with it.terminal("log") as terminal:
        async with await it.dom0(it.log_id) as dom0:
            await dom0.send(every)
            assert await terminal.receive(256) == every


async def test_a_log_to_a_console_that_is_not_there_is_refused(it: ConsoleWorld) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pvfront", "console", "log", "nowhere", "--stdin",
        env={**os.environ, **it.host.environ}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.count(b"\n") == 1
    assert b"there is no console 'nowhere' (there are: log, keys)" in errors


async def test_status_shows_its_counters(it: ConsoleWorld) -> None:
    assert it.service is not None
    text = await it.service.pvfront("status", "log")
    assert re.search(r"^ +out_bytes: [1-9]", text, re.M)
    found = json.loads(await it.service.pvfront("status", "--json", "log"))
    assert found["statistics"]["in_bytes"] >= 256
