# SPDX-License-Identifier: BSD-2-Clause
"""The hub against clients that send what they like, and what goes when they are gone."""

import json
import os
import signal
import socket
import struct
import subprocess

import pytest
from hubclient import HUB, Client, answers, dump
from waiting import PATIENCE, wait_for

from pvfront.host import handles


@pytest.fixture
def client(hub):
    with Client(hub) as connected:
        yield connected


def opened(hub, device, domid=1):
    client = Client(hub)
    assert client.ask({"do": "open", "device": device, "domid": domid})["ok"]
    return client


NONSENSE = [
    b"{",
    b"[]",
    b"1",
    b'"open"',
    b"\xff\xfe\x00",
    b"[" * 4096,
    b'{"do": ' * 500,
    b"{}",
    b'{"do": 5}',
    b'{"do": null}',
    b'{"do": "open"}',
    b'{"do": "open", "device": "evtchn"}',
    b'{"do": "open", "device": "evtchn", "domid": "1"}',
    b'{"do": "open", "device": "evtchn", "domid": true}',
    b'{"do": "open", "device": "evtchn", "domid": -1}',
    b'{"do": "open", "device": "evtchn", "domid": 32752}',
    b'{"do": "open", "device": "evtchn", "domid": 1e300}',
    b'{"do": "open", "device": "evtchn", "domid": ' + b"9" * 4000 + b"}",
    b'{"do": "open", "device": ["evtchn"], "domid": 1}',
    b'{"do": "bind_unbound", "remote": 0}',
    b'{"do": "__init__"}',
]


@pytest.mark.parametrize("packet", NONSENSE, ids=lambda packet: repr(packet[:40]))
def test_nonsense_before_open_is_refused_and_the_connection_lives(client, packet):
    answer = client.ask(packet)
    assert (answer["ok"], answer["errno"]) == (False, "EINVAL")
    assert answer["text"]
    assert client.ask({"do": "open", "device": "evtchn", "domid": 1}) == {"ok": True}


def test_a_device_that_there_is_not_is_refused(client):
    answer = client.ask({"do": "open", "device": "privcmd", "domid": 1})
    assert answer["errno"] == "ENODEV"


def test_open_happens_once(client):
    request = {"do": "open", "device": "evtchn", "domid": 1}
    assert client.ask(request)["ok"]
    assert client.ask(request)["errno"] == "EINVAL"


@pytest.mark.parametrize(
    ("device", "request_"),
    [
        ("evtchn", {"do": "alloc", "domid": 0, "pages": 1, "writable": True}),
        ("evtchn", {"do": "bind_unbound"}),
        ("evtchn", {"do": "bind_unbound", "remote": 99999}),
        ("evtchn", {"do": "bind_interdomain", "remote": 0, "remote_port": -1}),
        ("evtchn", {"do": "bind_interdomain", "remote": 0, "remote_port": 1 << 40}),
        ("evtchn", {"do": "bind_interdomain", "remote": 0, "remote_port": 5}),
        ("gntalloc", {"do": "bind_unbound", "remote": 0}),
        ("gntalloc", {"do": "alloc", "domid": 0, "pages": 0, "writable": True}),
        ("gntalloc", {"do": "alloc", "domid": 0, "pages": 1 << 70, "writable": True}),
        ("gntalloc", {"do": "alloc", "domid": 0, "pages": 1, "writable": 1}),
        ("gntalloc", {"do": "alloc", "domid": None, "pages": 1, "writable": True}),
        ("gntalloc", {"do": "free", "offset": 0, "pages": 1}),
        ("gntalloc", {"do": "free", "offset": 1, "pages": 1}),
        ("gntalloc", {"do": "free", "offset": -4096, "pages": 1}),
        ("gntalloc", {"do": "unmap_notify", "offset": 0, "clear_byte": True, "port": None}),
        ("gntdev", {"do": "arena", "domid": 1, "arena": 0}),
        ("gntdev", {"do": "domain", "domid": -1}),
        ("gntdev", {"do": "hand_over"}),
    ],
)
def test_a_bad_request_is_refused_and_changes_nothing(hub, device, request_):
    with opened(hub, device) as client:
        before = dump(hub)
        assert client.ask(request_)["errno"] == "EINVAL"
        assert dump(hub) == before


@pytest.mark.parametrize("do", ["unbind", "hand_over"])
def test_a_port_of_somebody_else_is_refused(hub, do):
    with opened(hub, "evtchn") as owner, opened(hub, "evtchn") as other:
        port = owner.ask({"do": "bind_unbound", "remote": 0})["port"]
        assert other.ask({"do": do, "port": port})["errno"] == "ENOTCONN"


def test_freeing_more_than_there_is_frees_nothing(hub):
    with opened(hub, "gntalloc") as client:
        client.ask({"do": "alloc", "domid": 0, "pages": 3, "writable": True})
        for offset, pages in ((0, 4), (8192, 2), (12288, 1), (1, 1), (4095, 1)):
            request = {"do": "free", "offset": offset, "pages": pages}
            assert client.ask(request)["errno"] == "EINVAL"
        assert dump(hub)["grants"][0]["pages"] == 3
        assert client.ask({"do": "free", "offset": 4096, "pages": 1})["ok"]
        assert dump(hub)["grants"][0]["pages"] == 2


def test_a_request_that_is_too_long_is_refused(client):
    answer = client.ask(b'{"do": "dump"' + b" " * 5000 + b"}")
    assert answer["errno"] == "EMSGSIZE"


