# SPDX-License-Identifier: BSD-2-Clause
"""A console's backend that breaks the rules of docs/security.md."""

from __future__ import annotations

import asyncio
import re

import pytest
import pytest_asyncio
from consoleworld import ConsoleWorld, console_world, numbered
from waiting import eventually

from pvfront.host.consback import ConsFault, Misstep

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAME = "hostile"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def whole_it():
    async with console_world() as made:
        made.devid = await made.attach(NAME)
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def it(whole_it):
    yield whole_it
    await whole_it.backend.clear()


async def _works(it: ConsoleWorld) -> None:
    """Bytes pass both ways, and nothing else was there before them."""
    with it.terminal(NAME) as terminal:
        async with await it.dom0(it.devid) as dom0:
            await dom0.send(b"in")
            assert await terminal.receive(2) == b"in"
            await terminal.send(b"out")
            assert await dom0.receive(3) == b"out"


async def _breaks(it: ConsoleWorld, fault: ConsFault, rule: int, field: str) -> None:
    before = it.state(it.devid)
    at = len(it.log)
    await it.backend.fault(fault)
    await eventually(
        f"rule {rule}",
        lambda: re.search(rf"the backend broke rule {rule}: {field}=0x", it.log[at:]),
        why=lambda: it.log[at:],
    )
    await it.backend.clear()
    after = await it.connected(it.devid, after=before["generation"])
    assert after["worker_pid"] == before["worker_pid"]
    await _works(it)


@pytest.mark.parametrize("field", ["in_prod", "out_cons"])
async def test_rule_01_a_console_s_index_past_its_ring_breaks_it(
    it: ConsoleWorld, field: str
) -> None:
    await _breaks(it, ConsFault.index(field, 5000, count=1), 1, field)


@pytest.mark.parametrize("field", ["in_prod", "out_cons"])
async def test_rule_02_a_console_s_index_that_moves_backwards_breaks_it(
    it: ConsoleWorld, field: str
) -> None:
    await _breaks(it, ConsFault.index(field, -1, count=1), 2, field)


async def test_rule_04_what_a_console_s_backend_writes_over_is_never_read(
    it: ConsoleWorld,
) -> None:
    generation = it.state(it.devid)["generation"]
    await it.backend.fault(ConsFault.scribble())
    data = numbered(20_000)
    with it.terminal(NAME) as terminal:
        async with await it.dom0(it.devid) as dom0:
            sending = asyncio.create_task(terminal.send(data))
            await eventually("it writes", lambda: _fired(it, "scribble"), why=lambda: it.log)
            await it.backend.clear()
            # The backend has lost our indices, and so what it reads; the next connection has all
            # that it did not take.
            await it.backend.state(6)
            await it.connected(it.devid, after=generation)
            await sending
            await eventually("the end", lambda: dom0.listen().endswith(data[-1000:]))
    await _works(it)


async def test_rule_23_a_storm_of_a_console_s_events_wakes_its_worker_a_few_times(
    it: ConsoleWorld,
) -> None:
    await it.backend.fault(ConsFault.storm())
    await eventually("a storm", lambda: _fired(it, "storm", 200), why=lambda: it.log)
    before = await it.stats(it.devid)
    fired = (await it.backend.stats())["fired_storm"]
    await eventually("more of it", lambda: _fired(it, "storm", fired + 1500), why=lambda: it.log)
    after = await it.stats(it.devid)
    assert after["events"] - before["events"] < 100
    await it.backend.clear()
    await _works(it)


async def test_rule_24_a_console_s_lost_event_is_found_by_the_watchdog(it: ConsoleWorld) -> None:
    before = (await it.stats(it.devid))["watchdog_hits"]
    await it.backend.fault(ConsFault.silent())
    with it.terminal(NAME) as terminal:
        async with await it.dom0(it.devid) as dom0:

            async def hit() -> bool:
                """Not each time: what comes while the worker is awake needs no event."""
                await dom0.send(b"quiet")
                assert await terminal.receive(5) == b"quiet"
                return bool((await it.stats(it.devid))["watchdog_hits"] > before)

            await eventually("a hit of the watchdog", hit, why=lambda: it.log)


async def test_rule_26_any_state_of_a_console_s_backend_ends_connected(it: ConsoleWorld) -> None:
    for state in (2, 5, 99):
        generation = it.state(it.devid)["generation"]
        await it.backend.state(state)
        await it.connected(it.devid, after=generation)
    generation = it.state(it.devid)["generation"]
    await it.backend.misstep(Misstep.state(6, at="connect", place="before", times=1))
    await it.backend.state(6)
    await it.connected(it.devid, after=generation)
    assert "misstep state at connect" in it.backend.log.read_text()
    await _works(it)


async def test_a_backend_that_vanishes_and_returns_has_the_console_again(
    it: ConsoleWorld,
) -> None:
    assert it.service is not None
    with it.terminal(NAME) as terminal:
        await it.backend.fault(ConsFault.deaf())
        await terminal.send(b"unheard")
        await eventually("it waits", lambda: _unsent(it), why=lambda: it.log)
        await it.backend_dies(it.devid)
        async with await it.dom0(it.devid) as dom0:
            assert await dom0.receive(7) == b"unheard"
        assert it.service.terminal(NAME).is_symlink()


async def _fired(it: ConsoleWorld, kind: str, times: int = 1) -> bool:
    return (await it.backend.stats())[f"fired_{kind}"] >= times


async def _unsent(it: ConsoleWorld) -> bool:
    return bool((await it.stats(it.devid))["unsent"])
