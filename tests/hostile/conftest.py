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
async def disk(world):
    made = await world.attach()
    yield made
    await made.end()
