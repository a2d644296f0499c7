# SPDX-License-Identifier: BSD-2-Clause
"""Rules 25 to 28: keys that lie, states that jump, nodes that go, a backend that does nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from typing import Literal

import pytest
from hostileworld import MIB, Attach, Disk, World
from nbdclient import (
    EINVAL,
    ENOSPC,
    READ,
    SEND_FLUSH,
    SEND_TRIM,
    WRITE,
    NbdError,
    finished,
    outcome,
)
from waiting import PATIENCE, eventually

from pvfront.host.blkback import Fault, Misstep

pytestmark = pytest.mark.asyncio(loop_scope="session")

Step = Literal["probe", "connect", "closing", "closed", "reconnect"]
HUGE = "9" * 500
ELSEWHERE = "/local/domain/0/backend/vbd/1/999"


# -- rule 25: keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sectors", None),
        ("sectors", "0"),
        ("sectors", "-1"),
        ("sectors", "0x4000"),
        ("sectors", "many"),
        ("sectors", HUGE),
        ("sectors", str((1 << 64) - 1)),
        ("sectors", str(1 << 54)),  # of 512 bytes: 2^63
        ("sector-size", "0"),
        ("sector-size", "511"),
        ("sector-size", "8192"),
        ("sector-size", "-512"),
        ("info", "ro"),
    ],
)
async def test_rule_25_a_key_without_which_there_is_no_disk_is_refused_by_name(
    attach: Attach, world: World, key: str, value: str | None
) -> None:
    await world.backend.override({key: value})
    disk = await attach(wait=False)
    shown = await disk.until("refused", lambda s: s and s["phase"] == "failed")
    assert f"backend key {key}" in shown["reason"], shown["reason"]
    assert value is None or value[:20] in shown["reason"]
    assert len(shown["reason"]) < 200
    right = {"sectors": "16384", "sector-size": "512", "info": "0"}[key]
    await world.backend.write({key: right}, vbd=disk.vdev)
    await disk.connected()
    await disk.works()


@pytest.mark.parametrize("value", ["-1", "x", HUGE])
async def test_rule_25_limits_and_features_that_are_nonsense_are_ignored(
    attach: Attach, world: World, value: str
) -> None:
    keys = (
        "feature-max-indirect-segments", "max-ring-page-order", "multi-queue-max-queues",
        "feature-persistent", "feature-barrier", "feature-flush-cache", "feature-discard",
        "discard-granularity", "discard-alignment", "discard-secure", "physical-sector-size",
    )  # fmt: skip
    await world.backend.override(dict.fromkeys(keys, value))
    disk = await attach()
    geometry = (await disk.shown())["geometry"]
    assert (geometry["flush"], geometry["discard"]) == (False, False)
    assert geometry["physical_sector_size"] == 512
    await disk.logged("backend key feature-flush-cache")
    client = await disk.client()
    assert not client.flags & (SEND_FLUSH | SEND_TRIM)
    await client.write(0, b"\x31" * 4096)
    assert await client.read(0, 4096) == b"\x31" * 4096


@pytest.mark.parametrize(
    ("granularity", "alignment"), [("513", "0"), ("4096", "100"), ("0", "7"), ("1", "1")]
)
async def test_rule_25_discard_that_does_not_fit_sectors_is_off(
    attach: Attach, world: World, granularity: str, alignment: str
) -> None:
    keys = {"discard-granularity": granularity, "discard-alignment": alignment}
    await world.backend.override(keys)
    disk = await attach()
    assert (await disk.shown())["geometry"]["discard"] is False
    await disk.logged("discard is off")


async def test_rule_25_a_disk_that_shrinks_under_a_client_refuses_what_lies_beyond(
    disk: Disk, world: World
) -> None:
    client = await disk.client()
    data = os.urandom(MIB)
    await client.write(0, data)
    await world.backend.resize(MIB, vbd=disk.vdev)
    await disk.until("the resize", lambda s: s["geometry"]["size"] == MIB)
    for reply, number in (
        (client.start(READ, MIB, 4096), EINVAL),
        (client.start(WRITE, MIB - 2048, 4096, bytes(4096)), ENOSPC),
        (client.start(READ, 0, 2 * MIB), EINVAL),
    ):
        error = await outcome(reply)
        assert isinstance(error, NbdError)
        assert error.number == number
    assert await client.read(0, MIB) == data
    assert (await disk.shown())["generation"] == disk.first


async def test_rule_25_keys_that_change_between_two_reads_are_taken_as_one_or_the_other(
    disk: Disk, world: World
) -> None:
    values = {"sectors": ["2048", HUGE, "16384", "-1", "0"], "sector-size": ["512", "513", "4096"]}
    client = await disk.client()
    await client.write(0, bytes(4096))  # a client that is not served yet waits for a medium
    await world.backend.flicker(values, every_ms=1, vbd=disk.vdev)
    for turn in range(30):
        reply = client.start(WRITE, 4096 * turn, 4096, bytes([turn]) * 4096)

        async def looked(reply: asyncio.Future[bytes] = reply) -> bool:
            await world.host.store.write(f"{disk.back}/state", "4")  # "look again"
            await asyncio.wait({reply}, timeout=1)
            return reply.done()

        await eventually("an answer to a request", looked)
        if isinstance(await outcome(reply), ConnectionError):
            client = await disk.client()
    shown = await disk.until("listed", lambda s: s.get("geometry"))
    assert shown["geometry"]["sectors"] in (0, 2048, 16384)  # 0: its medium is out
    assert shown["geometry"]["sector_size"] in (512, 4096)
    await world.backend.flicker({}, vbd=disk.vdev)
    await world.backend.write({"sectors": "16384", "sector-size": "512"}, vbd=disk.vdev)
    before = (await disk.shown())["generation"]
    await disk.state(6)
    await disk.connected(after=before)
    await disk.works()


# -- rule 26: states and nodes -------------------------------------------------------------------


@pytest.mark.parametrize("state", [0, 1, 2, 3, 5, 6, 7, 8, 42, -1])
async def test_rule_26_any_state_while_connected_is_walked_out_of(disk: Disk, state: int) -> None:
    client = await disk.client()
    data = [os.urandom(4096) for _ in range(16)]
    await disk.fault(Fault.delay(5, op="write"))
    replies = [client.start(WRITE, 4096 * i, 4096, data[i]) for i in range(16)]
    await disk.fired("delay")
    await disk.state(state)
    ends = [await outcome(reply) for reply in replies]
    await disk.connected(after=disk.first)
    await disk.works()
    client = await disk.client()
    for i, end in enumerate(ends):
        if not isinstance(end, Exception):
            assert await client.read(4096 * i, 4096) == data[i], "an acknowledged write is lost"


@pytest.mark.parametrize("step", ["probe", "connect", "closing", "closed", "reconnect"])
@pytest.mark.parametrize("state", [0, 1, 4, 5, 6])
async def test_rule_26_any_state_at_any_step_of_the_walk_ends_connected(
    attach: Attach, world: World, step: Step, state: int
) -> None:
    misstep = Misstep.state(state, at=step)
    if step in ("probe", "connect"):
        await world.backend.misstep(misstep)
        disk = await attach(wait=False)
    else:
        disk = await attach()
        await disk.misstep(misstep)
        # A worker's death, so that every step of the round is the backend's to answer.
        os.kill((await disk.shown())["worker_pid"], signal.SIGKILL)
    await disk.misstepped(f"state at {step}")
    if step in ("probe", "closed", "reconnect") or (step == "connect" and state == 4):
        # A backend that stays where it jumped to waits for nothing: a human helps.
        await disk.state(5)
    await disk.connected(after=disk.first)
    await disk.works()


async def test_rule_26_closed_in_the_middle_of_i_o_loses_no_acknowledged_write(disk: Disk) -> None:
    data: dict[int, bytes] = {}
    generation = disk.first
    for turn in range(5):
        client = await disk.client()
        await disk.fault(Fault.delay(0, 4))
        replies = {}
        for i in range(64):
            at = (turn * 64 + i) * 4096
            replies[at] = (block := os.urandom(4096)), client.start(WRITE, at, 4096, block)
        await disk.fired("delay", 1 + 64 * turn)
        await disk.state(6)
        for at, (block, reply) in replies.items():
            if not isinstance(await outcome(reply), Exception):
                data[at] = block
        generation = (await disk.connected(after=generation))["generation"]
        await disk.leave()
    client = await disk.client()
    for at, block in data.items():
        assert await client.read(at, 4096) == block


async def test_rule_26_closing_again_and_again_is_one_close(disk: Disk) -> None:
    client = await disk.client()
    await client.write(0, b"\x77" * 4096)
    for _ in range(10):
        await disk.state(5)
    await disk.connected(after=disk.first)
    client = await disk.client() if not client.alive else client
    assert await client.read(0, 4096) == b"\x77" * 4096
    await disk.works()


async def test_rule_26_a_backend_that_vanishes_mid_i_o_ends_the_requests_and_may_return(
    disk: Disk, world: World
) -> None:
    client = await disk.client()
    await client.write(0, b"\x55" * 4096)
    await disk.fault(Fault.stall(op="write"))
    replies = [client.start(WRITE, MIB + 4096 * i, 4096, bytes(4096)) for i in range(20)]
    await disk.fired("stall", 20)
    await world.backend.vanish(vbd=disk.vdev)
    for reply in replies:
        assert isinstance(await outcome(reply), ConnectionError)
    await disk.until("it is no longer served", lambda s: not s)
    await disk.logged("closed: removed")
    await world.backend.release()
    await world.backend.come_back()
    await world.host.store.write(f"{disk.front}/state", "1")  # as a toolstack that attaches it
    await world.end_supervisor(signal.SIGTERM)
    await world.serve()
    await disk.connected()
    client = await disk.client()
    assert await client.read(0, 4096) == b"\x55" * 4096


async def test_rule_26_nodes_removed_by_force_mid_i_o_leave_nothing(
    disk: Disk, world: World
) -> None:
    client = await disk.client()
    await disk.fault(Fault.stall())
    replies = [client.start(WRITE, 4096 * i, 4096, bytes(4096)) for i in range(40)]
    await disk.fired("stall", 32)
    await world.host.detach_disk(1, disk.vdev, force=True, timeout=2)
    disk.gone = True
    for reply in replies:
        assert isinstance(await outcome(reply), ConnectionError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend", ELSEWHERE),
        ("backend", "nowhere"),
        ("backend-id", "7"),
        ("backend-id", "-1"),
        ("backend-id", HUGE),
    ],
)
async def test_rule_26_another_backend_id_or_path_ends_in_order(
    disk: Disk, world: World, key: str, value: str
) -> None:
    """Both keys are the toolstack's; what is read anew is believed, nonsense is not."""
    client = await disk.client()
    await client.write(0, bytes(4096))
    store = world.host.store
    path = f"{disk.front}/{key}"
    right = await store.read_opt(path)
    assert right is not None
    await store.write(path, value)
    with contextlib.suppress(NbdError, ConnectionError):
        await finished(client.start(READ, 0, 4096))
    await disk.leave()
    restored = key == "backend"
    if restored:
        await disk.logged("the domain was suspended and resumed without us")
    await store.write(path, right)
    await disk.until("served again, or given up", lambda s: not s or s["phase"] == "connected")
    if await disk.shown():
        await disk.works()
    else:  # given up as removed: a toolstack would make it anew
        await world.host.detach_disk(1, disk.vdev, force=True, timeout=2)
        disk.gone = True
    if restored:
        # A domain that finds another backend was restored: its old port must stay bound for
        # ever (docs/suspend.md), here by its worker, which no guest's end takes with it.
        parked = re.search(r"process (\d+): its ports cannot be taken over", disk.log)
        assert parked is not None, disk.log
        os.kill(int(parked[1]), signal.SIGKILL)


