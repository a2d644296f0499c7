# SPDX-License-Identifier: BSD-2-Clause
"""Networks in a real guest on real Xen, through the installed package and its unit.

With tools that we did not write (ping, iperf3, tcpdump, ip, xl), and a checking sender where those
do not look at what they carry.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import pytest
from lab.errors import CommandFailed
from lab.guest import Guest
from lab.pvf import UNIT as DISKS
from lab.scenario import Lab, wait_until
from lab.vifs import (
    CHECKER,
    FRAME,
    UNIT,
    Networks,
    Stream,
    Vif,
    checker,
    install_checker,
    report,
)

pytestmark = pytest.mark.net

STREAM = "2M"
"""Bits per second of iperf3's stream: what it goes through (a start of Python, a suspend) needs the
guest's one emulated processor. iperf3 would wake up 1000 times a second to keep a rate:
that takes all of it."""
SOAK = int(os.environ.get("PVFRONT_REPEATS", "1")) > 1
CYCLES = int(os.environ.get("PVFRONT_CYCLES", 200 if SOAK else 10))
FRAMES = 5000 if SOAK else 250
LARGEST = 65517  # MTU: netback's
HOLES_KIB = 2048
"""By how much the supervisor's memory may grow in the second half of the cycles. What it has in use
does not, but the heap gets holes, fewer and fewer: in 120 cycles 4 MB of them."""


@pytest.fixture
def net(lab: Lab, guest: Guest) -> Networks:
    """The service, serving every vif but the control vif."""
    service = Networks(lab, guest)
    service.start("--all")
    return service


@pytest.fixture
def wide(lab: Lab, guest: Guest) -> Networks:
    """The same with two queues and a filter for groups."""
    service = Networks(lab, guest)
    service.start("-o max_queues=2 -o multicast_filter=1 --all")
    return service


@pytest.fixture
def large_packets(lab: Lab, guest: Guest) -> Iterator[None]:
    """TCP makes packets as large as the window lets it, on a slow machine too.

    Else a packet holds what is sent in a millisecond at the present rate (tcp_tso_autosize).
    """
    ours = {"tcp_min_tso_segs": 44, "tcp_tso_win_divisor": 1}
    keys = " ".join(f"net.ipv4.{name}" for name in ours)
    settings = " ".join(f"net.ipv4.{name}={value}" for name, value in ours.items())
    machines = (lab.dom0, guest)
    before = [machine.output(f"sysctl {keys}; sysctl -qw {settings}") for machine in machines]
    yield
    for machine, was in zip(machines, before, strict=True):
        machine.run("sysctl -q -p -", stdin=was.encode(), check=False)


@pytest.mark.core
@pytest.mark.usefixtures("large_packets")
def test_a_hot_plugged_interface_answers_and_carries_bulk_both_ways_in_large_packets(
    net: Networks,
) -> None:
    with net.vif() as vif:
        vif.ping(56, 1472, 65507)
        vif.send(8)
        vif.fetch(8)
        vif.iperf("-n", "2M", v6=True)
        told = vif.iperf("-u", "-b", "10M", "-l", "1400", "-n", "1M")
        assert told["end"]["sum"]["lost_packets"] < told["end"]["sum"]["packets"]

        def in_large_packets(way: str, *options: str) -> bool:
            """A loss, or a receiver that had to wait, makes a transfer's packets small."""
            before = net.counters(vif)
            end = vif.iperf("-n", "32M", *options)["end"]
            assert end["sum_received"]["bytes"] > 0.9 * (32 << 20)
            after = net.counters(vif)
            large, size = (
                after[f"{way}.{what}"] - before[f"{way}.{what}"]
                for what in ("large_bytes", "bytes")
            )
            return large >= 0.9 * size

        wait_until("90 % in packets of more than 16 KiB, out", lambda: in_large_packets("tx"))
        wait_until("the same, in", lambda: in_large_packets("rx", "-R"))


