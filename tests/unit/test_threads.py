# SPDX-License-Identifier: BSD-2-Clause
"""Calls in daemon threads: results, errors, deadlines, and what being cancelled means."""

from __future__ import annotations

import asyncio
import threading

import pytest
from waiting import PATIENCE

from pvfront.threads import Late, in_daemon_thread, to_its_end


def fail() -> None:
    raise OSError(5, "Input/output error")


async def test_a_result_comes_back_from_a_daemon_thread_of_that_name() -> None:
    def who() -> threading.Thread:
        return threading.current_thread()

    for thread in (
        await in_daemon_thread("pvfront-a", who),
        await to_its_end("pvfront-a", who, PATIENCE),
    ):
        assert thread.daemon
        assert thread.name == "pvfront-a"
        assert thread is not threading.current_thread()


async def test_an_error_comes_out_where_it_is_awaited() -> None:
    with pytest.raises(OSError, match="Input/output"):
        await in_daemon_thread("fails", fail)
    with pytest.raises(OSError, match="Input/output"):
        await to_its_end("fails", fail, PATIENCE)


async def test_a_call_that_hangs_is_late_and_its_result_is_nobodys() -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    release = threading.Event()
    with pytest.raises(Late, match="hangs did not end within 0 s"):
        await to_its_end("hangs", release.wait, 0.05)
    (thread,) = [each for each in threading.enumerate() if each.name == "hangs"]
    release.set()
    await asyncio.to_thread(thread.join, PATIENCE)
    assert not thread.is_alive()
    assert not complaints


async def test_being_cancelled_abandons_a_call_that_may_block_for_ever() -> None:
    release = threading.Event()
    task = asyncio.create_task(in_daemon_thread("hangs", release.wait))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()


async def test_being_cancelled_still_waits_for_a_call_that_must_end_first() -> None:
    release, begun = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        release.wait(PATIENCE)

    task = asyncio.create_task(to_its_end("works", work, PATIENCE))
    await asyncio.to_thread(begun.wait, PATIENCE)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=0.2)
    assert not done, "its caller would run the next command beside this one"
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
