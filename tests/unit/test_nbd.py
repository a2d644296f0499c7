# SPDX-License-Identifier: BSD-2-Clause
"""The messages to the kernel's nbd driver, byte by byte, and what becomes of its answers."""

from __future__ import annotations

import asyncio
import errno
import struct
from pathlib import Path
from typing import Any

import pytest
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError

from pvfront.blkfront import nbd
from pvfront.blkfront.nbd import NbdControl, NbdError, NbdMessage, NbdUnavailable
from pvfront.sysfs import Roots

CONNECT = {"size": 0, "block_size": 512, "server_flags": 0, "identifier": "pvfront:vbd-51728",
           "dead_conn_timeout": 60}  # fmt: skip


def attributes(data: bytes) -> list[tuple[int, bytes]]:
    """A chain of struct nlattr (linux/netlink.h): u16 length with header, u16 type, padded to 4."""
    found = []
    while data:
        length, kind = struct.unpack_from("=HH", data)
        found.append((kind & 0x3FFF, data[4:length]))
        data = data[(length + 3) & ~3 :]
    return found


def attribute(kind: int, payload: bytes) -> bytes:
    data = struct.pack("=HH", len(payload) + 4, kind) + payload
    return data + bytes(-len(data) % 4)


class FakeSocket:
    """The kernel's end: keeps what is sent as bytes, answers with prepared bytes or an error."""

    made: list[FakeSocket]
    answers: list[bytes | NetlinkError]
    missing_binds = 0

    def __init__(self, **_: Any) -> None:
        self.prid = 0x21
        self.sent: list[tuple[int, int, dict[int, bytes]]] = []
        self.closed = False
        FakeSocket.made.append(self)

    def bind(self, family: str, message: type) -> None:
        assert (family, message) == ("nbd", NbdMessage)
        if FakeSocket.missing_binds:
            FakeSocket.missing_binds -= 1
            raise NetlinkError(errno.ENOENT)

    def nlm_request(self, message: NbdMessage, msg_type: int, msg_flags: int) -> list[NbdMessage]:
        assert msg_type == self.prid
        assert msg_flags == NLM_F_REQUEST | NLM_F_ACK
        message.encode()
        data = bytes(message.data)[16:]  # struct nlmsghdr
        command, version = data[0], data[1]
        self.sent.append((command, version, dict(attributes(data[4:]))))
        answer = FakeSocket.answers.pop(0) if FakeSocket.answers else b""
        if isinstance(answer, NetlinkError):
            raise answer
        if not answer:
            return []
        body = bytes([command, 1, 0, 0]) + answer
        header = struct.pack("=IHHII", 16 + len(body), self.prid, 0, 0, 0)
        reply = NbdMessage(header + body)
        reply.decode()
        return [reply]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> type[FakeSocket]:
    FakeSocket.made = []
    FakeSocket.answers = []
    FakeSocket.missing_binds = 0
    monkeypatch.setattr(nbd, "_NbdSocket", FakeSocket)
    monkeypatch.setattr(nbd, "load_module", lambda: None)
    return FakeSocket


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    (tmp_path / "sys/block").mkdir(parents=True)
    return Roots(tmp_path)


def device(roots: Roots, name: str, *, backend: str | None = None, pid: bool = False) -> None:
    directory = roots.sys / "block" / name
    directory.mkdir()
    if backend is not None:
        (directory / "backend").write_text(f"{backend}\n")
    if pid:
        (directory / "pid").write_text("1\n")