def test_frames_of_any_size_arrive_with_what_they_were_sent_with(
    net: Networks, lab: Lab, guest: Guest
) -> None:
    with net.vif(mtu=LARGEST) as vif:
        vif.ping(56, 65000)
        ends = ((guest, vif.name), (lab.dom0, vif.dom0_name))
        macs = {vif.name: vif.mac, vif.dom0_name: "fe:ff:ff:ff:ff:ff"}
        for seed, ((source, out), (target, into)) in enumerate((ends, ends[::-1]), 1):
            receiver = checker(target, "frames-receive", into, ready=True)
            sender = checker(source, "frames-send", out, macs[into], FRAMES, LARGEST + FRAME, seed)
            sent = report(sender)
            got = report(receiver)
            assert got["corrupt"] == []
            assert sent["wrong_length"] == []
            assert got["frames"] == sent["frames"] == FRAMES


@contextlib.contextmanager
def capture(
    lab: Lab, interface: str, what: str, *, namespace: str = "", whole: bool = False
) -> Iterator[list[str]]:
    """tcpdump in dom0; the list is filled with its lines at the end."""
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    path = f"/tmp/{interface}.pcap"
    length = "-s0" if whole else "-s128"
    job = lab.dom0.start(
        [*inside, "tcpdump", "-p", "-i", interface, "-U", "-B", "32768", length, "-w", path, what]
    )

    def listens() -> bool:
        job.poll()
        return "listening on" in job.stderr

    wait_until(f"tcpdump on {interface}", listens)
    lines: list[str] = []
    yield lines
    job.kill(2)
    ended = job.wait()
    assert re.search(r"^0 packets dropped by kernel", ended.stderr, re.MULTILINE), ended
    lines += lab.dom0.output(f"tcpdump -nn -e -vv -r {path}; rm {path}", timeout=300).splitlines()


@contextlib.contextmanager
def network_beyond(vif: Vif) -> Iterator[tuple[str, str, str, str]]:
    """A namespace that dom0 routes to, through an interface that cuts and checks nothing itself.

    Returns its name, its interface, and its IPv4 and IPv6 addresses.
    """
    kind = vif.dom0.split(".")[1]
    far, v4, v6 = f"far{kind}", f"10.{kind}.200.", f"fd00:{kind}:200::"
    vif.lab.dom0.run(
        f"ip netns add {far} && ip link add {far}a type veth peer name {far}b netns {far} && "
        f"ethtool -K {far}a tx off tso off gso off >/dev/null && "
        f"ip address add {v4}1/24 dev {far}a && ip address add {v6}1/64 dev {far}a nodad && "
        f"ip link set {far}a up && ip netns exec {far} sh -c '"
        f"ip address add {v4}2/24 dev {far}b && ip address add {v6}2/64 dev {far}b nodad && "
        f"ip link set {far}b up && ip route add default via {v4}1 && "
        f"ip route add default via {v6}1' && "
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"
    )
    try:
        vif.guest.run(
            f"ip route add {v4}0/24 via {vif.dom0} && ip route add {v6}/64 via {vif.dom0_v6}"
        )
        yield far, f"{far}b", f"{v4}2", f"{v6}2"
    finally:
        vif.lab.dom0.run(f"ip netns del {far}; ip link del {far}a", check=False)


def lengths(lines: list[str]) -> list[int]:
    """Of the frames, as tcpdump -e tells them."""
    return [int(found[1]) for line in lines if (found := re.search(r", length (\d+): ", line))]


@pytest.mark.usefixtures("large_packets")
def test_dom0_gets_large_packets_that_become_frames_with_right_checksums(
    net: Networks, lab: Lab, guest: Guest
) -> None:
    with net.vif() as vif, network_beyond(vif) as (far, port, v4, v6):
        ours = f"src host {vif.address} or src host {vif.address_v6}"
        with (
            capture(lab, vif.dom0_name, f"tcp and ({ours})") as near,
            capture(lab, port, ours, namespace=far, whole=True) as beyond,
        ):
            vif.send(4, f"{far}/{v4}")
            vif.send(4, f"{far}/{v6}")
            guest.run(
                f"for n in 1 100 1400 4000; do head -c $n /dev/zero >/dev/udp/{v4}/9; "
                f"head -c $n /dev/zero >/dev/udp/{v6}/9; done; ping -n -c1 -w180 {v4}; "
                f"ping -n -c1 -w180 {v6}"
            )
        text = "\n".join(beyond)
        assert len(re.findall(r"cksum 0x[0-9a-f]+ \(correct\)", text)) > 4000
        assert "udp sum ok" in text
        assert not re.findall(r"^.*(?:incorrect|bad udp cksum|bad cksum|wrong).*$", text, re.M)
        assert max(lengths(near)) > 16384
        assert max(lengths(beyond)) <= 1514


