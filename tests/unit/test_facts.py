# SPDX-License-Identifier: BSD-2-Clause
"""Facts for the doctor, gathered below roots that merely look like a guest."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vclock import VirtualLoop

from pvfront import facts, workerprogram
from pvfront.agent import SOCKET
from pvfront.errors import PvfrontError
from pvfront.facts import (
    Agent,
    Node,
    gather,
    guest_type,
    limit,
    lists,
    module_state,
    named,
    xen_version,
)
from pvfront.inventory import Device
from pvfront.platform import Xen
from pvfront.questions import answering
from pvfront.sysfs import Roots
from pvfront.xenstore import XenstoreError

KERNEL = "6.1.0-40-amd64"


def put(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    made = Roots(tmp_path)
    monkeypatch.setattr(Xen, "roots", made)
    monkeypatch.setattr(Xen, "grant_limit", lambda on: 16384)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    put(made.sys / "hypervisor/type", "xen\n")
    put(made.sys / "hypervisor/guest_type", "PVH\n")
    for what, text in (("major", "4"), ("minor", "17"), ("extra", ".7")):
        put(made.sys / "hypervisor/version" / what, text + "\n")
    put(made.proc / "sys/kernel/osrelease", KERNEL + "\n")
    put(made.proc / "self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n")
    put(made.sys / "power/wakeup_count", "0\n")
    put(made.dev / "xen/evtchn")
    (made.dev / "xen/evtchn").chmod(0o600)
    (made.sys / "module/xen_evtchn").mkdir(parents=True)
    put(made.root / f"lib/modules/{KERNEL}/modules.dep",
        "kernel/drivers/xen/xen-gntalloc.ko:\nkernel/drivers/block/nbd.ko.xz: a.ko\n")  # fmt: skip
    put(made.root / f"lib/modules/{KERNEL}/modules.builtin", "kernel/drivers/net/tun.ko\n")
    return made


def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    async def store(on: Xen) -> None:
        raise XenstoreError(2, "connect", "/dev/xen/xenbus")

    monkeypatch.setattr(Xen, "store", store)


def test_a_store_that_answers_slowly_is_no_store_that_does_not_answer(
    roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer has its time, all together have none: a slow guest may have many devices."""

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[object]:
        yield object()

    async def store(on: Xen) -> object:
        return opened()

    async def devices(store: object, on: Xen) -> list[Device]:
        await asyncio.sleep(300)
        return []

    monkeypatch.setattr(Xen, "store", store)
    monkeypatch.setattr("pvfront.inventory.devices", devices)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(facts._devices(Xen(), str)) == ([], None)