def test_descriptors_that_a_client_sends_are_not_kept(hub_process, client):
    _, process = hub_process

    def count():
        return len(os.listdir(f"/proc/{process.pid}/fd"))  # noqa: PTH208

    assert client.ask({"do": "dump"})["ok"]  # it has been accepted
    before = count()
    for _ in range(20):
        with open(os.devnull) as null:  # noqa: PTH123
            socket.send_fds(client.socket, [b'{"do": "dump"}'], [null.fileno()])
        assert json.loads(client.receive())["ok"]
    wait_for("no descriptor more than before", lambda: count() <= before)


def test_a_client_that_reads_no_answers_is_dropped_and_others_are_served(hub):
    with Client(hub) as deaf:

        def send_for_ever():
            while True:
                deaf.send({"do": "dump"})

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_for_ever()
        assert dump(hub)["ok"]


def test_shared_memory_can_be_neither_shrunk_nor_sealed_by_a_client(hub):
    import fcntl

    with opened(hub, "gntalloc") as client:
        client.ask({"do": "alloc", "domid": 0, "pages": 1, "writable": True})
        (arena,) = client.fds
        with pytest.raises(PermissionError):
            os.ftruncate(arena, 0)
        with pytest.raises(PermissionError):
            fcntl.fcntl(arena, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        assert client.ask({"do": "alloc", "domid": 0, "pages": 9, "writable": True})["ok"]


def test_the_dump_names_holders_and_ends(hub):
    with opened(hub, "evtchn") as front, opened(hub, "evtchn", 0) as back:
        near = front.ask({"do": "bind_unbound", "remote": 0})["port"]
        (unbound,) = dump(hub)["ports"]
        assert unbound == {
            "domid": 1,
            "port": near,
            "remote": 0,
            "remote_port": None,
            "pid": os.getpid(),
        }
        far = back.ask({"do": "bind_interdomain", "remote": 1, "remote_port": near})["port"]
        assert sorted(
            (port["domid"], port["port"], port["remote"], port["remote_port"])
            for port in dump(hub)["ports"]
        ) == [(0, far, 1, near), (1, near, 0, far)]


def test_a_thousand_connections_that_come_and_go_leave_nothing(hub_process, hub):
    _, process = hub_process

    def descriptors():
        return len(os.listdir(f"/proc/{process.pid}/fd"))  # noqa: PTH208

    def round_():
        with opened(hub, "gntalloc") as grants, opened(hub, "gntdev", 0) as mapper:
            grants.ask({"do": "alloc", "domid": 0, "pages": 2, "writable": True})
            mapper.ask({"do": "domain", "domid": 1})

    round_()
    before = wait_for("the first round's end", lambda: not dump(hub)["grants"] and descriptors())
    for _ in range(300):
        round_()
    wait_for("the rounds' end", lambda: not dump(hub)["grants"] and descriptors() <= before)


def test_a_broken_limits_file_means_the_modules_default(hub, limit):
    with opened(hub, "gntalloc") as client:
        for text in ("", "[]", '{"gntalloc": "many"}', "[" * 5000):
            (hub / "limits.json").write_text(text)
            request = {"do": "alloc", "domid": 0, "pages": 1025, "writable": True}
            assert client.ask(request)["errno"] == "ENOSPC"
            assert client.ask({**request, "pages": 1})["ok"]
    limit.set(1024)


@pytest.fixture
def own_hub(tmp_path):
    process = subprocess.Popen([*HUB, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    wait_for("the hub", lambda: answers(tmp_path))
    yield tmp_path, process
    process.kill()
    process.communicate(timeout=PATIENCE)


def test_domains_without_end_are_refused_and_those_there_are_go_on(own_hub):
    directory, _ = own_hub
    for domid in range(64):
        opened(directory, "evtchn", domid).close()
    with Client(directory) as one_more:
        answer = one_more.ask({"do": "open", "device": "evtchn", "domid": 64})
    assert answer["errno"] == "ENOSPC"
    with opened(directory, "evtchn", 63) as client:
        assert client.ask({"do": "bind_unbound", "remote": 64})["ok"]
        answer = client.ask({"do": "bind_interdomain", "remote": 64, "remote_port": 3})
        assert answer["errno"] == "ENOSPC"


def test_a_second_hub_in_the_same_directory_is_refused_and_the_first_lives(own_hub):
    directory, _ = own_hub
    second = subprocess.run(
        [*HUB, str(directory)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert second.returncode == 1
    assert "runs at" in second.stderr
    assert "Traceback" not in second.stderr
    assert dump(directory)["ok"]


def test_a_hub_that_was_killed_is_followed_by_another(own_hub):
    directory, process = own_hub
    process.kill()
    process.wait(PATIENCE)
    assert (directory / "hub.sock").exists()
    with subprocess.Popen([*HUB, str(directory)]) as second:
        wait_for("the second hub", lambda: answers(directory))
        second.send_signal(signal.SIGTERM)
        assert second.wait(PATIENCE) == 0
    assert not (directory / "hub.sock").exists()


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(own_hub):
    directory, process = own_hub
    with handles.EmbeddedEventChannels.open(str(directory), domid=1) as channels:
        with socket.socket(fileno=os.dup(channels.fileno())) as same:
            # As open() does it, with less patience; not for the open itself.
            limit = struct.pack("@ll", 0, 200_000)
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        with pytest.raises(OSError, match="does not answer"):
            channels.bind_unbound(0)
        process.send_signal(signal.SIGCONT)
        with pytest.raises(OSError, match="hub is gone"):
            channels.bind_unbound(0)


def test_only_the_owner_may_connect(hub):
    assert (hub / "hub.sock").stat().st_mode & 0o077 == 0
