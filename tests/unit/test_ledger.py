# SPDX-License-Identifier: BSD-2-Clause
"""Who holds event channels and granted pages: what /proc, records and the host's books tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from pvfront.holdings import (
    EVTCHN,
    GNTALLOC,
    Holder,
    count_pages,
    count_ports,
    has_event_channels,
    of_guest,
    of_host,
)

INTERRUPTS = """\
           CPU0       CPU1
  0:          1          0   IO-APIC   2-edge      timer
 48:        120          0  xen-percpu    -virq      timer0
 49:          3          0  xen-percpu    -ipi       resched0
 56:         77          0   xen-dyn    -event     xenbus
 60:       1234          0   xen-dyn    -event     evtchn:pvfront
 61:         12          0   xen-dyn    -event     evtchn:pvfront
 62:          9          0   xen-dyn    -event     blkif
NMI:          0          0   Non-maskable interrupts
"""

MAPS = f"""\
55d0c8a00000-55d0c8a10000 r-xp 00000000 08:01 42    /usr/bin/pvfront-worker
7f0000000000-7f0000004000 rw-s 00000000 00:06 91    {GNTALLOC}
7f0000004000-7f00002c4000 rw-s 00004000 00:06 91    {GNTALLOC}
7f00002c4000-7f00002c5000 rw-s 00000000 00:01 7     /memfd:pvfront-stats (deleted)
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0     [stack]
"""


def process(proc: Path, pid: int, name: str, *links: str, maps: str = "", argv: str = "") -> None:
    (proc / str(pid) / "fd").mkdir(parents=True)
    for number, link in enumerate(links):
        (proc / str(pid) / "fd" / str(number)).symlink_to(link)
    (proc / str(pid) / "maps").write_text(maps)
    (proc / str(pid) / "comm").write_text(f"{name}\n")
    (proc / str(pid) / "cmdline").write_text((argv or name) + "\0")


def test_pages_of_gntalloc_are_counted_and_no_others() -> None:
    assert count_pages(MAPS) == 4 + 704
    assert count_pages("") == 0


def test_event_channels_are_told_apart_from_other_interrupts() -> None:
    assert count_ports(INTERRUPTS) == (6, 2)


def test_processes_that_hold_something_are_found_and_the_others_not(tmp_path: Path) -> None:
    process(tmp_path, 1, "init", "/dev/null")
    process(tmp_path, 70, "pvfront-worker", "/dev/null", EVTCHN, GNTALLOC, maps=MAPS)
    process(tmp_path, 8, "portparker", EVTCHN, EVTCHN, argv="@pvfront-parker\0-I")
    (tmp_path / "9").mkdir()  # has ended while we looked
    (tmp_path / "interrupts").write_text(INTERRUPTS)
    found = of_guest(tmp_path)
    assert sorted(found.holders, key=lambda holder: holder.pid) == [
        Holder(8, "portparker", 2, 0, 0, parker=True),
        Holder(70, "pvfront-worker", 1, 1, 708),
    ]
    assert (found.ports, found.ports_of_programs) == (6, 2)
    assert found.deferred is None, "nobody knows"
    assert found.mapped is None


def test_who_has_event_channels_is_told_by_its_open_files(tmp_path: Path) -> None:
    process(tmp_path, 70, "pvfront-worker", "/dev/null", EVTCHN)
    process(tmp_path, 71, "pvfront-worker", "/dev/null", GNTALLOC)
    process(tmp_path, 72, "zombie")
    (tmp_path / "73").mkdir()  # has ended while we looked
    assert has_event_channels(tmp_path / "70")
    for pid in (71, 72, 73, 74):
        assert not has_event_channels(tmp_path / str(pid)), pid


@pytest.mark.parametrize("denied", ["iterdir", "readlink"])
def test_a_process_that_cannot_be_looked_into_is_taken_to_have_event_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, denied: str
) -> None:
    process(tmp_path, 70, "secret", "/dev/null")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, denied, refuse)
    assert has_event_channels(tmp_path / "70")


def test_a_process_that_ends_while_its_open_files_are_read_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process(tmp_path, 70, "pvfront-worker", EVTCHN)

    def gone(path: Path) -> None:
        raise ProcessLookupError(3, "No such process", str(path))

    monkeypatch.setattr(Path, "readlink", gone)
    assert not has_event_channels(tmp_path / "70")


def test_the_books_of_a_host_tell_also_what_is_mapped() -> None:
    books = {
        "ports": [
            {"domid": 1, "port": 3, "remote": 0, "remote_port": 9, "pid": 70},
            {"domid": 0, "port": 9, "remote": 1, "remote_port": 3, "pid": 80},
        ],
        "grants": [
            {"domid": 1, "arena": 1, "first_ref": 8, "pages": 708, "mapped": 30, "pid": 70},
        ],
        "deferred": 5,
    }
    found = of_host(books, 1, "pvfront")
    assert list(found.holders) == [Holder(70, "pvfront", 1, 1, 708)]
    assert (found.deferred, found.ports, found.mapped) == (5, 1, {8: 30})
