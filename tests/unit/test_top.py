# SPDX-License-Identifier: BSD-2-Clause
"""What `pvfront top` puts where: columns, rows, widths; and its looks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from samples import console, console_queue, disk, disk_queue, net_queue, op, vif

from pvfront.cli import main
from pvfront.platform import Embedded
from pvfront.rates import rates
from pvfront.top import COLUMNS, GAP, Follower, Table, tables

BEFORE = [disk(0, disk_queue(0), disk_queue(1)), vif(0, net_queue()), console(0, console_queue())]
AFTER = [
    disk(1, disk_queue(0, read=op(5, 7_500_000, b6=5)), disk_queue(1, read=op(2000))),
    vif(1, net_queue(tx={"bytes": 125_000_000})),
    console(1, console_queue(out_bytes=70)),
]
FOUND = {"devices": rates(BEFORE, AFTER)}


def cells(table: Table, row: int) -> dict[str, str]:
    return {
        column.header: text for column, text in zip(table.columns, table.rows[row], strict=True)
    }


def test_a_device_of_several_queues_has_a_row_for_each_below_its_own() -> None:
    disks, networks, consoles = tables(FOUND)
    assert [cells(disks, row)["DISK"] for row in range(3)] == ["xvdb", "xvdb", "xvdb"]
    assert [cells(disks, row)["QUEUE"] for row in range(3)] == ["all", "0", "1"]
    assert [cells(disks, row)["READ/S"] for row in range(3)] == ["2005", "5", "2000"]
    assert cells(disks, 1)["READ MB/S"] == "7.5"
    assert cells(disks, 1)["P99"] == "<128us"
    assert len(networks.rows) == 1, "of one queue there is no more to say"
    assert cells(networks, 0)["TX GBIT/S"] == "1.000"
    assert cells(consoles, 0)["CONSOLE"] == "org.example.chan1"
    assert cells(consoles, 0)["OUT B/S"] == "70"


def test_what_nobody_knows_yet_is_a_dash() -> None:
    (table,) = tables({"devices": rates([], [disk(1, disk_queue(in_flight=4))])})
    assert cells(table, 0)["READ/S"] == cells(table, 0)["CPU%"] == cells(table, 0)["P50"] == "-"
    assert cells(table, 0)["IN FLIGHT"] == "4"


@pytest.mark.parametrize("width", [20, 60, 80, 100, 132])
def test_a_table_is_no_wider_than_the_terminal_but_for_what_it_is_about(width: int) -> None:
    for table, klass in zip(tables(FOUND, width), COLUMNS, strict=True):
        used = sum(
            max(len(column.header), *(len(row[index]) for row in table.rows)) + GAP
            for index, column in enumerate(table.columns)
        )
        needed = {column.header for column in COLUMNS[klass] if not column.rank}
        shown = {column.header for column in table.columns}
        assert used - GAP <= width or shown == needed
        assert needed <= shown
    whole = tables(FOUND)
    assert [len(table.columns) for table in whole] == [len(c) for c in COLUMNS.values()]


def test_each_look_is_told_against_the_one_before(tmp_path: Path) -> None:
    looks = [[disk(at, disk_queue(read=op(count)))] for at, count in ((0, 0), (1, 10), (3, 14))]
    follower = Follower(Embedded(tmp_path), take=lambda on: looks.pop(0))
    assert [follower.look()["devices"][0]["read_iops"] for _ in range(2)] == [10, 2]


def test_an_interval_without_devices_is_a_line_and_an_empty_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PVFRONT_HOST", str(tmp_path))
    monkeypatch.setattr(Embedded, "require", lambda on: None)
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main(["top", "-i", "0.1", "-c", "2", *arguments])
        assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("s  no device is served")
    assert [json.loads(line)["devices"] for line in lines[-2:]] == [[], []]
