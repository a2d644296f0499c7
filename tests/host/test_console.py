# SPDX-License-Identifier: BSD-2-Clause
"""A secondary console as its users have it, on the embedded host."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal

import pytest
import pytest_asyncio
from consoleworld import ConsoleWorld, console_world, numbered
from waiting import PATIENCE, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def it():
    async with console_world() as made:
        made.devid = await made.attach("org.example.login")
        yield made


NAME = "org.example.login"


async def test_what_dom0_types_comes_to_the_terminal_and_back(it: ConsoleWorld) -> None:
    with it.terminal(NAME) as terminal:
        async with await it.dom0(it.devid) as dom0:
            await dom0.send(b"who\r")
            assert await terminal.receive(4) == b"who\r"
            await terminal.send(b"root\r\n")
            assert await dom0.receive(6) == b"root\r\n"


async def test_a_mebibyte_passes_each_way_unchanged(it: ConsoleWorld) -> None:
    data = os.urandom(MIB)
    with it.terminal(NAME) as terminal:
        async with await it.dom0(it.devid) as dom0:
            for source, target in ((dom0, terminal), (terminal, dom0)):
                sending = asyncio.create_task(source.send(data))
                came = await target.receive(MIB)
                await sending
                assert hashlib.sha256(came).digest() == hashlib.sha256(data).digest()


async def test_the_terminal_has_a_size(it: ConsoleWorld) -> None:
    with it.terminal(NAME) as terminal:
        assert os.get_terminal_size(terminal.fd) == (80, 24)


async def test_what_nobody_has_read_waits_for_a_program(it: ConsoleWorld) -> None:
    async with await it.dom0(it.devid) as dom0:
        await dom0.send(b"early\r")
        with it.terminal(NAME) as terminal:
            assert await terminal.receive(6) == b"early\r"


async def test_a_program_s_last_words_come_though_it_has_ended(it: ConsoleWorld) -> None:
    with it.terminal(NAME) as terminal:
        await terminal.send(numbered(3000))
    async with await it.dom0(it.devid) as dom0:
        assert await dom0.receive(3000) == numbered(3000)


async def test_a_program_that_was_gone_before_anybody_looked_has_written_all_the_same(
    it: ConsoleWorld,
) -> None:
    assert it.service is not None
    os.kill(it.service.pid, signal.SIGSTOP)
    try:
        with it.terminal(NAME) as terminal:
            await terminal.send(b"short")
    finally:
        os.kill(it.service.pid, signal.SIGCONT)
    async with await it.dom0(it.devid) as dom0:
        assert await dom0.receive(5) == b"short"


async def test_a_terminal_that_nobody_reads_holds_dom0_up_and_loses_nothing(
    it: ConsoleWorld,
) -> None:
    data = numbered(2 * MIB)
    async with await it.dom0(it.devid) as dom0:
        sending = asyncio.create_task(dom0.send(data))
        await eventually("dom0 waits", lambda: _full(it), why=lambda: it.log)
        assert not sending.done()
        with it.terminal(NAME) as terminal:
            assert await terminal.receive(len(data)) == data
        await sending


async def _full(it: ConsoleWorld) -> bool:
    return (await it.stats(it.devid))["undelivered"] > 0


async def test_a_killed_worker_is_replaced_and_what_it_had_passed_on_was_passed_on_once(
    it: ConsoleWorld,
) -> None:
    with it.terminal(NAME) as terminal:
        async with await it.dom0(it.devid) as dom0:
            await dom0.send(b"before")
            assert await terminal.receive(6) == b"before"
            state = it.state(it.devid)
            it.kill(state["worker_pid"])
            await it.connected(it.devid, after=state["generation"])
            await terminal.send(b"still here")
            assert await dom0.receive(10) == b"still here"
            await dom0.send(b"so am I")
            assert await terminal.receive(7) == b"so am I"


async def test_no_byte_is_lost_when_the_backend_asks_for_a_new_connection(
    it: ConsoleWorld,
) -> None:
    data = numbered(MIB)
    with it.terminal(NAME) as terminal:
        async with await it.dom0(it.devid) as dom0:
            out = asyncio.create_task(terminal.send(data))
            for _ in range(5):
                generation = it.state(it.devid)["generation"]
                await it.backend.state(5, console=it.devid)
                await it.backend.state(6, console=it.devid)
                await it.connected(it.devid, after=generation)
            assert await dom0.receive(MIB) == data
            await out


async def test_a_killed_supervisor_leaves_the_worker_and_the_next_adopts_it(
    it: ConsoleWorld,
) -> None:
    assert it.service is not None
    before = it.state(it.devid)
    it.kill(it.service.pid)
    await it.service.stop()
    await it.serve()
    after = await it.connected(it.devid)
    assert (after["worker_pid"], after["generation"]) == (
        before["worker_pid"], before["generation"],
    )  # fmt: skip
    with it.terminal(NAME) as terminal:
        async with await it.dom0(it.devid) as dom0:
            await dom0.send(b"again")
            assert await terminal.receive(5) == b"again"
            await terminal.send(b"yes")
            assert await dom0.receive(3) == b"yes"


async def test_list_names_it_and_says_who_has_it_open(it: ConsoleWorld) -> None:
    assert it.service is not None

    async def row() -> dict[str, object]:
        assert it.service is not None
        (one,) = json.loads(await it.service.pvfront("console", "list", "--json"))
        return dict(one)

    async def in_use(wanted: bool) -> bool:
        return (await row())["pty_in_use"] is wanted

    with it.terminal(NAME):
        await eventually("it is in use", lambda: in_use(True))
        found = await row()
        assert (found["name"], found["id"], found["owner"]) == (NAME, it.devid, "pvfront")
        assert found["path"] == str(it.service.terminal(NAME))
        assert found["writer"] == "the program on its PTY"
    await eventually("nobody has it", lambda: in_use(False))
    text = await it.service.pvfront("console", "list")
    assert NAME in text
    assert NAME in await it.service.pvfront("list")


async def test_top_metrics_and_doctor_know_the_console(it: ConsoleWorld) -> None:
    assert it.service is not None
    interval = json.loads(await it.service.pvfront("top", "--json", "-i", "0.1", "-c", "1"))
    (console,) = interval["devices"]
    assert (console["class"], console["name"], console["phase"]) == ("console", NAME, "connected")
    assert console["in_bytes_per_second"] is not None
    assert (
        f'pvfront_console_in_bytes_total{{device="{NAME}",queue="0"}}'
        in await it.service.pvfront("metrics")
    )
    findings = {
        one["subject"]: one for one in json.loads(await it.service.pvfront("doctor", "--json"))
    }
    assert findings[NAME]["text"].startswith("served as ")


async def test_the_ledger_has_its_page_and_port(it: ConsoleWorld) -> None:
    assert it.service is not None
    found = json.loads(await it.service.pvfront("ledger", "--json"))
    (entry,) = found["devices"]
    assert (entry["pages"], len(entry["event_channels"])) == (1, 1)


async def test_a_name_that_is_no_file_s_is_refused_and_the_console_has_its_number(
    it: ConsoleWorld,
) -> None:
    devid = await it.attach("../../etc/passwd")
    assert it.state(devid)["label"] == f"console-{devid}"
    await eventually("why, in the log", lambda: "no name for a file" in it.log, why=lambda: it.log)
    await it.host.detach_console(1, devid, timeout=PATIENCE)


async def test_a_detached_console_takes_its_terminal_along(it: ConsoleWorld) -> None:
    assert it.service is not None
    devid = await it.attach("short")
    path = it.service.terminal("short")
    assert path.exists()
    await it.host.detach_console(1, devid, timeout=PATIENCE)
    await eventually("its terminal is gone", lambda: not path.is_symlink(), why=lambda: it.log)
