# SPDX-License-Identifier: BSD-2-Clause
"""What no request may do to the agent, and the table of it in docs/agent.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from agentworld import HOME, agent_world
from waiting import eventually

from pvfront.agent.board import Board
from pvfront.agent.control import SHUTDOWN, Control
from pvfront.agent.memory import TARGET, Memory
from pvfront.agent.requests import NAME, VIFS, HostName, StaticAddresses
from pvfront.agent.settings import AgentSettings

ROOT = Path(__file__).resolve().parents[2]
BAD = (b"\xff\xfe\x00poweroff", b"\x1b]0;x\x07" * 400, b"\xc3" * 4000, "10.0.0.\u0661/24".encode())


async def test_bytes_that_are_no_text_end_no_part_of_the_agent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[tuple[str, ...]] = []

    async def run(*words: str) -> str:
        ran.append(words)
        return ""

    async def stays_up() -> str:
        return ""

    setting = f"{VIFS}/0/static-ip-setting"
    allowed = AgentSettings(static_ip=True, set_hostname=True)
    async with agent_world(tmp_path, allowed) as world:
        world.file("sys/devices/system/xen_memory/xen_memory0/target_kb", "524288\n")
        world.set(TARGET, "524288", perms="n0,r5")
        world.set(VIFS, "")
        world.set(NAME, "")
        control, board = Control(Board(), run=run, kind=stays_up), Board()
        static = StaticAddresses(board, lambda _: "enX0", run=run)
        parts = (control, Memory(run=run, kernel=0.01), static, HostName(board, run=run))
        async with world.running(*parts) as agent:
            for bad in BAD:
                for path in (SHUTDOWN, TARGET, f"{NAME}/name", f"{setting}/address"):
                    world.mem.set(f"{HOME}/{path}", bad, perms="n5")
                world.set(f"{setting}/enabled", "1")
                world.set(f"{NAME}/action", "set")
                for path in (f"{setting}/enabled", f"{NAME}/action"):
                    await eventually(f"the end of {path}", lambda at=path: world.get(at) is None)
                assert world.get(f"{setting}/error-code") == "1"
                assert world.get(f"{NAME}/state") == "Failed"
            world.set(SHUTDOWN, "suspend")
            await eventually("the next", lambda: control.status()["last_request"] == "suspend")
            world.set(TARGET, "524288", perms="n0,r5")
            await eventually("the target", lambda: agent.status()["memory"]["target_kib"] == 524288)
            assert [name for name, part in agent.status().items() if "failed" in part] == []
    assert ran == []
    assert caplog.records
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert max(len(record.getMessage()) for record in caplog.records) < 400


def test_each_row_of_the_table_names_tests_that_there_are() -> None:
    text = (ROOT / "docs" / "agent.md").read_text().partition("\n## Bad input\n")[2]
    rows = re.findall(r"^\| [^|-].*\|(.*)\|$", text.partition("\n## ")[0], re.M)[1:]
    assert len(rows) > 10
    tests = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", "\n".join(tests)))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, set(named) - defined
