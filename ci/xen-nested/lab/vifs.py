# SPDX-License-Identifier: BSD-2-Clause
"""Networks between dom0 and a guest, and pvfront's network service in the guest.

Each vif is a network of its own: dom0's end has addresses on the vif itself (scripts/vif-lab), the
guest's gets its own from `Networks.attach`. dom0's numbers of devices, addresses and ports differ
from guest to guest, since several may run.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import paths
from .client import Job, Machine
from .errors import CommandFailed
from .guest import Guest
from .pvf import start_service, state_in
from .scenario import Lab, wait_until

UNIT = "pvfront-vif"
CHECKER = "/run/lab/netcheck.py"
FRAME = 14  # bytes of an Ethernet header


@dataclass
class Vif:
    """A network of two: dom0 and a guest."""

    lab: Lab
    guest: Guest
    devid: int
    mac: str
    net: int
    """Of its addresses: 10.KIND.NET.1 is dom0, .2 the guest."""
    name: str = ""
    """The guest's interface."""

    @property
    def dom0_name(self) -> str:
        return f"vif{self.guest.number}.{self.devid}"

    @property
    def dom0(self) -> str:
        return self.addresses(1)[0]

    @property
    def dom0_v6(self) -> str:
        return self.addresses(1)[1]

    @property
    def address(self) -> str:
        return self.addresses(2)[0]

    @property
    def address_v6(self) -> str:
        return self.addresses(2)[1]

    def addresses(self, host: int) -> tuple[str, str]:
        kind = self.guest.address.rsplit(".", 1)[1]
        return f"10.{kind}.{self.net}.{host}", f"fd00:{kind}:{self.net}::{host}"

    @property
    def port(self) -> int:
        """For a server of this network in dom0."""
        return 5000 + 100 * (int(self.guest.address.rsplit(".", 1)[1]) - 20) + self.net

    def states(self) -> tuple[str | None, str | None]:
        """(frontend's, backend's) XenbusState; None: no such key."""
        front = f"/local/domain/{self.guest.number}/device/vif/{self.devid}/state"
        back = f"/local/domain/0/backend/vif/{self.guest.number}/{self.devid}/state"
        read = f"for k in {front} {back}; do xenstore-read $k 2>/dev/null || echo; done"
        states = self.lab.dom0.run(read).stdout.split("\n")
        return states[0] or None, states[1] or None

    def is_the_kernels(self) -> bool:
        """Whether the guest's interface has a driver: a TAP has none."""
        return self.guest.has(f"/sys/class/net/{self.name}/device/driver")

    def configure(self, name: str) -> None:
        """Gives the guest's interface its addresses."""
        self.name = name
        v4, v6 = self.addresses(2)
        self.guest.run(
            f"ip address replace {v4}/24 dev {name} && "
            f"ip address replace {v6}/64 dev {name} nodad && ip link set {name} up"
        )

    def counter(self, name: str) -> int:
        """/sys/class/net/*/statistics/NAME of the guest's interface. Quick: for waiting."""
        (seen,) = self.guest.look(f"/sys/class/net/{self.name}/statistics/{name}")
        return int(seen.text) if seen and seen.text else 0

    def ping(self, *sizes: int, options: str = "") -> None:
        """dom0's IPv4 and IPv6 addresses, until the first answer to each size; 180 s at most."""
        for where in (self.dom0, self.dom0_v6):
            for size in sizes or (56,):
                self.guest.run(f"ping -n -c1 -w180 -s{size} {options} {where}")

    def send(self, mib: int, where: str = "") -> None:
        """Random data over TCP to dom0, or whoever else has the address `where`: in a namespace
        of dom0 if it is given as "NAMESPACE/ADDRESS". Raises AssertionError if it arrives changed.
        """
        namespace, _, address = where.rpartition("/")
        inside = f"ip netns exec {namespace} " if namespace else ""
        sink = self.lab.dom0.start(
            f"set -o pipefail; {inside}{self._listen(address, '-u')} - | sha256sum"
        )
        there = f"/dev/tcp/{address or self.dom0}/{self.port}"
        sent = self.guest.output(
            f"head -c {mib}M /dev/urandom >/dev/shm/sent; {_connect(there)}; "
            "cat /dev/shm/sent >&3; exec 3>&-; sha256sum </dev/shm/sent; rm /dev/shm/sent",
            timeout=300,
        )
        assert sink.wait().stdout == sent + "\n"

    def fetch(self, mib: int, address: str = "") -> None:
        """The same the other way, from dom0."""
        source = f"/tmp/fetched-{self.port}"
        source_sum = self.lab.dom0.output(
            f"head -c {mib}M /dev/urandom >{source}; sha256sum <{source}"
        )
        job = self.lab.dom0.start(f"{self._listen(address, '-U')} OPEN:{source}; rm {source}")
        there = f"/dev/tcp/{address or self.dom0}/{self.port}"
        got = self.guest.output(f"{_connect(there)}; sha256sum <&3", timeout=300)
        assert got == source_sum
        job.wait()

    def _listen(self, address: str, way: str) -> str:
        version = 6 if ":" in address else 4
        return f"socat {way} TCP{version}-LISTEN:{self.port},reuseaddr"

    def iperf(self, *options: str, v6: bool = False, timeout: float = 300.0) -> dict[str, Any]:
        """iperf3 in the guest against dom0: its report. Raises CommandFailed."""
        port = self.port + 1000
        listens = f"ss -Hltn 'sport = {port}' | grep -q ."
        serve = (
            f"{listens} || iperf3 -s -D -p {port} >/dev/null 2>&1; "
            f"until {listens}; do sleep 0.1; done"
        )
        self.lab.dom0.run(serve)
        line = self.iperf_line("-J", *options, v6=v6)
        end = time.monotonic() + timeout
        while True:
            told: dict[str, Any] = json.loads(self.guest.run(line, timeout=timeout).stdout)
            if not iperf_refused(told, time.monotonic() > end):
                return told

    def iperf_line(self, *options: str, v6: bool = False) -> list[str]:
        """The same as a command, for whoever has called `iperf` before: its server stays."""
        where = self.dom0_v6 if v6 else self.dom0
        return ["iperf3", "-c", where, "-p", str(self.port + 1000), *options]


