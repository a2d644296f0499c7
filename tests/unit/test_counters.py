# SPDX-License-Identifier: BSD-2-Clause
"""Counters as they are found in the run directory and below /proc."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.counters import process_times, sample
from pvfront.platform import Embedded

STAT = (
    "77 (a) b) S 1 77 77 0 -1 4194560 90 0 0 0 12 30 0 0 20 0 3 0 5551 1000 2 18446744073709551615"
)


def test_the_time_of_a_process_and_its_start_are_in_its_line_whatever_its_name() -> None:
    assert process_times(STAT) == (42, 5551)


@pytest.mark.parametrize("text", ["", "77", "77 (x) S 1", STAT.replace("5551", "-"), ")" * 30])
def test_what_is_no_such_line_is_nothing(text: str) -> None:
    assert process_times(text) is None


@given(st.text())
def test_any_text_is_times_or_nothing(text: str) -> None:
    process_times(text)
    process_times(f"1 (x) {text}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def put(run: Path, name: str, **state: object) -> None:
    (run / name).write_text(json.dumps(state))


def test_devices_are_the_state_files_that_name_one(tmp_path: Path, run: Path) -> None:
    put(run, "vif-1.json", phase="connected", os_device="enX1")
    put(run, "vbd-51728.json", phase="reconnecting", generation=3, worker_pid=os.getpid())
    for name in ("suspend.json", "refused-vbd.json", "vbd-x.json", "vbd-5.claim", "vkbd-0.json"):
        put(run, name)
    (run / "vbd-51744.json").write_text("no JSON")
    found = sample(Embedded(tmp_path))
    assert [one.name for one in found] == ["xvdb", "vif1"]
    assert (found[0].generation, found[0].phase, found[1].os_device) == (3, "reconnecting", "enX1")
    assert found[0].cpu is not None
    assert found[0].queues is None, "this process is no worker"
    assert found[1].cpu is None


@pytest.mark.parametrize("state", [{"worker_pid": "7"}, {"worker_pid": -1}, {"generation": "x"}])
def test_nonsense_in_a_state_file_is_nothing(
    tmp_path: Path, run: Path, state: dict[str, object]
) -> None:
    put(run, "vbd-51728.json", **state)
    (found,) = sample(Embedded(tmp_path))
    assert (found.pid, found.cpu, found.generation) == (None, None, 0)


def test_without_a_run_directory_there_are_none(tmp_path: Path) -> None:
    assert sample(Embedded(tmp_path / "nowhere")) == []
