# SPDX-License-Identifier: BSD-2-Clause
"""Reading the kernel's log, and arming the veto."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path

import pytest

from pvfront.errors import DeviceUnavailable
from pvfront.threads import in_daemon_thread
from pvfront.veto import (
    WRONG_COUNT,
    CannotVeto,
    KernelLog,
    Line,
    LogEvent,
    Veto,
    classify,
    may_block_suspend,
    parse_record,
)

ALL_CAPABILITIES = "Name:\tx\nCapEff:\t000001ffffffffff\n"


@pytest.mark.parametrize(
    ("text", "line", "elapsed"),
    [
        # As logged by Linux 6.1.
        (
            "Freezing of tasks aborted after 0.001 seconds (9 tasks refusing):",
            Line.FREEZE_GIVEN_UP,
            0.001,
        ),
        (
            "Freezing of tasks failed after 20.008 seconds (4 tasks refusing):",
            Line.FREEZE_GIVEN_UP,
            20.008,
        ),
        ("xen:manage: do_suspend: freeze processes failed -16", Line.REFUSED, 0.0),
        ("xen:manage: do_suspend: freeze kernel threads failed -16", Line.REFUSED, 0.0),
        ("xen:manage: do_suspend: dpm_suspend_start -16", Line.REFUSED, 0.0),
        ("xen:manage: dpm_suspend_end failed: -16", Line.REFUSED, 0.0),
        (
            "Freezing user space processes completed (elapsed 0.001 seconds)",
            Line.FREEZE_DONE,
            0.0,
        ),
        # As logged by 5.10.
        (
            "Freezing user space processes ... (elapsed 0.002 seconds) done.",
            Line.FREEZE_DONE,
            0.0,
        ),
        ("suspending xenstore...", Line.XEN_SUSPENDING, 0.0),
        ("Restarting tasks ... done.", Line.THAWED, 0.0),
    ],
)
def test_lines_that_the_kernel_writes_are_understood(text: str, line: Line, elapsed: float) -> None:
    assert classify(text) == LogEvent(line, text, elapsed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Freezing user space processes",
        "Freezing remaining freezable tasks completed (elapsed 0.002 seconds)",
        "Restarting kernel threads ... done.",
        "xen:manage: Ignoring shutdown request: ",
        "xen:grant_table: Grant tables using version 1 layout",
        "Freezing of tasks aborted after 9999999999999999999999.0 seconds",
        "foo: do_suspend: freeze processes failed -16",
    ],
)
def test_other_lines_mean_nothing(text: str) -> None:
    assert classify(text) is None


def test_a_record_of_the_kernel_is_parsed() -> None:
    record = (
        b"3,612,221570514,-;xen:manage: do_suspend: freeze processes failed -16\n SUBSYSTEM=x\n"
    )
    event = parse_record(record)
    assert event is not None
    assert event.line is Line.REFUSED


def test_a_line_that_a_program_wrote_to_the_log_is_not_believed() -> None:
    """Facility 1 (user): what /dev/kmsg gives to anybody who writes to it."""
    record = b"11,613,221570600,-;xen:manage: do_suspend: freeze processes failed -16\n"
    assert parse_record(record) is None


@pytest.mark.parametrize(
    "record", [b"", b";", b"x,1,2,-;suspending xenstore", b"6,1", b"\xff;\xff"]
)
def test_broken_records_mean_nothing(record: bytes) -> None:
    assert parse_record(record) is None


def test_a_log_that_cannot_be_opened_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="cannot be told from a poweroff") as caught:
        KernelLog(tmp_path / "kmsg")
    assert "CAP_SYSLOG" in (caught.value.hint or "")


class LogOverSocket(KernelLog):
    """A KernelLog whose descriptor is a datagram socket: one read gives one record, as in kmsg."""

    def __init__(self) -> None:
        self.kernel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        other.setblocking(False)
        self._fd = other.detach()


def test_everything_new_is_read_at_once_and_nothing_twice() -> None:
    log = LogOverSocket()
    log.kernel.send(b"4,1,5,-;hello\n")
    log.kernel.send(b"7,2,6,-;suspending xenstore...\n")
    log.kernel.send(b"6,3,7,-;Restarting tasks ... done.\n")
    assert [event.line for event in log.read()] == [Line.XEN_SUSPENDING, Line.THAWED]
    assert log.read() == []
    log.close()
    log.kernel.close()


def test_overwritten_records_are_reported_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogOverSocket()
    answers: list[bytes | OSError] = [BrokenPipeError(32, "Broken pipe"), b"6,9,7,-;x\n"]

    def read(fd: int, size: int) -> bytes:
        if not answers:
            raise BlockingIOError
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr("pvfront.veto.os.read", read)
    assert [event.line for event in log.read()] == [Line.LOST]
    monkeypatch.undo()
    log.close()
    log.kernel.close()


@pytest.mark.parametrize(
    ("status", "may"),
    [(ALL_CAPABILITIES, True), ("CapEff:\t0000000000000000\n", False), ("", False)],
)
def test_the_capability_is_read_from_proc(status: str, may: bool) -> None:
    assert may_block_suspend(status) is may


# -- the veto over a file that stands in for /sys/power/wakeup_count ---------------------------


@pytest.fixture
def status(tmp_path: Path) -> Path:
    path = tmp_path / "status"
    path.write_text(ALL_CAPABILITIES)
    return path


@pytest.fixture
def count(tmp_path: Path) -> Path:
    path = tmp_path / "wakeup_count"
    path.write_text("17\n")
    return path


def make_fifo(path: Path) -> None:
    """Reading blocks until somebody writes: as the kernel's read does while a source is active."""
    path.unlink()
    os.mkfifo(path)


