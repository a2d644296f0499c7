# SPDX-License-Identifier: BSD-2-Clause
"""The timeline of a device: a ring in a file, what readers make of it, whatever is in it."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from pvfront import timeline as timeline_module
from pvfront.timeline import NothingOnRecord, Reader, Timeline, select
from pvfront.trace import SERVICE, Event, Kind, Ring, Trace, names, read, read_lines

NAME = "vbd-51728"


def event(serial: int, kind: Kind, text: str, clock: float, device: str = NAME) -> Event:
    return Event(serial, 1e9 + clock, clock, device, 1, kind, text)


# -- the ring --------------------------------------------------------------------------------------


def test_what_is_appended_is_read_in_order(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "ring", 4096)
    for line in (b"one", b"", b"three"):
        ring.append(line)
    assert read_lines(tmp_path / "ring") == [b"one", b"", b"three"]
    ring.close()


def test_of_a_full_ring_the_oldest_lines_go_and_every_line_is_whole(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "ring", 4096)
    written = [
        b"%d " % number + b"x" * random.Random(number).randrange(90) for number in range(999)
    ]
    for done, line in enumerate(written, 1):
        ring.append(line)
        there = read_lines(ring.path)
        assert there == written[done - len(there) : done]
        assert len(there) == done or sum(map(len, there)) + len(there) > 4096 - 100
    assert (tmp_path / "ring").stat().st_size == 64 + 4096
    ring.close()


def test_another_writer_goes_on_where_a_killed_one_has_stopped(tmp_path: Path) -> None:
    first = Ring(tmp_path / "ring", 4096)  # never closed: it was killed
    first.append(b"one")
    second = Ring(tmp_path / "ring", 4096)
    second.append(b"two")
    assert read_lines(tmp_path / "ring") == [b"one", b"two"]
    first.close()
    second.close()


@pytest.mark.parametrize("line", [b"a\nb", b"x" * 2048])
def test_what_is_no_short_line_is_refused(tmp_path: Path, line: bytes) -> None:
    ring = Ring(tmp_path / "ring", 4096)
    with pytest.raises(ValueError, match="one line"):
        ring.append(line)
    assert read_lines(ring.path) == []
    ring.close()


@pytest.mark.parametrize(
    "junk", [b"", b"x", b"PVFTRACE", os.urandom(5000), b"PVFTRACE" + b"\xff" * 5000]
)
def test_a_file_that_is_no_ring_reads_as_nothing_and_is_begun_anew(
    tmp_path: Path, junk: bytes
) -> None:
    path = tmp_path / "ring"
    path.write_bytes(junk)
    assert read_lines(path) == []
    ring = Ring(path, 4096)
    ring.append(b"one")
    assert read_lines(path) == [b"one"]
    ring.close()


def test_who_reads_while_it_is_written_gets_whole_lines_in_order(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "ring", 4096)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            ring.append(b"%09d" % number * 3)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        last = 0
        for _ in range(300):
            numbers = [int(line[:9]) for line in read_lines(ring.path)]
            for line in read_lines(ring.path):
                assert line == line[:9] * 3
            if numbers:
                assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
                assert numbers[-1] >= last
                last = numbers[-1]
    finally:
        stop.set()
        writer.join()
    ring.close()


# -- events ----------------------------------------------------------------------------------------


def test_events_are_on_record_with_generation_facts_and_both_clocks(tmp_path: Path) -> None:
    trace = Trace(tmp_path, NAME)
    trace.generation = lambda: 3
    trace.note(Kind.BACKEND, "InitWait (2)", state=2)
    trace.note(Kind.WAITED, "0.1 s for backend Connected", seconds=0.1, came=True)
    trace.close()
    first, second = read(tmp_path, [NAME])
    assert (first.serial, first.generation, first.kind, first.text) == (
        1,
        3,
        "backend",
        "InitWait (2)",
    )
    assert first.facts == {"state": 2}
    assert second.clock >= first.clock
    assert first.as_json()["state"] == 2
    assert first.time > 1.7e9


def test_the_next_supervisor_counts_on(tmp_path: Path) -> None:
    for turn in range(3):
        trace = Trace(tmp_path, NAME)
        trace.note(Kind.SERVICE, f"begins {turn}")
        trace.close()
    assert [e.serial for e in read(tmp_path, [NAME])] == [1, 2, 3]


def test_a_trace_that_cannot_be_written_is_done_without_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    trace = Trace(tmp_path, NAME)
    for _ in range(10):
        trace.note(Kind.PHASE, "connected")
    trace.close()
    assert caplog.text.count("No space left") == 1


def test_what_another_domain_wrote_neither_fills_nor_breaks_the_record(tmp_path: Path) -> None:
    trace = Trace(tmp_path, NAME)
    trace.note(Kind.PHASE, "x" * 100000)
    trace.note(Kind.PHASE, "a\nb\x00\x1b[2J\udcff")
    trace.note(Kind.PHASE, "odd", fact=object())
    trace.note(Kind.PHASE, "last")
    trace.close()
    found = read(tmp_path, [NAME])
    assert [len(found[0].text), found[1].text, found[-1].text] == [
        1000,
        "a\nb\x00\x1b[2J\udcff",
        "last",
    ]


def test_lines_of_nonsense_are_passed_over(tmp_path: Path) -> None:
    trace = Trace(tmp_path, NAME)
    trace.note(Kind.PHASE, "one")
    ring = Ring(tmp_path / "trace" / NAME)
    for line in (b"", b"{}", b"[1]", b"[" * 5000, b'{"n":"x"}', b'{"n":2,"t":1,"c":1,"g":1}'):
        ring.append(line)
    ring.close()
    assert [e.text for e in read(tmp_path, [NAME])] == ["one"]
    trace.close()


def test_traces_of_devices_long_gone_make_room_those_served_stay(tmp_path: Path) -> None:
    (tmp_path / "vbd-0.json").write_text("{}")  # is served
    for number in range(80):
        Trace(tmp_path, f"vbd-{number}", size=4096).close()
        os.utime(tmp_path / "trace" / f"vbd-{number}", (number, number))
    there = names(tmp_path)
    assert len(there) <= 65
    assert {"vbd-0", "vbd-79", "vbd-40"} <= set(there)
    assert "vbd-1" not in there


# -- reading ---------------------------------------------------------------------------------------


def test_a_state_answers_the_other_ends_last_one_and_says_how_long_that_waited() -> None:
    lines = list(
        Reader().lines(
            [
                event(1, Kind.FRONTEND, "Initialising (1)", 1.0),
                event(2, Kind.BACKEND, "InitWait (2)", 1.5),
                event(3, Kind.STEP, "opening ring and port", 1.6),
                event(4, Kind.FRONTEND, "Initialised (3)", 1.75),
                event(5, Kind.FRONTEND, "Closing (5)", 3.0),
            ]
        )
    )
    assert [line.answered for line in lines] == [
        None,
        ("frontend Initialising (1)", 0.5),
        None,
        ("backend InitWait (2)", 0.25),
        None,  # its own state was the last: it answers nothing
    ]
    assert [line.delta for line in lines] == [
        None,
        0.5,
        pytest.approx(0.1),
        pytest.approx(0.15),
        1.25,
    ]
    assert lines[1].as_json()["waited"] == 0.5


def test_two_devices_do_not_answer_each_other() -> None:
    lines = list(
        Reader().lines(
            [
                event(1, Kind.FRONTEND, "Initialising (1)", 1.0),
                event(1, Kind.BACKEND, "InitWait (2)", 1.5, "vbd-51744"),
            ]
        )
    )
    assert lines[1].answered is None


def test_news_are_told_once(tmp_path: Path) -> None:
    trace = Trace(tmp_path, NAME)
    for number in range(5):
        trace.note(Kind.PHASE, str(number))
    timeline = Timeline(tmp_path, "xvdb")
    assert [line.event.text for line in timeline.news(2)] == ["3", "4"]
    assert timeline.news() == []
    trace.note(Kind.PHASE, "5")
    assert [line.event.text for line in timeline.news()] == ["5"]
    trace.close()


def test_the_time_of_day_may_jump_and_the_order_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(tmp_path, NAME)
    trace.note(Kind.PHASE, "before the restore")
    monkeypatch.setattr("time.time", lambda: 1.0)
    trace.note(Kind.PHASE, "after it")
    lines = Timeline(tmp_path).news()
    assert [line.event.text for line in lines] == ["before the restore", "after it"]
    assert lines[1].delta is not None
    assert 0 <= lines[1].delta < 60
    trace.close()


@pytest.mark.parametrize("text", ["xvdb", "/dev/xvdb", "51728", "vbd-51728", "vbd/51728", "nbd3"])
def test_a_device_has_the_names_that_status_knows(tmp_path: Path, text: str) -> None:
    for name in (NAME, "vbd-51744", "vif-0", f"{SERVICE}vbd", f"{SERVICE}vif"):
        Trace(tmp_path, name).close()
    (tmp_path / f"{NAME}.json").write_text('{"os_device": "/dev/nbd3"}')
    assert select(tmp_path, text) == [NAME, f"{SERVICE}vbd"]


def test_of_a_device_without_a_trace_those_that_have_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(NothingOnRecord) as caught:
        select(tmp_path, "xvdz")
    assert "none" in str(caught.value.hint)
    Trace(tmp_path, NAME).close()
    with pytest.raises(NothingOnRecord) as caught:
        select(tmp_path, "xvdz")
    assert caught.value.hint == "there are traces of: xvdb"
    assert timeline_module.label(f"{SERVICE}vbd") == "vbd"
