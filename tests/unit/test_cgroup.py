# SPDX-License-Identifier: BSD-2-Clause
"""Who is frozen before a suspend, and that nobody ever stays frozen."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import PATIENCE, eventually, wait_for

from pvfront.cgroup import (
    GUARD,
    FreezeFailed,
    Freezer,
    awake_tasks,
    clients,
    mount_point,
    own_cgroup,
    thaw_listed,
)

# -- pure ------------------------------------------------------------------------------------------


def test_the_unified_hierarchy_is_found_among_mounts() -> None:
    mountinfo = (
        "24 1 0:22 / /sys rw - sysfs sysfs rw\n"
        "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    assert mount_point(mountinfo) == Path("/sys/fs/cgroup")


def test_no_unified_hierarchy_is_none() -> None:
    assert mount_point("24 1 0:22 / /sys rw - sysfs sysfs rw\nnonsense\n") is None


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("0::/system.slice/pvfront-vbd.service\n", "/system.slice/pvfront-vbd.service"),
        ("4:memory:/x\n0::/a/b\n", "/a/b"),
        ("0::/\n", "/"),
        ("4:memory:/x\n", "/"),
        ("0::/pvfront.slice/pvfront-vbd.service\n", "/pvfront.slice"),
        ("0::/a.slice/pvfront.slice/pvfront-vbd.service/x\n", "/a.slice/pvfront.slice"),
    ],
)
def test_our_own_cgroup_is_read_from_proc(text: str, own: str) -> None:
    assert own_cgroup(text) == own


# -- a directory that looks like a cgroup tree -------------------------------------------------


def group(root: Path, path: str, *, populated: bool = True, frozen: bool = False) -> Path:
    here = root / path
    here.mkdir(parents=True, exist_ok=True)
    (here / "cgroup.events").write_text(f"populated {int(populated)}\nfrozen {int(frozen)}\n")
    (here / "cgroup.freeze").write_text("1\n" if frozen else "0\n")
    (here / "cgroup.procs").write_text("")
    return here


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "cgroup"
    for path in (
        "init.scope",
        "user.slice",
        "user.slice/user-0.slice",
        "system.slice",
        "system.slice/fio.service",
        "system.slice/pvfront-vbd.service",
        "system.slice/systemd-journald.service",
    ):
        group(root, path)
    return root


OWN = "/system.slice/pvfront-vbd.service"


def names(groups: list[Path]) -> list[str]:
    return sorted(path.name for path in groups)


def test_everything_beside_our_path_is_frozen_but_pid_1(tree: Path) -> None:
    found = clients(tree, OWN)
    assert names(found) == ["fio.service", "systemd-journald.service", "user.slice"]


def test_init_scope_is_spared_only_at_the_top(tree: Path) -> None:
    """A user's own systemd has an init.scope too: nothing special."""
    group(tree, "system.slice/init.scope")
    assert "init.scope" in names(clients(tree, OWN))


def test_cgroups_without_processes_are_left_alone(tree: Path) -> None:
    group(tree, "system.slice/empty.service", populated=False)
    assert "empty.service" not in names(clients(tree, OWN))


def test_what_somebody_else_froze_is_not_ours_to_thaw(tree: Path) -> None:
    group(tree, "system.slice/paused.service", frozen=True)
    assert "paused.service" not in names(clients(tree, OWN))


def test_the_cgroups_of_other_services_go_on_as_well(tree: Path) -> None:
    group(tree, "user.slice/user-0.slice")
    group(tree, "user.slice/user-0.slice/lend.scope")
    group(tree, "user.slice/user-0.slice/shell.scope")
    found = clients(tree, OWN, others=["/user.slice/user-0.slice/lend.scope", "/system.slice"])
    assert names(found) == ["shell.scope"], "all below system.slice goes on, and lend.scope"


