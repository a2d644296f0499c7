# SPDX-License-Identifier: BSD-2-Clause
"""Taking devices from the kernel and giving them back, against a fake xen bus in sysfs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pvfront import sysfs
from pvfront.blkfront import inuse
from pvfront.claim import CannotTake, Claims, InUse, Taken
from pvfront.errors import PvfrontError
from pvfront.sysfs import Roots


class FakeBus:
    """/sys/bus/xen with drivers that bind and unbind as the kernel's do."""

    def __init__(self, root: Path) -> None:
        self.roots = Roots(root)
        self.bus = root / "sys/bus/xen"
        self.loaded: list[str] = []
        self.binds_again = 0
        self.made = 0
        (self.bus / "devices").mkdir(parents=True)
        (self.bus / "drivers_autoprobe").write_text("1\n")
        (self.bus / "drivers_probe").write_text("")
        for driver in ("vbd", "vif"):
            self.driver(driver)
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/mountinfo").write_text("")
        (root / "proc/swaps").write_text("Filename\n")
        (root / "dev").mkdir()

    def driver(self, name: str) -> None:
        (self.bus / "drivers" / name).mkdir(parents=True)
        (self.bus / "drivers" / name / "unbind").write_text("")
        (self.roots.sys / "module" / f"xen_{'blkfront' if name == 'vbd' else 'netfront'}").mkdir(
            parents=True
        )

    def device(self, name: str, *, bound: bool = False, disk: str = "") -> Path:
        self.made += 1
        real = self.roots.sys / "devices" / f"{name}.{self.made}"
        real.mkdir(parents=True)
        (self.bus / "devices" / name).symlink_to(real)
        if bound:
            self.bind(name, disk)
        return real

    def bind(self, name: str, disk: str = "") -> None:
        device = self.bus / "devices" / name
        (device / "driver").symlink_to(self.bus / "drivers" / name.partition("-")[0])
        if disk:
            (device / "block" / disk / "holders").mkdir(parents=True)
            (self.roots.sys / "class/block").mkdir(parents=True, exist_ok=True)
            (self.roots.sys / "class/block" / disk).symlink_to(device / "block" / disk)
            (device / "block" / disk / "dev").write_text("202:16\n")
            (self.roots.dev / disk).touch()

    def unbind(self, name: str) -> None:
        device = self.bus / "devices" / name
        (device / "driver").unlink()
        for disk in list(device.glob("block/*")):
            (self.roots.sys / "class/block" / disk.name).unlink()
            disk.rename(device / f"gone-{disk.name}")
        if self.binds_again:
            self.binds_again -= 1
            self.bind(name)

    def bound(self, name: str) -> bool:
        return (self.bus / "devices" / name / "driver").is_symlink()

    def autoprobe(self) -> str:
        return (self.bus / "drivers_autoprobe").read_text().strip()


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeBus:
    made = FakeBus(tmp_path)
    real_write = sysfs.write

    def write(path: Path, value: object) -> None:
        if path.name == "unbind":
            made.unbind(str(value))
        elif path.name == "drivers_probe":
            made.bind(str(value), "xvdb" if str(value).startswith("vbd") else "")
        else:
            real_write(path, value)

    monkeypatch.setattr("pvfront.claim.sysfs.write", write)
    return made


@pytest.fixture
def claims(bus: FakeBus) -> Claims:
    def load(module: str) -> str | None:
        bus.loaded.append(f"{module} autoprobe={bus.autoprobe()}")
        return None

    return Claims(bus.roots, load=load)


def test_an_unbound_device_is_taken_and_remembered_as_never_bound(
    bus: FakeBus, claims: Claims
) -> None:
    bus.device("vbd-51728")
    assert claims.take("vbd-51728") == Taken("vbd-51728", kernel_had_bound=False)
    assert claims.taken("vbd-51728") == Taken("vbd-51728", kernel_had_bound=False)


