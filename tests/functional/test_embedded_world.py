# SPDX-License-Identifier: BSD-2-Clause
"""The checks that the other tests rely on find what they are there for."""

from __future__ import annotations

import json

import pytest
from embedded_world import EmbeddedWorld

from pvfront.host.blkback import Fault

pytestmark = [pytest.mark.disk, pytest.mark.embedded]


def test_a_write_that_the_backend_loses_is_found_by_fio(host: EmbeddedWorld) -> None:
    with host.disk(16) as disk:
        host.do(host.backend.fault(Fault.short(op="write", skip=20, count=1)))
        with pytest.raises(AssertionError, match="verify"):
            disk.fio(size="1M")
        host.do(host.backend.clear())
        disk.fio(size="1M")


def test_a_load_that_meets_an_error_says_so_when_it_is_ended(host: EmbeddedWorld) -> None:
    with host.disk(16) as disk:
        host.do(host.backend.fault(Fault.fail(op="write", skip=20, count=1)))
        load = disk.load(depth=4)
        host.wait_until("the end of fio", lambda: load.fio.poll() is not None)
        with pytest.raises(AssertionError, match="ended by itself"):
            load.end()


def test_what_a_test_leaves_is_named(host: EmbeddedWorld) -> None:
    with host.disk(16) as disk:
        held = host.held()
        assert held["workers"] == 1
        assert held["event channels"] == 2  # one for each end
        assert held["granted areas"] >= 1
        assert held["files"] >= 1
        assert host.workers() == [disk.worker()]
        with pytest.raises(AssertionError, match="nothing of its disks left"):
            host.assert_nothing_left(deadline=0)
    host.assert_nothing_left()


def test_a_page_that_is_granted_is_missed(host: EmbeddedWorld) -> None:
    host.grant_every_page()
    with host.disk(16) as disk:
        pages = disk.state()["rings"]["granted"]["got"]
        limit = json.loads((host.directory / "limits.json").read_text())["gntalloc"]
        assert sum(area["pages"] for area in host.host.dump()["grants"]) == pages < limit
        with pytest.raises(AssertionError, match="GrantsExhausted"):
            host.grant_every_page()
