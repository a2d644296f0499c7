# SPDX-License-Identifier: BSD-2-Clause
"""The publisher and the store: together, once, and whatever the store refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import memstore
import pytest
from agentworld import HOME, AgentWorld, agent_world
from waiting import eventually

from pvfront.agent.board import Board
from pvfront.agent.context import Resumed
from pvfront.agent.keys import Address, Vif, VifKeys, VolumeKeys
from pvfront.agent.publish import UPDATED, Publisher
from pvfront.agent.suspendable import CANNOT, Judge


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[AgentWorld]:
    async with agent_world(tmp_path) as made:
        yield made


@pytest.fixture
def board() -> Board:
    return Board()


def publisher(board: Board, vifs: VifKeys | None = None) -> Publisher:
    return Publisher(board, vifs or VifKeys(), VolumeKeys(), settle=0.01)


def refuse_new_nodes(world: AgentWorld, room: int) -> None:
    """A quota: so many more nodes."""
    store, most = world.mem, len(world.mem.tree.nodes) + room
    perform = store.perform

    def limited(client: Any, op: int, tx_id: int, payload: bytes, after: Any) -> bytes:
        if op == memstore.WRITE:
            tree = client.txns[tx_id].tree if tx_id else store.tree
            path = store.absolute(client, payload.partition(b"\0")[0])
            if path not in tree.nodes and len(tree.nodes) >= most:
                raise memstore.Refused("ENOSPC")
        return perform(client, op, tx_id, payload, after)

    store.perform = limited  # type: ignore[method-assign]


async def test_what_is_on_the_board_is_in_the_store_and_the_time_of_it(
    world: AgentWorld, board: Board
) -> None:
    board.put("os", {"data/os_name": "x", "attr/PVAddons/Installed": "1"})
    async with world.running(publisher(board)):
        await eventually("the keys", lambda: world.get("attr/PVAddons/Installed") == "1")
        assert world.get("data/os_name") == "x"
        assert world.get(UPDATED)


async def test_a_change_is_one_transaction_of_what_has_changed(
    world: AgentWorld, board: Board
) -> None:
    one = publisher(board)
    board.put("a", {"data/a": "1", "data/b": "1"})
    async with world.running(one):
        await eventually("the first keys", lambda: world.get("data/b") == "1")
        await eventually("their count", lambda: one.status()["store_writes"])
        commits: list[int] = []
        world.mem.on_commit = lambda: commits.append(1)
        before = one.status()["store_writes"]
        board.put("a", {"data/a": "1", "data/b": "2"})
        await eventually("the second value", lambda: world.get("data/b") == "2")
        await eventually("the count", lambda: one.status()["store_writes"] == before + 2)
        assert len(commits) == 1
        board.put("a", {"data/a": "1", "data/b": "2"})
        assert not board.changed.is_set()


async def test_what_an_earlier_agent_left_goes_or_stays_with_its_index(
    world: AgentWorld, board: Board
) -> None:
    world.set("attr/vif/0/name", "enX0")
    world.set("attr/vif/0/ipv4/5", "10.0.0.1")
    world.set("attr/vif/7/name", "enX7")
    world.set("data/volumes/0/name", "/dev/old")
    world.set("drivers/1", "pvfront XENVBD 0.0.9")
    vifs = VifKeys()
    board.put("os", {"data/os_name": "x"})
    async with world.running(one := publisher(board, vifs)):
        await eventually("what is known", lambda: world.get("data/os_name") == "x")
        assert world.get("attr/vif/7/name") == "enX7", "nobody has looked yet"
        board.put("network", vifs.keys([Vif(0, "enX0", "m", (Address(4, "10.0.0.1", 24),))]))
        await eventually("the end of the old", lambda: world.get("attr/vif/7/name") is None)
        assert world.get("attr/vif/0/ipv4/5") == "10.0.0.1"
        assert world.get("attr/vif/0/ipv4/5/prefix") == "24"
        assert world.get("data/volumes/0/name") == "/dev/old"
        board.put("volumes", {})
        board.put("drivers", {"drivers/0": "pvfront XENIFACE 0.1.0"})
        await eventually("the end of the others", lambda: world.get("data/volumes/0") is None)
        assert world.get("drivers/1") is None
        await eventually("their count", lambda: len(one.published) == 6)


async def test_a_reason_against_suspend_of_an_earlier_agent_goes_and_the_toolstacks_stays(
    world: AgentWorld, board: Board
) -> None:
    world.set(CANNOT, "pvfront: suspend cannot be held up: an earlier agent's")
    board.put("suspendable", Judge().keys(None))
    async with world.running(publisher(board)):
        await eventually("its end", lambda: world.get(CANNOT) is None)
    world.set(CANNOT, "a GPU of the host's")
    board.put("a", {"data/a": "1"})
    async with world.running(publisher(board)):
        await eventually("another key", lambda: world.get("data/a") == "1")
        assert world.get(CANNOT) == "a GPU of the host's"


def test_writes_of_more_than_an_hour_ago_cost_no_memory(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = VirtualClock()
    monkeypatch.setattr("pvfront.agent.publish.time", clock)
    one = publisher(board)
    for _ in range(100):
        clock.now += 100.0
        one._count(2)
    assert len(one._recent) <= 37
    assert one.status()["store_writes_last_hour"] <= 74
    assert one.status()["store_writes"] == 200


class VirtualClock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


async def test_a_key_that_is_not_ours_to_write_is_no_error_and_costs_no_other(
    world: AgentWorld, board: Board
) -> None:
    world.set("control/feature-balloon", "1", perms="n0,r5")
    board.put("features", {"data/w": "1", "control/feature-balloon": "0", "data/x": "1"})
    one = publisher(board)
    commits: list[int] = []
    world.mem.on_commit = lambda: commits.append(1)
    async with world.running(one):
        await eventually("the other key", lambda: world.get("data/x") == "1")
        await eventually("the refusal", lambda: bool(one.refused))
        assert commits == [1]
        assert one.status()["refused"] == {"control/feature-balloon": "EACCES"}
        assert world.get("control/feature-balloon") == "1"


async def test_a_quota_costs_new_keys_only_and_room_that_comes_is_used(
    world: AgentWorld, board: Board
) -> None:
    board.put("a", {"attr/a": "1"})
    board.put("volumes", {"data/volumes/0/name": "v"})
    one = publisher(board)
    async with world.running(one):
        await eventually("the first keys", lambda: world.get("attr/a") == "1")
        refuse_new_nodes(world, 2)
        board.put("b", {f"data/b{n}": "1" for n in range(9)})
        board.put("a", {"attr/a": "2"})
        await eventually("the change", lambda: world.get("attr/a") == "2")
        await eventually("refusals", lambda: len(one.refused) == 7)
        assert set(one.refused.values()) == {"ENOSPC"}
        board.put("volumes", {})
        await eventually("the nodes of the volume used", lambda: len(one.refused) < 7)


async def test_after_a_resume_everything_is_written_into_the_new_store(
    world: AgentWorld, board: Board
) -> None:
    board.put("a", {"data/a": "1", "attr/b": "2"})
    async with world.running(publisher(board)):
        await eventually("the keys", lambda: world.get("attr/b") == "2")
        world.set("data/a", None)
        world.set("attr/b", None)
        world.context.events.publish(Resumed(1))
        await eventually("the keys again", lambda: world.get("attr/b") == "2")
        assert world.get("data/a") == "1"


async def test_a_conflict_with_the_toolstack_is_tried_again(
    world: AgentWorld, board: Board
) -> None:
    tries = []

    def interfere() -> None:
        tries.append(1)
        if len(tries) < 3:
            world.mem.set(f"{HOME}/data/a", b"theirs")

    world.mem.on_commit = interfere
    board.put("a", {"data/a": "ours"})
    async with world.running(publisher(board)):
        await eventually("our value", lambda: world.get("data/a") == "ours")
    assert len(tries) >= 3


async def test_the_status_counts_writes_and_what_had_no_place(
    world: AgentWorld, board: Board
) -> None:
    board.put("a", {f"data/k{n}": "1" for n in range(450)})
    one = publisher(board)
    async with world.running(one):
        await eventually("the keys", lambda: one.status()["keys"] == 400)
        found = one.status()
    assert found["left_out"] == 50
    assert found["store_writes"] == found["store_writes_last_hour"] == 401
