# SPDX-License-Identifier: BSD-2-Clause
"""The parts of a console that know no ring: names, history, hot keys, what is kept, the backlog."""

from __future__ import annotations

import array
import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront import sysfs
from pvfront.console import dump, fdstore, keys
from pvfront.console.history import SIZE, History
from pvfront.console.hotkeys import HotKeys
from pvfront.console.log import Backlog, run
from pvfront.console.settings import parse_options


@pytest.mark.parametrize("name", ["login", "org.example.chan1", "A_b-c.9", "console-7"])
def test_a_channel_s_name_is_the_console_s(name: str) -> None:
    assert keys.name_of(name, 7) == (name, None)


@pytest.mark.parametrize(
    "name", ["../x", ".hidden", "a/b", "x" * 65, "a b", "\x1b[2J", "-rf", "console-8", "12", "ä"]
)
def test_a_name_that_is_none_for_a_file_or_another_s_is_not_taken(name: str) -> None:
    found, problem = keys.name_of(name, 7)
    assert found == "console-7"
    assert problem is not None
    assert "\x1b" not in str(problem)


def test_a_console_without_a_name_has_its_number() -> None:
    assert keys.name_of(None, 3) == ("console-3", None)


UNITS = Path(__file__).resolve().parents[2] / "systemd"


@pytest.mark.parametrize("unit", ["pvfront-getty@.service", "pvfront-channel@.service"])
def test_a_unit_of_one_console_takes_its_name_as_it_is(unit: str) -> None:
    text = (UNITS / unit).read_text(encoding="utf-8")
    assert "%i" in text
    assert "%I" not in text, "systemd makes a slash of each hyphen of it: console-1"


# -- history -----------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=SIZE // 3), max_size=12))
def test_history_has_the_last_of_all_that_came(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("history") / "h"
    history = History.open(path)
    for piece in pieces:
        history.append(piece)
    everything = b"".join(pieces)
    found, at = b"", history.begin
    while at < history.end:
        part = history.read(at, 5000)
        found, at = found + part, at + len(part)
    assert found == everything[-SIZE:]
    assert history.taken == history.begin
    history.close(keep=False)


def test_history_outlives_its_writer_with_what_the_terminal_has_taken(tmp_path: Path) -> None:
    history = History.open(tmp_path / "h")
    history.append(b"taken, not taken")
    history.take(5)
    history.close(keep=True)
    again = History.open(tmp_path / "h")
    assert again.read(again.taken, 100) == b", not taken"
    again.close(keep=False)
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"pvfcons1" + b"\xff" * 24, os.urandom(200)])
def test_a_file_that_is_no_history_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "h").write_bytes(content)
    history = History.open(tmp_path / "h")
    assert (history.begin, history.end, history.taken) == (0, 0, 0)
    history.close(keep=False)


# -- hot keys ----------------------------------------------------------------------------------


def test_a_known_key_behind_the_escape_is_taken_out() -> None:
    assert HotKeys(0x1E, "dx").feed(b"ab\x1edcd\x1ex") == (b"abcd", ["d", "x"])


def test_the_escape_twice_is_itself_and_an_unknown_key_passes() -> None:
    assert HotKeys(0x1E, "d").feed(b"\x1e\x1e\x1e?") == (b"\x1e\x1e?", [])


def test_an_escape_at_the_end_waits_for_its_key() -> None:
    hot = HotKeys(0x1E, "d")
    assert hot.feed(b"a\x1e") == (b"a", [])
    assert hot.feed(b"db") == (b"b", ["d"])


@given(st.lists(st.binary(max_size=40)), st.binary(max_size=40))
def test_pieces_make_no_difference_to_hot_keys(pieces: list[bytes], more: bytes) -> None:
    whole, cut = HotKeys(0x1E, "dx"), HotKeys(0x1E, "dx")
    text = b"".join(pieces) + more
    passed = [cut.feed(piece) for piece in (*pieces, more)]
    data, pressed = whole.feed(text)
    assert b"".join(part for part, _ in passed) == data
    assert [key for _, found in passed for key in found] == pressed


@pytest.mark.parametrize(
    ("text", "byte"), [("^^", 0x1E), ("^O", 0x0F), ("^o", 0x0F), ("^_", 0x1F), ("^@", 0)]
)
def test_an_escape_is_a_control_character(text: str, byte: int) -> None:
    assert parse_options([f"hotkey.a.b={text}"]) == {"a.b": byte}