async def test_hooks_that_are_never_run_are_found_in_the_settings_directory(
    roots: Roots, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_store(monkeypatch)
    monkeypatch.setattr(Xen, "config_dir", tmp_path / "settings")
    hook = tmp_path / "settings" / "hooks.d" / "post-link.d" / "bad\x1b.sh"
    hook.parent.mkdir(parents=True)
    hook.touch(0o755)
    ((text, fix),) = (await gather(Xen(), try_worker=lambda other_user: None)).hooks
    assert "post-link.d/bad\\x1b.sh is never run" in text
    assert fix == "rename it"


async def test_a_guest_is_told_by_its_files(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    no_store(monkeypatch)
    found = await gather(Xen(), try_worker=lambda other_user: None)
    assert (found.guest, found.xen, found.kernel) == ("PVH", "4.17.7", KERNEL)
    assert found.modules == {
        "xen-evtchn": "loaded", "xen-gntalloc": "there", "nbd": "there", "ublk_drv": "missing",
        "tun": "built in",
    }  # fmt: skip
    assert found.nodes["xen/evtchn"] == Node("", 0o600)
    assert found.nodes["xen/gntalloc"].problem == "ENOENT"
    assert found.can_suspend
    assert found.may_veto
    assert not found.cgroup2
    assert found.store is not None
    assert "/dev/xen/xenbus" in found.store[0]
    assert found.worker is None


async def test_what_no_file_says_is_not_made_up(tmp_path: Path) -> None:
    empty = Roots(tmp_path)
    assert guest_type(empty) == ""
    assert xen_version(empty) == ""
    assert module_state("nbd", KERNEL, empty) == "missing"


async def test_a_mistake_in_the_settings_and_a_worker_that_fails_are_facts(
    roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_store(monkeypatch)
    put(roots.root / "etc/pvfront/pvfront.toml", "[disk]\nmax_qeues = 3\n[vif]\nx = 1\n")

    def broken(other_user: bool) -> None:
        raise PvfrontError("the worker program does not run: x", hint="y")

    found = await gather(Xen(), try_worker=broken)
    assert "pvfront.toml:2: max_qeues: no such setting" in found.config[0][0]
    assert "pvfront.toml:4: x: no such setting" in found.config[1][0]
    assert found.config_file.endswith("/etc/pvfront/pvfront.toml")
    assert found.worker == ("the worker program does not run: x", "y")


@pytest.mark.parametrize("wanted_by", [True, False])
async def test_a_unit_is_enabled_if_something_wants_it(
    roots: Roots, monkeypatch: pytest.MonkeyPatch, wanted_by: bool
) -> None:
    no_store(monkeypatch)
    put(roots.root / "usr/lib/systemd/system/pvfront-vbd.service")
    if wanted_by:
        put(roots.root / "etc/systemd/system/multi-user.target.wants/pvfront-vbd.service")
    found = await gather(Xen(), try_worker=lambda other_user: None)
    assert found.services["vbd"].enabled is wanted_by
    assert found.services["vif"].enabled is None, "it is not installed"


@contextlib.asynccontextmanager
async def agent_of(on: Xen, answer: dict[str, Any]) -> AsyncIterator[None]:
    async def status(_: dict[str, Any]) -> dict[str, Any]:
        return answer

    on.run_dir.mkdir(parents=True, exist_ok=True)
    async with answering(on.run_dir / SOCKET, "agent", {"status": status}):
        yield


async def test_what_the_agent_says_is_a_fact_and_that_none_runs(
    roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_store(monkeypatch)
    put(roots.root / "usr/lib/systemd/system/pvfront-agent.service")
    found = await gather(Xen(), try_worker=lambda other_user: None)
    assert found.agent == Agent(None, "", enabled=False)
    async with agent_of(Xen(), {"ok": True, "agent": {"publish": {"keys": 3}}}):
        found = await gather(Xen(), try_worker=lambda other_user: None)
    assert found.agent == Agent({"publish": {"keys": 3}}, "", enabled=False)


def test_the_settings_name_devices_and_with_a_mistake_none(roots: Roots) -> None:
    def device(klass: str, number: int, os_device: str = "") -> Device:
        return Device(klass, number, "", 0, "", "", "kernel", os_device)

    there = [
        device("vbd", 51728), device("vbd", 51744), device("vif", 3, "eth9"), device("x", 1),
        device("console", 0), device("console", 1),
    ]  # fmt: skip
    file = roots.root / "etc/pvfront/pvfront.toml"
    for text, found in (
        (
            '[disk]\nclaim = ["xvdb"]\n[vif]\nclaim = ["eth*"]\n[console]\nclaim = ["[01]"]\n',
            [True, False, True, False, False, True],
        ),
        ("[disk]\nclaim = 3\n", [False] * 6),
        ("no TOML", [False] * 6),
    ):
        put(file, text)
        assert [named(Xen())(one) for one in there] == found


def test_a_module_s_name_has_dashes_or_underscores(roots: Roots) -> None:
    put(roots.root / f"lib/modules/{KERNEL}/modules.dep", "kernel/ublk-drv.ko.zst:\n")
    assert module_state("ublk_drv", KERNEL, roots) == "there"
    assert module_state("ublk", KERNEL, roots) == "missing"


LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max locked memory         65536                unlimited            bytes
Max realtime priority     0                    0
Max realtime timeout      unlimited            unlimited            us
"""


def test_limits_of_a_process_are_numbers_or_none() -> None:
    assert limit(LIMITS, "Max locked memory") == 65536
    assert limit(LIMITS, "Max realtime priority") == 0
    assert limit(LIMITS, "Max realtime timeout") is None
    assert limit("", "Max locked memory") is None


@given(st.text(), st.text())
def test_lists_of_modules_and_limits_may_be_any_text(text: str, name: str) -> None:
    assert lists(text, name) in (True, False)
    limit(text, "Max locked memory")
    limit(f"Max locked memory {text}", "Max locked memory")


def test_a_worker_is_tried_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workerprogram, "worker_ids", lambda: (65534, 65534))
    workerprogram.try_start(change_user=True)


def test_a_worker_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "pvfront-worker"
    program.write_text("#!/bin/sh\necho 'cannot load libseccomp.so.2:\n\033 gone' >&2\nexit 127\n")
    program.chmod(0o755)
    monkeypatch.setenv("PVFRONT_WORKER", str(program))
    monkeypatch.setattr(workerprogram, "worker_ids", lambda: (65534, 65534))
    with pytest.raises(PvfrontError, match=r"does not run: cannot load libseccomp.so.2:") as caught:
        workerprogram.try_start(change_user=True)
    assert caught.value.hint == "apt-get install libseccomp2"
