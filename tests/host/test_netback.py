# SPDX-License-Identifier: BSD-2-Clause
"""The embedded host's network backend as its toolstack and its frontends find it in the store."""

from __future__ import annotations

import dataclasses

import pytest
from networld import OURS4, SPEC, THEIRS4, THEIRS6, Network, Transfer, network, networks
from waiting import eventually

from pvfront.errors import PvfrontError
from pvfront.host import Host, VifSpecError
from pvfront.host.netback import BackendError, Features, Misstep, NetBackend, NetFault
from pvfront.host.toolstack import ToolstackError
from pvfront.host.vifspec import VifSpec

MIB = 1 << 20
BACK = "/local/domain/0/backend/vif/1/0"
FRONT = "/local/domain/1/device/vif/0"

# -- the toolstack -------------------------------------------------------------------------------


def test_a_specification_is_read_as_xl_reads_it() -> None:
    spec = VifSpec.parse("mac=00:16:3e:01:02:03, bridge=xenbr1,mtu=9000,vifname=web,untrusted")
    assert spec.frontend_keys(2) == {
        "handle": "2", "mac": "00:16:3e:01:02:03", "mtu": "9000", "trusted": "0",
    }  # fmt: skip
    assert spec.backend_keys(2) == {
        "script": "/etc/xen/scripts/vif-bridge", "vifname": "web", "mac": "00:16:3e:01:02:03",
        "bridge": "xenbr1", "handle": "2", "type": "vif", "mtu": "9000", "hotplug-status": "",
    }  # fmt: skip


def test_without_a_mac_one_of_xens_is_drawn() -> None:
    macs = {VifSpec.parse("").mac for _ in range(20)}
    assert len(macs) > 1
    assert all(mac.startswith("00:16:3e:") and int(mac[9:11], 16) < 0x80 for mac in macs)


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("mac=1", "six bytes"),
        ("mtu=x", "mtu=x is no number"),
        ("mtu=65536", "0..65535"),
        ("rate=1", "rate is no parameter"),
        ("nonsense", "neither a flag nor"),
        ("mtu=9000,mtu=1500", "mtu is given twice"),
        ("type=ioemu", "vif only"),
        ("backend=driver", "domain 0 only"),
        ("trusted=2", "0 or 1"),
    ],
)
def test_a_specification_that_makes_no_sense_is_refused(spec: str, what: str) -> None:
    with pytest.raises(VifSpecError, match=what):
        VifSpec.parse(spec)


async def test_an_interface_is_attached_once_and_detached() -> None:
    async with await Host.start() as host:
        with pytest.raises(ToolstackError, match="no domain 1"):
            await host.attach_vif(1)
        await host.create_domain()
        assert [await host.attach_vif(1, spec) for spec in ("devid=1", "", "")] == [1, 0, 2]
        with pytest.raises(ToolstackError, match="network interface vif1 already"):
            await host.attach_vif(1, "devid=1")
        assert await host.store.read_opt(f"{BACK}/frontend") == FRONT
        with pytest.raises(ToolstackError, match="backend Closing"):
            await host.detach_vif(1, 0, timeout=0.2)
        await host.detach_vif(1, 0, force=True, timeout=0.2)
        assert await host.store.read_opt(f"{BACK}/state") is None
        with pytest.raises(ToolstackError, match="has no network interface vif7"):
            await host.detach_vif(1, 7)


# -- the backend ---------------------------------------------------------------------------------


def test_features_that_cannot_be_are_refused() -> None:
    for queues in (0, 17, True):
        with pytest.raises(PvfrontError, match="queues"):
            Features(queues=queues)