async def test_rule_26_a_backend_killed_mid_i_o_that_returns_poorer_is_used_as_it_is(
    attach: Attach, world: World
) -> None:
    path = world.host.directory / "image"
    path.write_bytes(bytes(8 * MIB))
    disk = await attach(target=str(path))
    client = await disk.client()
    assert client.flags & SEND_FLUSH
    await client.write(0, b"\x42" * 65536)
    await client.flush()
    await disk.fault(Fault.delay(1, 10))
    replies = [client.start(WRITE, MIB + 4096 * i, 4096, b"\x43" * 4096) for i in range(50)]
    await disk.fired("delay", 10)
    await world.backend_dies(
        flush=False, barrier=False, discard=False, persistent=False, indirect=0, ring_order=0,
        queues=1,
    )  # fmt: skip
    ends = [await outcome(reply) for reply in replies]
    await disk.connected(after=disk.first)
    await disk.leave()
    client = await disk.client()
    assert not client.flags & (SEND_FLUSH | SEND_TRIM)
    assert await client.read(0, 65536) == b"\x42" * 65536
    for i, end in enumerate(ends):
        if not isinstance(end, Exception):
            assert await client.read(MIB + 4096 * i, 4096) == b"\x43" * 4096
    await disk.leave()
    await world.host.detach_disk(1, disk.vdev, timeout=PATIENCE)
    disk.gone = True
    await world.backend.stop()  # ensure_alive() starts an ordinary one