@pytest.mark.area
def test_an_interface_of_a_large_mtu_carries_vlans(net: Networks, lab: Lab, guest: Guest) -> None:
    with net.vif(mtu=9000) as vif:
        assert guest.read(f"/sys/class/net/{vif.name}/mtu") == b"9000\n"
        vif.ping(8952, options="-M do")  # with an IPv6 header: 9000
        there, here = vif.dom0.replace(".1", ".101", 1), vif.address.replace(".1", ".101", 1)
        for machine, below, address in (
            (lab.dom0, vif.dom0_name, there),
            (guest, vif.name, here),
        ):
            machine.run(
                f"ip link add link {below} name vlan5 type vlan id 5 && "
                f"ip address add {address}/24 dev vlan5 && ip link set vlan5 up"
            )
        guest.run(f"ping -n -c1 -w180 -s 20000 {there}")
        vif.send(8, there)
        vif.fetch(8, there)
        # netif cannot say what a VLAN's frame wants.
        assert net.counters(vif)["tx.csum_done"] > 0


@contextlib.contextmanager
def neighbour(vif: Vif) -> Iterator[tuple[str, str]]:
    """A namespace of dom0 that shares a bridge with the vif: netback looks at the group of what
    dom0 passes on, not of what dom0 itself sends. Returns its name and its address."""
    kind = vif.dom0.split(".")[1]
    name, address = f"next{kind}", vif.dom0.removesuffix(".1") + ".3"
    vif.lab.dom0.run(
        f"ip netns add {name} && ip link add {name}a type veth peer name {name}b netns {name} && "
        f"ip link add {name} type bridge mcast_snooping 0 && ip link set {name} up && "
        f"ip link set {name}a master {name} && ip link set {name}a up && "
        f"ip link set {vif.dom0_name} master {name} && "
        f"ip -n {name} address add {address}/24 dev {name}b && ip -n {name} link set {name}b up"
    )
    try:
        yield name, address
    finally:
        vif.lab.dom0.run(f"ip netns del {name}; ip link del {name}a; ip link del {name}")


@pytest.mark.area
def test_a_group_that_is_joined_is_heard_and_another_does_not_reach_the_guest(
    wide: Networks, lab: Lab, guest: Guest
) -> None:
    port = 6789
    joined, other = "239.1.2.3", "239.4.5.6"
    with wide.vif() as vif, neighbour(vif) as (name, address):
        guest.run(f"ping -n -c1 -w180 {address}")
        sees = guest.start(["tcpdump", "-p", "-nn", "-l", "-i", vif.name, f"udp port {port}"])
        hears = checker(guest, "hear", vif.address, port, joined, ready=True)

        def listens() -> bool:
            sees.poll()
            return "listening on" in sees.stderr

        wait_until("tcpdump", listens)
        install_checker(lab.dom0)

        def heard() -> bool:
            for group in (other, joined):
                lab.dom0.run(
                    f"ip netns exec {name} python3 {CHECKER} say {address} {port} {group} "
                    f"'to {group}'"
                )
            hears.poll()
            return f"to {joined}" in hears.stdout

        def captured() -> bool:
            sees.poll()
            return f"{joined}.{port}" in sees.stdout

        wait_until("a datagram to the group that was joined", heard)
        wait_until("the group's frame", captured)
        hears.kill()
        sees.kill()
        assert f"{other}.{port}" not in sees.stdout, "the backend has not heard what is wanted"


def both_queues_carry(net: Networks, vif: Vif) -> None:
    assert net.state(vif)["queues"] == 2

    def carry() -> bool:
        vif.iperf("-n", "4M", "-P", "8")
        queues = net.queues(vif)
        assert len(queues) == 2
        return all(queue[way]["packets"] > 10 for queue in queues for way in ("tx", "rx"))

    wait_until("flows on both queues, both ways", carry)


def test_two_queues_carry_flows_side_by_side(wide: Networks) -> None:
    with wide.vif() as vif:
        both_queues_carry(wide, vif)


