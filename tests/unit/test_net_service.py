# SPDX-License-Identifier: BSD-2-Clause
"""Whose a vif is: taken from the kernel with what is configured on it, and given back with it.

The kernel's frontend is made up: its interface is a TAP that comes when the device is bound, and
goes with it. Everything else is this machine's kernel, in a namespace of the test's own.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from netnamespace import ip, namespace
from waiting import eventually

from pvfront import sysfs
from pvfront.claim import Claims
from pvfront.errors import PvfrontError
from pvfront.netfront import service
from pvfront.netfront.link import note_path
from pvfront.netfront.service import Networks, find
from pvfront.netfront.tap import Tap
from pvfront.states import XenbusState
from pvfront.sysfs import Roots

__all__ = ["namespace"]
pytestmark = pytest.mark.usefixtures("namespace")


class Kernel:
    """Xen's bus in a directory, with a netfront whose interfaces are TAPs."""

    def __init__(self, root: Path) -> None:
        self.roots = Roots(root)
        self.bus = self.roots.sys / "bus/xen"
        self.name = "eth1"  # of the next interface
        self.connects = True
        (self.bus / "drivers/vif").mkdir(parents=True)
        (self.bus / "drivers_autoprobe").write_text("1\n")
        (self.roots.sys / "module/xen_netfront").mkdir(parents=True)
        self.roots.run.mkdir(parents=True)
        self.roots.proc.mkdir()

    def plug(self, devid: int, *, bound: bool = True) -> None:
        (self.bus / "devices" / f"vif-{devid}" / "net").mkdir(parents=True)
        if bound:
            self.bind(f"vif-{devid}")

    def bind(self, device: str) -> None:
        (self.bus / "devices" / device / "driver").symlink_to(self.bus / "drivers/vif")
        if self.connects:
            self.connect(device)

    def connect(self, device: str) -> None:
        ip("tuntap", "add", self.name, "mode", "tap")
        (self.bus / "devices" / device / "net" / self.name).mkdir()

    def unbind(self, device: str) -> None:
        (self.bus / "devices" / device / "driver").unlink()
        for interface in (self.bus / "devices" / device / "net").iterdir():
            ip("link", "del", interface.name)
            interface.rmdir()

    def renamed(self, device: str, before: str, name: str) -> None:
        """As sysfs shows it."""
        net = self.bus / "devices" / device / "net"
        (net / before).rename(net / name)

    def bound(self, device: str) -> bool:
        return (self.bus / "devices" / device / "driver").is_symlink()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path)
    real_write = sysfs.write

    def write(path: Path, value: object) -> None:
        if path.name == "unbind":
            made.unbind(str(value))
        elif path.name == "drivers_probe":
            made.bind(str(value))
        else:
            real_write(path, value)

    monkeypatch.setattr("pvfront.claim.sysfs.write", write)
    return made


@pytest.fixture
async def networks(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Networks]:
    on: Any = SimpleNamespace(
        name="xen",
        roots=kernel.roots,
        run_dir=kernel.roots.run,
        grant_limit=lambda: None,
        claims=lambda: Claims(kernel.roots, load=lambda module: None),
    )
    made = Networks(on)
    yield made
    for task in made._later:
        task.cancel()
    await asyncio.gather(*made._later, return_exceptions=True)


class Device:
    """The store's view of a vif."""

    def __init__(self, devid: int = 1) -> None:
        self.devid = devid
        self.name = f"vif-{devid}"
        self.view = SimpleNamespace(online=True)
        self.tells: object = ()
        self.states: list[XenbusState] = []

    async def write_state(self, state: XenbusState) -> None:
        self.states.append(state)


def configured(name: str) -> None:
    ip("link", "set", name, "address", "00:16:3e:01:02:03", "mtu", "1400", "up")
    ip("addr", "add", "10.1.2.1/24", "dev", name)
    ip("addr", "add", "fd00::1/64", "dev", name, "nodad")
    ip("route", "add", "10.9.0.0/16", "via", "10.1.2.9", "dev", name)
    ip("-6", "route", "add", "fd99::/64", "via", "fd00::9", "dev", name)


