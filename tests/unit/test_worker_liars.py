# SPDX-License-Identifier: BSD-2-Clause
"""The supervisor's end of the control protocol against a worker that says whatever none ever would.

A liar is a socket of this test.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE, eventually
from workerevents import NAME, Events

from pvfront import workerlink as module
from pvfront.abi import ffi, lib
from pvfront.blkfront.lend import pair
from pvfront.worker import Worker, WorkerGone
from pvfront.workermessage import Broken, Exited, FeatureOff, Stalled, TargetGone


def packet(struct: str, kind: int, generation: int = 0, **fields: Any) -> bytes:
    body = ffi.new(f"struct {struct} *", fields)
    body.hdr.magic, body.hdr.version = lib.PVF_CTL_MAGIC, lib.PVF_CTL_VERSION
    body.hdr.type, body.hdr.generation = kind, generation
    body.hdr.length = ffi.sizeof(body[0])
    return bytes(ffi.buffer(body))


def hello(**fields: Any) -> bytes:
    return packet("pvf_ctl_hello", lib.PVF_CTL_HELLO, name=NAME.encode(), **fields)


class Liar:
    """The far end of a Worker's connection. Its process is this one."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(run_dir / f"{NAME}.sock"))
        self.listener.listen(4)
        self.listener.setblocking(False)
        self.sock: socket.socket | None = None
        self.worker: Worker | None = None
        self.events: Events | None = None

    async def greet(self, first: bytes | None) -> Worker | None:
        """Lets a Worker adopt us; `first` is what we say to it."""
        adopting = asyncio.create_task(Worker.adopt(NAME, self.run_dir))
        self.sock, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        if first is None:
            self.sock.close()
        else:
            self.sock.send(first)
        self.worker = await adopting
        if self.worker is not None:
            self.events = Events(self.worker)
        return self.worker

    def say(self, data: bytes, fds: list[int] | None = None) -> None:
        assert self.sock is not None
        socket.send_fds(self.sock, [data], fds or [])

    async def asked(self) -> int:
        """The type of the next command."""
        assert self.sock is not None
        self.sock.setblocking(False)
        data = await asyncio.wait_for(
            asyncio.get_running_loop().sock_recv(self.sock, 8192), PATIENCE
        )
        return int(ffi.from_buffer("struct pvf_ctl_hdr *", data).type)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
        if self.sock is not None:
            self.sock.close()
        self.listener.close()


@pytest.fixture
async def liar(tmp_path: Path) -> AsyncIterator[Liar]:
    made = Liar(tmp_path)
    yield made
    made.close()


LIES = {
    "a header cut short": (b"PVFC\1", "truncated message"),
    "another protocol": (bytes(64), "another version of the control protocol"),
    "a type nobody knows": (packet("pvf_ctl_simple", 77), r"unknown shape \(type 77\)"),
    "a command, not an answer": (
        packet("pvf_ctl_simple", lib.PVF_CTL_EXIT),
        r"unknown shape \(type 5\)",
    ),
    "a body cut short": (
        packet("pvf_ctl_simple", lib.PVF_CTL_BROKEN),
        r"unknown shape \(type 97\)",
    ),
    "a HELLO of no known state": (hello(state=99), "unknown shape"),
    "more than a message can be": (bytes(lib.PVF_CTL_MAX + 1), "too long"),
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.replace(" ", "-"))
async def test_nonsense_ends_the_connection_and_the_reason_is_named(liar: Liar, lie: str) -> None:
    data, reason = LIES[lie]
    worker = await liar.greet(hello())
    assert worker is not None
    assert liar.events is not None
    pending = asyncio.create_task(worker.quiesce(0, PATIENCE))
    await liar.asked()
    liar.say(data)
    with pytest.raises(WorkerGone, match=reason):
        await pending
    assert [type(event) for event in liar.events] == [Exited]
    assert not worker.alive


async def test_the_end_of_the_connection_is_named(liar: Liar) -> None:
    worker = await liar.greet(hello())
    assert worker is not None
    assert liar.sock is not None
    liar.sock.close()
    assert await worker.ended(PATIENCE)
    with pytest.raises(WorkerGone, match="closed the control connection"):
        await worker.detach(0, keep_target=True)


async def test_the_last_words_of_a_worker_come_before_its_end(liar: Liar) -> None:
    """Its process and its socket are two descriptors: here that of the process is served first."""
    worker = await liar.greet(hello())
    assert worker is not None
    assert liar.events is not None
    detaching = asyncio.create_task(worker.detach(0, keep_target=True))
    await liar.asked()
    liar.say(packet("pvf_ctl_broken", lib.PVF_CTL_BROKEN, rule=7))
    liar.say(packet("pvf_ctl_simple", lib.PVF_CTL_DETACHED))
    module.WorkerLink._exited(worker)
    await detaching
    assert [type(event) for event in liar.events] == [Broken, Exited]