@pytest.mark.long
def test_a_guest_with_two_processors_has_two_queues(lab: Lab, guest: Guest) -> None:
    guest.destroy()
    guest.create(options={"vcpus": 2})
    net = Networks(lab, guest)
    net.start("--all")
    with net.vif() as vif:
        vif.send(32)
        vif.fetch(32)
        both_queues_carry(net, vif)


def held(net: Networks, guest: Guest) -> dict[str, int]:
    """What cycles of attach and detach must not leave behind."""
    pid = net.pid()
    return {
        what: int(guest.output(command))
        for what, command in {
            "workers": "pgrep -c -x pvfront-worker || true",
            "event channels": "grep -c 'xen-dyn.*evtchn' /proc/interrupts || true",
            "interfaces": "ls /sys/class/net | wc -l",
            "descriptors": f"ls /proc/{pid}/fd | wc -l",
            "tasks": f"ls /proc/{pid}/task | wc -l",
        }.items()
    }


@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("soak_round")
def test_attach_and_detach_again_and_again_leaks_nothing(net: Networks, guest: Guest) -> None:
    rss = f"awk '/^VmRSS/ {{print $2}}' /proc/{net.pid()}/status"
    before: dict[str, int] = {}
    kib = 0
    for cycle in range(CYCLES):
        with net.vif() as vif:
            if cycle % 5 == 0:
                vif.ping(56, 4000)
        if cycle == CYCLES // 2 - 1:  # by then Python's and libc's arenas have what a cycle needs
            before, kib = held(net, guest), int(guest.output(rss))

    # asyncio's executor begins another thread whenever none is idle yet, up to this many.
    cpus = int(guest.output("nproc"))
    before["tasks"] = max(before["tasks"], 1 + min(32, cpus + 4))

    def no_more() -> bool:
        more = {what: n for what, n in held(net, guest).items() if n > before[what]}
        if more:
            raise CommandFailed(f"there are {more}")
        return True

    wait_until(f"no more than {before}", no_more)
    more = int(guest.output(rss)) - kib
    assert more < HOLES_KIB, f"{more} KiB more after {CYCLES - CYCLES // 2} cycles"
    limit = int(guest.output("cat /sys/module/xen_gntalloc/parameters/limit"))
    probe = (
        "from pvfront.gntalloc import GrantAllocator\n"
        f"GrantAllocator.open().alloc(0, min({limit}, 8192))\n"
    )
    guest.run(["/opt/pvfront/bin/python", "-W", "ignore", "-c", probe])


@pytest.mark.area
def test_an_idle_interface_costs_no_cpu(net: Networks, guest: Guest, lab: Lab) -> None:
    with net.vif() as vif:
        vif.ping()
        # Who hears no router asks for one again and again, ever more seldom (RFC 7559).
        for machine, name in ((guest, vif.name), (lab.dom0, vif.dom0_name)):
            machine.run(f"echo 0 >/proc/sys/net/ipv6/conf/{name}/accept_ra")
        pids = (net.pid(), net.state(vif)["worker_pid"])
        look = "cat " + " ".join(f"/proc/{pid}/stat" for pid in pids)

        def idle(seconds: int) -> bool:
            lines = guest.output(f"{look}; sleep {seconds}; {look}").splitlines()
            ticks = [sum(map(int, line.rpartition(")")[2].split()[11:13])) for line in lines]
            return ticks[:2] == ticks[2:]

        # What the attach set going (router solicitations, the log, the state file) ends first.
        wait_until("2 s without a tick", lambda: idle(2))
        wait_until("10 s without a tick", lambda: idle(10), deadline=300)