def shown(name: str) -> list[str]:
    """What a user sees of it, without what depends on a carrier."""
    text = "\n".join(
        (
            *(ip("-4", "route", "show", "dev", name), ip("-6", "route", "show", "dev", name)),
            *(ip("-o", "-4", "addr", "show", name), ip("-o", "-6", "addr", "show", name)),
            ip("link", "show", name),
        )
    )
    wanted = ("10.9.0.0/16", "10.1.2.1/24", "fd00::1/64", "fd99::/64", "mtu 1400",
              "00:16:3e:01:02:03", ",UP")  # fmt: skip
    return [part for part in wanted if part not in text]


async def test_what_is_configured_goes_from_the_kernel_to_the_tap_and_back(
    kernel: Kernel, networks: Networks
) -> None:
    kernel.plug(1)
    configured("eth1")
    device: Any = Device()
    await networks.take(device, force=False)
    assert not kernel.bound("vif-1")
    assert networks.patience("vif-1") == service.CONNECTED_WITHIN
    frontend = networks.frontend(device)
    assert frontend.ifname == "eth1"
    assert "carrier" in device.tells
    tap = await asyncio.to_thread(frontend.link.open, 1, mac=bytes(5) + b"\1", mtu=1500, most=65517)
    assert shown("eth1") == []
    assert networks.patience("vif-1") is None  # from now on it is waited for
    tap.close()
    await frontend.close()
    kernel.name = "eth7"  # as the kernel counts
    assert await networks.give_back(device) == "vif-1: given back to the kernel as eth1"
    assert device.states == [XenbusState.INITIALISING]
    assert shown("eth1") == []
    assert not note_path("vif-1", kernel.roots.run).exists()


async def test_a_vif_that_never_connected_is_the_kernels_again_as_it_was(
    kernel: Kernel, networks: Networks
) -> None:
    kernel.plug(1)
    configured("eth1")
    device: Any = Device()
    await networks.take(device, force=False)
    await networks.frontend(device).close()
    assert await networks.give_back(device) == "vif-1: given back to the kernel as eth1"
    assert shown("eth1") == []


async def test_a_backend_that_lets_the_kernel_wait_too_gets_its_configuration_later(
    kernel: Kernel, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "BACK_WITHIN", 0.0)
    kernel.plug(1)
    configured("eth1")
    device: Any = Device()
    await networks.take(device, force=False)
    kernel.connects = False
    said = await networks.give_back(device)
    assert said == "vif-1: given back to the kernel; the kernel has not connected it yet"
    kernel.connect("vif-1")
    await eventually("its configuration", lambda: shown("eth1") == [])


@pytest.mark.parametrize("family", ["-4", "-6"])
async def test_the_interface_of_the_default_route_is_taken_by_force_only(
    kernel: Kernel, networks: Networks, family: str
) -> None:
    kernel.plug(1)
    configured("eth1")
    gateway = {"-4": "10.1.2.9", "-6": "fd00::9"}[family]
    ip(family, "route", "add", "default", "via", gateway, "dev", "eth1")
    device: Any = Device()
    with pytest.raises(PvfrontError) as refused:
        await networks.take(device, force=False)
    assert str(refused.value) == "it is eth1, the interface of the default route"
    assert "--force" in str(refused.value.hint)
    assert kernel.bound("vif-1")
    assert not note_path("vif-1", kernel.roots.run).exists()
    await networks.take(device, force=True)
    assert not kernel.bound("vif-1")
    await networks.give_back(device)
    assert f"default via {gateway} dev eth1" in ip(family, "route", "show", "default")