def iperf_refused(told: dict[str, Any], last: bool = False) -> bool:
    """Whether iperf3's client reports that the server was busy: it is to ask again.

    That may not have seen yet that the client before has ended. It says so and hangs up, which may
    overtake what it said. Raises CommandFailed for any other error, and for this one if no more
    is asked: the client's status is 0 with one as well.
    """
    if "error" not in told:
        return False
    cut = "Connection reset" in told["error"] and not told.get("intervals")
    if last or not (cut or "server is busy" in told["error"]):
        raise CommandFailed(f"iperf3: {told['error']}")
    return True


def _connect(there: str) -> str:
    """For bash: descriptor 3 is the connection, as soon as somebody listens."""
    return f"until exec 3<>{there}; do sleep 0.1; done 2>/dev/null"


def install_checker(machine: Machine) -> None:
    if not machine.has(CHECKER):
        machine.write(CHECKER, (paths.LAB / "scripts" / "netcheck.py").read_bytes())


def checker(machine: Machine, *arguments: object, ready: bool = False) -> Job:
    """Starts netcheck.py there; `ready`: returns once it has said that it is."""
    install_checker(machine)
    # Of a test that is repeated, the first one's may still listen.
    again = " ".join(map(str, arguments))
    machine.run(["pkill", "-f", "--", f"[n]etcheck.py {again}$"], check=False)
    job = machine.start(["python3", CHECKER, *map(str, arguments)])
    if ready:

        def said() -> bool:
            job.poll()
            assert job.code is None, job.stderr
            return "ready" in job.stdout

        wait_until(f"netcheck.py {arguments[0]} in {machine.name}", said)
    return job


def report(job: Job, timeout: float = 300.0) -> dict[str, Any]:
    """What a netcheck.py that has succeeded says in its last line."""
    ended = job.wait(timeout)
    assert ended.ok, ended
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answer


class Stream:
    """Blocks over TCP from the guest to dom0, each compared there and answered, until `end`."""

    def __init__(self, vif: Vif) -> None:
        self.guest = vif.guest
        self._progress = f"/run/lab/answered-{vif.net}"
        self._server = checker(vif.lab.dom0, "stream-serve", vif.dom0, vif.port, ready=True)
        self._job = checker(vif.guest, "stream-send", vif.dom0, vif.port, self._progress)

    def answered(self) -> int:
        """How many blocks were. Quick: for waiting."""
        (seen,) = self.guest.look(self._progress)
        return int(seen.text or 0) if seen else 0

    def goes_on(self) -> None:
        """Returns once some more were answered."""
        before = self.answered()
        wait_until("the stream's answers", lambda: self.answered() > before + 10)
        assert self._job.running

    def end(self) -> None:
        """Raises AssertionError if a block was lost or changed."""
        self._job.kill(15)
        sent = report(self._job)
        assert report(self._server)["blocks"] == sent["sent"] == sent["answered"]