def test_our_slice_is_spared_as_a_whole(tree: Path) -> None:
    group(tree, "pvfront.slice")
    group(tree, "pvfront.slice/pvfront-vbd.service")
    group(tree, "pvfront.slice/pvfront-vif.service")
    found = clients(tree, own_cgroup("0::/pvfront.slice/pvfront-vbd.service\n"))
    assert names(found) == ["system.slice", "user.slice"]


def freezer(tree: Path, tmp_path: Path) -> Freezer:
    return Freezer(tmp_path / "run" / "suspend.frozen", root=tree, own=OWN)


def settle(root: Path) -> None:
    """What the kernel does: a cgroup that is asked to freeze is frozen."""
    for asked in root.rglob("cgroup.freeze"):
        frozen = int(asked.read_text())
        (asked.parent / "cgroup.events").write_text(f"populated 1\nfrozen {frozen}\n")


async def kernel(root: Path) -> None:
    while True:
        settle(root)
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def living(root: Path):  # type: ignore[no-untyped-def]
    task = asyncio.create_task(kernel(root))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_freezing_returns_when_all_are_frozen_and_thawing_undoes_it(
    tree: Path, tmp_path: Path
) -> None:
    under_test = freezer(tree, tmp_path)
    under_test.start()
    async with living(tree):
        assert await under_test.freeze(PATIENCE) == 3
    assert (tree / "user.slice/cgroup.freeze").read_text() == "1"
    assert (tree / "init.scope/cgroup.freeze").read_text() == "0\n"
    assert (tree / "system.slice/cgroup.freeze").read_text() == "0\n"
    under_test.thaw()
    assert (tree / "user.slice/cgroup.freeze").read_text() == "0"
    under_test.close()


