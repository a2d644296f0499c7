# SPDX-License-Identifier: BSD-2-Clause
"""One world for all tests of the directory, a disk of its own for each."""

import sys
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("hostileworld", "nbdclient")

from hostileworld import World  # noqa: E402


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def whole_world():
    made = await World.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def world(whole_world):
    await whole_world.ensure_alive()
    yield whole_world
    assert whole_world.supervisor is not None
    assert whole_world.supervisor.returncode is None, whole_world.log.read_text()


@pytest_asyncio.fixture(loop_scope="session")
async def attach(world):
    """Attaches disks as World.attach does; they are detached at the end."""
    made = []

    async def more(*options, **settings):
        made.append(await world.attach(*options, **settings))
        return made[-1]

    yield more
    await world.honest()
    problems = []
    for disk in made:
        try:
            await disk.end()
        except Exception as problem:  # the next test starts without it all the same
            problems.append(problem)
            await disk.remove()
    if problems:
        raise problems[0]


@pytest_asyncio.fixture(loop_scope="session")
async def disk(attach):
    return await attach()