class RecordingVeto(Veto):
    """Notes the order of writes; `answers` are the errors that the kernel gives to them."""

    def __init__(self, count: Path, status: Path) -> None:
        super().__init__(count, status)
        self.written: list[bytes] = []
        self.answers: list[OSError | None] = []

    def _write(self, count: bytes) -> None:
        self.written.append(count)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer

    def source_is_active(self) -> bool:
        return self._epoll is not None and bool(self._epoll.poll(0))


INVALID = OSError(22, "Invalid argument")


async def test_arming_writes_back_the_count_that_was_read(count: Path, status: Path) -> None:
    veto = RecordingVeto(count, status)
    await veto.arm()
    assert veto.written == [b"17\n"]
    assert veto.source_is_active()
    veto.close()


async def test_an_event_between_read_and_write_is_tried_again(count: Path, status: Path) -> None:
    veto = RecordingVeto(count, status)
    veto.answers = [INVALID, INVALID, None]
    await veto.arm()
    assert len(veto.written) == 3
    assert veto.source_is_active()
    veto.close()


async def test_arming_drops_the_old_source_before_it_reads(count: Path, status: Path) -> None:
    """The kernel's read waits until no source is active: with our own up it would never return."""
    veto = RecordingVeto(count, status)
    await veto.arm()
    make_fifo(count)
    arming = asyncio.create_task(veto.arm())
    fifo = await in_daemon_thread("open", lambda: os.open(count, os.O_WRONLY))
    assert not veto.source_is_active()
    os.write(fifo, b"18\n")
    os.close(fifo)
    await arming
    assert veto.written == [b"17\n", b"18\n"]
    assert veto.source_is_active()
    veto.close()


async def test_disarming_writes_a_count_that_is_never_right(count: Path, status: Path) -> None:
    veto = RecordingVeto(count, status)
    await veto.arm()
    veto.answers = [INVALID]
    veto.disarm()
    assert veto.written[-1] == WRONG_COUNT
    assert int(WRONG_COUNT) > 0xFFFF
    assert not veto.source_is_active()


async def test_disarming_overtakes_an_arming_that_waits_for_another_source(
    count: Path, status: Path
) -> None:
    veto = RecordingVeto(count, status)
    make_fifo(count)
    arming = asyncio.create_task(veto.arm())
    fifo = await in_daemon_thread("open", lambda: os.open(count, os.O_WRONLY))
    veto.answers = [INVALID]
    veto.disarm()
    os.write(fifo, b"18\n")
    os.close(fifo)
    await arming
    assert veto.written == [WRONG_COUNT]
    assert not veto.source_is_active()


async def test_an_abandoned_arming_changes_nothing_any_more(count: Path, status: Path) -> None:
    veto = RecordingVeto(count, status)
    make_fifo(count)
    arming = asyncio.create_task(veto.arm())
    fifo = await in_daemon_thread("open", lambda: os.open(count, os.O_WRONLY))
    arming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await arming
    abandoned = [thread for thread in threading.enumerate() if thread.name == "pvfront-arm"]
    os.write(fifo, b"18\n")
    os.close(fifo)
    for thread in abandoned:
        thread.join(10)
    assert veto.written == []
    veto.close()


async def test_a_kernel_that_refuses_the_count_is_reported(count: Path, status: Path) -> None:
    veto = RecordingVeto(count, status)
    veto.answers = [OSError(16, "Device or resource busy")]
    with pytest.raises(CannotVeto, match="wakeup_count: Device or resource busy"):
        await veto.arm()
    assert not veto.source_is_active()


def test_a_kernel_without_suspend_says_so(tmp_path: Path, status: Path) -> None:
    with pytest.raises(CannotVeto, match="no suspend support"):
        Veto(tmp_path / "wakeup_count", status)


def test_a_missing_capability_is_reported_because_the_kernel_would_not(
    count: Path, tmp_path: Path
) -> None:
    weak = tmp_path / "weak"
    weak.write_text("CapEff:\t0000000000000000\n")
    with pytest.raises(CannotVeto, match="CAP_BLOCK_SUSPEND is missing"):
        Veto(count, weak)
