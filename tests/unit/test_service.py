# SPDX-License-Identifier: BSD-2-Clause
"""The log of a process in the writeback path: it never waits, and says what it lost."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import PATIENCE, wait_for

from pvfront import service
from pvfront.service import _DroppingHandler, _Formatter, _Writer

QUEUE = service._LOG_QUEUE


class Log:
    """A logger that writes into a pipe, which is full until somebody reads."""

    def __init__(self) -> None:
        self.reader, self.fd = os.pipe()
        os.set_blocking(self.fd, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.fd, bytes(4096))
        os.set_blocking(self.fd, True)
        self.records: queue.Queue[logging.LogRecord | None] = queue.Queue(QUEUE)
        self.handler = _DroppingHandler(self.records)
        self.logger = logging.Logger("under test", logging.DEBUG)
        self.logger.addHandler(self.handler)
        self.writer = _Writer(self.records, _Formatter(journal=True), self.fd)
        self._text = ""

    def hang(self) -> None:
        """The writer has taken one record and hangs on it."""
        self.logger.info("taken")
        wait_for("the record in the writer's hands", self.records.empty)

    def lines(self) -> list[str]:
        """What has been written until now."""
        while select.select([self.reader], [], [], 0)[0]:
            data = os.read(self.reader, 1 << 16)
            if not data:
                break
            self._text += data.decode().replace("\0", "")
        return self._text.splitlines()

    def close(self) -> None:
        wait_for("an empty queue", lambda: (self.lines(), self.records.empty())[1])
        self.writer.stop()
        os.close(self.fd)
        os.close(self.reader)


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log()
    yield made
    made.close()


def test_a_writer_that_hangs_holds_up_nobody(log: Log) -> None:
    log.hang()
    done = threading.Event()

    def write() -> None:
        for number in range(QUEUE + 1000):
            log.logger.info("line %d", number)
        done.set()

    threading.Thread(target=write, daemon=True).start()
    assert done.wait(PATIENCE), "logging waits for the writer"
    assert log.handler.dropped == 1000


def test_how_many_lines_were_dropped_is_said_once_there_is_room(log: Log) -> None:
    log.hang()
    for number in range(QUEUE + 17):
        log.logger.info("line %d", number)
    wait_for("the last line kept", lambda: f"<6>line {QUEUE - 1}" in log.lines())
    log.logger.info("after")
    count = "<4>17 log lines were dropped: the log did not keep up"
    wait_for("the count", lambda: count in log.lines())
    log.logger.info("later")
    wait_for("the line after that", lambda: "<6>later" in log.lines())
    assert log.lines() == [
        "<6>taken",
        *(f"<6>line {number}" for number in range(QUEUE)),
        "<6>after",
        count,
        "<6>later",
    ]


def test_nothing_is_said_when_nothing_was_dropped(log: Log) -> None:
    for number in range(10):
        log.logger.info("line %d", number)
    wait_for("the last line", lambda: "<6>line 9" in log.lines())
    assert log.lines() == [f"<6>line {number}" for number in range(10)]


def test_a_log_whose_reader_has_gone_is_no_reason_to_fail(log: Log) -> None:
    log.hang()
    os.close(log.reader)
    log.logger.info("into the void")
    wait_for("an empty queue", log.records.empty)
    log.reader = os.open(os.devnull, os.O_RDONLY)
    assert log.writer.thread.is_alive()


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("pvfront", level, __file__, 1, text, None, None)


@pytest.mark.parametrize(
    ("level", "prefix"),
    [
        (logging.CRITICAL, "<2>"),
        (logging.ERROR, "<3>"),
        (logging.WARNING, "<4>"),
        (logging.INFO, "<6>"),
        (logging.DEBUG, "<7>"),
        (35, "<6>"),
    ],
)
def test_the_journal_gets_a_level_before_every_line(level: int, prefix: str) -> None:
    shown = _Formatter(journal=True).format(record(level, "one\ntwo"))
    assert shown == f"{prefix}one\n{prefix}two"


def test_a_terminal_gets_time_and_level_instead() -> None:
    shown = _Formatter(journal=False).format(record(logging.WARNING, "said"))
    assert shown.endswith(" WARNING said")
    assert shown[:4].isdigit()
    assert "<4>" not in shown


PROGRAM = """
import logging
from pvfront.service import prepare_process
prepare_process(logging.INFO)
log = logging.getLogger("pvfront.test")
log.debug("not shown")
log.info("shown %d", 1)
try:
    raise ValueError("inside")
