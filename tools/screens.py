# SPDX-License-Identifier: BSD-2-Clause
"""Makes the screens of the documentation anew: each command of pvfront that they show, as it is.

A line `<!-- screen: COMMAND -->` in a file stands above a block, which becomes what COMMAND says
(to a shell) beside an embedded host whose guest has a disk and a network interface, both in use. As
root, or whoever may have network namespaces; it takes half a minute. What stands below
`<!-- a guest's screen: COMMAND -->` was taken in a guest of Xen, and is left as it is.
tests/unit/test_screens.py looks whether each block has the columns that its command has now.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from pvfront.host import Host
from pvfront.host.blkback import BlkBackend
from pvfront.host.netback import NetBackend
from pvfront.host.netns import NetNamespace
from pvfront.host.service import DiskService, NetService

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "README.md", ROOT / "docs/tools.md")
DIRECTORY = Path("/tmp/h")
"""As docs/host.md has it: it stands in what is shown."""
SCREEN = re.compile(
    r"^<!-- (?P<whose>a guest's )?screen: (?P<command>.+) -->\n```\n(?P<text>(?:.*\n)*?)```\n", re.M
)
THEIRS, OURS = "10.7.0.1", "10.7.0.2"
WARM_UP = 3.0  # seconds


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[dict[str, str]]:
    """A guest with a disk and a network interface in use; what commands need in the environment."""
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        host = await enter(await Host.start(DIRECTORY))
        guest = await enter(await NetNamespace.start(DIRECTORY, "guest"))
        dom0 = await enter(await NetNamespace.start(DIRECTORY, "dom0"))
        await host.create_domain()
        await host.attach_disk(1, "format=raw,vdev=xvdb,access=rw,target=memory:256M")
        await host.attach_vif(1, f"mac=00:16:3e:07:00:02,ip={THEIRS}/24")
        await enter(await BlkBackend.start(host))
        await enter(await NetBackend.start(host, dom0))
        disks = await enter(await DiskService.start(host))
        stack.push_async_callback(disks.end)
        networks = await enter(await NetService.start(host, guest))
        stack.push_async_callback(networks.end)
        await guest.run("ip", "address", "add", f"{OURS}/24", "dev", "enX0")
        await guest.run("ip", "link", "set", "enX0", "up")
        for command in (
            [*dom0.prefix(), "iperf3", "--server"],
            ["fio", "--name=x", "--ioengine=nbd", f"--uri={disks.uri('xvdb')}", "--rw=randrw",
             "--bs=16k", "--iodepth=8", "--size=256M", "--time_based", "--runtime=600"],
            [*guest.prefix(), "sh", "-c", f"sleep 1; exec iperf3 --client {THEIRS} --time 600"],
        ):  # fmt: skip
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=DIRECTORY,
                process_group=0,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            stack.push_async_callback(_end, process)
        await asyncio.sleep(WARM_UP)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        yield {**os.environ, **host.environ, "PATH": path, "COLUMNS": "132"}


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    await process.wait()


async def renew(texts: dict[Path, str]) -> None:
    """Replaces each text by the one with its screens made anew."""
    async with world() as environ:
        for file, text in texts.items():
            made, end = "", 0
            for found in SCREEN.finditer(text):
                if found["whose"]:
                    continue
                process = await asyncio.create_subprocess_shell(
                    found["command"], env=environ,
                    stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                )  # fmt: skip
                said = (await process.communicate())[0].decode()
                lines = [f"$ {found['command']}", *(line.rstrip() for line in said.splitlines())]
                screen = "\n".join(lines).rstrip()
                made += text[end : found.start()]
                made += f"<!-- screen: {found['command']} -->\n```\n{screen}\n```\n"
                end = found.end()
            texts[file] = made + text[end:]


def main() -> None:
    argparse.ArgumentParser(prog="tools/screens.py", description=__doc__).parse_args()
    texts = {file: file.read_text() for file in FILES}
    DIRECTORY.mkdir(mode=0o755)
    try:
        asyncio.run(renew(texts))
    finally:
        shutil.rmtree(DIRECTORY)
    for file, text in texts.items():
        file.write_text(text)
        print(f"{file.relative_to(ROOT)}: made anew")


if __name__ == "__main__":
    main()
