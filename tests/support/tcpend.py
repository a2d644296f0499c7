# SPDX-License-Identifier: BSD-2-Clause
"""One end of a TCP connection, as a program for a network namespace.

    python tcpend.py listen|connect send|receive HOST PORT BYTES [PAUSE]

`send` sends so many bytes that a seed draws; PAUSE: milliseconds between 64 KiB of them. `receive`
reads to the end. Each says `ready` when it listens, `begun` with the first bytes, and at the end
`BYTES SHA256` of what it sent or received.
"""

import hashlib
import random
import socket
import sys
import time

PIECE = 1 << 16


def connection(how: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if how == "connect":
        made = socket.socket(family)
        made.connect((host, port))
        return made
    with socket.create_server((host, port), family=family) as server:
        print("ready", flush=True)
        made, _ = server.accept()
    return made


def main(how: str, way: str, host: str, port: int, size: int, pause: int) -> None:
    digest, done, drawn = hashlib.sha256(), 0, random.Random(7)
    with connection(how, host, port) as sock:
        sock.settimeout(120)
        while way == "receive" or done < size:
            if way == "send":
                data = drawn.randbytes(min(PIECE, size - done))
                sock.sendall(data)
                time.sleep(pause / 1000)
            else:
                data = sock.recv(PIECE)
            if not data:
                break
            if not done:
                print("begun", flush=True)
            done += len(data)
            digest.update(data)
    print(done, digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main(
        sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]),
        int(sys.argv[6]) if len(sys.argv) > 6 else 0,
    )  # fmt: skip