@pytest.mark.parametrize("text", ["hotkey=^O", "hotkey.a=O", "hotkey.a=^OO", "hotkey.=^O", "x"])
def test_an_option_that_is_none_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_options([text])


def test_a_dump_names_devices_and_waiting_tasks_in_plain_characters(tmp_path: Path) -> None:
    run, proc = tmp_path / "run", tmp_path / "proc"
    for pid, stat in (("7", "7 (a \x1b) D) D 1"), ("8", "8 (idle) S 1")):
        (proc / pid).mkdir(parents=True)
        (proc / pid / "stat").write_text(stat)
    (proc / "loadavg").write_text("0.5 0.4 0.3 1/2 3\n")
    run.mkdir()
    (run / "vbd-51728.json").write_text('{"label": "xvdb", "phase": "connected"}')
    (run / "vif-0.json").write_text("[1")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kmsg").write_text(
        "6,1,1000,-;it is well\n4,2,2500000,-;disk \x1b hangs\n DEVICE=b8:0\n"
        "12,3,3,-;a program's\n?\n"
    )
    text = dump.text("login", sysfs.Roots(tmp_path), run)
    assert "tasks that wait in the kernel (D): 1" in text
    assert "7 a \\x1b) D" in text
    assert "vbd-51728: label xvdb, phase connected" in text
    assert "vif-0: ?" in text
    assert "kernel's warnings, the last 1:\r\n    [2.500] disk \\x1b hangs\r\nvbd-" in text
    assert re.fullmatch(r"[ -~\r\n]*", text)


def test_a_dump_says_that_the_kernel_s_log_cannot_be_read(tmp_path: Path) -> None:
    text = dump.text("login", sysfs.Roots(tmp_path), tmp_path)
    assert "kernel's log: No such file or directory" in text
    assert text.endswith("--- end of the dump\r\n")


# -- descriptors that are kept -------------------------------------------------------------------


def test_a_descriptor_is_given_to_systemd_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        ours, theirs = os.pipe()
        fdstore.keep("console-1.pty", ours)
        text, ancillary, _, _ = systemd.recvmsg(4096, socket.CMSG_SPACE(4))
        assert text.split() == [b"FDSTORE=1", b"FDNAME=console-1.pty", b"FDPOLL=0"]
        (fd,) = array.array("i", ancillary[0][2])
        assert os.fstat(fd).st_ino == os.fstat(ours).st_ino
        for one in (fd, ours, theirs):
            os.close(one)
        fdstore.forget("console-1.pty")
        assert systemd.recv(4096).split() == [b"FDSTOREREMOVE=1", b"FDNAME=console-1.pty"]


def test_what_was_kept_for_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "2")
    assert fdstore.kept() == {}
    assert "LISTEN_FDS" not in os.environ


# -- the log -------------------------------------------------------------------------------------


def test_lines_that_find_no_room_are_dropped_and_a_line_in_their_place_says_how_many() -> None:
    backlog = Backlog(40)
    for number in range(6):
        backlog.put(b"line %d of six" % number)  # 16 bytes with their end
    first = backlog.take(100)
    assert first == b"line 0 of six\r\nline 1 of six\r\n"
    backlog.taken(len(first))
    backlog.put(b"after")
    assert backlog.take(100) == b"--- 4 lines dropped: nobody read them in time\r\nafter\r\n"
    assert backlog.dropped == 4


def test_a_line_is_taken_in_pieces_and_plays_with_no_terminal() -> None:
    backlog = Backlog()
    backlog.put(b"\x1b[2J\xff\ta")
    assert b"\x1b" not in backlog.take(100)
    whole = backlog.take(100)
    found = b""
    while part := backlog.take(3):
        found += part
        backlog.taken(len(part))
    assert found == whole


@pytest.mark.parametrize(("ends", "status"), [("true", 0), ("exit 3", 1), ("kill -9 $$", 1)])
def test_a_log_whose_journal_fails_fails_with_all_that_it_said(ends: str, status: int) -> None:
    master, slave = os.openpty()
    try:
        assert run(Path(os.ttyname(slave)), ["sh", "-c", f"echo last words; {ends}"]) == status
        assert os.read(master, 100) == b"last words\r\n"
    finally:
        os.close(master)
        os.close(slave)