async def test_file_systems_are_listed_before_they_are_frozen_and_thawed_with_the_programs(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, story = tmp_path / "run" / "suspend.frozen", []

    def hold(where: str) -> bool:
        story.append(f"hold {where}")
        assert where in record.read_text().splitlines()
        return where != "/fat"  # which cannot be frozen

    monkeypatch.setattr("pvfront.fssync.hold", hold)
    monkeypatch.setattr("pvfront.fssync.let_go", lambda where: story.append(f"let go {where}"))
    under_test = freezer(tree, tmp_path)
    under_test.start()
    async with living(tree):
        await under_test.freeze(PATIENCE)
    await under_test.hold(["/srv", "/fat"], PATIENCE)
    under_test.close()
    await eventually("the thaw", lambda: sorted(story) == ["hold /fat", "hold /srv", "let go /srv"])
    assert not record.exists()


async def test_a_file_system_that_freezes_too_late_is_thawed_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[str] = []
    answers = threading.Event()

    def hold(where: str) -> bool:
        answers.wait(PATIENCE)
        story.append("frozen")
        return True

    monkeypatch.setattr("pvfront.fssync.hold", hold)
    monkeypatch.setattr("pvfront.fssync.let_go", lambda where: story.append("thawed"))
    under_test = freezer(tree, tmp_path)
    with pytest.raises(FreezeFailed, match=r"file systems not frozen after 0\.05 s: /srv"):
        await under_test.hold(["/srv"], 0.05)
    under_test.thaw()  # too early: there is nothing to thaw yet
    await eventually("the vain thaw", lambda: story == ["thawed"])
    answers.set()
    await eventually("the end", lambda: story == ["thawed", "frozen", "thawed"])
    under_test.close()


async def test_a_cgroup_that_appears_while_freezing_is_frozen_too(
    tree: Path, tmp_path: Path
) -> None:
    under_test = freezer(tree, tmp_path)
    under_test.start()
    freezing = asyncio.create_task(under_test.freeze(PATIENCE))
    await asyncio.sleep(0)
    group(tree, "system.slice/late.service")
    async with living(tree):
        assert await freezing == 4
    under_test.close()


async def test_the_list_of_what_is_frozen_is_there_before_it_is_and_gone_after(
    tree: Path, tmp_path: Path
) -> None:
    record = tmp_path / "run" / "suspend.frozen"
    under_test = freezer(tree, tmp_path)
    under_test.start()
    async with living(tree):
        await under_test.freeze(PATIENCE)
    assert names([Path(line) for line in record.read_text().splitlines()]) == [
        "fio.service",
        "systemd-journald.service",
        "user.slice",
    ]
    under_test.thaw()
    assert not record.exists()
    under_test.close()


async def test_what_does_not_freeze_is_named(tree: Path, tmp_path: Path) -> None:
    under_test = freezer(tree, tmp_path)
    under_test.start()
    with pytest.raises(FreezeFailed, match=r"not frozen after 0\.1 s: .*fio\.service"):
        await under_test.freeze(0.1)
    under_test.thaw()
    under_test.close()


async def test_a_cgroup_that_goes_away_meanwhile_counts_as_frozen(
    tree: Path, tmp_path: Path
) -> None:
    under_test = freezer(tree, tmp_path)
    under_test.start()
    freezing = asyncio.create_task(under_test.freeze(PATIENCE))
    asked = tree / "system.slice/fio.service/cgroup.freeze"
    await eventually("it is asked to freeze", lambda: asked.read_text().strip() == "1")
    for name in ("cgroup.events", "cgroup.freeze", "cgroup.procs"):
        (tree / "system.slice/fio.service" / name).unlink()
    (tree / "system.slice/fio.service").rmdir()
    async with living(tree):
        await freezing
    under_test.thaw()
    under_test.close()


async def test_what_a_dead_predecessor_left_frozen_is_thawed_at_start(
    tree: Path, tmp_path: Path
) -> None:
    record = tmp_path / "run" / "suspend.frozen"
    record.parent.mkdir()
    left = group(tree, "user.slice", frozen=True)
    record.write_text(f"{left}\n{tree}/gone.service\n")
    under_test = freezer(tree, tmp_path)
    under_test.start()
    assert (left / "cgroup.freeze").read_text() == "0"
    assert not record.exists()
    under_test.close()


def test_thawing_without_a_list_is_harmless(tmp_path: Path) -> None:
    assert thaw_listed(tmp_path / "none") == []


async def test_without_a_cgroup_of_our_own_nothing_is_frozen(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for root, own in ((None, "/"), (tree, "/")):
        under_test = Freezer(tmp_path / "record", root=root, own=own)
        under_test.start()
        assert under_test.guard_pid is None
        assert await under_test.freeze(PATIENCE) == 0
        under_test.close()
    assert "programs are not frozen before a suspend" in caplog.text


def test_the_tasks_that_keep_a_cgroup_awake_are_named(tree: Path, tmp_path: Path) -> None:
    (tree / "user.slice/user-0.slice/cgroup.procs").write_text("81\n99999\n")
    task = tmp_path / "proc/81/task/81"
    task.mkdir(parents=True)
    (task / "stat").write_text("81 (fio (x)) D 1 2 3")
    (task / "wchan").write_text("submit_bio_wait")
    assert awake_tasks(tree / "user.slice", proc=tmp_path / "proc") == [
        "fio (x)[81] D submit_bio_wait"
    ]


# -- the guard ---------------------------------------------------------------------------------


@pytest.fixture
def frozen(tree: Path) -> Path:
    return group(tree, "user.slice", frozen=True)


@pytest.fixture
def guard(tmp_path: Path, frozen: Path) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "list").write_text(f"{tmp_path}/gone\n{frozen}\n")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(GUARD), str(tmp_path / "list"), "0.3"],
        stdin=subprocess.PIPE,
    )
    yield process
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    process.kill()
    process.wait()


def thawed(path: Path) -> bool:
    return (path / "cgroup.freeze").read_text().startswith("0")