# -- rules 27 and 28: waits ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "missing"),
    [
        ("probe", "backend InitWait never came within 2 s (frontend Initialising (1)"),
        ("connect", "backend Connected never came within 2 s (frontend Initialised (3)"),
        ("closing", "backend Closing never came within 1 s (frontend Closing (5)"),
        ("closed", "backend Closed never came within 1 s (frontend Closed (6)"),
        ("reconnect", "backend InitWait never came within 2 s (frontend Initialising (1)"),
    ],
)
async def test_rule_27_a_wait_ends_and_names_who_is_stuck(
    attach: Attach, world: World, step: Step, missing: str
) -> None:
    silence = Misstep.silence(at=step)
    if step in ("probe", "connect"):
        await world.backend.misstep(silence)
        disk = await attach(wait=False)
    else:
        disk = await attach()
        await disk.misstep(silence)
        # A worker's death, so that every step of the round is the backend's to answer.
        os.kill((await disk.shown())["worker_pid"], signal.SIGKILL)
    # Another step may be late as well, where the machine is: the one left out is so in each round.
    shown = await disk.until(missing, lambda s: s and missing in s["reason"])
    assert shown["phase"] in ("failed", "reconnecting")
    await world.honest()
    if step == "probe":
        await disk.state(2)  # Linux probes once: what was not done then is done by hand
    await disk.connected()
    await disk.works()


