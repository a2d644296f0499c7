# SPDX-License-Identifier: BSD-2-Clause
"""A client of the hub that sends what it likes."""

import json
import os
import socket
import sys

from waiting import PATIENCE

HUB = [sys.executable, "-P", "-m", "pvfront.host.hub"]


class Client:
    """A client of the hub that sends what it likes."""

    def __init__(self, directory):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        self.fds = []
        try:
            self.socket.connect(str(directory / "hub.sock"))
        except OSError:
            self.socket.close()
            raise

    def send(self, packet):
        data = packet if isinstance(packet, bytes) else json.dumps(packet).encode()
        self.socket.send(data)

    def receive(self):
        """The answer; its descriptors are in `fds`."""
        data, fds, _, _ = socket.recv_fds(self.socket, 1 << 19, 8)
        self.fds += fds
        return data

    def ask(self, packet):
        self.send(packet)
        return json.loads(self.receive())

    def close(self):
        self.socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def answers(directory):
    """Whether a hub lives there."""
    try:
        return dump(directory)["ok"]
    except OSError:
        return False


def dump(directory):
    with Client(directory) as client:
        return client.ask({"do": "dump"})
