# SPDX-License-Identifier: BSD-2-Clause
"""`pvfront console attach`, and programs at both ends, on the embedded host."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pexpect
import pexpect.fdpexpect
import pytest
import pytest_asyncio
from consoleworld import ConsoleWorld, console_world, numbered
from waiting import PATIENCE, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAME = "shared"
ESCAPE = "\x1d"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def it():
    async with console_world() as made:
        made.devid = await made.attach(NAME)
        yield made


class Attached:
    """`pvfront console attach` in a terminal of its own."""

    def __init__(self, it: ConsoleWorld, *options: str) -> None:
        command = ["-P", "-m", "pvfront", "console", "attach", *options, NAME]
        self.child = pexpect.spawn(
            sys.executable, command, env={**os.environ, **it.host.environ}, timeout=PATIENCE
        )

    async def expect(self, text: str) -> bytes:
        """Waits for it; what came before it."""
        await asyncio.to_thread(self.child.expect_exact, text)
        found: bytes = self.child.before
        return found

    async def expect_end(self) -> int:
        await asyncio.to_thread(self.child.expect, pexpect.EOF)
        await asyncio.to_thread(self.child.wait)
        return int(self.child.exitstatus)

    async def detach(self) -> None:
        self.child.send(ESCAPE)
        assert await self.expect_end() == 0


@pytest.fixture
def attached(it: ConsoleWorld) -> Iterator[object]:
    made: list[Attached] = []

    def attach(*options: str) -> Attached:
        made.append(Attached(it, *options))
        return made[-1]

    yield attach
    for one in made:
        one.child.close(force=True)


async def _clients(it: ConsoleWorld, count: int) -> None:
    await it.until(f"{count} clients", it.devid, lambda state: len(state["clients"]) == count)


async def test_attached_one_talks_with_dom0_until_ctrl_bracket(it: ConsoleWorld, attached) -> None:
    async with await it.dom0(it.devid) as dom0:
        one = attached("--history=0")
        await _clients(it, 1)
        await dom0.send(b"hello guest\r\n")
        await one.expect("hello guest")
        one.child.send("hello dom0\r")
        assert await dom0.receive(11) == b"hello dom0\r"
        await one.detach()
        await _clients(it, 0)
        again = attached("--history=0")
        await _clients(it, 1)
        again.child.send("back")
        assert await dom0.receive(4) == b"back"
        await again.detach()
    await _clients(it, 0)


async def test_another_escape_ends_it_and_leaves_ctrl_bracket_to_dom0(
    it: ConsoleWorld, attached
) -> None:
    async with await it.dom0(it.devid) as dom0:
        one = attached("--history=0", "--escape", "^T")
        await _clients(it, 1)
        one.child.send(f"{ESCAPE}more")
        assert await dom0.receive(5) == b"\x1dmore"
        one.child.send("\x14")
        assert await one.expect_end() == 0
    await _clients(it, 0)


async def test_an_escape_that_is_no_control_character_is_refused(
    it: ConsoleWorld, attached
) -> None:
    one = attached("--escape", "x")
    await one.expect("the escape is a control character")
    assert await one.expect_end() == 2


async def test_what_is_typed_before_it_is_attached_comes_too(it: ConsoleWorld, attached) -> None:
    async with await it.dom0(it.devid) as dom0:
        one = attached("--history=0")
        one.child.send("early")  # Python takes longer to start
        assert await dom0.receive(5) == b"early"
        await one.detach()
    await _clients(it, 0)


async def test_two_readers_see_the_same_bytes_and_a_late_one_what_came_before(
    it: ConsoleWorld, attached
) -> None:
    text = numbered(40_000)
    async with await it.dom0(it.devid) as dom0:
        first = attached("--read-only", "--history=0")
        second = attached("--read-only", "--history=0")
        await _clients(it, 2)
        sending = asyncio.create_task(dom0.send(text + b"END-OF-IT"))
        seen = await asyncio.gather(first.expect("END-OF-IT"), second.expect("END-OF-IT"))
        await sending
        assert seen[0] == seen[1] == text
        late = attached("--read-only", "--history=20009")
        assert await late.expect("END-OF-IT") == text[-20_000:]
        for one in (first, second, late):
            await one.detach()
    await _clients(it, 0)
    with it.terminal(NAME) as terminal:  # the program finds it, too
        assert (await terminal.receive(len(text)))[:100] != b""
        await eventually("the last of it", lambda: b"END-OF-IT" in terminal.listen())


async def test_one_writes_at_a_time_and_another_takes_its_place_when_it_says_so(
    it: ConsoleWorld, attached
) -> None:
    async with await it.dom0(it.devid) as dom0:
        first = attached("--history=0")
        await it.until("it writes", it.devid, lambda state: state["writer"].startswith("pid "))
        second = attached("--history=0")
        await second.expect("read only")
        second.child.send("nothing")
        third = attached("--steal", "--history=0")
        await first.expect("writes now")
        assert await first.expect_end() == 1
        await _clients(it, 2)
        third.child.send("mine")
        assert await dom0.receive(4) == b"mine"
        await third.detach()
        await second.detach()
    await _clients(it, 0)


async def test_a_program_on_the_terminal_writes_and_waits_while_its_place_is_taken(
    it: ConsoleWorld, attached
) -> None:
    async with await it.dom0(it.devid) as dom0:
        with it.terminal(NAME) as terminal:
            await terminal.send(b"program")
            assert await dom0.receive(7) == b"program"
            thief = attached("--steal", "--history=0")
            await it.until("it writes", it.devid, lambda s: s["writer"].startswith("pid "))
            await terminal.send(b"later")
            thief.child.send("first ")
            assert await dom0.receive(6) == b"first "
            await thief.detach()
            assert await dom0.receive(5) == b"later"


async def test_a_shell_on_the_terminal_serves_dom0_and_another_follows_it(
    it: ConsoleWorld,
) -> None:
    assert it.service is not None
    path = it.service.terminal(NAME)

    def shell(prompt: str) -> subprocess.Popen[bytes]:
        """As a getty would: the terminal is its own."""
        return subprocess.Popen(
            ["sh", "-c", f"exec <{path} >{path} 2>&1; stty sane; PS1='{prompt}> ' sh -i"],
            start_new_session=True,
        )

    async with await it.dom0(it.devid) as dom0:
        dom0.sock.setblocking(True)
        end = pexpect.fdpexpect.fdspawn(dom0.sock.fileno(), timeout=PATIENCE)
        for prompt in ("first", "second"):
            process = shell(prompt)
            try:
                await asyncio.to_thread(end.expect_exact, f"{prompt}> ")
                end.send("stty size\r")
                await asyncio.to_thread(end.expect_exact, "24 80")
                end.send("echo $((6 * 7))\r")
                await asyncio.to_thread(end.expect_exact, "42\r\n")
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


async def test_a_client_of_a_console_that_goes_is_told(it: ConsoleWorld, attached) -> None:
    one = attached("--read-only")
    await _clients(it, 1)
    await it.host.detach_console(1, it.devid, timeout=PATIENCE)
    await one.expect("detached")
    assert await one.expect_end() == 1