WHO_HANGS_UP = """
import socket, sys, time
path, hello, log = sys.argv[1], *map(bytes.fromhex, sys.argv[2:])
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(path)
listener.listen()
print("listening", flush=True)
sock, _ = listener.accept()
sock.send(hello)
sock.send(log)
sock.close()
time.sleep(3600)
"""


async def test_an_adopted_worker_has_ended_when_its_process_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection ends first; ports and pages are free only afterwards."""
    monkeypatch.setattr(module, "_LAST_BREATH", 3600.0)
    log = packet("pvf_ctl_log", lib.PVF_CTL_LOG, level=4, text=b"my last word")
    arguments = str(tmp_path / f"{NAME}.sock"), hello().hex(), log.hex()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WHO_HANGS_UP, *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), PATIENCE)
        worker = await Worker.adopt(NAME, tmp_path)
        assert worker is not None
        events = Events(worker)
        await eventually("its last word", lambda: "my last word" in caplog.text)
        await asyncio.sleep(0)  # a turn for the end of the connection
        os.kill(process.pid, signal.SIGKILL)
        gone = await events.one(Exited)
        assert gone.text == f"the worker (pid {process.pid}) has ended"
        worker.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


WHO_BORROWS = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
sock.send(bytes.fromhex(sys.argv[2]))
print("said", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("noticed", ["as a worker", "never"])
async def test_what_the_next_borrower_says_is_not_taken_for_the_last_ones(noticed: str) -> None:
    """A script's programs have one end, one after another; the loop was busy when they changed."""
    ours, theirs = pair()

    def borrower() -> subprocess.Popen[bytes]:
        begun = subprocess.Popen(
            [sys.executable, "-c", WHO_BORROWS, str(theirs.fileno()), hello().hex()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()],
        )  # fmt: skip
        assert begun.stdout is not None
        assert begun.stdout.readline() == b"said\n"
        return begun

    with ours, theirs, borrower() as first:
        if noticed == "as a worker":
            worker = await asyncio.wait_for(Worker.over(NAME, ours.dup()), PATIENCE)
            assert worker.pid == first.pid
            events = Events(worker)
        first.communicate()
        with borrower() as second:
            if noticed == "as a worker":
                await events.one(Exited)
            worker = await asyncio.wait_for(Worker.over(NAME, ours.dup()), PATIENCE)
            assert worker.pid == second.pid
            worker.close()
            second.communicate()


@pytest.mark.parametrize(
    "first", [None, b"", b"short", bytes(512), hello(state=99)],
    ids=["closes", "empty", "short", "zeros", "no-known-state"],
)  # fmt: skip
async def test_what_does_not_greet_is_not_adopted(
    liar: Liar, first: bytes | None, tmp_path: Path
) -> None:
    assert await liar.greet(first) is None
    assert not (tmp_path / f"{NAME}.sock").exists()


async def test_what_does_not_speak_at_all_is_given_up(
    liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.peer_pid, "__defaults__", (0.2,))
    assert await Worker.adopt(NAME, tmp_path) is None


async def test_the_pid_of_an_adopted_worker_is_the_kernels_word_not_its_own(liar: Liar) -> None:
    worker = await liar.greet(hello(pid=1))
    assert worker is not None
    assert worker.pid == os.getpid()


async def test_descriptors_that_nobody_asked_for_are_closed(liar: Liar) -> None:
    worker = await liar.greet(hello())
    assert worker is not None
    reader, writer = os.pipe()
    try:
        liar.say(packet("pvf_ctl_feature_off", lib.PVF_CTL_FEATURE_OFF, feature=2), [writer] * 3)
        os.close(writer)
        assert liar.events is not None
        await liar.events.one(FeatureOff)
        assert os.read(reader, 1) == b"", "somebody still holds the pipe's end"
    finally:
        os.close(reader)


async def test_events_are_decoded_and_told_in_order(liar: Liar) -> None:
    assert await liar.greet(hello()) is not None
    liar.say(
        packet(
            "pvf_ctl_broken", lib.PVF_CTL_BROKEN,
            rule=3, queue=1, value=1 << 40, field=b"rsp_prod", text=b"beyond the ring",
        )
    )  # fmt: skip
    liar.say(
        packet(
            "pvf_ctl_target_gone", lib.PVF_CTL_TARGET_GONE,
            error=errno.EPROTO, queue=2, text=b"\xff!",
        )
    )  # fmt: skip
    for queue, feature in enumerate(
        (lib.PVF_BLK_DISCARD, lib.PVF_BLK_FLUSH, lib.PVF_BLK_BARRIER), start=3
    ):
        liar.say(
            packet("pvf_ctl_feature_off", lib.PVF_CTL_FEATURE_OFF, feature=feature, queue=queue)
        )
    liar.say(packet("pvf_ctl_stalled", lib.PVF_CTL_STALLED, seconds=12, queue=15, in_flight=3))
    assert liar.events is not None
    await liar.events.one(Stalled)
    assert liar.events == [
        Broken(3, "rsp_prod", 1 << 40, "beyond the ring", queue=1),
        TargetGone(errno.EPROTO, "\N{REPLACEMENT CHARACTER}!", queue=2),
        FeatureOff("discard", queue=3),
        FeatureOff("flush", queue=4),
        FeatureOff("flush", queue=5),
        Stalled(12, 3, queue=15),
    ]


