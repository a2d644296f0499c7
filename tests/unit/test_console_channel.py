# SPDX-License-Identifier: BSD-2-Clause
"""The channel's frames, and what becomes of a transfer that is damaged on its way."""

from __future__ import annotations

import ast
import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pvfront.console.pvfront_channel as helper
from pvfront.console import channel
from pvfront.console.channel import Server
from pvfront.console.pvfront_channel import (
    ACK,
    DATA,
    END,
    ERROR,
    FRAME,
    GET,
    GREETING,
    HELLO,
    MOST,
    OK,
    PUT,
    RUN,
    TAKEN,
    WINDOW,
    Channel,
    ChannelError,
    ChannelGone,
    Frames,
    Link,
    Receipts,
    Window,
    facts_of,
    framed,
)

LIMIT = 1 << 20
"""What libxl lets QEMU keep of a console's output."""


@given(st.lists(st.tuples(st.integers(1, 255), st.binary(max_size=300))), st.data())
def test_frames_come_whole_however_they_are_cut(
    sent: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(framed(kind, body) for kind, body in sent)
    frames, found = Frames(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += frames.feed(stream[:cut])
        stream = stream[cut:]
    assert found == sent
    assert frames.skipped == 0


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_noise_before_a_frame_is_skipped_and_counted(noise: bytes, body: bytes) -> None:
    frames = Frames()
    found = list(frames.feed(noise + framed(DATA, body) + framed(END)))
    assert found[-2:] == [(DATA, body), (END, b"")]
    assert frames.skipped == len(noise) or len(found) > 2


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_frame_with_a_wrong_bit_is_none(body: bytes, data: st.DataObject) -> None:
    frame = bytearray(framed(DATA, body))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    frames = Frames()
    assert list(frames.feed(bytes(frame) + framed(END) * (MOST // FRAME.size + 20)))[:1] != [
        (DATA, body)
    ]
    assert frames.skipped > 0


class Keeper:
    """What QEMU keeps for who sits at a console: more than `LIMIT` since it last had nothing is
    cut, what has been read of it included.
    """

    def __init__(self) -> None:
        self._kept = bytearray()
        self._read = 0
        self.dropped = 0

    def __bool__(self) -> bool:
        return bool(self._kept)

    def keep(self, data: bytes) -> None:
        self._kept += data
        self.dropped += max(0, len(self._kept) - LIMIT)
        del self._kept[LIMIT:]

    def read(self, most: int) -> bytes:
        data = bytes(self._kept[self._read : self._read + most])
        self._read += len(data)
        if self._read == len(self._kept):
            self._kept.clear()
            self._read = 0
        return data


@given(
    st.lists(st.integers(0, MOST), min_size=1, max_size=20),
    st.lists(st.integers(1000, 600_000), min_size=1, max_size=10),
)
@settings(max_examples=20)
def test_nothing_is_dropped_however_slowly_it_is_read(sizes: list[int], reads: list[int]) -> None:
    bodies = ([bytes(size) for size in sizes] * 300)[:300]
    window, receipts, frames, keeper = Window(), Receipts(), Frames(), Keeper()
    sent = got = turn = 0
    while got < len(bodies):
        while sent < len(bodies) and window.fits(bodies[sent]):
            keeper.keep(framed(DATA, bodies[sent]))
            window.sent(bodies[sent])
            sent += 1
        for _, body in frames.feed(keeper.read(reads[turn % len(reads)])):
            window.heard(ACK, receipts.of(body))
            got += 1
        turn += 1
        assert keeper.dropped == frames.skipped == 0


@given(st.integers(1, 255), st.one_of(st.binary(max_size=20), st.integers(0, 99).map(TAKEN.pack)))
def test_only_what_was_sent_and_not_yet_acknowledged_is_acknowledged(
    kind: int, body: bytes
) -> None:
    window = Window()
    for size in (8, 18):  # frames of 20 and 30 bytes
        window.sent(bytes(size))
    window.heard(ACK, TAKEN.pack(20))
    if kind == ACK and len(body) == TAKEN.size and 20 < TAKEN.unpack(body)[0] <= 50:
        window.heard(kind, body)
    else:
        with pytest.raises(ChannelError):
            window.heard(kind, body)


def test_a_window_opens_again_only_when_all_of_it_was_taken() -> None:
    window, receipts, body = Window(), Receipts(), bytes(MOST)
    said = []
    while window.fits(body):
        window.sent(body)
        said.append(receipts.of(body))
    assert len(said) == WINDOW // (FRAME.size + MOST)
    for one in said:
        assert not window.fits(body)
        window.heard(ACK, one)
    assert window.fits(body)


class Damaging:
    """A wire between both ends that can turn a byte over."""

    def __init__(self, tmp_path: Path) -> None:
        self.files = tmp_path / "files"
        self.files.mkdir()
        self.commands = tmp_path / "commands"
        self.commands.mkdir()
        self.turn_over = 0
        self.slow: Keeper | None = None
        """Is between the guest and a dom0 that reads slowly."""
        dom0, self._a = socket.socketpair()
        guest, self._b = socket.socketpair()
        self._threads = [
            threading.Thread(target=self._carry),
            threading.Thread(target=self._carry_back),
            threading.Thread(target=self._serve, args=(guest,)),
        ]
        for thread in self._threads:
            thread.start()
        self._dom0 = dom0
        self.channel = Channel(dom0.fileno(), seconds=20)

    def _carry(self) -> None:
        # Who leaves with something unread is a reset, and no end.
        with contextlib.suppress(ConnectionResetError):
            while data := bytearray(self._a.recv(4096)):
                if self.turn_over and len(data) > 2000:
                    self.turn_over -= 1
                    data[1000] ^= 1
                self._b.sendall(data)
        with contextlib.suppress(OSError):
            self._b.shutdown(socket.SHUT_WR)

    def _carry_back(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while data := self._b.recv(1 << 16):
                if self.slow is None:
                    self._a.sendall(data)
                    continue
                self.slow.keep(data)
                # A little is read of what is kept whenever the guest sends nothing.
                while self.slow and not select.select([self._b], [], [], 0)[0]:
                    self._a.sendall(self.slow.read(1000))
        with contextlib.suppress(OSError):
            self._a.shutdown(socket.SHUT_WR)

    def _serve(self, guest: socket.socket) -> None:
        with guest:
            server = Server(
                Link(guest.fileno(), seconds=None),
                files=self.files, writable=True, commands=self.commands,
            )  # fmt: skip
            with pytest.raises(ChannelGone):
                server.run()

    def close(self) -> None:
        self._dom0.close()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        self._a.close()
        self._b.close()


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Damaging]:
    made = Damaging(tmp_path)
    yield made
    made.close()


def test_a_damaged_transfer_is_refused_and_the_file_of_before_stays(
    wire: Damaging, tmp_path: Path
) -> None:
    (wire.files / "name").write_text("before")
    (tmp_path / "new").write_bytes(os.urandom(300_000))
    wire.turn_over = 1
    with pytest.raises(ChannelError, match="lost or changed"):
        wire.channel.put(str(tmp_path / "new"), "name")
    assert (wire.files / "name").read_text() == "before"
    assert len(list(wire.files.iterdir())) == 1
    again = Channel(wire.channel.link.fd, seconds=20)
    again.put(str(tmp_path / "new"), "name")
    assert (wire.files / "name").read_bytes() == (tmp_path / "new").read_bytes()


def test_a_wrong_sum_is_no_file(wire: Damaging) -> None:
    link = wire.channel.link
    link.tell(PUT, path="name", mode=0o600)
    link.receive()
    link.send(DATA, b"something")
    link.tell(END, sha256="0" * 64)
    assert link.receive() == (ACK, TAKEN.pack(FRAME.size + 9))
    assert b"SHA-256 differs" in link.receive()[1]
    assert list(wire.files.iterdir()) == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}" * 3, b'{"path": 7, "mode": "x"}'])
def test_nonsense_is_answered_with_an_error(wire: Damaging, body: bytes) -> None:
    wire.channel.link.send(PUT, body)
    kind, _ = wire.channel.link.receive()
    assert kind != END
    Channel(wire.channel.link.fd, seconds=20)


@pytest.mark.parametrize("version", [1, None, "2", 3, "\x1b[2J" * 500])
def test_a_guest_of_another_version_is_one_clear_line(version: object) -> None:
    dom0, guest = socket.socketpair()
    with dom0, guest:

        def greet() -> None:
            link = Link(guest.fileno(), seconds=20)
            kind, body = link.receive()
            assert kind == HELLO
            link.tell(GREETING, number=facts_of(body)["number"], version=version)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ChannelError, match=r"guest speaks version .* this helper 2") as told:
            Channel(dom0.fileno(), seconds=20)
        thread.join(20)
        assert len(str(told.value)) < 200
        assert str(told.value).isprintable()


def test_who_speaks_another_version_is_told_ours_and_not_served(wire: Damaging) -> None:
    (wire.files / "name").write_text("text")
    link = wire.channel.link
    link.tell(HELLO, number="x", version=1)
    kind, body = link.receive()
    assert (kind, facts_of(body)) == (GREETING, {"number": "x", "version": 2})
    link.tell(GET, path="name")
    kind, body = link.receive()
    assert kind == ERROR
    assert "version 2" in facts_of(body)["text"]


def test_a_frame_that_was_cut_does_not_swallow_the_next_client(wire: Damaging) -> None:
    fd = wire.channel.link.fd
    os.write(fd, framed(DATA, bytes(MOST))[: FRAME.size + 5])
    Channel(fd, seconds=20)


def test_a_guest_waits_for_who_reads_slowly(wire: Damaging, tmp_path: Path) -> None:
    data = os.urandom(3 * LIMIT)
    (wire.files / "name").write_bytes(data)
    wire.slow = Keeper()
    wire.channel.get("name", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    assert wire.slow.dropped == 0


def test_what_was_never_sent_cannot_be_acknowledged(wire: Damaging) -> None:
    (wire.files / "name").write_bytes(bytes(2 * WINDOW))
    link = wire.channel.link
    link.tell(GET, path="name")
    link.receive()
    link.send(ACK, TAKEN.pack(1 << 63))
    while (got := link.receive())[0] == DATA:
        pass
    assert got[0] == ERROR
    assert "not sent" in facts_of(got[1])["text"]
    Channel(link.fd, seconds=20)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (PUT, b'{"path": "x", "mode": Infinity}'),
        (PUT, b'{"path": "x", "mode": true}'),
        (PUT, b'{"path": "x"}'),
        (GET, b'{"path": "loop"}'),
        (PUT, b'{"path": "loop/x", "mode": 0}'),
        (GET, b'{"path": "\\ud800"}'),
        (GET, b'{"path": "' + b"x/" * 5000 + b'"}'),
        (RUN, b'{"command": "x", "arguments": "text"}'),
        (RUN, b'{"command": ["x"]}'),
        (RUN, b"[" * 16000),
        (HELLO, b'{"number": 7, "version": 2}'),
        (HELLO, b'{"number": "%s"}' % ("\xe4" * 8000).encode()),
    ],
)
def test_no_request_ends_the_guest_s_end(wire: Damaging, kind: int, body: bytes) -> None:
    (wire.files / "loop").symlink_to("loop")
    wire.channel.link.send(kind, body)
    assert wire.channel.link.receive()[0] == ERROR
    Channel(wire.channel.link.fd, seconds=20)


def test_a_request_that_is_too_long_is_said_and_not_sent(wire: Damaging) -> None:
    with pytest.raises(ChannelError, match="too long"):
        wire.channel.run("x", ["y" * MOST], sys.stdout.buffer, sys.stderr.buffer)
    Channel(wire.channel.link.fd, seconds=20)


def test_a_directory_is_refused_before_anything_is_sent(wire: Damaging, tmp_path: Path) -> None:
    (wire.files / "there").mkdir()
    link = wire.channel.link
    link.tell(PUT, path="there", mode=0o600)
    kind, body = link.receive()
    assert (kind, "directory" in facts_of(body)["text"]) == (ERROR, True)
    (wire.files / "name").write_text("text")
    with pytest.raises(IsADirectoryError):
        wire.channel.get("name", str(tmp_path))


def test_a_command_that_is_silent_is_said_to_live(
    wire: Damaging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "ALIVE", 0.05)
    (wire.commands / "quiet").write_text("#!/bin/sh\nexec sleep 1000\n")
    (wire.commands / "quiet").chmod(0o755)
    link = wire.channel.link
    link.tell(RUN, command="quiet", arguments=[])
    assert [link.receive()[0] for _ in range(4)] == [OK, GREETING, GREETING, GREETING]
    Channel(link.fd, seconds=20)


@pytest.mark.parametrize("kind", [PUT, GET])
def test_a_directory_that_becomes_a_link_while_it_is_asked_for_is_not_followed(
    wire: Damaging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    below, outside = wire.files / "below", tmp_path / "outside"
    for directory in (below, outside):
        directory.mkdir()
        (directory / "name").write_text("private")
    look = Server._path

    def look_and_swap(server: Server, facts: dict[str, object]) -> Path:
        found = look(server, facts)
        below.rename(wire.files / "before")
        below.symlink_to(outside)
        return found

    monkeypatch.setattr(Server, "_path", look_and_swap)
    wire.channel.link.tell(kind, path="below/name", mode=0o600)
    said, body = wire.channel.link.receive()
    assert (said, "below/name: Not a directory" in facts_of(body)["text"]) == (ERROR, True)
    assert [one.name for one in outside.iterdir()] == ["name"]


@pytest.mark.parametrize("status", ["256", "-1", "Infinity", "true", '"7"', "null"])
def test_a_status_that_is_none_is_nonsense(status: str) -> None:
    with pytest.raises(ChannelError, match="nonsense: status"):
        helper.number_of(facts_of(b'{"status": %s}' % status.encode()), "status", 255)


FULL = """
import pathlib, resource, sys
from pvfront.console.pvfront_channel import Received
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
file = Received(sys.argv[1], 0o600)
try:
    while True:
        file.add(bytes(1000))  # of which the buffer keeps some
except OSError:
    pass
finally:
    file.close()
"""


def test_a_file_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", FULL, str(tmp_path / "name")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_dom0_s_helper_is_one_file_of_python_3_9_and_its_library() -> None:
    tree = ast.parse(Path(helper.__file__).read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert imported <= sys.stdlib_module_names