@pytest.mark.usefixtures("soak_round")
@pytest.mark.timeout(1800)
def test_streams_go_on_through_a_dead_worker_a_restart_and_a_suspend(
    net: Networks, lab: Lab, guest: Guest
) -> None:
    with net.vif() as vif:
        vif.ping()
        stream = Stream(vif)
        vif.iperf("-n", "1M")  # its server
        pace = ("-b", STREAM, "--pacing-timer", "50000")
        load = guest.start(vif.iperf_line("-t", "3000", *pace))

        def goes_on() -> None:
            sent = vif.counter("tx_bytes")
            stream.goes_on()
            wait_until("iperf3's bytes", lambda: vif.counter("tx_bytes") > sent + (1 << 19), 300)
            assert load.running

        goes_on()
        first = net.state(vif)
        guest.run(f"kill -KILL {first['worker_pid']}")
        wait_until("another worker", lambda: net.state(vif).get("generation", 0) > 1)
        net.wait_served(vif)
        goes_on()
        second = net.state(vif)
        supervisor = net.pid()
        guest.run(f"systemctl restart {UNIT}", timeout=300)
        wait_until("another supervisor", lambda: net.pid() not in (0, supervisor))
        net.wait_served(vif)
        goes_on()
        said = guest.run(["pvfront", "upgrade", vif.name])
        third = net.state(vif)
        assert third["worker_pid"] not in (first["worker_pid"], second["worker_pid"]), said
        assert third["generation"] == second["generation"], "both ends stay Connected"
        goes_on()
        boot, domid = guest.boot_id(), guest.number
        guest.save()
        guest.restore()
        assert guest.boot_id() == boot
        assert guest.number != domid
        net.wait_served(vif)
        goes_on()
        load.kill(2)
        ended = load.wait()
        assert "interrupt" in ended.stdout + ended.stderr, ended
        stream.end()
        assert "BUG" not in guest.output("dmesg")


@pytest.mark.long
def test_a_cable_that_is_pulled_by_any_key_of_dom0_is_seen_and_so_is_its_return(
    net: Networks, lab: Lab, guest: Guest
) -> None:
    with net.vif() as vif:
        vif.ping()
        front = f"/local/domain/{guest.number}/device/vif/{vif.devid}"
        back = f"/local/domain/0/backend/vif/{guest.number}/{vif.devid}"
        sys = f"/sys/class/net/{vif.name}"
        for key, down, up in (
            (f"{front}/disconnect", "1", "0"),
            (f"{back}/carrier", "0", "1"),
            (f"{front}/speed", "0", "10G"),
        ):
            lab.xenstore_write(key, down)
            wait_until("no carrier", lambda: guest.read(f"{sys}/carrier") == b"0\n")
            assert key.rpartition("/")[2] in net.state(vif)["no_carrier_because"]
            lab.xenstore_write(key, up)
            wait_until("a carrier", lambda: guest.read(f"{sys}/carrier") == b"1\n")
            vif.ping(56, 4000)
        assert guest.read(f"{sys}/speed") == b"10000\n"
        assert "Speed: 10000Mb/s" in guest.output(["ethtool", vif.name])


@pytest.mark.kinds("pv")
def test_what_is_stopped_is_the_kernels_again(net: Networks, guest: Guest) -> None:
    with net.vif() as vif:
        vif.ping()
        assert not vif.is_the_kernels()
        net.stop()
        wait_until("the kernel's interface", vif.is_the_kernels)
        vif.configure(vif.name)
        vif.ping(56, 4000)


@pytest.mark.long
def test_addresses_go_with_the_interface_to_the_kernel_and_back(
    net: Networks, guest: Guest
) -> None:
    def has_them(kernels: bool) -> bool:
        said = guest.run(f"ip -o address show dev {vif.name}", check=False).stdout
        there = vif.address in said and vif.address_v6 in said
        return there and vif.is_the_kernels() == kernels

    with net.vif() as vif:
        vif.ping()
        net.stop()
        wait_until("the kernel's interface with its addresses", lambda: has_them(True))
        vif.ping(56, 4000)
        net.start("--all")
        net.wait_served(vif)
        wait_until("ours with its addresses", lambda: has_them(False))
        vif.ping(56, 4000)


def test_the_interface_of_the_default_route_is_refused_without_force(guest: Guest) -> None:
    guest.run(f"systemctl stop {UNIT}; ip route replace default via 10.0.2.2 dev eth0")
    refused = guest.run("timeout 150 pvfront vif serve 0", check=False)
    assert refused.code != 0
    assert "--force" in refused.stderr
    assert "default route" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert guest.has("/sys/class/net/eth0/device/driver")


@pytest.mark.long
def test_the_disk_service_beside_it_lets_the_network_service_have_new_vifs(
    net: Networks, guest: Guest
) -> None:
    """Both hold new devices back from the kernel's drivers."""
    guest.run(f"systemctl start {DISKS}", timeout=300)
    for service in (DISKS, UNIT):
        with net.vif() as vif:
            vif.ping()
        guest.run(f"systemctl restart {service}", timeout=300)
    with net.vif() as vif:
        vif.ping()
