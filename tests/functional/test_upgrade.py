# SPDX-License-Identifier: BSD-2-Clause
"""A disk in use gets another worker: its users notice a pause, and the backend nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from world import Disk, World

from pvfront.workerprogram import binary

pytestmark = pytest.mark.disk

# The long count in a soak (`make soak`). More than may die within seconds: none of these dies.
UPGRADES = 100 if int(os.environ.get("PVFRONT_REPEATS", "1")) > 1 else 8
TEXT = re.compile(r"worker (\d+) took over from (\d+) with (\d+) requests .* pause of ([\d.]+) ms")


@pytest.fixture
def own_program(world: World) -> Iterator[Path]:
    """The service runs workers of a file of its own, which a test may replace."""
    from embedded_world import EmbeddedWorld

    assert isinstance(world, EmbeddedWorld)
    program = world.directory / "pvfront-worker"
    shutil.copy2(binary(), program)
    before = dict(world.environ)
    world.environ["PVFRONT_WORKER"] = str(program)
    world.stop()
    world.start()
    try:
        yield program
    finally:
        world.environ.clear()
        world.environ.update(before)
        world.stop()
        world.start()
        program.unlink()


def install(program: Path, text: str | None = None) -> None:
    """Replaces it, as a package manager does; None: by one that differs and does the same."""
    new = program.with_name("new-program")
    if text is None:
        new.write_bytes(program.read_bytes() + b"\0")
    else:
        new.write_text(text)
    new.chmod(0o755)
    new.replace(program)


def written(disk: Disk) -> int:
    counters = disk.status().get("statistics")
    return int(counters["write"]["requests"]) if counters else 0


def goes_on(world: World, disk: Disk) -> None:
    before = written(disk)
    world.wait_until("new writes", lambda: written(disk) > before)


def upgraded(world: World, disk: Disk) -> re.Match[str]:
    while True:
        ended = world.pvfront("upgrade", disk.name)
        found = TEXT.search(ended.stdout)
        if found and ended.code == 0:
            return found
        # A machine that is busy elsewhere for seconds: the old worker has gone on, as it should.
        assert "did not answer in time" in ended.stderr, ended


@pytest.mark.embedded  # tests/lab/test_upgrade.py has its own
def test_fio_at_depth_32_notices_nothing_of_upgrades(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    with world.disk() as disk:
        if disk.state()["target"] == "ublk":
            pytest.skip("a ublk device's worker cannot be handed over")
        load = disk.load(depth=32)
        first = disk.state()
        pauses, flying, pids = [], [], {first["worker_pid"]}
        goes_on(world, disk)
        for _ in range(UPGRADES):
            found = upgraded(world, disk)
            pids.add(int(found[1]))
            flying.append(int(found[3]))
            pauses.append(float(found[4]))
        last = disk.state()
        goes_on(world, disk)
        load.end()
        middle, longest = statistics.median(pauses), max(pauses)
        with capsys.disabled():
            print(
                f"\n{UPGRADES} upgrades at depth 32, {min(flying)} to {max(flying)} requests in "
                f"flight: median pause {middle:.1f} ms, longest {longest:.1f} ms"
            )
        assert len(pids) == UPGRADES + 1
        assert last["upgrades"] == UPGRADES
        assert (last["generation"], last["reconnects"]) == (first["generation"], 0)
        disk.fio(size="4M")
        world.assert_no_io_errors()


@pytest.mark.embedded
def test_a_reload_and_a_restart_bring_the_program_that_was_installed(
    world: World, own_program: Path
) -> None:
    with world.disk() as disk:
        load = disk.load(depth=8)
        goes_on(world, disk)
        first = disk.state()
        assert disk.status()["worker_outdated"] is False
        install(own_program)
        assert disk.status()["worker_outdated"] is True
        os.kill(world.supervisor(), signal.SIGHUP)
        world.wait_until("the reload", lambda: disk.state().get("upgrades") == 1)
        second = disk.state()
        assert second["worker_build"] != first["worker_build"]
        install(own_program)
        world.stop()
        world.start()
        world.wait_until(
            "the upgrade after a restart",
            lambda: disk.state().get("worker_build") not in (None, second["worker_build"]),
        )
        last = disk.state()
        assert last["generation"] == first["generation"]
        assert disk.status()["worker_outdated"] is False
        goes_on(world, disk)
        load.end()
        world.assert_no_io_errors()


@pytest.mark.embedded
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("#!/bin/sh\nexit 3\n", id="ends at once"),
        pytest.param("#!/bin/sh\nexec sleep 600\n", id="never says hello"),
    ],
)
def test_a_new_worker_that_does_not_begin_changes_nothing(
    world: World, own_program: Path, text: str
) -> None:
    with world.disk() as disk:
        load = disk.load(depth=8)
        goes_on(world, disk)
        first = disk.state()
        install(own_program, text)
        ended = world.pvfront("upgrade", disk.name)
        assert ended.code == 1, ended
        assert ended.stderr.startswith("pvfront: vbd-51728: "), ended
        last = disk.state()
        assert last["worker_pid"] == first["worker_pid"]
        assert (last["generation"], last["reconnects"]) == (first["generation"], 0)
        goes_on(world, disk)
        load.end()
        shutil.copy2(binary(), own_program)
        world.assert_no_io_errors()