def test_connect_sends_every_attribute_as_the_kernels_header_numbers_it(
    kernel: type[FakeSocket], roots: Roots
) -> None:
    with NbdControl(roots) as control:
        control.connect(
            [9, 10],
            size=1 << 40,
            block_size=4096,
            server_flags=nbd.FLAG_SEND_FLUSH,
            identifier="pvfront:vbd-51728",
            dead_conn_timeout=3600,
            index=3,
        )
    ((command, version, sent),) = kernel.made[0].sent
    assert (command, version) == (1, 1)
    sockets = sent.pop(7)
    assert sent == {
        1: struct.pack("=I", 3),
        2: struct.pack("=Q", 1 << 40),
        3: struct.pack("=Q", 4096),
        4: struct.pack("=Q", 0),
        5: struct.pack("=Q", 0b101),  # HAS_FLAGS | SEND_FLUSH
        6: struct.pack("=Q", 1),  # DESTROY_ON_DISCONNECT
        8: struct.pack("=Q", 3600),
        10: b"pvfront:vbd-51728\0",
    }
    items = attributes(sockets)
    assert [kind for kind, _ in items] == [1, 1]
    fds = [attributes(item) for _, item in items]
    assert fds == [[(1, struct.pack("=I", 9))], [(1, struct.pack("=I", 10))]]


def test_connect_returns_the_index_of_the_kernels_reply(
    kernel: type[FakeSocket], roots: Roots
) -> None:
    kernel.answers = [attribute(1, struct.pack("=I", 5))]
    with NbdControl(roots) as control:
        assert control.connect([9], **CONNECT) == 5  # type: ignore[arg-type]


def test_reconfigure_never_sends_a_timeout_nor_a_size_that_was_not_asked_for(
    kernel: type[FakeSocket], roots: Roots
) -> None:
    with NbdControl(roots) as control:
        control.reconfigure(2, identifier="pvfront:vbd-1", sock_fds=[9])
    ((command, _, sent),) = kernel.made[0].sent
    assert command == 3
    assert set(sent) == {1, 7, 10}


def test_reconfigure_to_size_0_sends_the_0(kernel: type[FakeSocket], roots: Roots) -> None:
    with NbdControl(roots) as control:
        control.reconfigure(2, identifier="pvfront:vbd-1", size=0)
    assert kernel.made[0].sent[0][2][2] == bytes(8)


def test_disconnect_names_the_index(kernel: type[FakeSocket], roots: Roots) -> None:
    with NbdControl(roots) as control:
        control.disconnect(4)
    assert kernel.made[0].sent == [(2, 1, {1: struct.pack("=I", 4)})]


def test_status_finds_its_device_in_the_list(kernel: type[FakeSocket], roots: Roots) -> None:
    def item(index: int, connected: int) -> bytes:
        inner = attribute(1, struct.pack("=I", index)) + attribute(2, bytes([connected]))
        return attribute(1, inner)

    kernel.answers = [attribute(9, item(2, 0) + item(3, 1)), attribute(9, b"")]
    with NbdControl(roots) as control:
        assert control.status(3)
        assert not control.status(3)


def test_an_error_names_operation_device_errno_and_the_kernels_text(
    kernel: type[FakeSocket], roots: Roots
) -> None:
    kernel.answers = [NetlinkError(errno.EINVAL, "bad attribute")]
    with NbdControl(roots) as control, pytest.raises(NbdError) as caught:
        control.disconnect(4)
    assert str(caught.value) == (
        "nbd disconnect of nbd4 failed: EINVAL (Invalid argument): bad attribute"
    )
    assert caught.value.errno == errno.EINVAL


def test_without_the_right_to_do_it_the_hint_says_root(
    kernel: type[FakeSocket], roots: Roots
) -> None:
    kernel.answers = [NetlinkError(errno.EPERM)]
    with NbdControl(roots) as control, pytest.raises(NbdError) as caught:
        control.disconnect(4)
    assert caught.value.hint == "run it as root (CAP_SYS_ADMIN)"


def test_the_socket_is_closed_at_the_end_of_the_block(
    kernel: type[FakeSocket], roots: Roots
) -> None:
    with NbdControl(roots) as control:
        pass
    assert kernel.made[0].closed
    with pytest.raises(RuntimeError, match="with block"):
        control.disconnect(0)