def test_the_end_of_the_pipe_thaws_what_is_listed(
    guard: subprocess.Popen[bytes], frozen: Path, tmp_path: Path
) -> None:
    assert guard.stdin is not None
    guard.stdin.close()
    assert guard.wait(PATIENCE) == 0
    assert thawed(frozen)
    assert not (tmp_path / "list").exists()


def test_a_supervisor_that_hangs_with_programs_frozen_has_them_thawed_in_time(
    guard: subprocess.Popen[bytes], frozen: Path
) -> None:
    assert guard.stdin is not None
    guard.stdin.write(b"F")
    guard.stdin.flush()
    wait_for("thaw after the limit", lambda: thawed(frozen))
    assert guard.poll() is None


def test_the_guard_outlives_the_signals_that_end_a_service(
    guard: subprocess.Popen[bytes], frozen: Path
) -> None:
    assert guard.stdin is not None
    guard.stdin.write(b"F")
    guard.stdin.flush()
    # The list goes last: from then on the guard only waits.
    wait_for("the guard to run", lambda: not (frozen.parent.parent / "list").exists())
    assert thawed(frozen)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        guard.send_signal(number)
    group(frozen.parent, "user.slice", frozen=True)
    (frozen.parent.parent / "list").write_text(f"{frozen}\n")
    guard.stdin.close()
    assert guard.wait(PATIENCE) == 0
    assert thawed(frozen)


# -- the real thing: this kernel's cgroup v2 -----------------------------------------------------


@pytest.fixture
def real_root() -> Iterator[Path]:
    """A cgroup v2 directory of our own, with every process in it ended at the end."""
    mounted = mount_point(Path("/proc/self/mountinfo").read_text())
    if mounted is None:
        pytest.skip("cgroup v2 is not mounted here")
    root = mounted / f"pvfront-test-{os.getpid()}"
    try:
        root.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield root
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir():
            end(path)
    end(root)


def end(path: Path) -> None:
    (path / "cgroup.freeze").write_text("0")
    for pid in (path / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    wait_for("an empty cgroup", lambda: "populated 0" in (path / "cgroup.events").read_text())
    path.rmdir()


def inhabit(path: Path) -> subprocess.Popen[bytes]:
    path.mkdir(exist_ok=True)
    process = subprocess.Popen(["sleep", "600"])
    (path / "cgroup.procs").write_text(str(process.pid))
    return process


def is_frozen(path: Path) -> bool:
    return "frozen 1" in (path / "cgroup.events").read_text()


@pytest.fixture
def sleepers(real_root: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [inhabit(real_root / "own"), inhabit(real_root / "client")]
    yield processes
    for process in processes:
        process.kill()
        (real_root / "client/cgroup.freeze").write_text("0")
        process.wait()


async def test_real_programs_are_frozen_and_thawed(
    real_root: Path, sleepers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    under_test = Freezer(tmp_path / "frozen", root=real_root, own="/own")
    under_test.start()
    assert await under_test.freeze(PATIENCE) == 1
    assert is_frozen(real_root / "client")
    assert not is_frozen(real_root / "own")
    under_test.thaw()
    wait_for("the programs' thaw", lambda: not is_frozen(real_root / "client"))
    under_test.close()


FREEZES_AND_WAITS = """
import asyncio, sys
from pathlib import Path
from pvfront.cgroup import Freezer
async def main():
    freezer = Freezer(Path(sys.argv[2]), root=Path(sys.argv[1]), own="/own")
    freezer.start()
    await freezer.freeze(60)
    print("frozen", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_programs_are_thawed_when_their_supervisor_is_killed(
    real_root: Path, sleepers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-c", FREEZES_AND_WAITS, str(real_root), str(tmp_path / "frozen")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert supervisor.stdout is not None
    assert supervisor.stdout.readline() == b"frozen\n"
    assert is_frozen(real_root / "client")
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    wait_for("thaw by the guard", lambda: not is_frozen(real_root / "client"))
    wait_for("the list to be gone", lambda: not (tmp_path / "frozen").exists())
