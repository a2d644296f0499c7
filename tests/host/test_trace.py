# SPDX-License-Identifier: BSD-2-Clause
"""`pvfront trace`, and the end of a crash loop, on the whole service."""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

from test_export import Served, served
from waiting import PATIENCE, eventually

DIES = "signal 9"


async def events(it: Served, *arguments: str) -> list[dict[str, Any]]:
    found = json.loads(await it.pvfront("trace", "--json", *arguments))
    assert isinstance(found, list)
    return found


def kinds(found: list[dict[str, Any]], *wanted: str) -> list[tuple[str, str]]:
    return [(e["kind"], e["text"]) for e in found if e["kind"] in wanted]


async def kill_worker(it: Served) -> None:
    """Ends the worker that there is, and waits until the supervisor knows."""
    pid = (await it.until("a worker", lambda s: s["worker_pid"]))["worker_pid"]
    os.kill(pid, signal.SIGKILL)
    await it.until("another worker, or none", lambda s: s["worker_pid"] != pid)


async def test_the_walk_is_on_record_from_the_first_state_to_connected(served: Served) -> None:
    found = await events(served, "xvdb")
    states = kinds(found, "frontend", "backend")
    for wanted in (("frontend", "Initialised (3)"), ("backend", "Connected (4)"),
                   ("frontend", "Connected (4)")):  # fmt: skip
        assert wanted in states
    ours = states.index(("frontend", "Initialised (3)"))
    theirs = states.index(("backend", "Connected (4)"))
    assert ours < theirs < states.index(("frontend", "Connected (4)"))
    answer = next(e for e in found if (e["kind"], e["text"]) == states[theirs])
    assert answer["answered"] == "frontend Initialised (3)"
    assert 0 <= answer["waited"] < PATIENCE
    (attached,) = [e for e in found if e["kind"] == "attached"]
    assert len(attached["ports"]) == 1
    assert attached["pages"] > 0
    assert attached["generation"] == 1
    assert ("phase", "connected") in kinds(found, "phase")
    clocks = [e["clock"] for e in found]
    assert clocks == sorted(clocks)


async def test_a_dead_worker_and_a_new_supervisor_are_on_record_in_one_file(
    served: Served,
) -> None:
    await kill_worker(served)
    await served.until(
        "connected again", lambda s: s["generation"] > 1 and s["phase"] == "connected"
    )
    await served.stop(signal.SIGKILL)
    killed = await events(served, "xvdb")
    assert any("signal 9" in text for _, text in kinds(killed, "died"))
    assert ("attached", 2) in [(e["kind"], e["generation"]) for e in killed]
    await served.serve("xvdb")
    found = await events(served, "51728")
    assert found[: len(killed)] == killed, "the killed supervisor's record goes on"
    later = found[len(killed) :]
    assert any(text.startswith("begins") for _, text in kinds(later, "service"))
    assert any(text.startswith("found, RUNNING") for _, text in kinds(later, "worker"))
    assert kinds(later, "phase")[-1] == ("phase", "connected: adopted")
    await served.stop()
    assert kinds(await events(served, "xvdb"), "phase")[-1] == ("phase", "closed")


async def test_the_timeline_reads_like_a_log_and_can_be_followed(served: Served) -> None:
    text = await served.pvfront("trace", "xvdb")
    assert any(
        line.split()[3:7] == ["xvdb", "#1", "phase", "connected"] for line in text.splitlines()
    ), text
    assert len((await served.pvfront("trace", "-n", "3")).splitlines()) == 3
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pvfront", "trace", "--follow", "--json", "-n", "1", "xvdb",
        env=served.environ, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            await process.stdout.readline()
            await kill_worker(served)
            while json.loads(await process.stdout.readline())["kind"] != "died":
                pass
    finally:
        process.kill()
        await process.wait()


async def test_a_crash_loop_is_a_failed_disk_with_its_reason_and_then_errors(
    served: Served,
) -> None:
    await served.stop()
    await served.serve(
        "-o", "start_limit_burst=3", "-o", "start_limit_interval=600",
        "-o", "dead_conn_timeout=2", "xvdb",
    )  # fmt: skip
    for _ in range(3):
        await kill_worker(served)
    shown = await served.until("failed", lambda s: s["phase"] == "failed")
    assert shown["reason"].startswith("its worker died 3 times within 600 s, the last time: ")
    assert "signal 9" in shown["reason"]
    assert shown["gave_up_at"] is not None
    done = await served.until("given up", lambda s: "I/O errors" in s["reason"])
    assert done["worker_pid"] is None
    assert not (served.run_dir / "xvdb.nbd").exists(), "clients are refused"

    def held() -> list[object]:
        books = served.host.dump()
        ports = [port for port in books["ports"] if port["domid"] == 1]
        return [*ports, *books["grants"], *[books["deferred"]] * bool(books["deferred"])]

    await eventually("nothing granted and no port any more", lambda: not held(), why=held)
    said = kinds(await events(served, "xvdb"), "died", "phase")
    assert [kind for kind, _ in said].count("died") == 3
    # A restart of the service serves it again.
    await served.stop()
    await served.serve("xvdb")
    await served.until("connected", lambda s: s["phase"] == "connected")


async def test_a_disk_in_a_crash_loop_is_detached(served: Served) -> None:
    """That it takes less than the toolstack's 10 s is shown in tests/unit/test_crash_loop.py."""
    await served.stop()
    await served.serve("-o", "start_limit_burst=1", "xvdb")
    await kill_worker(served)
    await served.until("failed", lambda s: s["phase"] == "failed")
    await served.host.detach_disk(1, 51728, timeout=PATIENCE)
    state = served.run_dir / "vbd-51728.json"
    await eventually("no state file", lambda: not state.exists(), why=served.log.read_text)