def test_a_missing_module_is_loaded(
    kernel: type[FakeSocket], roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    monkeypatch.setattr(nbd, "load_module", lambda: loads.append(1))
    kernel.missing_binds = 1
    with NbdControl(roots):
        assert loads == [1]
    assert [sock.closed for sock in kernel.made] == [True, True]


def test_a_module_that_cannot_be_loaded_is_one_line_with_both_remedies(
    kernel: type[FakeSocket], roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd, "load_module", lambda: "modprobe: module nbd not found")
    kernel.missing_binds = 2
    with pytest.raises(NbdUnavailable) as caught, NbdControl(roots):
        pass
    assert "module nbd not found" in str(caught.value)
    assert caught.value.hint is not None
    assert "modprobe nbd" in caught.value.hint
    assert "/etc/modules-load.d" in caught.value.hint


def test_a_free_index_is_no_connected_device_and_not_the_modules_own(roots: Roots) -> None:
    assert nbd.free_index(roots) == 0
    parameters = roots.sys / "module/nbd/parameters"
    parameters.mkdir(parents=True)
    (parameters / "nbds_max").write_text("2\n")
    device(roots, "nbd0")
    device(roots, "nbd1", pid=True)
    device(roots, "nbd2", backend="other", pid=True)
    assert nbd.free_index(roots) == 3
    device(roots, "nbd3")  # left over unconnected: it is used, and goes with the connection
    assert nbd.free_index(roots) == 3


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EEXIST, errno.EINVAL])
def test_an_index_that_is_held_for_a_moment_is_tried_again(
    kernel: type[FakeSocket], roots: Roots, code: int
) -> None:
    kernel.answers = [NetlinkError(code), attribute(1, struct.pack("=I", 0))]
    with NbdControl(roots) as control:
        assert control.connect([9], **CONNECT) == 0  # type: ignore[arg-type]


def test_an_index_that_stays_held_is_an_error_in_the_end(
    kernel: type[FakeSocket], roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd, "_CREATE_DEADLINE", 0.0)
    kernel.answers = [NetlinkError(errno.EBUSY)] * 2
    with NbdControl(roots) as control, pytest.raises(NbdError, match="EBUSY"):
        control.connect([9], **CONNECT)  # type: ignore[arg-type]


def test_any_other_error_of_connect_is_final(kernel: type[FakeSocket], roots: Roots) -> None:
    kernel.answers = [NetlinkError(errno.ENOMEM)]
    with NbdControl(roots) as control, pytest.raises(NbdError, match="ENOMEM"):
        control.connect([9], **CONNECT)  # type: ignore[arg-type]
    assert len(kernel.made[0].sent) == 1


@pytest.mark.parametrize(
    "wrong", [{"size": -1}, {"size": 1 << 63}, {"block_size": 256}, {"block_size": 1000}]
)
def test_sizes_that_the_kernel_would_refuse_are_refused_before(
    kernel: type[FakeSocket], roots: Roots, wrong: dict[str, int]
) -> None:
    with NbdControl(roots) as control, pytest.raises(ValueError, match="size"):
        control.connect([9], **(CONNECT | wrong))  # type: ignore[arg-type]
    assert kernel.made[0].sent == []


def test_devices_are_listed_by_number_with_what_sysfs_says(roots: Roots) -> None:
    device(roots, "nbd10", backend="pvfront:vbd-1", pid=True)
    device(roots, "nbd2")
    device(roots, "nbdx")
    device(roots, "xvda")
    assert [(d.name, d.backend, d.connected) for d in nbd.devices(roots)] == [
        ("nbd2", None, False),
        ("nbd10", "pvfront:vbd-1", True),
    ]


async def test_the_real_socket_works_in_a_thread_beside_a_running_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whatever the kernel of this machine answers: an answer, not pyroute2's complaint about loops.
    monkeypatch.setattr(nbd, "load_module", lambda: "not tried")

    def use() -> None:
        with NbdControl() as control:
            control.status(0)

    try:
        await asyncio.to_thread(use)
    except (NbdUnavailable, NbdError) as error:
        assert "nbd" in str(error)  # noqa: PT017