async def test_a_text_without_an_end_is_cut_at_its_field(liar: Liar) -> None:
    assert await liar.greet(hello()) is not None
    liar.say(packet("pvf_ctl_broken", lib.PVF_CTL_BROKEN, field=b"f" * 64, text=b"t" * 192))
    assert liar.events is not None
    broken = await liar.events.one(Broken)
    assert (broken.field, broken.text) == ("f" * 64, "t" * 192)


async def test_what_the_worker_logs_is_logged_at_its_level(
    liar: Liar, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await liar.greet(hello())
    assert worker is not None
    with caplog.at_level(logging.INFO):
        for level in (3, 4, 6, 99):
            liar.say(packet("pvf_ctl_log", lib.PVF_CTL_LOG, level=level, text=b"said %d" % level))
        await eventually("the last line", lambda: "said 99" in caplog.text)
    said = {r.getMessage().rpartition(" ")[2]: r.levelno for r in caplog.records}
    assert said == {
        "3": logging.ERROR, "4": logging.WARNING, "6": logging.INFO, "99": logging.INFO,
    }  # fmt: skip


async def test_a_command_without_an_answer_names_itself(
    liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker._command, "__defaults__", (None, (), 0.2))
    worker = await liar.greet(hello())
    assert worker is not None
    with pytest.raises(WorkerGone, match="did not answer DETACH"):
        await worker.detach(0, keep_target=False)


async def test_answers_to_something_else_are_not_taken_for_ours(liar: Liar) -> None:
    worker = await liar.greet(hello())
    assert worker is not None
    assert not await worker.quiesce(3, 0.1)
    assert await liar.asked() == lib.PVF_CTL_QUIESCE
    pending = asyncio.create_task(worker.detach(3, keep_target=False))
    assert await liar.asked() == lib.PVF_CTL_DETACH
    # The QUIESCE is answered late, and refused late; DETACHED of another generation comes.
    liar.say(packet("pvf_ctl_simple", lib.PVF_CTL_DRAINED, 3))
    liar.say(
        packet(
            "pvf_ctl_error", lib.PVF_CTL_ERROR, 3,
            in_reply_to=lib.PVF_CTL_QUIESCE, error=errno.EIO, text=b"too late",
        )
    )  # fmt: skip
    liar.say(packet("pvf_ctl_simple", lib.PVF_CTL_DETACHED, 2))
    liar.say(packet("pvf_ctl_stalled", lib.PVF_CTL_STALLED))
    assert liar.events is not None
    await liar.events.one(Stalled)
    assert not pending.done()
    liar.say(packet("pvf_ctl_simple", lib.PVF_CTL_DETACHED, 3))
    await asyncio.wait_for(pending, PATIENCE)


async def test_commands_go_one_at_a_time(liar: Liar) -> None:
    worker = await liar.greet(hello())
    assert worker is not None
    first = asyncio.create_task(worker.quiesce(1, PATIENCE))
    second = asyncio.create_task(worker.detach(1, keep_target=True))
    assert await liar.asked() == lib.PVF_CTL_QUIESCE
    for _ in range(10):  # turns of the loop: more than the second needs to come to its wait
        await asyncio.sleep(0)
    assert not second.done()
    assert liar.sock is not None
    with pytest.raises(BlockingIOError):
        liar.sock.recv(8192)
    liar.say(packet("pvf_ctl_simple", lib.PVF_CTL_DRAINED, 1))
    assert await first
    assert await liar.asked() == lib.PVF_CTL_DETACH
    liar.say(packet("pvf_ctl_simple", lib.PVF_CTL_DETACHED, 1))
    await second


async def test_a_worker_that_reads_nothing_is_given_up_instead_of_waited_for(liar: Liar) -> None:
    worker = await liar.greet(hello())
    assert worker is not None

    async def ask_on_and_on() -> None:
        for _ in range(5000):
            await worker.quiesce(1, 0.0)

    with pytest.raises(WorkerGone, match="the control connection failed"):
        await ask_on_and_on()
