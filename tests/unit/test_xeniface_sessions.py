# SPDX-License-Identifier: BSD-2-Clause
"""Sessions of XENIFACE without a bus: watches, transactions, ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agentworld import HOME, AgentWorld, agent_world
from waiting import eventually

from pvfront.agent.xeniface import sessions as module
from pvfront.agent.xeniface.policy import Caller, Limits, Policy, Refused, Settings
from pvfront.agent.xeniface.sessions import Requests, Session, Sessions

ROOT = Caller(":1.1", 0)
USER = Caller(":1.2", 1000)
MEMBER = Caller(":1.3", 1001, may_write=True)
LIMITS = Limits(sessions=2, watches=3, transaction_seconds=60)


class Place:
    """Sessions in a guest whose store is in memory; `fired` is what was told, `requests` theirs."""

    def __init__(self, world: AgentWorld, limits: Limits) -> None:
        self.world = world
        self.fired: list[tuple[int, int, str]] = []
        policy = Policy(Settings(write_group="xen"), limits)
        store = world.context.store
        self.sessions = Sessions(store, policy, self._tell)
        self.requests = Requests(store, policy)

    def _tell(self, session: Session, number: int, path: str) -> None:
        self.fired.append((session.number, number, path))

    @property
    def open_transactions(self) -> int:
        return sum(len(client.txns) for client in self.world.mem.clients)

    @property
    def store_watches(self) -> int:
        return sum(len(client.watches) for client in self.world.mem.clients)

    def paths(self, watch: int) -> list[str]:
        return [path for _, number, path in self.fired if number == watch]

    async def write(self, session: Session, path: str, value: bytes) -> None:
        async with session.turn() as transaction:
            await self.requests.write(session.caller, path, value, transaction)

    async def read(self, session: Session, path: str) -> bytes:
        async with session.turn() as transaction:
            return await self.requests.read(session.caller, path, transaction)

    async def live(self) -> None:
        """The store's watch is set: from here on what fires is what has changed."""
        watch = self.sessions.open(Caller(":1.9", 9)).watch("attr")

        async def has_fired() -> bool:
            self.world.set("attr/live", "x")
            await asyncio.sleep(0.005)
            return "attr/live" in self.paths(watch)

        await eventually("the watch is set", has_fired)

    async def fires(self, watch: int, path: str) -> None:
        await eventually(f"{path} fires", lambda: path in self.paths(watch), why=lambda: self.fired)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[AgentWorld]:
    async with agent_world(tmp_path) as made:
        yield made


@pytest.fixture
async def place(world: AgentWorld) -> AsyncIterator[Place]:
    made = Place(world, LIMITS)
    await made.live()
    yield made
    await made.sessions.close_all()
    assert made.sessions.status() == {"sessions": 0, "watches": 0}
    assert made.sessions.usage(ROOT).watches == made.sessions.usage(USER).watches == 0
    await eventually("no transaction is left", lambda: not made.open_transactions)


@pytest.fixture(autouse=True)
def no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACE", 0.001)


async def refused(call) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        await call
    return caught.value.name, str(caught.value)


async def test_what_a_transaction_has_written_is_there_when_it_is_committed(place: Place) -> None:
    session = place.sessions.open(ROOT)
    await session.begin()
    await place.write(session, "data/a", b"1")
    assert await place.read(session, "data/a") == b"1"
    assert place.world.get("data/a") is None
    await session.commit()
    assert place.world.get("data/a") == "1"


async def test_what_an_aborted_transaction_has_written_never_was(place: Place) -> None:
    session = place.sessions.open(ROOT)
    await session.begin()
    await place.write(session, "data/a", b"1")
    await session.abort()
    assert place.world.get("data/a") is None
    assert await refused(session.commit()) == ("NoTransaction", "this session has no transaction")


async def test_a_commit_after_somebody_elses_change_is_a_conflict_and_can_be_tried_again(
    place: Place,
) -> None:
    session = place.sessions.open(ROOT)
    for conflict in (True, False):
        await session.begin()
        await place.read(session, "domid")
        await place.write(session, "data/a", b"1")
        if conflict:
            place.world.set("domid", "5")
            place.world.set("data/a", "2")
            assert (await refused(session.commit()))[0] == "Conflict"
            assert place.world.get("data/a") == "2"
        else:
            await session.commit()
            assert place.world.get("data/a") == "1"


