# SPDX-License-Identifier: BSD-2-Clause
"""Programs that are told what happens to a device."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest
from waiting import PATIENCE, eventually

from pvfront import hooks
from pvfront.hooks import MOMENTS, Hooks, trouble


def program(directory: Path, name: str, body: str, mode: int = 0o755) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(mode)
    return path


def ended(pid: int) -> bool:
    """Gone, or dead and not yet collected by whoever inherits it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] in "ZX"
    except OSError:
        return True


async def told(to: Hooks) -> None:
    await asyncio.wait_for(to.told(), PATIENCE)


async def test_every_program_is_run_in_order_with_what_happened(tmp_path: Path) -> None:
    made, out = tmp_path / "hooks.d", tmp_path / "out"
    for name in ("20-second", "10-first"):
        program(made, name, f'echo "{name} $PVFRONT_EVENT $PVFRONT_DEVICE $PVFRONT_SIZE" >> {out}')
    to = Hooks(made)
    to.tell("resize", {"DEVICE": "/dev/pvfront/xvdb", "SIZE": 4096})
    to.tell("eject", {"DEVICE": "/dev/pvfront/xvdb"})
    await told(to)
    assert out.read_text().splitlines() == [
        "10-first resize /dev/pvfront/xvdb 4096",
        "20-second resize /dev/pvfront/xvdb 4096",
        "10-first eject /dev/pvfront/xvdb ",
        "20-second eject /dev/pvfront/xvdb ",
    ]


async def test_what_is_no_program_or_has_an_editors_name_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "hooks.d"
    for name in ("a.dpkg-old", "b~", ".hidden"):
        program(made, name, "true")
    program(made, "not-executable", "true", 0o644)
    (made / "directory").mkdir()
    good = program(made, "good", "true")
    assert Hooks(made).programs() == [good]


async def test_without_a_directory_nothing_happens(tmp_path: Path) -> None:
    to = Hooks(tmp_path / "none")
    to.tell("resize", {})
    await told(to)
    await to.close()


async def test_output_and_a_bad_end_go_to_the_log_and_the_next_is_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = tmp_path / "hooks.d"
    program(made, "1", "echo one; echo two >&2; exit 3")
    program(made, "2", "echo after")
    (made / "0").write_text("#!/nonexistent\n")
    (made / "0").chmod(0o755)
    to = Hooks(made)
    to.tell("resize", {})
    await told(to)
    assert [record.message for record in caplog.records][1:] == [
        "hook 1: one",
        "hook 1: two",
        "hook 1: resize: ended with status 3",
        "hook 2: after",
    ]
    assert "hook 0: " in caplog.records[0].message