def test_a_fault_says_what_is_wrong_with_it() -> None:
    for make in (
        lambda: NetFault.rx_id(1 << 16),
        lambda: NetFault.rx_status(1 << 15),
        lambda: NetFault.rx_flags(),
        lambda: NetFault.producer(0),
        lambda: NetFault.look(0),
        lambda: NetFault.tx_drop(often=1),
        lambda: NetFault.decode({"kind": "rx_nothing"}),
        lambda: NetFault.decode({"kind": "rx_id", "value": -1}),
    ):
        with pytest.raises(PvfrontError):
            make()
    fault = NetFault.rx_extra("gso", gso_size=1400, gso_type=2, times=3, skip=4, count=5)
    assert fault.value == 1 | 2 << 8 | 1400 << 16 | 3 << 32
    assert NetFault.decode(fault.encode()) == fault


@networks
async def test_a_backend_serves_what_it_finds_and_its_end_takes_its_interfaces_along() -> None:
    async with network(start=False) as it:
        await it.host.attach_vif(1, SPEC)

        async def waits() -> bool:
            return await it.host.store.read_opt(f"{BACK}/state") == "2"

        await eventually("InitWait", waits)
        assert [vif["tap"] for vif in await it.backend.vifs()] == ["vif1.0"]
        shown = await it.net.run("ip", "addr", "show", "vif1.0")
        assert f"{THEIRS4}/24" in shown
        assert f"{THEIRS6}/64" in shown
        with pytest.raises(PvfrontError, match="a netback of domain 0 runs at"):
            await NetBackend.start(it.host, it.net)
        with pytest.raises(BackendError, match="no vif 7"):
            await it.backend.stats(vif=7)
        with pytest.raises(BackendError, match="has a vif only"):
            await it.backend.stats(vbd=0)
        await it.backend.stop()
        assert "vif1.0" not in await it.net.run("ip", "link")
        it.backend = await NetBackend.start(it.host, it.net)
        assert await it.backend.vifs()


async def crosses(it: Network) -> None:
    """Both ways, in small packets and in bulk."""
    for source, address in ((it.guest, THEIRS4), (it.net, OURS4), (it.guest, THEIRS6)):
        assert await (await Transfer.start(it, source, address, MIB)).ended() == MIB


FEATURES = [
    f.name
    for f in dataclasses.fields(Features)
    if f.name not in ("queues", "rx_copy", "gref_mapping")
]
KEYS = {
    "csum": "feature-no-csum-offload",
    "ipv6_csum": "feature-ipv6-csum-offload",
}


@networks
@pytest.mark.parametrize("feature", FEATURES)
async def test_a_backend_without_one_feature_carries_everything(feature: str) -> None:
    async with network(**{feature: False}) as it:
        await it.attach()
        await it.configure()
        key = KEYS.get(feature, "feature-" + feature.replace("_", "-"))
        wanted = "1" if feature == "csum" else "0"
        assert await it.host.store.read_opt(f"{BACK}/{key}") == wanted
        await crosses(it)
        assert not any(vif["mistake"] for vif in await it.backend.vifs())
        stats = await it.backend.stats()
        assert not stats["tx_rejected"]
        if feature == "sg":
            assert stats["tx_gso"] == 0


@networks
async def test_a_backend_without_any_feature_carries_everything() -> None:
    async with network(queues=1, **dict.fromkeys(FEATURES, False)) as it:
        await it.attach(f"{SPEC},mtu=9000")
        await it.configure()
        assert it.state()["mtu"] == 1500  # no feature-sg
        await crosses(it)


@networks
async def test_connected_waits_for_the_hotplug_script() -> None:
    async with network(start=False) as it:
        await it.backend.override({"hotplug-status": ""})
        await it.host.attach_vif(1, SPEC)
        starting = it.serve_soon()
        log = it.backend.log
        await eventually("the rings in use", lambda: "connected, " in log.read_text())
        assert await it.host.store.read_opt(f"{BACK}/state") == "2"
        await it.backend.write({"hotplug-status": "connected"})
        await starting
        await it.connected()


@networks
async def test_a_misstep_of_the_walk_ends_connected() -> None:
    async with network() as it:
        await it.backend.misstep(
            Misstep.state(6, at="connect"), Misstep.pause(50, at="reconnect", times=2)
        )
        await it.attach()
        await it.configure()
        await crosses(it)