def test_a_bound_device_is_unbound_and_remembered_as_bound(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728", bound=True, disk="xvdb")
    taken = claims.take("vbd-51728")
    assert taken == Taken("vbd-51728", kernel_had_bound=True, os_device="xvdb")
    assert not bus.bound("vbd-51728")


def test_taking_twice_keeps_what_the_first_time_found(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728", bound=True, disk="xvdb")
    claims.take("vbd-51728")
    assert Claims(bus.roots).take("vbd-51728").kernel_had_bound


def test_an_unknown_device_is_refused_and_the_others_are_named(
    bus: FakeBus, claims: Claims
) -> None:
    bus.device("vbd-51712")
    bus.device("vif-0")
    with pytest.raises(CannotTake, match="vbd-1") as caught:
        claims.take("vbd-1")
    assert caught.value.hint == "there are: vbd-51712"


def test_a_mounted_disk_is_not_taken(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728", bound=True, disk="xvdb")
    mount(bus, "/srv")
    with pytest.raises(InUse, match="mounted at /srv"):
        claims.take("vbd-51728")
    assert bus.bound("vbd-51728")
    assert claims.taken("vbd-51728") is None


def test_force_takes_a_mounted_disk(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728", bound=True, disk="xvdb")
    mount(bus, "/srv")
    claims.take("vbd-51728", force=True)
    assert not bus.bound("vbd-51728")


def test_force_does_not_take_the_root_disk(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728", bound=True, disk="xvdb")
    mount(bus, "/")
    with pytest.raises(InUse, match="root"):
        claims.take("vbd-51728", force=True)
    assert bus.bound("vbd-51728")


def test_a_disk_that_the_kernel_says_is_claimed_is_not_taken(
    bus: FakeBus, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus.device("vbd-51728", bound=True, disk="xvdb")
    monkeypatch.setattr(inuse, "claim_probe", lambda name, roots: inuse.Use(name, "claimed"))
    with pytest.raises(InUse, match="claimed"):
        claims.take("vbd-51728")


def test_a_bound_vif_is_taken_without_asking_for_disks(bus: FakeBus, claims: Claims) -> None:
    bus.device("vif-0", bound=True)
    assert claims.take("vif-0").kernel_had_bound
    assert not bus.bound("vif-0")


def test_the_kernels_module_is_loaded_before_taking_and_must_not_bind(
    bus: FakeBus, claims: Claims
) -> None:
    (bus.roots.sys / "module/xen_blkfront").rmdir()
    bus.device("vbd-51728")
    claims.take("vbd-51728")
    assert bus.loaded == ["xen-blkfront autoprobe=0"]
    assert bus.autoprobe() == "1"


def test_a_module_that_is_there_is_not_loaded_again(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728")
    claims.take("vbd-51728")
    assert bus.loaded == []


def test_a_driver_that_binds_again_once_is_unbound_once_more(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728", bound=True)
    bus.binds_again = 1
    claims.take("vbd-51728")
    assert not bus.bound("vbd-51728")


def test_a_driver_that_never_lets_go_is_an_error_and_leaves_no_claim(
    bus: FakeBus, claims: Claims
) -> None:
    bus.device("vbd-51728", bound=True)
    bus.binds_again = 100
    with pytest.raises(CannotTake, match="again after each unbind"):
        claims.take("vbd-51728")
    assert claims.taken("vbd-51728") is None


def test_a_device_stolen_back_is_noticed_and_undone(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728")
    claims.take("vbd-51728")
    assert not claims.stolen_back("vbd-51728")
    bus.bind("vbd-51728", "xvdb")
    assert claims.stolen_back("vbd-51728")
    claims.undo("vbd-51728")
    assert not bus.bound("vbd-51728")
    assert claims.taken("vbd-51728") == Taken("vbd-51728", True, "xvdb")


def test_a_stolen_disk_that_is_mounted_by_now_is_left_to_its_users(
    bus: FakeBus, claims: Claims
) -> None:
    bus.device("vbd-51728")
    claims.take("vbd-51728")
    bus.bind("vbd-51728", "xvdb")
    mount(bus, "/srv")
    with pytest.raises(InUse):
        claims.undo("vbd-51728")
    assert bus.bound("vbd-51728")


def test_a_kernel_device_that_we_never_took_is_not_stolen(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728", bound=True)
    assert not claims.stolen_back("vbd-51728")


def test_a_claim_on_an_earlier_device_of_the_same_name_is_void(
    bus: FakeBus, claims: Claims
) -> None:
    bus.device("vbd-51728", bound=True, disk="xvdb")
    claims.take("vbd-51728")
    (bus.bus / "devices/vbd-51728").unlink()
    bus.device("vbd-51728")
    assert claims.taken("vbd-51728") is None
    assert not claims.take("vbd-51728").kernel_had_bound


def test_a_damaged_claim_gives_the_careful_answer(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728")
    claims.take("vbd-51728")
    (bus.roots.run / "vbd-51728.claim").write_text("{oops")
    assert claims.taken("vbd-51728") == Taken("vbd-51728", kernel_had_bound=True)


def test_a_vbd_that_the_kernel_never_had_is_bound_by_it(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728")
    claims.take("vbd-51728")
    assert claims.give_back("vbd-51728") == "vbd-51728: given back to the kernel as xvdb"
    assert bus.bound("vbd-51728")
    assert claims.taken("vbd-51728") is None


def test_a_vbd_that_the_kernel_had_is_not_bound_and_told_what_helps(
    bus: FakeBus, claims: Claims
) -> None:
    bus.device("vbd-51728", bound=True, disk="xvdb")
    claims.take("vbd-51728")
    text = claims.give_back("vbd-51728")
    assert "block-detach" in text
    assert "restart the guest" in text
    assert not bus.bound("vbd-51728")
    assert claims.taken("vbd-51728") is None


def test_a_vbd_that_the_kernel_had_is_not_bound_after_a_second_service_either(
    bus: FakeBus, claims: Claims
) -> None:
    bus.device("vbd-51728", bound=True, disk="xvdb")
    claims.take("vbd-51728")
    claims.give_back("vbd-51728")
    claims.probe("vbd-51728")
    assert claims.probe_others(lambda name: False) == []
    assert claims.take("vbd-51728") == Taken("vbd-51728", kernel_had_bound=True, os_device="xvdb")
    assert claims.taken("vbd-51728") is not None
    assert "block-detach" in claims.give_back("vbd-51728")
    assert not bus.bound("vbd-51728")


def test_a_new_vbd_of_the_name_goes_to_the_kernel_whatever_became_of_the_old(
    bus: FakeBus, claims: Claims
) -> None:
    bus.device("vbd-51728", bound=True, disk="xvdb")
    claims.take("vbd-51728")
    claims.give_back("vbd-51728")
    (bus.bus / "devices/vbd-51728").unlink()
    bus.device("vbd-51728")
    assert claims.probe_others(lambda name: False) == ["vbd-51728"]
    assert bus.bound("vbd-51728")


def test_a_vif_that_the_kernel_had_is_bound_again(bus: FakeBus, claims: Claims) -> None:
    bus.device("vif-0", bound=True)
    claims.take("vif-0")
    assert claims.give_back("vif-0") == "vif-0: given back to the kernel"
    assert bus.bound("vif-0")


def test_a_device_that_is_gone_is_just_released(bus: FakeBus, claims: Claims) -> None:
    assert claims.give_back("vbd-51728") == "vbd-51728: released; the device is gone"


def test_holding_autoprobe_is_noted_and_undone(bus: FakeBus, claims: Claims) -> None:
    claims.hold_autoprobe("vbd")
    assert bus.autoprobe() == "0"
    assert (bus.roots.run / "autoprobe").exists()
    claims.release_autoprobe("vbd")
    assert bus.autoprobe() == "1"
    assert not (bus.roots.run / "autoprobe").exists()


def test_autoprobe_held_by_a_supervisor_that_crashed_is_repaired(
    bus: FakeBus, claims: Claims
) -> None:
    claims.hold_autoprobe("vbd")
    Claims(bus.roots).repair("vbd")
    assert bus.autoprobe() == "1"


def test_a_restart_after_a_crash_does_not_take_our_0_for_the_users(
    bus: FakeBus, claims: Claims
) -> None:
    claims.hold_autoprobe("vbd")
    after_crash = Claims(bus.roots)
    after_crash.hold_autoprobe("vbd")
    after_crash.release_autoprobe("vbd")
    assert bus.autoprobe() == "1"


def test_autoprobe_that_was_off_before_stays_off(bus: FakeBus, claims: Claims) -> None:
    (bus.bus / "drivers_autoprobe").write_text("0\n")
    claims.hold_autoprobe("vbd")
    claims.release_autoprobe("vbd")
    assert bus.autoprobe() == "0"


def test_autoprobe_stays_off_until_the_last_service_goes(bus: FakeBus, claims: Claims) -> None:
    claims.hold_autoprobe("vbd")
    claims.hold_autoprobe("vif")
    claims.release_autoprobe("vbd")
    assert bus.autoprobe() == "0"
    Claims(bus.roots).repair("vbd")  # one that serves what it was named, beside it
    assert bus.autoprobe() == "0"
    claims.release_autoprobe("vif")
    assert bus.autoprobe() == "1"


def test_a_device_whose_own_service_takes_it_is_not_handed_to_the_kernel(
    bus: FakeBus, claims: Claims
) -> None:
    claims.hold_autoprobe("vbd")
    claims.hold_autoprobe("vif")
    bus.device("vif-0")
    bus.device("console-1")
    assert claims.probe_others(lambda name: name.startswith("vbd-")) == ["console-1"]
    claims.release_autoprobe("vif")
    assert "vif-0" in claims.probe_others(lambda name: name.startswith("vbd-"))


def test_a_load_of_a_module_that_was_killed_holds_nothing(bus: FakeBus, claims: Claims) -> None:
    claims.hold_autoprobe("vbd")
    (bus.roots.run / "hot-plug" / "xen-netfront.999999999").touch()
    claims.release_autoprobe("vbd")
    assert bus.autoprobe() == "1"


def test_releasing_what_was_never_held_changes_nothing(bus: FakeBus, claims: Claims) -> None:
    claims.release_autoprobe("vbd")
    assert bus.autoprobe() == "1"


def test_without_a_xen_bus_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(PvfrontError, match="drivers_autoprobe is missing"):
        Claims(Roots(tmp_path)).hold_autoprobe("vbd")


def test_devices_that_are_nobodys_go_to_the_kernel(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728")
    claims.take("vbd-51728")
    bus.device("vbd-51744")
    bus.device("vif-0")
    bus.device("vif-1", bound=True)
    assert claims.probe_others(lambda name: name == "vbd-51744") == ["vif-0"]
    assert bus.bound("vif-0")
    assert not bus.bound("vbd-51728")
    assert not bus.bound("vbd-51744")


def test_claims_are_whole_json_files(bus: FakeBus, claims: Claims) -> None:
    bus.device("vbd-51728")
    claims.take("vbd-51728")
    note = json.loads((bus.roots.run / "vbd-51728.claim").read_text())
    assert note["kernel_had_bound"] is False
    assert sorted(p.name for p in bus.roots.run.iterdir()) == ["vbd-51728.claim"]


def mount(bus: FakeBus, point: str) -> None:
    (bus.roots.proc / "self/mountinfo").write_text(
        f"30 1 202:16 / {point} rw - ext4 /dev/xvdb rw\n"
    )