except ValueError:
    log.exception("broke")
"""


@pytest.mark.parametrize("journal", [True, False])
def test_what_was_logged_is_out_before_the_process_ends(journal: bool) -> None:
    env = {k: v for k, v in os.environ.items() if k != "JOURNAL_STREAM"}
    if journal:
        env["JOURNAL_STREAM"] = "8:1"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    lines = [line for line in done.stderr.splitlines() if "mlock" not in line.lower()]
    lines = [line for line in lines if "PR_SET_IO_FLUSHER" not in line]
    assert "not shown" not in done.stderr
    assert lines[0].endswith("<6>shown 1" if journal else "INFO    shown 1")
    assert lines[1].endswith("<3>broke" if journal else "ERROR   broke")
    assert lines[-1] == ("<3>" if journal else "") + "ValueError: inside"
    if journal:
        assert all(line.startswith("<") for line in done.stderr.splitlines())


FLOOD = """
import logging
from pvfront.service import prepare_process
prepare_process(logging.INFO)
for number in range(20000):
    logging.getLogger("pvfront").info("a line that nobody reads %d", number)
"""


def test_a_journal_that_hangs_does_not_keep_the_process_from_ending() -> None:
    with subprocess.Popen([sys.executable, "-c", FLOOD], stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("says", "status", "stopping"),
    [("stopping", 1, True), ("running", 0, False), ("degraded", 1, False), ("", 1, False)],
)
async def test_whether_the_machine_stops_is_systemds_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, status: int, stopping: bool
) -> None:
    monkeypatch.setattr(service, "_SYSTEMD", tmp_path)
    monkeypatch.setattr(service, "_SYSTEMCTL_DEADLINE", PATIENCE)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not await service.system_is_stopping(), "there is no systemctl"
    tool = tmp_path / "systemctl"
    tool.write_text(f"#!/bin/sh\necho {says}\nexit {status}\n")
    tool.chmod(0o755)
    assert await service.system_is_stopping() is stopping
    monkeypatch.setattr(service, "_SYSTEMD", tmp_path / "none")
    assert not await service.system_is_stopping(), "systemd is not the init"


@pytest.mark.parametrize(
    ("jobs", "found"),
    [
        ("", False),
        ("812 pvfront-vif.service restart running\n", True),
        ("812 pvfront-vif.service stop running\n", False),
        ("812 pvfront-vbd.service restart running\n813 pvfront-vif.service stop running\n", False),
        ("nonsense\n\n", False),
    ],
)
def test_a_restart_of_the_unit_is_told_from_its_stop(jobs: str, found: bool) -> None:
    assert service.restarted("pvfront-vif.service", jobs) is found


async def test_outside_of_a_unit_nobody_restarts_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    async def systemctl(*words: str) -> str:
        asked.append(words)
        return "7 pvfront-vif.service restart running\n"

    monkeypatch.setattr(service, "_systemctl", systemctl)
    cgroup = tmp_path / "cgroup"
    for text in ("0::/user.slice/session-1.scope\n", "0::/\n"):
        cgroup.write_text(text)
        assert not await service.service_restarts(cgroup)
    assert not await service.service_restarts(tmp_path / "none")
    assert asked == []
    cgroup.write_text("0::/system.slice/pvfront-vif.service\n")
    assert await service.service_restarts(cgroup)
    assert asked == [("list-jobs", "--plain", "--no-legend")]
