# SPDX-License-Identifier: BSD-2-Clause
"""The channel's frames, and what becomes of a transfer that is damaged on its way."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.console.channel import Server
from pvfront.console.pvfront_channel import (
    DATA,
    END,
    FRAME,
    MOST,
    PUT,
    Channel,
    ChannelError,
    ChannelGone,
    Frames,
    Link,
    framed,
)


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


class Damaging:
    """A wire between both ends that can turn a byte over."""

    def __init__(self, tmp_path: Path) -> None:
        self.files = tmp_path / "files"
        self.files.mkdir()
        self.turn_over = 0
        dom0, self._a = socket.socketpair()
        guest, self._b = socket.socketpair()
        self._threads = [
            threading.Thread(target=self._carry, args=(self._a, self._b, True)),
            threading.Thread(target=self._carry, args=(self._b, self._a, False)),
            threading.Thread(target=self._serve, args=(guest,)),
        ]
        for thread in self._threads:
            thread.start()
        self._dom0 = dom0
        self.channel = Channel(dom0.fileno(), seconds=20)

    def _carry(self, source: socket.socket, to: socket.socket, out: bool) -> None:
        while data := bytearray(source.recv(4096)):
            if out and self.turn_over and len(data) > 2000:
                self.turn_over -= 1
                data[1000] ^= 1
            to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)

    def _serve(self, guest: socket.socket) -> None:
        with guest:
            server = Server(
                Link(guest.fileno(), seconds=None), files=self.files, writable=True, commands=None
            )
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
    assert b"SHA-256 differs" in link.receive()[1]
    assert list(wire.files.iterdir()) == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}" * 3, b'{"path": 7, "mode": "x"}'])
def test_nonsense_is_answered_with_an_error(wire: Damaging, body: bytes) -> None:
    wire.channel.link.send(PUT, body)
    kind, _ = wire.channel.link.receive()
    assert kind != END
    Channel(wire.channel.link.fd, seconds=20)
