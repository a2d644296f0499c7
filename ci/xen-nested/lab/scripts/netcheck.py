# SPDX-License-Identifier: BSD-2-Clause
"""Checking senders and receivers for the two ends of a network: runs in dom0 and in guests.

    netcheck.py frames-receive IFNAME
    netcheck.py frames-send IFNAME MAC COUNT LARGEST SEED
    netcheck.py stream-serve ADDRESS PORT
    netcheck.py stream-send ADDRESS PORT FILE
    netcheck.py echo ADDRESS PORT
    netcheck.py ask ADDRESS PORT SECONDS
    netcheck.py hear ADDRESS PORT [GROUP]...
    netcheck.py say ADDRESS PORT GROUP WORD

frames: Ethernet frames of random sizes, of 14 bytes and more, whose contents follow from their
number, which is their source address. Each is answered; one that was not is sent again, and
counted. What comes with other contents is corrupt. Both ends print JSON in the end.

stream: a TCP connection with blocks of random sizes; each is compared, and answered by its number.
FILE holds how many were answered. SIGTERM ends the sender in order, with all answers.

echo, ask: one UDP datagram there and back at a time; the times of the round trips as JSON.

hear, say: datagrams to multicast groups; hear prints each that comes to its port.

Who receives prints "ready" first.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable

DATA, ANSWER = 0x88B5, 0x88B6  # IEEE 802's experimental EtherTypes
HEADER = 14
WINDOW = 8  # frames under way
AGAIN_AFTER = 1.0  # seconds
PACE = 0.05  # seconds between a stream's blocks
BLOCK_MOST = 32768
GIVE_UP_AFTER = 300.0
LAST = 0xFFFFFFFF
NUMBER = struct.Struct("!I")
BLOCK = struct.Struct("!QI")
REPLY = struct.Struct("!Q")
TABLE = random.Random(7).randbytes(1 << 20)
SO_RCVBUFFORCE = 33


def contents(number: int, length: int) -> bytes:
    """What the payload of a frame, or a block, of that number must be."""
    begin = number * 7919 % (len(TABLE) - 65536)
    return TABLE[begin : begin + length]


# Frames


def raw(name: str, kind: int) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
    sock.bind((name, kind))
    return sock


def frame(target: bytes, number: int, kind: int, payload: bytes) -> bytes:
    return target + b"\x02\x00" + NUMBER.pack(number) + struct.pack("!H", kind) + payload


def number_of(data: bytes) -> int:
    return int(NUMBER.unpack_from(data, 8)[0])


def frames_receive(name: str) -> None:
    data, answers = raw(name, DATA), raw(name, ANSWER)
    seen: set[int] = set()
    corrupt: list[int] = []
    total = 0
    print("ready", flush=True)
    while True:
        got = data.recv(1 << 17)
        number = number_of(got)
        if number != LAST and number not in seen:
            seen.add(number)
            total += len(got)
            if got[HEADER:] != contents(number, len(got) - HEADER):
                corrupt.append(number)
        answers.send(frame(b"\xff" * 6, number, ANSWER, NUMBER.pack(len(got)).ljust(46, b"\0")))
        if number == LAST:
            print(json.dumps({"frames": len(seen), "bytes": total, "corrupt": corrupt}))
            return


def sizes(count: int, largest: int, seed: int) -> list[int]:
    """Of whole frames: the edges first, then any, small ones more often."""
    edges = [14, 15, 18, 59, 60, 61, 255, 256, 257, 269, 270, 271, 1514, 1515, 1518]
    edges += [pages * 4096 + more for pages in (1, 2, 15, 16) for more in (-1, 0, 1)]
    edges += [largest - 1, largest]
    dice = random.Random(seed)
    found = [size for size in edges if size <= largest]
    while len(found) < count:
        found.append(dice.randint(14, min(largest, dice.choice((300, 5000, 70000)))))
    return found[:count]


def frames_send(name: str, mac: str, count: str, largest: str, seed: str) -> None:
    data, answers = raw(name, DATA), raw(name, ANSWER)
    target = bytes.fromhex(mac.replace(":", ""))
    first = int(seed) << 16
    lengths = dict(enumerate(sizes(int(count), int(largest), int(seed)), first))
    left = list(lengths)
    lengths[LAST] = 64
    under_way: dict[int, float] = {}
    wrong: list[tuple[int, int]] = []
    repeated = 0
    give_up = time.monotonic() + GIVE_UP_AFTER

    def send(number: int) -> None:
        payload = contents(number, lengths[number] - HEADER)
        under_way[number] = time.monotonic()
        data.send(frame(target, number, DATA, payload))

    last_sent = False
    while left or under_way or not last_sent:
        while left and len(under_way) < WINDOW:
            send(left.pop(0))
        if not left and not under_way:
            last_sent = True
            send(LAST)
        if select.select([answers], [], [], AGAIN_AFTER)[0]:
            got = answers.recv(1 << 17)
            number = number_of(got)
            if under_way.pop(number, None) is not None:
                length = int(NUMBER.unpack_from(got, HEADER)[0])
                if length != lengths[number]:
                    wrong.append((lengths[number], length))
        now = time.monotonic()
        if now > give_up:
            sys.exit(f"never answered: frames of {[lengths[n] for n in under_way]} bytes")
        for number in [n for n, sent in under_way.items() if now - sent > AGAIN_AFTER]:
            repeated += 1
            send(number)
    print(json.dumps({"frames": len(lengths) - 1, "repeated": repeated, "wrong_length": wrong}))


# Streams


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def receive(sock: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = sock.recv(min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def stream_serve(address: str, port: str) -> None:
    listener = socket.create_server((address, int(port)), family=family(address))
    print("ready", flush=True)
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    blocks = 0
    while True:
        try:
            number, length = BLOCK.unpack(receive(sock, BLOCK.size))
        except EOFError:
            print(json.dumps({"blocks": blocks}))
            return
        if number != blocks or receive(sock, length) != contents(number, length):
            sys.exit(f"block {blocks} (said to be {number}), {length} bytes, is corrupt")
        blocks += 1
        sock.sendall(REPLY.pack(number))


def stream_send(address: str, port: str, path: str) -> None:
    sock = socket.create_connection((address, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    answered = 0

    def answers() -> None:
        nonlocal answered
        try:
            while True:
                (number,) = REPLY.unpack(receive(sock, REPLY.size))
                if number != answered:
                    break
                answered += 1
                os.pwrite(file, b"%d\n" % answered, 0)
        except (EOFError, OSError):
            pass

    receiver = threading.Thread(target=answers, daemon=True)
    receiver.start()
    dice = random.Random(int(port))
    sent = 0
    # No window of our own: after a pause it is new data that shows TCP at once what was lost. The
    # processor is left to others: what the stream is to go through is theirs to do.
    while not ending.wait(PACE):
        length = dice.randint(1, BLOCK_MOST)
        sock.sendall(BLOCK.pack(sent, length) + contents(sent, length))
        sent += 1
    sock.shutdown(socket.SHUT_WR)
    receiver.join()
    print(json.dumps({"sent": sent, "answered": answered}))
    sys.exit(sent != answered)


# Round trips


def echo(address: str, port: str) -> None:
    sock = socket.socket(family(address), socket.SOCK_DGRAM)
    sock.bind((address, int(port)))
    print("ready", flush=True)
    while True:
        sock.sendto(*sock.recvfrom(65536))


def ask(address: str, port: str, seconds: str) -> None:
    sock = socket.socket(family(address), socket.SOCK_DGRAM)
    sock.connect((address, int(port)))
    sock.settimeout(30)
    times = []
    begin = time.perf_counter()
    end = begin + float(seconds)
    while begin < end:
        sock.send(b"?")
        sock.recv(64)
        now = time.perf_counter()
        times.append(now - begin)
        begin = now
    cuts = statistics.quantiles(times, n=100)
    print(json.dumps({"rounds": len(times), "median": cuts[49], "p99": cuts[98]}))


# Multicast


def hear(address: str, port: str, *groups: str) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", int(port)))
    for group in groups:
        there = socket.inet_aton(group) + socket.inet_aton(address)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, there)
    print("ready", flush=True)
    while True:
        print(sock.recv(65536).decode(), flush=True)


def say(address: str, port: str, group: str, word: str) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
    sock.sendto(word.encode(), (group, int(port)))


VERBS: dict[str, Callable[..., None]] = {
    "frames-receive": frames_receive,
    "frames-send": frames_send,
    "stream-serve": stream_serve,
    "stream-send": stream_send,
    "echo": echo,
    "ask": ask,
    "hear": hear,
    "say": say,
}

if __name__ == "__main__":
    VERBS[sys.argv[1]](*sys.argv[2:])
