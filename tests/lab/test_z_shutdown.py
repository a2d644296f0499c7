# SPDX-License-Identifier: BSD-2-Clause
"""The end of a guest, after all other tests: what is mounted from our disks goes before they do."""

from __future__ import annotations

import pytest
from lab.guest import Guest
from lab.pvf import UNIT, Pvfront
from lab.scenario import Lab

pytestmark = [pytest.mark.disk, pytest.mark.pv]


def test_at_shutdown_a_mount_of_fstab_and_a_volume_are_taken_down_before_our_disks(
    lab: Lab, guest: Guest
) -> None:
    pvf = Pvfront(lab, guest)
    pvf.start("--all")
    data, volume = lab.loop_disk(16), lab.volume(24)
    for device in (data.device, volume.device):
        lab.dom0.run(f"mkfs.ext4 -q {device}")
    volume.activate(False)
    for name, spec in (("xvdb", data.spec("xvdb")), ("xvdc", volume.below.spec("xvdc"))):
        guest.block_attach(spec)
        pvf.wait_served(name)
    # LVM's service for this is masked in the image, since it costs time.
    guest.run(
        "rm /etc/systemd/system/blk-availability.service; mkdir -p /srv/data /srv/volume; "
        f"printf '/dev/pvfront/xvdb /srv/data ext4 x-systemd.requires={UNIT}.service 0 2\\n"
        f"/dev/{volume.name}/disk /srv/volume ext4 defaults 0 2\\n' >/etc/fstab; "
        "systemctl daemon-reload && systemctl start blk-availability && "
        f"vgchange -q -ay {volume.name} && mount /srv/data && mount /srv/volume && "
        "dd if=/dev/urandom of=/srv/data/f bs=64k count=16 status=none && "
        "dd if=/dev/urandom of=/srv/volume/f bs=64k count=16 status=none"
    )
    guest.dirty = True
    guest.shutdown()
    volume.activate(True)
    for device in (data.device, volume.device):
        assert lab.dom0.run(f"e2fsck -f -n {device}").ok, "it was not unmounted in order"
    for backing in (data, volume):
        backing.remove()
    # So that a guest that is created after this boots as from the image.
    lab.dom0.run(
        f"mkdir -p /tmp/root && mount {guest.root} /tmp/root && : >/tmp/root/etc/fstab "
        "&& umount /tmp/root"
    )