async def test_a_session_has_one_transaction_at_a_time(place: Place) -> None:
    session = place.sessions.open(ROOT)
    await session.begin()
    assert (await refused(session.begin()))[0] == "TransactionOpen"
    await session.abort()
    assert (await refused(session.abort()))[0] == "NoTransaction"


async def test_who_may_not_write_has_no_transactions(place: Place) -> None:
    session = place.sessions.open(USER)
    assert (await refused(session.begin()))[0] == "AccessDenied"
    await place.sessions.open(MEMBER).begin()


async def test_requests_that_were_sent_at_once_are_done_in_their_order(place: Place) -> None:
    session = place.sessions.open(ROOT)
    await asyncio.gather(
        session.begin(),
        *(place.write(session, "data/a", b"%d" % number) for number in range(5)),
        session.commit(),
        place.write(session, "data/b", b"after"),
    )
    assert (place.world.get("data/a"), place.world.get("data/b")) == ("4", "after")


async def test_a_transaction_that_is_open_for_too_long_is_ended_and_its_owner_told(
    world: AgentWorld,
) -> None:
    place = Place(world, Limits(transaction_seconds=0.01))
    session = place.sessions.open(ROOT)
    await session.begin()
    await eventually("its end", lambda: not place.open_transactions)
    name, said = await refused(place.write(session, "data/a", b"1"))
    assert name == "TransactionExpired"
    assert said == "the transaction was open for more than 0.01 s, and nothing of it happened"
    assert world.get("data/a") is None
    await place.write(session, "data/a", b"2")
    assert world.get("data/a") == "2"
    await place.sessions.close_all()


async def test_a_session_that_ends_takes_its_transaction_and_its_watches_along(
    place: Place,
) -> None:
    session = place.sessions.open(ROOT)
    await session.begin()
    await place.write(session, "data/a", b"1")
    watch = session.watch("data")
    await place.fires(watch, "data")
    await place.sessions.close(session)
    assert place.world.get("data/a") is None
    place.world.set("data/b", "1")
    assert await place.read(place.sessions.open(ROOT), "data/b") == b"1"
    assert place.paths(watch) == ["data"]
    assert await refused(place.write(session, "data/c", b"1")) == (
        "UnknownObject",
        "the session has ended",
    )
    await place.sessions.close(session)


async def test_the_end_of_a_connection_is_the_end_of_its_sessions_alone(place: Place) -> None:
    place.sessions.open(ROOT)
    place.sessions.open(ROOT)
    kept = place.sessions.open(USER)
    await place.sessions.close_all(ROOT.name)
    assert place.sessions.numbers_of(ROOT) == []
    assert place.sessions.numbers_of(USER) == [kept.number]
    assert not place.sessions.has(ROOT.name)


async def test_a_session_is_its_connections_own(place: Place) -> None:
    session = place.sessions.open(ROOT)
    other = Caller(":1.99", 0)
    with pytest.raises(Refused, match="another connection's") as caught:
        place.sessions.of(other, session.number)
    assert caught.value.name == "AccessDenied"
    with pytest.raises(Refused, match="there is no session 9999"):
        place.sessions.of(ROOT, 9999)


async def test_a_watch_fires_at_once_and_for_what_is_at_below_and_above_it(place: Place) -> None:
    session = place.sessions.open(USER)
    watch = session.watch("data/app")
    await place.fires(watch, "data/app")
    place.world.set("data/app/x", "1")
    await place.fires(watch, "data/app/x")
    place.fired.clear()
    place.world.set("data/other", "1")
    place.world.set("data", None)
    await place.fires(watch, "data/app")
    assert set(place.paths(watch)) == {"data/app"}


async def test_a_watch_on_the_guests_own_directory_tells_nobody_of_what_is_hidden(
    place: Place,
) -> None:
    users, roots = place.sessions.open(USER).watch(""), place.sessions.open(ROOT).watch("")
    await place.fires(users, "")
    await place.fires(roots, "")
    place.world.set("vm-data/password", "x", perms="n0,r5")
    place.world.set("name", "x", perms="n0,r5")
    await place.fires(roots, "vm-data/password")
    await place.fires(users, "name")
    assert "vm-data/password" not in place.paths(users)


