# SPDX-License-Identifier: BSD-2-Clause
"""What `--json` prints is what tests/interfaces/shapes.json says of it (docs/interfaces.md)."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

import interfaces
import pytest
import pytest_asyncio
from consoleworld import console_world
from networld import Network, network, networks
from test_negotiation import RICH, Place, place
from waiting import PATIENCE

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELP = (
    "this is not what tests/interfaces/shapes.json says of `pvfront {} --json`: undo the change, "
    "or write it there and raise versions.JSON (docs/interfaces.md)"
)


async def printed(environ: Mapping[str, str], *words: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pvfront", *words,
        env={**os.environ, **environ}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    return out.decode()


def holds(verb: str, value: Any) -> None:
    found = interfaces.differences(value, interfaces.shapes()[verb])
    assert not found, HELP.format(verb)


async def shown(environ: Mapping[str, str], verb: str, *arguments: str) -> Any:
    """What a command prints as JSON, after a look at its shape."""
    value = json.loads(await printed(environ, *verb.split(), *arguments, "--json"))
    # A command that takes a device prints that one's object, without it a list.
    several = isinstance(interfaces.shapes()[verb], list) and not isinstance(value, list)
    holds(verb, [value] if several else value)
    return value


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def disk() -> AsyncIterator[Place]:
    async with place(RICH) as it:
        await it.status()
        await it.verify()
        yield it


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def net() -> AsyncIterator[Network]:
    async with network("--all") as it:
        await it.attach()
        await it.configure()
        yield it


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("list", []),
        ("vbd list", []),
        ("status", []),
        ("status", ["xvdb"]),
        ("vbd status", []),
        ("trace", []),
        ("trace", ["xvdb"]),
        ("ledger", []),
        ("ledger", ["xvdb"]),
        ("store ls", ["device"]),
        ("store ls", ["-p", "device"]),
        ("store read", ["domid", "device/vbd/51728/state"]),
        ("doctor", []),
        ("config check", []),
        ("time", []),
    ],
)
async def test_with_a_disk_it_is_what_is_recorded(
    disk: Place, verb: str, arguments: list[str]
) -> None:
    assert await shown(disk.host.environ, verb, *arguments)


@pytest.mark.parametrize(("verb", "arguments"), [("store watch", ["-n", "1", "domid"])])
async def test_a_command_that_goes_on_prints_an_object_a_line(
    disk: Place, verb: str, arguments: list[str]
) -> None:
    (line,) = (await printed(disk.host.environ, *verb.split(), *arguments, "--json")).splitlines()
    holds(verb, json.loads(line))


async def test_with_a_console_it_is_what_is_recorded() -> None:
    async with console_world() as it:
        await it.attach("com1")
        for verb in ("list", "console list", "status", "console status", "trace", "ledger"):
            assert await shown(it.host.environ, verb)
        await top_holds(it.host.environ)


async def top_holds(environ: Mapping[str, str]) -> None:
    lines = await printed(environ, "top", "--json", "--interval", "0.2", "-c", "2")
    assert len(lines.splitlines()) == 2
    for line in lines.splitlines():
        found = json.loads(line)
        holds("top", found)
        assert found["devices"]


async def test_top_prints_an_object_a_line(disk: Place) -> None:
    await top_holds(disk.host.environ)


@networks
async def test_so_it_does_of_a_network(net: Network) -> None:
    await top_holds(net.host.environ)


@networks
@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("list", []),
        ("vif list", []),
        ("status", []),
        ("status", ["vif0"]),
        ("vif status", []),
        ("trace", []),
        ("ledger", []),
    ],
)
async def test_with_a_network_it_is_what_is_recorded(
    net: Network, verb: str, arguments: list[str]
) -> None:
    assert net.service is not None
    value = json.loads(await net.service.pvfront(*verb.split(), *arguments, "--json"))
    several = isinstance(interfaces.shapes()[verb], list) and not isinstance(value, list)
    holds(verb, [value] if several else value)


async def test_a_device_that_nobody_serves_has_the_same_keys(disk: Place) -> None:
    await disk.host.attach_disk(1, "format=raw,vdev=xvdc,access=rw,target=memory:8M")
    for verb in ("list", "status", "ledger"):
        await shown(disk.host.environ, verb)
    await shown(disk.host.environ, "status", "xvdc")