async def test_rule_27_one_stuck_backend_keeps_no_other_disk_waiting(
    attach: Attach, world: World
) -> None:
    await world.backend.misstep(Misstep.silence(at="connect"))
    stuck = await attach(wait=False)
    other = await attach(wait=False)
    for disk in (stuck, other):
        await disk.until("it waits", lambda s: s and s["frontend_state"] == "Initialised (3)")
    await other.misstep()
    await other.connected()
    await other.works()
    await world.host.detach_disk(1, other.vdev, timeout=PATIENCE)
    other.gone = True
    assert (await stuck.shown())["phase"] != "connected"


async def test_rule_28_a_stalled_backend_does_not_keep_a_detach_from_ending(
    disk: Disk, world: World
) -> None:
    """Requests that are never answered; the client has gone."""
    client = await disk.client()
    await disk.fault(Fault.stall())
    for i in range(32):
        client.start(WRITE, 4096 * i, 4096, bytes(4096))
    await disk.fired("stall", 32)
    await disk.leave()
    await world.host.detach_disk(1, disk.vdev, timeout=PATIENCE)
    disk.gone = True
    await disk.logged("detached by the toolstack")


async def test_rule_28_a_client_that_stays_is_refused_not_hung(disk: Disk, world: World) -> None:
    """In use: the detach is refused by name, and completes when the client goes."""
    client = await disk.client()
    await disk.fault(Fault.stall())
    reply = client.start(READ, 0, 4096)
    await disk.fired("stall")
    detach = asyncio.create_task(world.host.detach_disk(1, disk.vdev, timeout=2 * PATIENCE))
    await disk.until("refused", lambda s: s["phase"] == "detach refused")
    await disk.logged("refused while in use: pid")
    assert not reply.done()
    await disk.release()
    await disk.leave()
    await detach
    disk.gone = True


async def test_rule_28_a_supervisor_ends_in_time_although_a_backend_is_silent(
    disk: Disk, world: World
) -> None:
    client = await disk.client()
    await client.write(0, bytes(4096))
    await disk.leave()
    await disk.misstep(Misstep.silence(at="closing"))
    await world.end_supervisor(signal.SIGTERM)  # or fails
    assert "backend Closing never came" in disk.log
    await disk.misstep()
    await world.serve()
    await disk.connected()
    await disk.works()
