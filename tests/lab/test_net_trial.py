# SPDX-License-Identifier: BSD-2-Clause
"""Trial."""
from __future__ import annotations
import json, os
import pytest
from lab.guest import Guest
from lab.scenario import Lab, wait_until

pytestmark = [pytest.mark.net]
OUT = open("/tmp/w/net-trial.txt", "a")

def say(*a):
    print(*a, file=OUT, flush=True)

def sh(g, cmd, timeout=120):
    r = g.run(cmd, check=False, timeout=timeout)
    say(f"[{g.kind if hasattr(g,'kind') else 'dom0'}] $ {cmd}\n{r.stdout}{r.stderr}")
    return r

def test_trial(guest: Guest, lab: Lab) -> None:
    d0 = lab.dom0
    lab.xl("network-attach", guest.kind, "bridge=xenbr0")
    wait_until("eth1", lambda: guest.has("/sys/class/net/eth1"))
    sh(d0, "ip addr add 192.168.9.1/24 dev xenbr0; ip -6 addr add fd00::1/64 dev xenbr0; (iperf3 -s -D)")
    conf = "ip link set eth1 up; ip addr add 192.168.9.2/24 dev eth1; ip -6 addr add fd00::2/64 dev eth1 nodad; ip -s link show eth1"
    sh(guest, conf)
    sh(guest, "ethtool -k eth1 | grep -E 'tcp-seg|scatter|checksumming'; sleep 2; ping -c 3 192.168.9.1; iperf3 -c 192.168.9.1 -t 5 | tail -4; iperf3 -c 192.168.9.1 -t 5 -R | tail -4")
    sh(guest, "systemd-run --unit=pvfvif --collect pvfront vif serve 1 -v; for i in $(seq 90); do grep -qs '\"phase\": \"connected\"' /run/pvfront/vif-1.json && break; sleep 1; done; cat /run/pvfront/vif-1.json; journalctl -u pvfvif --no-pager | tail -40; ip link; xenstore-ls -f device/vif/1")
    sh(d0, "xenstore-ls -f /local/domain/0/backend/vif | tail -60; ip link; dmesg | tail -5")
    sh(guest, conf)
    sh(guest, "ip -s neigh; ping -c 5 192.168.9.1; ping -c 3 fd00::1; ping -c 3 -s 65507 192.168.9.1; ping -c 3 -s 1400 -M do 192.168.9.1")
    sh(guest, "cat /run/pvfront/vif-1.json | python3 -m json.tool | head -60; journalctl -u pvfvif --no-pager | tail -20")
    sh(guest, "iperf3 -c 192.168.9.1 -t 5 | tail -6; iperf3 -c 192.168.9.1 -t 5 -R | tail -6; iperf3 -c fd00::1 -t 3 | tail -4; iperf3 -u -b 50M -c 192.168.9.1 -t 3 | tail -5", 180)
    sh(guest, "python3 - <<'E'\nimport json,os\ns=json.load(open('/run/pvfront/vif-1.json'));print(s.get('details',s).get('statistics_file'))\nE\n/opt/pvfront/bin/python - <<'E'\nimport json,os\nfrom pvfront.abi import read_all_net_stats\ns=json.load(open('/run/pvfront/vif-1.json'))\nf=s.get('statistics_file') or s['details']['statistics_file']\nfd=os.open(f,os.O_RDONLY)\nprint(json.dumps(read_all_net_stats(fd),indent=0))\nE")
    sh(d0, "dmesg | tail -5")
    sh(guest, "dmesg | tail -8; systemctl stop pvfvif; sleep 3; ip link; journalctl -u pvfvif --no-pager | tail -12; xenstore-ls -f device/vif/1")
    lab.xl("network-detach", guest.kind, "1")