async def test_at_boot_the_interface_that_had_the_default_route_is_left_alone_as_before(
    kernel: Kernel, networks: Networks
) -> None:
    """There is no route yet."""

    def reboots() -> None:
        for device in ("vif-0", "vif-1"):
            if kernel.bound(device):
                kernel.unbind(device)
        shutil.rmtree(kernel.roots.run)
        kernel.roots.run.mkdir()
        for number in range(2):
            kernel.name = f"eth{number}"
            kernel.bind(f"vif-{number}")

    for number in range(2):
        kernel.name = f"eth{number}"
        kernel.plug(number)
    ip("addr", "add", "10.1.2.1/24", "dev", "eth0")
    ip("link", "set", "eth0", "up")
    ip("route", "add", "default", "via", "10.1.2.9", "dev", "eth0")
    with pytest.raises(PvfrontError, match=r"the interface of the default route$"):
        await networks.take(Device(0), force=False)
    reboots()
    assert ip("route", "show", "default") == ""
    with pytest.raises(PvfrontError, match="when there was one") as refused:
        await networks.take(Device(0), force=False)
    assert "default-route.json" in str(refused.value.hint)
    assert kernel.bound("vif-0")
    await networks.take(Device(1), force=False)
    await networks.take(Device(0), force=True)
    assert not kernel.bound("vif-0")

    reboots()  # and this time another one gets it
    ip("addr", "add", "10.1.2.1/24", "dev", "eth1")
    ip("link", "set", "eth1", "up")
    ip("route", "add", "default", "via", "10.1.2.9", "dev", "eth1")
    await networks.take(Device(0), force=False)
    reboots()
    await networks.take(Device(0), force=False)


async def test_an_interface_that_others_are_built_on_is_taken_by_force_only(
    kernel: Kernel, networks: Networks
) -> None:
    kernel.plug(1)
    ip("link", "add", "link", "eth1", "name", "eth1.5", "type", "macvlan")
    device: Any = Device()
    with pytest.raises(PvfrontError, match=r"it is eth1, which eth1\.5 is built on, and would go"):
        await networks.take(device, force=False)
    await networks.take(device, force=True)
    assert not kernel.bound("vif-1")


async def test_several_vifs_that_the_kernel_never_had_get_names_of_their_own(
    kernel: Kernel, networks: Networks
) -> None:
    (kernel.roots.proc / "cmdline").write_text("net.ifnames=0")
    devices: list[Any] = [Device(devid) for devid in (1, 2, 3)]
    for device in devices:
        kernel.plug(device.devid, bound=False)
    await asyncio.gather(*(networks.take(device, force=False) for device in devices))
    names = {networks.frontend(device).ifname for device in devices}
    assert len(names) == 3
    assert all(name.startswith("eth") for name in names)
    assert networks.patience("vif-1") is None


async def test_a_detached_vif_leaves_nothing_behind(kernel: Kernel, networks: Networks) -> None:
    kernel.plug(1)
    configured("eth1")
    device: Any = Device()
    await networks.take(device, force=False)
    networks.frontend(device)
    device.view.online = False
    assert "detaching" in await networks.give_back(device)
    assert sysfs.listdir(kernel.roots.run) == []


async def test_a_driver_that_does_not_let_go_keeps_its_interface(
    kernel: Kernel, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.plug(1)
    monkeypatch.setattr(kernel, "unbind", lambda device: None)
    device: Any = Device()
    with pytest.raises(PvfrontError, match="the kernel binds it again"):
        await networks.take(device, force=False)
    assert not note_path("vif-1", kernel.roots.run).exists()


async def in_thread(work: Callable[[], int]) -> int:
    return await asyncio.to_thread(work)


async def test_a_vif_is_found_by_its_number_and_by_its_interface(
    kernel: Kernel, networks: Networks
) -> None:
    kernel.plug(0)
    kernel.plug(3, bound=False)
    tap = await asyncio.to_thread(Tap.open, "lan0", owner="vif-3")
    on = networks.platform
    for name, devid in (("eth1", 0), ("lan0", 3), ("3", 3), ("vif3", 3), ("vif-3", 3),
                        ("enX3", 3)):  # fmt: skip
        assert await in_thread(lambda name=name: find(name, [0, 3], on)) == devid  # type: ignore[misc]
    for name in ("eth9", "7", "vif7", "", "--all", "\x1b[2J"):
        with pytest.raises(PvfrontError, match="there is no network interface") as refused:
            await in_thread(lambda name=name: find(name, [0, 3], on))  # type: ignore[misc]
        assert str(refused.value.hint) == "there are: vif0, vif3"
    tap.close()


def test_a_kernel_without_tun_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvfront.netfront.tap.TUN", "/dev/net/none")
    monkeypatch.setattr(service, "load_module", lambda module: f"Module {module} not found")
    with pytest.raises(PvfrontError, match="/dev/net/none is missing, and its module cannot be"):
        service._prepare()