async def test_a_hook_that_hangs_is_killed_with_all_that_it_started(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, pids = tmp_path / "hooks.d", tmp_path / "pids"
    program(made, "hangs", f"sleep 1000 & echo $! $$ > {pids}; wait")
    to = Hooks(made, limit=1.0)
    # A machine that is busy may let it get no further than its beginning in that second.
    while not pids.exists() or len(pids.read_text().split()) < 2:
        to.tell("resize", {})
        await told(to)
        assert "hook hangs: killed: not done with resize in 1 s" in caplog.text
    for pid in map(int, pids.read_text().split()):
        await eventually("the end of what it started", lambda pid=pid: ended(pid))


async def test_endless_output_is_cut_but_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = tmp_path / "hooks.d"
    program(made, "talks", "head -c 200000 /dev/zero; echo; seq 1000; echo the end >&2")
    to = Hooks(made)
    to.tell("resize", {})
    await told(to)
    assert len(caplog.records) <= hooks.LINES
    assert "killed" not in caplog.text


async def test_more_events_than_can_wait_are_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    to = Hooks(tmp_path)
    for _ in range(hooks.WAITING + 1):
        to.tell("resize", {})
    assert "resize dropped" in caplog.text
    await told(to)


async def test_close_ends_what_runs(tmp_path: Path) -> None:
    made, pids = tmp_path / "hooks.d", tmp_path / "pids"
    os.mkfifo(pids)
    program(made, "hangs", f"echo $$ > {pids}; sleep 1000")
    to = Hooks(made)
    to.tell("resize", {})
    pid = int(await asyncio.wait_for(asyncio.to_thread(pids.read_text), PATIENCE))
    await to.close()
    await eventually("its end", lambda: ended(pid))


async def test_a_size_is_told_to_the_programs_of_its_own_directory_too(tmp_path: Path) -> None:
    made, out = tmp_path / "hooks.d", tmp_path / "out"
    program(made, "all", f'echo "all $PVFRONT_EVENT" >> {out}')
    program(made / "post-resize.d", "grow", f'echo "grow $PVFRONT_EVENT" >> {out}')
    program(made / "pre-suspend.d", "no", f"echo no >> {out}")
    to = Hooks(made)
    to.tell("resize", {})
    to.tell("eject", {})
    await told(to)
    assert out.read_text().splitlines() == ["all resize", "grow resize", "all eject"]


OUTPUT = r"printf 'a\tgr\303\274n \033[2J\377\r\n'; printf '%05000d' 1"


async def test_what_a_hook_prints_does_nothing_to_a_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = tmp_path / "hooks.d"
    program(made / "post-link.d", "say", OUTPUT)
    with caplog.at_level(logging.INFO):
        assert await Hooks(made).run("post-link") == []
    first, second = [r.getMessage() for r in caplog.records if "hook say" in r.getMessage()]
    assert first == "hook say: a       gr\u00fcn ?[2J\ufffd"
    assert len(second) < 1100


def test_what_is_never_run_or_may_be_written_by_others_is_named(tmp_path: Path) -> None:
    made = tmp_path / "hooks.d"
    assert trouble(made) == []
    for moment in MOMENTS:
        program(made / f"{moment}.d", "well", "true")
    (made / "post-link.d" / "README").write_text("")
    (made / "post-link.d" / "old.dpkg-bak").write_text("")
    assert trouble(made) == []
    program(made / "post-link.d", "notify.sh", "true")
    program(made / "pre-link.d", "never", "true")
    program(made, "open", "true")
    (made / "open").chmod(0o775)
    (made / "post-link.d" / "well").chmod(0o644)
    assert [text.replace(f"{made}/", "") for text, _ in trouble(made)] == [
        "open is run as root, and others than root may write it",
        "post-link.d/notify.sh is never run: its name may have letters, digits, _ and - only",
        "post-link.d/well is never run: it is not executable",
        "nothing in pre-link.d is ever run",
    ]
    assert all(fix for _, fix in trouble(made))


async def test_a_moment_is_over_when_its_programs_are_and_says_which_failed(
    tmp_path: Path,
) -> None:
    made, out = tmp_path / "hooks.d", tmp_path / "out"
    program(made / "pre-suspend.d", "1-well", f'echo "$PVFRONT_EVENT $PVFRONT_WHY" >> {out}')
    program(made / "pre-suspend.d", "2-bad", "exit 3")
    (made / "pre-suspend.d" / "3-none").write_text("no program, though it may be run")
    (made / "pre-suspend.d" / "3-none").chmod(0o755)
    failures = await Hooks(made).run("pre-suspend", {"WHY": "migration"})
    assert out.read_text() == "pre-suspend migration\n"
    assert failures[0] == "2-bad: pre-suspend: ended with status 3"
    assert "Exec format error" in failures[1]
    assert await Hooks(made).run("post-suspend") == []


async def test_a_hook_that_hangs_costs_the_moment_no_more_than_its_time(tmp_path: Path) -> None:
    made, out = tmp_path / "hooks.d", tmp_path / "out"
    program(made / "pre-suspend.d", "1-hangs", f"echo $$ > {out}; sleep 1000")
    program(made / "pre-suspend.d", "2-late", "true")
    # A machine that is busy may let it not even begin in that second.
    while not out.exists() or not out.read_text():
        failures = await asyncio.wait_for(Hooks(made).run("pre-suspend", within=1.0), PATIENCE)
        assert failures[0].startswith("1-hangs: killed: not done with pre-suspend in ")
        assert failures[1] == "2-late: not begun: no time is left for pre-suspend"
    await eventually("the end of what hung", lambda: ended(int(out.read_text())))
