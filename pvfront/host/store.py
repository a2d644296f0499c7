# SPDX-License-Identifier: BSD-2-Clause
"""The store of the embedded host: Xen's own oxenstored, run without Xen.

A shim in LD_PRELOAD (native/host/oxenstored_shim.c) answers the few calls that it makes to the
hypervisor at its start, and moves its socket. Nodes, watches, transactions and quotas are the real
ones; every connection is domain 0's, as at the real socket.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from pvfront.errors import PvfrontError
from pvfront.host.child import Child, answers

SOCKET_NAME = "store.sock"
VARIABLE = "OXENSTORED"
SHIM = Path(__file__).with_name("liboxenstored_shim.so")


def find() -> str:
    """The program: $OXENSTORED, or the one of Debian's xen-utils. Raises PvfrontError."""
    named = os.environ.get(VARIABLE)
    if named:
        found = [named]
    else:
        # Not the one in /usr/sbin: that is a wrapper, which refuses to run without a hypervisor.
        found = sorted(map(str, Path("/usr/lib").glob("xen-*/bin/oxenstored")))
        found += ["/usr/libexec/xen/bin/oxenstored", "/usr/local/sbin/oxenstored"]
    for program in found:
        if os.access(program, os.X_OK):
            return program
    raise PvfrontError(
        f"oxenstored is not installed ({' '.join(found)})",
        hint=f"apt-get install xen-utils-4.17, or set {VARIABLE} to the program",
    )


async def start(directory: Path, settings: Mapping[str, object] | None = None) -> Child:
    """Runs an empty store at DIR/store.sock; it ends with this process. Raises PvfrontError.

    settings: more of oxenstored.conf, as {"quota-maxsize": 8192}. Quotas are the daemon's
    defaults otherwise, and some hold for domain 0 too.
    """
    program = find()
    if not SHIM.exists():
        raise PvfrontError(
            f"{SHIM} is missing", hint="pvfront was installed without its compiled parts"
        )
    path = directory / SOCKET_NAME
    if answers(path, socket.SOCK_STREAM):
        raise PvfrontError(f"a store runs at {path} already", hint="use another directory")
    path.unlink(missing_ok=True)
    config = directory / "store.conf"
    config.write_text(
        f"xenstored-log-file = {directory}/store-daemon.log\n"
        f"pid-file = {directory}/store.pid\n"
        "persistent = false\n"
        + "".join(f"{name} = {value}\n" for name, value in (settings or {}).items())
    )
    child = Child(
        "oxenstored",
        [
            program,
            "--no-fork",
            "--no-domain-init",
            # Rotated by renaming: as root, /dev/null as its file was renamed too.
            "--no-access-log",
            "--config-file",
            os.fspath(config),
        ],
        directory / "store.log",
        {"LD_PRELOAD": os.fspath(SHIM), "OXENSTORED_SOCKET": os.fspath(path)},
        tell_again=1.0,
    )
    try:
        await child.listening(path, socket.SOCK_STREAM)
    except BaseException:
        await child.stop()
        raise
    return child
