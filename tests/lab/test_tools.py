# SPDX-License-Identifier: BSD-2-Clause
"""The tools that watch a guest, in a guest: what only the kernel and systemd can show."""

from __future__ import annotations

import json

import pytest
from lab.guest import Guest
from lab.pvf import Pvfront
from lab.scenario import Lab, wait_until

# Little that only a guest can show: for who asks for services.
pytestmark = [pytest.mark.services, pytest.mark.area]

TEXTFILES = "/var/lib/prometheus/node-exporter"


@pytest.fixture
def pvf(lab: Lab, guest: Guest) -> Pvfront:
    service = Pvfront(lab, guest)
    service.start("--all")
    return service


def test_doctor_top_and_the_metrics_unit_see_a_served_disk(
    pvf: Pvfront, guest: Guest, lab: Lab
) -> None:
    with pvf.disk(lab.loop_disk(16)):
        said = guest.run("pvfront doctor --json", check=False)
        findings = {one["subject"]: one for one in json.loads(said.stdout)}
        assert said.ok, said
        assert findings["guest"]["text"].startswith(f"{guest.kind[:3].upper()} guest of Xen 4.")
        assert findings["xvdb"]["text"].startswith("served as /dev/")
        assert findings["suspend"]["level"] == "OK"
        assert "the root file system" in findings["xvda"]["text"]
        (disk,) = json.loads(guest.output("pvfront top --json -c 1"))["devices"]
        assert (disk["name"], disk["phase"]) == ("xvdb", "connected")
        guest.run(f"mkdir -p {TEXTFILES} && chown nobody {TEXTFILES}")
        guest.run("systemctl start pvfront-metrics.service")
        text = guest.output(f"cat {TEXTFILES}/pvfront.prom")
        assert 'pvfront_worker_up{device="xvdb"} 1.0' in text
        assert 'pvfront_vbd_requests_total{device="xvdb",operation="read",queue="0"}' in text
        guest.run(f"rm {TEXTFILES}/pvfront.prom && systemctl start pvfront-metrics.timer")
        wait_until("the timer's file", lambda: guest.run(
            f"test -e {TEXTFILES}/pvfront.prom", check=False).ok)  # fmt: skip
        guest.run(f"systemctl stop pvfront-metrics.timer; rm -r {TEXTFILES}")