async def test_a_watch_that_was_taken_back_fires_no_more(place: Place) -> None:
    session = place.sessions.open(USER)
    first, second = session.watch("data"), session.watch("data")
    await place.fires(first, "data")
    await session.unwatch(first)
    assert (await refused(session.unwatch(first)))[0] == "NoSuchWatch"
    place.world.set("data/x", "1")
    await place.fires(second, "data/x")
    assert "data/x" not in place.paths(first)


async def test_many_watches_are_one_of_the_stores(place: Place) -> None:
    session = place.sessions.open(USER)
    for watch in [session.watch(path) for path in ("data", "attr", "no/such/node")]:
        await eventually("fires", lambda watch=watch: place.paths(watch))
    await eventually("set", lambda: place.store_watches == 1)


async def test_one_watch_or_session_too_many_of_a_user_is_refused(place: Place) -> None:
    one, two = place.sessions.open(USER), place.sessions.open(Caller(":1.50", USER.uid))
    with pytest.raises(Refused, match="2 sessions at a time"):
        place.sessions.open(Caller(":1.51", USER.uid))
    for session in (one, one, two):
        session.watch("data")
    with pytest.raises(Refused, match="3 watches at a time"):
        two.watch("data")
    await place.sessions.close(one)
    two.watch("data")


async def test_all_users_together_have_so_many_sessions_and_root_has_more(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALL_SESSIONS", 3)  # one is the fixture's
    place.sessions.open(USER)
    place.sessions.open(MEMBER)
    with pytest.raises(Refused, match="there are 3 sessions already"):
        place.sessions.open(Caller(":1.60", 1002))
    place.sessions.open(ROOT)


async def test_a_flood_of_changes_is_told_of_as_one(place: Place) -> None:
    watch = place.sessions.open(USER).watch("data")
    await place.fires(watch, "data")
    place.fired.clear()
    for number in range(200):
        place.world.set(f"data/{number}", "x")
    # Marks the end: it is told of after all that came before it.
    place.world.set("data/end", "x")
    await eventually("the end", lambda: {"data/end", "data"} & set(place.paths(watch)))
    assert len(place.paths(watch)) < 200


async def test_a_name_that_only_a_hostile_store_has_is_told_as_the_watched_path_or_not_at_all(
    place: Place,
) -> None:
    watch = place.sessions.open(USER).watch("data")
    await place.fires(watch, "data")
    place.world.mem.set(f"{HOME}/data/a\x1b[2Jb", b"1", perms="n5")
    place.world.set("data/end", "1")
    await eventually(
        "the end", lambda: {"data/end"} & set(place.paths(watch)), why=lambda: place.fired
    )
    assert all(path.isprintable() for path in place.paths(watch))


async def test_after_a_resume_every_watch_fires_and_follows_the_new_directory(
    place: Place,
) -> None:
    session = place.sessions.open(USER)
    watch = session.watch("data")
    await place.fires(watch, "data")
    place.fired.clear()
    place.sessions.resumed()
    await place.fires(watch, "data")
    place.world.set("data/x", "1")
    await place.fires(watch, "data/x")


async def test_to_remove_what_is_not_there_is_an_error_as_everywhere_in_pvfront(
    place: Place,
) -> None:
    with pytest.raises(FileNotFoundError):
        await place.requests.remove(ROOT, "data/none", None)
    place.world.set("data/x", "1")
    await place.requests.remove(ROOT, "data/x", None)
    assert place.world.get("data/x") is None


async def test_permissions_are_shown_to_all_and_set_by_root(place: Place) -> None:
    place.world.set("data/x", "1")
    assert await place.requests.get_permissions(USER, "data/x", None) == ["n5"]
    await place.requests.set_permissions(ROOT, "data/x", ["n5", "r0"], None)
    assert await place.requests.get_permissions(USER, "data/x", None) == ["n5", "r0"]
    for wrong in (["x5"], [], ["n99999"]):
        with pytest.raises(Refused) as caught:
            await place.requests.set_permissions(ROOT, "data/x", wrong, None)
        assert caught.value.name == "InvalidArgs"
