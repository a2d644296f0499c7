# SPDX-License-Identifier: BSD-2-Clause
"""What a worker gives up, seen from outside: its /proc entry."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from embedded import serving

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="giving up privileges needs some: run as root"
)
sanitized = pytest.mark.skipif(
    "PVFRONT_SANITIZED" in os.environ, reason="a sanitizer's build has no system call filter"
)


def status(pid: int) -> Iterator[dict[str, list[str]]]:
    """What /proc says of each thread of a process: the main one's first, then each queue's."""
    for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name)):
        lines = (task / "status").read_text().splitlines()
        yield {key: rest.split() for key, _, rest in (line.partition(":") for line in lines)}


@needs_root
def test_a_worker_that_serves_is_an_unprivileged_user_without_capabilities(tmp_path: Path) -> None:
    args = ["--uid", "65534", "--gid", "65533", "--chroot", str(tmp_path)]
    with serving(args=args, queues=3) as host:
        host.nbd().write(0, b"x" * 4096)
        threads = list(status(host.process.pid))
        assert len(threads) >= 4
        for found in threads:
            # A sanitizer's own thread began before anything was given up.
            if "PVFRONT_SANITIZED" in os.environ and found["Uid"] == ["0"] * 4:
                continue
            assert found["Uid"] == ["65534"] * 4
            assert found["Gid"] == ["65533"] * 4
            assert found["Groups"] == []
            for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(found[kind][0], 16) == 0, kind
            assert found["NoNewPrivs"] == ["1"]
        assert Path(f"/proc/{host.process.pid}/root").readlink() == tmp_path


@sanitized
def test_a_worker_that_serves_has_a_system_call_filter() -> None:
    with serving(queues=3) as host:
        host.nbd(2).write(0, bytes(4096))
        threads = list(status(host.process.pid))
        assert [found["Seccomp"] for found in threads] == [["2"]] * 4
        assert [found["NoNewPrivs"] for found in threads] == [["1"]] * 4
