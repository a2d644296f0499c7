# SPDX-License-Identifier: BSD-2-Clause
"""What the suites inside a Xen guest share. They need root and the real devices, and say so."""

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from pvfront import gntalloc
from pvfront.evtchn import EventChannels
from pvfront.gntalloc import GrantAllocator
from pvfront.gntdev import GrantMapper
from pvfront.xenstore import Xenstore

MODULES = ("xen-evtchn", "xen-gntalloc", "xen-gntdev")


@pytest.fixture(scope="session", autouse=True)
def xen_devices():
    """The modules behind /dev/xen/*. A guest without them is broken: an error, not a skip."""
    assert os.geteuid() == 0, "these suites need root"
    assert Path("/sys/hypervisor/type").read_text().strip() == "xen", "this is no Xen guest"
    for module in MODULES:
        subprocess.run(["modprobe", module], check=True)


@pytest.fixture
async def store():
    async with await Xenstore.connect() as connected:
        assert connected.path == "/dev/xen/xenbus"
        yield connected


@pytest.fixture
async def scratch(store):
    """A directory of the store that is ours to write; gone after the test."""
    path = f"data/pvfront-test-{os.getpid()}"
    await store.mkdir(path)
    yield path
    await store.remove(path, missing_ok=True)


@pytest.fixture(scope="session")
def domid():
    """Our own id. A domain may bind a channel to itself; a PV one may map its own grants."""

    async def ask():
        async with await Xenstore.connect() as store:
            return int(await store.read("domid"))

    return asyncio.run(ask())


@pytest.fixture
def channels():
    with EventChannels.open() as opened:
        yield opened


@pytest.fixture
def allocator():
    with GrantAllocator.open() as opened:
        yield opened


GUEST_TYPE = Path("/sys/hypervisor/guest_type")


@pytest.fixture
def mapper(domid):
    """Maps this domain's own grants, which in a translated guest would crash its kernel."""
    kind = GUEST_TYPE.read_text().strip()
    if kind != "PV":
        pytest.skip(f"only a PV guest may map its own grants, this one is {kind} (see gntdev.py)")
    with GrantMapper.open(own_domid=domid) as opened:
        yield opened


class Limit:
    """The module's limit on granted pages."""

    path = gntalloc.LIMIT_PATH
    for_ever = "/etc/modprobe.d/"
    """What a hint says of the next boots."""

    def get(self) -> int:
        return int(Path(self.path).read_text())

    def set(self, pages: int) -> None:
        Path(self.path).write_text(str(pages))


@pytest.fixture
def limit():
    """Back to what it was afterwards."""
    found = Limit()
    before = found.get()
    yield found
    found.set(before)


@pytest.fixture
def memory_name():
    """What granted pages are called in /proc/PID/maps."""
    return "/dev/xen/gntalloc"
