#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-2-Clause
"""Shows what becomes of a port of /dev/xen/evtchn when its domain is saved and restored.

    guest# modprobe xen-evtchn; python3 evtchn-resume.py
    dom0#  xl save GUEST FILE && xl restore FILE

It binds a port, waits until the domain was resumed, and unbinds it: docs/evtchn-resume.md. With
`--new-first` another descriptor binds a port before that, and gets the same number.
"""

import fcntl
import os
import struct
import sys


def number(nr: int) -> int:
    """_IOC(_IOC_NONE, 'E', nr, 4) of <xen/evtchn.h>: all of these take one port or domain."""
    return 4 << 16 | ord("E") << 8 | nr


BIND_UNBOUND_PORT, UNBIND, NOTIFY = number(2), number(3), number(4)


def call(fd: int, request: int, argument: int) -> int:
    return fcntl.ioctl(fd, request, bytearray(struct.pack("I", argument)))


def attempt(what: str, fd: int, request: int, port: int) -> None:
    print(f"{what} {port} ...", end=" ", flush=True)
    try:
        call(fd, request, port)
        print("fine", flush=True)
    except OSError as error:
        print(error, flush=True)


def bind() -> tuple[int, int]:
    fd = os.open("/dev/xen/evtchn", os.O_RDWR | os.O_CLOEXEC)
    return fd, call(fd, BIND_UNBOUND_PORT, 0)


def wait_for_resume() -> None:
    """The kernel's log tells: a record of /dev/kmsg is one read."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_CLOEXEC)
    os.lseek(log, 0, os.SEEK_END)
    for line in (b"suspending xenstore", b"Restarting tasks"):
        while line not in os.read(log, 8192):
            pass


def main() -> None:
    old, port = bind()
    print(f"bound port {port}; now save and restore this domain", flush=True)
    wait_for_resume()
    print("the domain was resumed", flush=True)
    attempt("notify", old, NOTIFY, port)
    new = None
    if "--new-first" in sys.argv[1:]:
        new = bind()
        print(f"another descriptor has bound port {new[1]}", flush=True)
        attempt("notify", old, NOTIFY, port)
    attempt("unbind", old, UNBIND, port)
    if new is not None:
        attempt("notify, by the other", new[0], NOTIFY, new[1])
        attempt("unbind, by the other", new[0], UNBIND, new[1])


if __name__ == "__main__":
    main()
