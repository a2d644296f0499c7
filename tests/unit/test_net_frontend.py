# SPDX-License-Identifier: BSD-2-Clause
"""A vif's half of the device loop; around it tests/support/vifworld.py."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from controlpeer import Peer
from vclock import VirtualLoop
from vifworld import MAC, NETBACK, World

from pvfront import parking, workerside
from pvfront.abi import lib
from pvfront.errors import PvfrontError
from pvfront.gntalloc import GrantsExhausted
from pvfront.netfront import frontend as module
from pvfront.netfront.control import ANSWER
from pvfront.netfront.controlside import LOST
from pvfront.netfront.features import NetError
from pvfront.netfront.generation import PortsExhausted
from pvfront.netfront.settings import NetSettings
from pvfront.parking import CannotPark
from pvfront.states import XenbusState
from pvfront.worker import WorkerError
from pvfront.workermessage import Broken, Exited
from pvfront.xenbus import View

LOOP_FACTORY = VirtualLoop
POOR = {"feature-rx-copy": "1"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# -- a generation ----------------------------------------------------------------------------------


async def test_attach_publishes_all_queues_and_the_control_ring_and_keeps_only_that(
    world: World,
) -> None:
    keys = await world.attach()
    assert keys["multi-queue-num-queues"] == "2"
    ports = [int(keys[f"queue-{q}/event-channel-{way}"]) for q in (0, 1) for way in ("tx", "rx")]
    assert len({*ports, int(keys["event-channel-ctrl"])}) == 5
    assert keys["ctrl-ring-ref"].isdigit()
    assert keys["xdp-headroom"] == "0"
    assert all(world.vif.stale_key(key) for key in keys)
    assert world.guest.bound == [int(keys["event-channel-ctrl"])], "the worker has the others"
    assert world.guest.granted == 2
    first, second = world.worker.held
    assert (first["queue"], second["queue"]) == (0, 1)
    assert (first["port"], first["rx_port"]) == (ports[0], ports[1])
    assert (first["tx_pages"], len(first["pool_grefs"])) == (288, 288 + 256)
    assert world.taps == [], "nothing is served before the backend is Connected"


async def test_start_sets_up_the_tap_for_what_the_backend_can_and_starts_every_queue(
    world: World,
) -> None:
    world.device.keys["mtu"] = "9000"
    vif = await world.running()
    tap = world.tap
    assert (tap.queues, tap.open) == (2, False)
    assert tap.set == {
        "mac": bytes.fromhex(MAC.replace(":", "")), "mtu": 9000, "most": 65517, "csum": True,
        "tso4": True, "tso6": True,
    }  # fmt: skip
    (started,) = world.worker.started
    assert started["features"] == (
        lib.PVF_NET_SG | lib.PVF_NET_CSUM4 | lib.PVF_NET_CSUM6 | lib.PVF_NET_GSO4
        | lib.PVF_NET_GSO6 | lib.PVF_NET_MULTICAST
    )  # fmt: skip
    assert world.fds == set(), "the worker is the only holder"
    details = vif.details()
    assert (details["queues"], details["mtu"], details["carrier"]) == (2, 9000, True)
    assert details["rings"]["granted"] == {"asked": 1094, "got": 1094, "why": ""}
    assert details["control"]["hash"]["kinds"] == ("ipv4", "ipv4-tcp", "ipv6", "ipv6-tcp")
    assert world.peer.table[:4] == [0, 1, 0, 1]


async def test_the_backend_is_asked_before_packets_flow_and_unmaps_after(world: World) -> None:
    world.peer.greferences = 4096
    vif = await world.running()
    pools = [set(held["pool_grefs"]) for held in world.worker.held]
    assert [set(world.peer.mapped[queue]) for queue in (0, 1)] == pools
    assert vif.details()["control"]["static"]["pages"] == sum(map(len, pools))
    assert world.faults.done.index("notify") < world.faults.done.index("start")
    assert await vif.quiesce(10.0)
    assert world.peer.mapped == {0: {}, 1: {}}
    await vif.detach(keep_target=False)
    assert world.left() == {}


async def test_a_ring_that_does_not_drain_is_not_unmapped_in_use(world: World) -> None:
    world.peer.greferences = 4096
    vif = await world.running()
    world.worker.drains = False
    assert not await vif.quiesce(1.0)
    assert all(world.peer.mapped.values())
    await vif.detach(keep_target=False)
    assert world.left() == {}


async def test_a_new_generation_begins_with_nothing_of_the_one_before(world: World) -> None:
    vif = await world.running()
    key, port = world.peer.key, world.guest.bound
    await vif.detach(keep_target=False)
    assert world.left() == {}
    world.guest.peer = world.peer = Peer()
    await world.running()
    assert vif.generation == 2
    assert (len(world.workers), len(world.worker.held)) == (1, 2)
    assert world.guest.bound != port
    assert world.peer.key != key


async def test_end_ends_the_worker_and_leaves_nothing(world: World) -> None:
    vif = await world.running()
    await vif.detach(keep_target=False)
    await vif.close()
    await vif.end()
    await vif.end()
    assert world.worker.calls[-2:] == ["exit", "close"]
    assert world.left() == {}
    assert world.budget.devices == 0


# -- every step that can fail ----------------------------------------------------------------------


async def _steps(world: World) -> list[str]:
    await world.running()
    return world.faults.done


async def test_whatever_step_fails_nothing_is_left_and_the_next_try_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, monkeypatch)
    world.peer.greferences = 4096
    steps = await _steps(world)
    assert len(steps) > 30
    assert {"spawn", "bind", "alloc", "map", "attach", "tap", "notify", "start"} <= set(steps)
    outcomes = set()
    for number, what in enumerate(steps):
        with monkeypatch.context() as patch:
            world = World(tmp_path, patch)
            world.peer.greferences = 4096
            world.faults.at = number
            vif = world.vif
            failed = None
            try:
                await world.running()
            except (PvfrontError, OSError) as error:
                failed = error
            assert world.faults.done[number] == what
            outcomes.add((what, failed is None))
            await vif.detach(keep_target=False)
            assert world.left() == {}, f"step {number}, {what}: {failed}"
            world.guest.peer = world.peer = Peer()
            await world.running()
            assert vif.trouble is None
            assert vif.details()["control"]["state"] == "in use"
            await vif.detach(keep_target=False)
            await vif.end()
            assert world.left() == {}
    # Of the control ring's own nothing fails the vif; of all other things everything does.
    assert ("notify", True) in outcomes
    assert ("notify", False) not in outcomes
    assert ("map", False) not in outcomes
    assert {("spawn", False), ("attach", False), ("tap", False), ("start", False)} <= outcomes


async def test_a_worker_that_refuses_its_first_queue_is_not_told_to_detach(world: World) -> None:
    world.faults.name = "attach"
    with pytest.raises(WorkerError):
        await world.attach()
    await world.vif.detach(keep_target=False)
    assert world.worker.calls == ["attach"]
    assert world.left() == {}


async def test_a_start_that_failed_is_tried_again_on_the_same_connection(world: World) -> None:
    world.peer.greferences = 4096
    await world.attach()
    world.faults.name = "tap"
    with pytest.raises(OSError, match="tap failed"):
        await world.vif.start(world.device)
    world.faults.name = "start"
    with pytest.raises(PvfrontError):
        await world.vif.start(world.device)
    assert (world.fds, [tap.open for tap in world.taps]) == (set(), [False])
    world.faults.name = ""
    await world.vif.start(world.device)
    assert world.vif.generation == 1
    assert world.vif.details()["control"]["static"]["queues"] == 2


async def test_a_goal_that_changes_while_the_tap_is_made_leaves_no_queue_of_it_open(
    world: World,
) -> None:
    made = asyncio.get_running_loop().create_future()

    async def to_thread(do: Any, *args: Any) -> Any:
        await made
        return do(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.asyncio, "to_thread", to_thread)
        await world.attach()
        starting = asyncio.create_task(world.vif.start(world.device))
        await asyncio.sleep(1)
        assert world.taps == []
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        made.set_result(None)
        await asyncio.sleep(1)
    assert [tap.open for tap in world.taps] == [False]
    await world.vif.detach(keep_target=False)
    assert world.left() == {}


async def test_an_end_while_the_tap_is_made_comes_after_it_so_that_none_is_left(
    world: World,
) -> None:
    made = asyncio.get_running_loop().create_future()
    removed: list[int] = []

    async def to_thread(do: Any, *args: Any) -> Any:
        if do == world.vif._set_up:
            await made
        return do(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.asyncio, "to_thread", to_thread)
        patch.setattr(world.vif.link, "close", lambda: removed.append(len(world.taps)))
        await world.attach()
        starting = asyncio.create_task(world.vif.start(world.device))
        await asyncio.sleep(1)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        closing = asyncio.create_task(world.vif.close())
        await asyncio.sleep(1)
        assert removed == [], "there is none to remove yet, but there will be"
        made.set_result(None)
        await closing
    assert removed == [1]
    assert [tap.open for tap in world.taps] == [False]


# -- what the backend cannot -----------------------------------------------------------------------


async def test_a_backend_that_offers_nothing_is_served_with_one_queue_and_one_port(
    world: World,
) -> None:
    world.device.back = dict(POOR)
    world.device.keys["mtu"] = "9000"
    keys = await world.attach()
    assert not [key for key in keys if key.startswith(("queue-", "ctrl", "request-multicast"))]
    assert "event-channel" in keys
    assert "xdp-headroom" not in keys
    (queue,) = world.worker.held
    assert (queue["rx_port"], queue["tx_pages"]) == (0, 257)
    assert world.guest.open == []
    await world.vif.start(world.device)
    assert world.tap.set["mtu"] == 1500
    assert (world.tap.set["tso4"], world.tap.set["tso6"], world.tap.set["csum"]) == (
        False, False, True,
    )  # fmt: skip
    assert world.worker.started[0]["features"] == lib.PVF_NET_CSUM4
    assert world.vif.details()["control"]["state"] == "the backend offers none"


async def test_a_backend_that_comes_back_poorer_takes_offloads_and_mtu_along_and_users_are_told(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.device.keys["mtu"] = "9000"
    vif = await world.running()
    notes: list[str] = []
    vif.on_note(lambda kind, text, **facts: notes.append(text))
    await vif.detach(keep_target=False)
    world.device.back = dict(POOR)
    await world.running()
    assert world.tap.set["mtu"] == 1500
    assert not world.tap.set["tso4"]
    assert world.worker.started[-1]["features"] == lib.PVF_NET_CSUM4
    assert (vif.queues, world.tap.queues) == (1, 1)
    for what in ("no packets of several pages", "large TCP packets over IPv6", "1 queues at most"):
        assert what in caplog.text
        assert any(what in note for note in notes)
    await vif.detach(keep_target=False)
    world.device.back = dict(NETBACK)
    await world.running()
    assert world.tap.set["mtu"] == 9000
    assert world.tap.set["tso4"]


async def test_a_key_that_makes_no_sense_is_one_line_each_and_said_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.device.back.update({"multi-queue-max-queues": "-3", "feature-gso-tcpv4": "yes"})
    world.device.keys.update({"mtu": "70000", "trusted": "maybe"})
    vif = await world.running()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) == 4
    for key in ("multi-queue-max-queues", "feature-gso-tcpv4", "mtu", "trusted"):
        assert sum(key in line for line in lines) == 1
    assert not any("\n" in line for line in lines)
    assert vif.mtu == 65517
    assert world.worker.held[0]["scrub"], "who may be trusted or not is not trusted"
    assert vif.details()["trusted"] is False


@pytest.mark.parametrize(("key", "value"), [("mac", "ff:ff:ff:ff:ff:ff"), ("mac", "nonsense")])
async def test_without_an_address_there_is_no_interface_and_nothing_is_held(
    world: World, key: str, value: str
) -> None:
    world.device.keys[key] = value
    with pytest.raises(NetError, match=key):
        await world.attach()
    await world.vif.detach(keep_target=False)
    assert world.left() == {}


async def test_the_mtu_of_the_backend_counts_where_the_frontend_has_none(world: World) -> None:
    world.device.back["mtu"] = "9000"
    await world.running()
    assert world.tap.set["mtu"] == 9000


async def test_more_queues_than_a_living_worker_has_are_not_asked_of_it(world: World) -> None:
    await world.attach()
    await world.vif.detach(keep_target=False)
    world.device.back["multi-queue-max-queues"] = "16"
    world.vif.max_queues = 16
    await world.attach()
    assert len(world.worker.held) == 2


# -- multicast -------------------------------------------------------------------------------------

ALL_HOSTS = bytes.fromhex("01005e000001")


async def test_joins_are_told_and_all_multicast_is_wanted_unless_a_filter_is_set(
    world: World,
) -> None:
    world.joined = [ALL_HOSTS]
    keys = await world.attach()
    assert keys["request-multicast-control"] == "0"
    await world.vif.start(world.device)
    assert world.worker.started[0]["groups"] == [ALL_HOSTS]
    assert world.device.keys["request-multicast-control"] == "0"


async def test_a_dynamic_filter_begins_when_the_joins_are_told(world: World) -> None:
    world.vif.multicast_filter = True
    keys = await world.attach()
    assert keys["request-multicast-control"] == "0"
    world.faults.name = "start"
    with pytest.raises(PvfrontError):
        await world.vif.start(world.device)
    assert world.device.keys["request-multicast-control"] == "0"
    world.faults.name = ""
    await world.vif.start(world.device)
    assert world.device.keys["request-multicast-control"] == "1"


async def test_a_static_filter_is_asked_for_with_the_other_keys(world: World) -> None:
    world.vif.multicast_filter = True
    world.device.back["feature-dynamic-multicast-control"] = "0"
    assert (await world.attach())["request-multicast-control"] == "1"


# -- room ------------------------------------------------------------------------------------------


async def test_pools_and_queues_shrink_as_devices_grow_and_why_is_shown(world: World) -> None:
    world.limit = 1024
    vif = await world.running()
    rings = vif.details()["rings"]
    assert (rings["queues"], rings["tx_pages"], rings["rx_pages"]) == (1, 113, 112)
    assert rings["granted"]["why"] == "a share of 1024 pages for 1 device"
    assert world.tap.queues == 1
    for number in range(1, 20):
        world.budget.join(f"vif-{number}")
    await vif.detach(keep_target=False)
    await world.running()
    rings = vif.details()["rings"]
    assert (rings["tx_pages"], rings["rx_pages"]) == (18, 20)
    assert rings["granted"]["got"] == 42


@pytest.mark.parametrize("left", [1000, 600, 300, 100, 40])
async def test_where_others_hold_the_pages_a_smaller_pool_does(
    world: World, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    world.guest.pages_left = left
    vif = await world.running()
    rings = vif.details()["rings"]
    got = rings["queues"] * (2 + rings["tx_pages"] + rings["rx_pages"])
    assert left / 4 < got <= left
    assert "no room for" in rings["granted"]["why"]
    assert "instead of 2 queues of 288 TX and 256 RX pages" in caplog.text
    await vif.detach(keep_target=False)
    assert world.left() == {}


async def test_without_room_for_the_least_the_limit_is_named_and_nothing_is_held(
    world: World,
) -> None:
    world.guest.pages_left = 39
    with pytest.raises(GrantsExhausted, match="no room for"):
        await world.attach()
    await world.vif.detach(keep_target=False)
    assert world.left() == {}


@pytest.mark.parametrize(
    ("ports", "queues", "split"), [(5, 2, True), (4, 2, True), (3, 2, False), (1, 1, False)]
)
async def test_where_event_channels_run_out_fewer_do(
    world: World, ports: int, queues: int, split: bool
) -> None:
    world.guest.ports_left = ports
    vif = await world.running()
    rings = vif.details()["rings"]
    assert (rings["queues"], rings["split_event_channels"]) == (queues, split)
    if not split:
        assert "no event channel is left" in rings["granted"]["why"]


async def test_without_any_event_channel_the_error_says_where_their_number_stands(
    world: World,
) -> None:
    world.guest.ports_left = 0
    with pytest.raises(PortsExhausted) as refused:
        await world.attach()
    assert "max_event_channels" in str(refused.value.hint)
    await world.vif.detach(keep_target=False)
    assert world.left() == {}


# -- a control ring that does not do ---------------------------------------------------------------


async def test_a_silent_control_ring_delays_a_vif_by_one_request_and_no_more(world: World) -> None:
    world.peer.mute = True
    await world.attach()
    await world.vif.start(world.device)
    assert world.worker.started
    assert "within 2 s" in world.vif.details()["control"]["state"]
    assert ANSWER == 2.0
    assert await world.vif.quiesce(1.0)
    await world.vif.detach(keep_target=False)
    assert world.left() == {}


async def test_a_setting_leaves_the_hash_to_the_backend(world: World) -> None:
    world.settings = NetSettings(max_queues=2, hash=0)
    world.vif = world.frontend()
    await world.running()
    assert world.peer.algorithm == 0
    assert world.vif.details()["control"]["state"] == "in use"


# -- what the worker tells, other supervisors, a suspend that nobody asked for ---------------------


async def test_a_broken_rule_is_trouble_and_the_control_ring_goes_with_the_rest(
    world: World,
) -> None:
    vif = await world.running()
    vif._on_event(Broken(5, "id", 4711, "is not in flight"))
    assert "broke rule 5" in str(vif.trouble)
    assert not await vif.quiesce(1.0)
    await vif.detach(keep_target=False)
    assert world.left() == {}


async def test_a_worker_that_died_leaves_no_port_of_ours_bound(world: World) -> None:
    vif = await world.running()
    world.worker.held.clear()
    vif._on_event(Exited("pid 4000 ended by signal 9"))
    assert world.guest.bound, "the ring is the supervisor's"
    await vif.detach(keep_target=False)
    assert world.left() == {}
    await world.running()
    assert len(world.workers) == 2


async def test_an_adopted_worker_is_served_without_a_control_ring_until_it_connects_anew(
    world: World,
) -> None:
    first = await world.running()
    first.control.close()  # as the end of its process does
    world.serving()
    world.budget.leave("vif-0")
    vif = world.vif = world.frontend()
    assert await vif.adopt(world.device)
    details = vif.details()
    assert details["control"]["state"] == LOST
    assert (details["queues"], details["rings"]["queues"], vif.generation) == (2, 2, 1)
    assert details["rings"]["granted"]["why"] == "as it was adopted"
    assert world.budget.held == 2 * 546
    assert await vif.quiesce(1.0)
    await vif.detach(keep_target=False)
    await world.running()
    assert vif.details()["control"]["state"] == "in use"


async def test_a_worker_that_does_not_serve_is_detached_or_after_a_restore_parked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.running()
    worker = world.serving()
    world.device.view = View(XenbusState.CLOSING, XenbusState.CLOSED, True, True)
    vif = world.vif = world.frontend()
    assert not await vif.adopt(world.device)
    assert worker.calls[-1] == "detach"
    assert world.budget.held == 0


async def test_after_an_unasked_suspend_the_ports_of_both_are_parked_and_not_unbound(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vif = await world.running()
    parked: list[Any] = []

    async def park(pid: int, *, fds: Any = ()) -> tuple[int, int]:
        parked.append((pid, list(fds)))
        return 999, 1

    (port,) = world.guest.bound
    for place in (workerside, parking):
        monkeypatch.setattr(place, "park", park)
    world.fds.add(1000 + port)
    await vif.poisoned()
    assert parked == [(os.getpid(), [1000 + port]), (world.worker.pid, [])]
    assert world.worker.calls[-2:] == ["kill", "close"]
    assert world.left() == {}
    assert "suspended" in vif.details()["control"]["state"]
    world.guest.peer = world.peer = Peer()
    await world.running()
    assert vif.generation == 2


async def test_a_control_port_that_cannot_be_parked_stays_open_and_the_worker_is_parked_still(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vif = await world.running()

    async def park(pid: int, *, fds: Any = ()) -> tuple[int, int]:
        if fds:
            raise CannotPark("process 1: its ports cannot be taken over: no pidfd")
        return 999, 2

    for place in (workerside, parking):
        monkeypatch.setattr(place, "park", park)
    monkeypatch.setattr(parking, "_never_closed", kept := [])
    await vif.poisoned()
    assert len(kept) == 1
    assert "kill" in world.worker.calls
