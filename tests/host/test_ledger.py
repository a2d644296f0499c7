# SPDX-License-Identifier: BSD-2-Clause
"""`pvfront ledger` beside the books of the embedded host, which know better."""

# ruff: noqa: F401, F811 (fixtures are imported, and arguments are named as they are)

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from test_export import Served, served


async def ledger(it: Served, *arguments: str) -> dict[str, Any]:
    found = json.loads(await it.pvfront("ledger", "--json", *arguments))
    assert isinstance(found, dict)
    return found


async def test_what_a_disk_holds_is_what_the_host_has_in_its_books(served: Served) -> None:
    found = await ledger(served)
    (disk,) = found["devices"]
    books = served.host.dump()
    assert disk["name"] == "xvdb"
    assert disk["event_channels"] == [p["port"] for p in books["ports"] if p["domid"] == 1]
    (grants,) = [grant for grant in books["grants"] if grant["domid"] == 1]
    assert (disk["pages"], disk["mapped"]) == (grants["pages"], grants["mapped"])
    assert disk["mapped"] >= disk["ring_pages"] >= disk["mapped_at_least"] > 0
    assert disk["pages"] == disk["ring_pages"] + disk["pool_pages"]
    assert disk["pid"] == (await served.shown())["worker_pid"]
    assert time.time() - 600 < disk["since"] <= time.time()
    assert found["granted_pages"] == {"held": disk["pages"], "deferred": 0, "limit": 16384}
    assert found["event_channels"]["held"] == found["event_channels"]["of_programs"] == 1
    assert [process["pages"] for process in found["processes"]] == [disk["pages"]]


async def test_a_new_generation_holds_from_its_own_beginning(served: Served) -> None:
    (before,) = (await ledger(served, "xvdb"))["devices"]
    os.kill(before["pid"], signal.SIGKILL)
    await served.until(
        "connected again", lambda s: s["generation"] > 1 and s["phase"] == "connected"
    )
    (now,) = (await ledger(served, "xvdb"))["devices"]
    assert now["generation"] > before["generation"]
    assert now["since"] > before["since"]
    assert now["pid"] != before["pid"]
    await served.stop(signal.SIGKILL)
    (alone,) = (await ledger(served, "xvdb"))["devices"]
    assert alone == now, "a worker holds it without any supervisor"
    await served.serve("xvdb")


async def test_the_ledger_is_a_table_for_people(served: Served) -> None:
    lines = (await served.pvfront("ledger")).splitlines()
    assert lines[0].split()[:3] == ["DEVICE", "GEN", "QUEUES"]
    assert lines[1].split()[:3] == ["xvdb", "1", "1"]
    assert any(line.startswith("granted pages:") and "of 16384" in line for line in lines)
    await served.pvfront("release", "vbd", "xvdb")
    assert (await ledger(served))["devices"] == []
    error = await served.pvfront("ledger", "xvdz", status=1)
    assert "there is no device 'xvdz'" in error