@dataclass
class Networks:
    """The network service of one guest, and the guest's vifs."""

    lab: Lab
    guest: Guest
    _nets: set[int] = field(default_factory=set)

    # -- the service -------------------------------------------------------------------------

    def start(self, vifs: str = "--all") -> None:
        """Starts the service for these vifs (as on its command line), if it does not run so.

        The control vif is never ours: the default route goes through it.
        """
        route = "ip route replace default via 10.0.2.2 dev eth0"
        start_service(self.guest, UNIT, f"PVFRONT_VIFS={vifs}", route)

    def stop(self) -> None:
        self.guest.run(f"systemctl stop {UNIT}", timeout=300)

    def pid(self) -> int:
        """The supervisor's."""
        return int(self.guest.output(f"systemctl show -p MainPID --value {UNIT}"))

    # -- questions ---------------------------------------------------------------------------

    def state(self, vif: Vif | int) -> dict[str, Any]:
        """What the supervisor last wrote about the vif, {} if nothing. Quick: for waiting."""
        devid = vif if isinstance(vif, int) else vif.devid
        return state_in(self.guest.look(f"/run/pvfront/vif-{devid}.json")[0])

    def status(self, vif: Vif) -> dict[str, Any]:
        """`pvfront status --json`."""
        answer: dict[str, Any] = json.loads(
            self.guest.output(["pvfront", "status", vif.name, "--json"])
        )
        return answer

    def queues(self, vif: Vif) -> list[dict[str, Any]]:
        """The worker's counters of each queue, as struct pvf_net_stats has them."""
        file = self.state(vif)["statistics_file"]
        program = (
            "import json, os; from pvfront.abi import read_all_net_stats as read; "
            f"print(json.dumps(read(os.open({file!r}, os.O_RDONLY))))"
        )
        answer: list[dict[str, Any]] = json.loads(
            self.guest.output(["/opt/pvfront/bin/python", "-W", "ignore", "-c", program])
        )
        return answer

    def counters(self, vif: Vif) -> dict[str, int]:
        """The same of all queues together, by plain names: "tx.packets"."""
        sums: dict[str, int] = {}
        for queue in self.queues(vif):
            for name, value in queue.items():
                inner = value if isinstance(value, dict) else {"": value}
                for key, number in inner.items():
                    if isinstance(number, int):
                        full = f"{name}.{key}".rstrip(".")
                        sums[full] = sums.get(full, 0) + number
        return sums

    def served(self, vif: Vif | int) -> bool:
        now = self.state(vif)
        return now.get("phase") == "connected" and bool(now.get("carrier"))

    def wait_served(self, vif: Vif) -> None:
        wait_until(f"vif{vif.devid} served by pvfront", lambda: self.served(vif))

    # -- vifs --------------------------------------------------------------------------------

    def attach(self, *, mtu: int = 1500, served: bool = True) -> Vif:
        """Attaches a vif, waits for its interface, which pvfront (or, not `served`, the kernel)
        makes, and gives both ends their addresses."""
        net = next(n for n in range(1, 99) if n not in self._nets)
        self._nets.add(net)
        kind = self.guest.mac.rsplit(":", 1)[1]
        vif = Vif(self.lab, self.guest, -1, f"00:16:3e:77:{kind}:{net:02x}", net)
        v4, v6 = vif.addresses(1)
        path = f"/local/domain/0/backend/vif/{self.guest.number}"
        attach = [
            "xl", "network-attach", self.guest.kind, "type=vif", f"mac={vif.mac}", f"mtu={mtu}",
            f"script={paths.VIF_SCRIPT.name}", f"ip={v4}/24 {v6}/64",
        ]  # fmt: skip
        find = (
            '"$@" || exit 1; '
            f"for i in $(xenstore-list {path}); do "
            f'[ "$(xenstore-read {path}/$i/mac)" = {vif.mac} ] && echo $i; done'
        )
        found = self.lab.dom0.output(["bash", "-c", find, "attach", *attach])
        vif.devid = int(found.split()[-1])
        if served:
            self.wait_served(vif)
            vif.configure(self.state(vif)["os_device"])
        else:
            vif.configure(wait_until("the kernel's interface", lambda: self._named(vif.mac)))
        return vif

    def _named(self, mac: str) -> str:
        look = f"grep -l {mac} /sys/class/net/*/address"
        found = self.guest.run(look, check=False).stdout.split()
        return found[0].split("/")[4] if found else ""

    def detach(self, vif: Vif) -> None:
        """`xl network-detach`; returns once nothing of it is left on either side."""

        def gone() -> bool:
            return not self.guest.has(f"/sys/class/net/{vif.name}")

        self.lab.detach(self.guest, "network-detach", str(vif.devid), gone)
        wait_until("the vif gone from the store", lambda: vif.states() == (None, None))
        wait_until(f"{vif.name} gone", gone)
        self._nets.discard(vif.net)

    @contextlib.contextmanager
    def vif(self, *, mtu: int = 1500, served: bool = True) -> Iterator[Vif]:
        """`attach`; and `detach` at the end."""
        vif = self.attach(mtu=mtu, served=served)
        try:
            yield vif
        finally:
            self.detach(vif)
