# SPDX-License-Identifier: BSD-2-Clause
"""The publisher against a store that nobody here wrote: Debian's oxenstored, without Xen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from agentworld import Place
from waiting import eventually

from pvfront.agent.board import Board
from pvfront.agent.context import Context
from pvfront.agent.keys import Address, Vif, VifKeys, VolumeKeys
from pvfront.agent.publish import Publisher
from pvfront.agent.service import Agent
from pvfront.errors import PvfrontError
from pvfront.host.store import SOCKET_NAME, find, start
from pvfront.xenstore import Xenstore

HOME = "/local/domain/5"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        find()
    except PvfrontError as error:
        pytest.skip(f"{error}")
    folder = tmp_path_factory.mktemp("oxenstored")
    child = asyncio.run(start(folder, {}))
    yield str(folder / SOCKET_NAME)
    asyncio.run(child.stop())


@pytest.fixture
async def store(daemon: str) -> AsyncIterator[Xenstore]:
    async with await Xenstore.connect(daemon, home=HOME) as connected:
        yield connected


async def one_life(store: Xenstore, where: Path, *numbers: int) -> int:
    """An agent that publishes these addresses and ends; how often it wrote."""
    board, vifs = Board(), VifKeys()
    publisher = Publisher(board, vifs, VolumeKeys(), settle=0.01)
    agent = Agent(Context(Place(where), store), [publisher])
    task = asyncio.create_task(agent.run(signals=False))
    await eventually("its begin", lambda: publisher.begun)
    addresses = tuple(Address(4, f"10.0.0.{number}", 24) for number in numbers)
    board.put("network", vifs.keys([Vif(0, "enX0", "00:16:3e:00:00:01", addresses)]))
    wanted = board.wanted()
    await eventually("the keys", lambda: publisher.published == wanted)
    agent.stop()
    await task
    return int(publisher.status()["store_writes"])


async def test_an_agent_that_begins_anew_writes_only_what_has_changed(
    store: Xenstore, tmp_path: Path
) -> None:
    assert await one_life(store, tmp_path, 1, 2, 3) == 2 + 6 + 1
    assert await one_life(store, tmp_path, 1, 2, 3) == 0
    # One removal, an address in the place of another (with the same prefix), the time.
    assert await one_life(store, tmp_path, 3, 4) == 3
    assert await store.read("attr/vif/0/ipv4/2") == "10.0.0.3"
    assert await store.read("attr/vif/0/ipv4/0") == "10.0.0.4"
    assert await store.read_opt("attr/vif/0/ipv4/1") is None
