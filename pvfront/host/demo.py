# SPDX-License-Identifier: BSD-2-Clause
"""`make demo`: a disk and a network interface from an xl config, served by pvfront, used and
verified, in seconds.

Everything that runs in a Xen guest runs here: the real store, the services, their workers on shared
rings, backends as processes of their own. Only the hypervisor is missing; the embedded host
(docs/host.md) stands in for its event channels and grants. No root is needed, where users may have
user namespaces and open /dev/net/tun, as Debian has it: the interface's two ends are networks of
their own. Where they may not, the network is left out, and a line says so.

Every command is shown as it can be repeated. Exit status 0: all data was the same on both sides,
and nothing was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pvfront.errors import PvfrontError
from pvfront.host import Host, iperf
from pvfront.host.blkback import BlkBackend
from pvfront.host.child import START_SECONDS, said_by
from pvfront.host.netback import NetBackend
from pvfront.host.netns import NetNamespace, NetNamespaceError
from pvfront.host.service import DiskService, NetService
from pvfront.netfront.tap import TUN

MIB = 1 << 20
DISK = "xvdb"
IFNAME = "enX0"
TOOLS = {
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "qemu-io": "qemu-utils",
    "fio": "fio",
    "ip": "iproute2",
    "ping": "iputils-ping",
    "iperf3": "iperf3",
}
"""What is used on the devices, none of it ours: program, Debian package."""


class DemoFailed(PvfrontError):
    """Something did not do what it should have; the line says what."""


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


class Progress:
    """One line on a terminal, renewed in place; a line for each quarter elsewhere."""

    def __init__(self, what: str, size: int) -> None:
        self._what = what
        self._size = size
        self._begin = time.monotonic()
        self._live = sys.stdout.isatty()
        self._told = 0

    def show(self, percent: int) -> None:
        if self._live:
            bar = "#" * (percent * 30 // 100)
            print(f"\r{self._what} [{bar:30}] {self._line(percent)} ", end="", flush=True)
        elif percent // 25 > self._told:
            print(f"  {self._what} {self._line(percent)}", flush=True)
        self._told = max(self._told, percent // 25)

    def feed(self, data: bytes) -> None:
        """Lines as nbdcopy writes them: N/100."""
        for line in data.split(b"\n"):
            percent = line.removesuffix(b"/100")
            if percent.isdigit() and percent != line:
                self.show(int(percent))

    def end(self) -> None:
        if self._live:
            print(flush=True)

    def _line(self, percent: int) -> str:
        done = self._size * percent / 100 / MIB
        seconds = max(time.monotonic() - self._begin, 1e-6)
        return f"{percent:3}%  {done:4.0f} MiB  {done / seconds:6.0f} MiB/s"


class Demo(ABC):
    """What both walks share: showing what is done."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.prefix: list[str] = []
        """What stands before a command: that it runs in the guest's network."""

    @abstractmethod
    async def run(self) -> None:
        """Raises PvfrontError."""

    # -- showing ---------------------------------------------------------------------------------

    async def pvfront(self, *arguments: str, only: Callable[[str], bool] | None = None) -> None:
        print(f"$ pvfront {shlex.join(arguments)}", flush=True)
        command = [*self.prefix, sys.executable, "-P", "-m", "pvfront", *arguments]
        text = await self._run(command, {**os.environ, **self.host.environ})
        lines = text.rstrip().splitlines()
        print("\n".join(line for line in lines if only is None or only(line)), flush=True)

    async def tool(self, *command: str, show: bool = True) -> None:
        print(f"$ {shlex.join(command)}", flush=True)
        text = await self._run(command)
        if show and text.strip():
            print(text.rstrip(), flush=True)

    async def _run(
        self,
        command: Sequence[str],
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> str:
        """What it says; ended if we are. Raises DemoFailed."""
        status, text = await said_by(
            *command, environ=environ, cwd=self.host.directory, pass_fds=pass_fds
        )
        if status:
            raise DemoFailed(f"{command[0]} failed with status {status}", hint=text)
        return text

    def nothing_left(self) -> None:
        say("nothing is left behind")
        left = self.host.dump()
        print(
            f"event channels: {len(left['ports'])}, grants: {len(left['grants'])}, "
            f"grants still mapped: {left['deferred']}",
            flush=True,
        )
        if any(left.values()):
            raise DemoFailed(f"something leaked: {left}")


class DiskDemo(Demo):
    """A disk."""

    def __init__(self, host: Host, size: int) -> None:
        super().__init__(host)
        self.size = size
        self.store = host.directory / "disk.img"  # what the backend keeps the disk in

    async def run(self) -> None:
        """Raises PvfrontError."""
        self.store.touch()
        os.truncate(self.store, self.size)
        spec = f"format=raw,vdev={DISK},access=rw,target={self.store}"
        say("a guest with a disk, as its xl config has it")
        print(f"disk = [ '{spec}' ]")
        await self.host.create_domain()
        vdev = await self.host.attach_disk(1, spec)
        async with await BlkBackend.start(self.host) as backend:
            say("domain 0's block backend runs; in the guest the disk service takes the disk")
            print(f"$ export PVFRONT_HOST={self.host.directory}")
            print("$ pvfront vbd serve --all &")
            service = await DiskService.start(self.host)
            try:
                await self.look(service)
                await self.use(service)
                stats = await backend.stats()
                say("the toolstack takes the disk away (xl block-detach)")
                await self.host.detach_disk(1, vdev, timeout=START_SECONDS)
                await self.pvfront("list")
                if await service.stop():
                    raise DemoFailed("the disk service failed", hint=service.log.read_text())
            finally:
                await service.end()
        self.nothing_left()
        self.nothing_unanswered(stats)

    async def look(self, service: DiskService) -> None:
        await self.pvfront("list")
        say("what was negotiated")
        await self.pvfront("status", DISK, only=lambda line: not statistics(line))
        say("tools that nobody here wrote use it at its NBD socket")
        await self.tool("nbdinfo", service.uri(DISK))

    async def use(self, service: DiskService) -> None:
        uri = service.uri(DISK)
        source, back = self.host.directory / "random", self.host.directory / "back"
        wanted = fill(source, self.size)
        await self.copy("write", str(source), uri)
        await self.copy("read ", uri, str(back))
        self.compare("sent to the disk", wanted, "the backend's store", digest(self.store))
        self.compare("sent to the disk", wanted, "read back", digest(back))
        back.unlink()
        say("requests of all kinds, checked by those who sent them")
        await self.tool(
            "qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 4M", "-c", "flush",
            "-c", "discard 2M 1M", "-c", "read -P 0x5a 1M 1M", "-c", "read -P 0x5a 3M 2M", uri,
        )  # fmt: skip
        await self.tool(
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw",
            "--bsrange=512-256k", "--iodepth=32", f"--size={self.size // 4}", "--verify=crc32c",
            "--verify_fatal=1", "--verify_state_save=0", "--output-format=terse",
            show=False,
        )  # fmt: skip
        print("fio: every block was what it had written")
        await self.copy("read ", uri, str(back))
        self.compare("read by the client", digest(back), "the backend's store", digest(self.store))
        say("what the worker counted")
        await self.pvfront("status", DISK, only=statistics)

    async def copy(self, what: str, source: str, destination: str) -> None:
        """nbdcopy, with its progress as one live line."""
        read, write = os.pipe()
        flush = ["--flush"] if destination.startswith("nbd") else []
        command = ["nbdcopy", *flush, f"--progress={write}", source, destination]
        print(f"$ {shlex.join(['nbdcopy', *flush, source, destination])}", flush=True)
        progress = Progress(what, self.size)
        os.set_blocking(read, False)
        loop = asyncio.get_running_loop()
        loop.add_reader(read, lambda: progress.feed(os.read(read, 4096)))
        try:
            await self._run(command, pass_fds=(write,))
            progress.show(100)
        finally:
            loop.remove_reader(read)
            progress.end()
            os.close(read)
            os.close(write)

    def compare(self, left: str, one: str, right: str, other: str) -> None:
        print(f"sha256 {one[:32]}…  {left}\nsha256 {other[:32]}…  {right}", flush=True)
        if one != other:
            raise DemoFailed(f"what was {left} is not {right}")

    def nothing_unanswered(self, stats: Mapping[str, int]) -> None:
        print(
            f"requests unanswered: {stats['requests'] - stats['responses']} of {stats['requests']}"
        )
        if stats["requests"] != stats["responses"]:
            raise DemoFailed("requests were not answered")


THEIRS, OURS = ("10.7.0.1", "fd07::1"), ("10.7.0.2", "fd07::2")
IPERF_SECONDS = 2


class NetDemo(Demo):
    """A network interface, between two networks."""

    def __init__(self, host: Host, guest: NetNamespace, dom0: NetNamespace) -> None:
        super().__init__(host)
        self.guest = guest
        self.dom0 = dom0
        self.prefix = guest.prefix()

    async def run(self) -> None:
        """Raises PvfrontError."""
        spec = f"mac=00:16:3e:07:00:02,mtu=9000,ip={THEIRS[0]}/24 {THEIRS[1]}/64"
        say("a guest with a network interface, as its xl config has it")
        print(f"vif = [ '{spec}' ]")
        devid = await self.host.attach_vif(1, spec)
        async with await NetBackend.start(self.host, self.dom0) as backend:
            say("domain 0's network backend runs; in the guest the network service takes the vif")
            print("$ pvfront vif serve --all &")
            service = await NetService.start(self.host, self.guest)
            try:
                await self.pvfront("list")
                say("what was negotiated")
                await self.pvfront("status", IFNAME, only=lambda line: not statistics(line))
                await self.configure()
                await self.use()
                await self.counted(backend)
                say("the toolstack takes the interface away (xl network-detach)")
                await self.host.detach_vif(1, devid, timeout=START_SECONDS)
                await self.pvfront("list")
                if await service.stop():
                    raise DemoFailed("the network service failed", hint=service.log.read_text())
            finally:
                await service.end()
        self.nothing_left()

    async def configure(self) -> None:
        say("the guest gives it addresses, as any interface")
        await self.inside("ip", "address", "add", f"{OURS[0]}/24", "dev", IFNAME)
        await self.inside("ip", "address", "add", f"{OURS[1]}/64", "dev", IFNAME, "nodad")
        await self.inside("ip", "link", "set", IFNAME, "up")

    async def use(self) -> None:
        say("pings of the largest size there is, cut by the kernel and put together again")
        for address in THEIRS:
            ping = ["ping", "-c", "3", "-i", "0.2", "-W", "10", "-s", "65507", address]
            await self.inside(*ping, only=lambda line: "packets transmitted" in line)
        say("iperf3 across it: out, in, and over UDP")
        server = self.dom0.start_command(
            "iperf3", ["iperf3", "--server", "--forceflush"], self.host.directory / "iperf3.log"
        )
        try:
            await server.saying("listening")
            for name, how in {
                "TCP out": [], "TCP in ": ["--reverse"], "UDP out": ["--udp", "--bitrate", "50M"],
            }.items():  # fmt: skip
                print(f"{name}: {await self.iperf(*how)}", flush=True)
        finally:
            await server.stop(signal.SIGKILL)

    async def iperf(self, *how: str) -> str:
        command = ["iperf3", "--client", THEIRS[0], "--time", str(IPERF_SECONDS), *how]
        print(f"guest$ {shlex.join(command)}", flush=True)
        asked = [*self.prefix, *command, "--json"]
        end = (await iperf.report(lambda: self._run(asked)))["end"]
        got = end.get("sum_received") or end["sum"]
        lost = f", {got['lost_percent']:.2g} % lost" if "lost_percent" in got else ""
        if not got["bytes"]:
            raise DemoFailed("nothing came")
        return (
            f"{got['bytes'] / MIB:.0f} MiB in {got['seconds']:.1f} s, "
            f"{got['bits_per_second'] / 1e9:.2f} Gbit/s{lost}"
        )

    async def counted(self, backend: NetBackend) -> None:
        say("what the worker counted (all but zeroes), and the backend at its other end")
        await self.pvfront("status", IFNAME, only=counts)
        stats = await backend.stats()
        for way, name in (("tx", "sent"), ("rx", "received")):
            packets, size = stats[f"{way}_packets"], stats[f"{way}_bytes"]
            print(
                f"{name} by the guest: {packets} packets of {size / max(packets, 1):.0f} bytes on "
                f"average, {stats[f'{way}_gso']} of them large ones (GSO)"
            )
        if stats["fatal"] or stats["tx_rejected"]:
            raise DemoFailed(f"the backend refused packets: {stats}")

    async def inside(self, *command: str, only: Callable[[str], bool] | None = None) -> None:
        """A command in the guest's network."""
        print(f"guest$ {shlex.join(command)}", flush=True)
        text = await self._run([*self.prefix, *command])
        lines = [line for line in text.splitlines() if line and (only is None or only(line))]
        print("\n".join(lines) if lines else "", end="\n" if lines else "", flush=True)


async def network(host: Host) -> None:
    """The network's part, or the line that says why there is none. Raises PvfrontError."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            guest, dom0 = [
                await stack.enter_async_context(await NetNamespace.start(host.directory, name))
                for name in ("guest", "dom0")
            ]
            await try_tap(guest)
        except NetNamespaceError as exc:
            say(f"the network is left out: {exc}")
            print(exc.hint or "")
            return
        await NetDemo(host, guest, dom0).run()


def no_tun() -> str:
    """Why this user can have no TAPs; "": nothing is known against it. root loads the module."""
    if os.geteuid() == 0 or os.access(TUN, os.R_OK | os.W_OK):
        return ""
    return f"{TUN} {'may not be opened by users' if Path(TUN).exists() else 'is missing'}"


async def try_tap(where: NetNamespace) -> None:
    """Raises NetNamespaceError: there can be no interfaces like ours."""
    if why := no_tun():
        raise NetNamespaceError(why, hint=f"as root: modprobe tun; chmod 666 {TUN}")
    await where.run("ip", "tuntap", "add", "dev", "try", "mode", "tap")
    await where.run("ip", "link", "del", "try")


def statistics(line: str) -> bool:
    """Whether a line of `pvfront status` is of the worker's counters."""
    return line.startswith(("statistics:", "  "))


def counts(line: str) -> bool:
    """Whether it is one of a counter that is not 0, or their headline."""
    return statistics(line) and not line.endswith(": 0")


def fill(path: Path, size: int) -> str:
    """Random bytes; their sha256."""
    found = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(size // MIB):
            block = os.urandom(MIB)
            found.update(block)
            file.write(block)
    return found.hexdigest()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_tools() -> None:
    """Raises DemoFailed naming the packages of what is not installed."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if missing:
        raise DemoFailed(
            "some of the tools that use the devices are not installed",
            hint=f"as root: apt-get install --no-install-recommends {' '.join(sorted(missing))}",
        )


async def demo(size: int) -> None:
    """Runs both and cleans up, whatever happens. Raises PvfrontError."""
    require_tools()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pvfront-demo-") as directory:
        async with await Host.start(Path(directory)) as host:
            await DiskDemo(host, size).run()
            await network(host)
    say(f"done in {time.monotonic() - begin:.0f} s")
    print(
        "The same in a real guest: `make demo-xen` boots Xen under QEMU and does it there;\n"
        'for a guest of your own see README.md, "In a guest of your own".'
    )


async def _main(size: int) -> int:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await demo(size)
    except asyncio.CancelledError:
        print("\ndemo: interrupted; everything that it started is ended", file=sys.stderr)
        return 130
    except PvfrontError as exc:
        print(f"\ndemo: {exc}", file=sys.stderr)
        if exc.hint:
            print(f"  {exc.hint}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pvfront.host.demo",
        description="A disk and a network interface, served and verified, in seconds.",
    )
    parser.add_argument("--size", type=int, default=128, metavar="MIB", help="of the disk")
    options = parser.parse_args(arguments)
    if options.size < 16:
        parser.error("the disk must have 16 MiB at least")
    return asyncio.run(_main(options.size * MIB))


if __name__ == "__main__":
    sys.exit(main())
