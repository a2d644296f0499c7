# SPDX-License-Identifier: BSD-2-Clause
"""`make bench` as it is run, one short round of one job: that it works, not how fast."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_a_short_round_gives_figures_for_every_peer_and_a_picture(tmp_path: Path) -> None:
    missing = [t for t in ("cc", "fio", "nbdcopy", "nbdkit") if shutil.which(t) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (tools/apt-demo.txt)")
    null_server = tmp_path / "null_server"
    subprocess.run(
        ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", null_server, BENCH / "null_server.c"],
        check=True,
    )
    result = subprocess.run(
        [sys.executable, BENCH / "host.py", "--quick", "--match=read 4k QD32 fio",
         f"--null-server={null_server}", f"--output={tmp_path}"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "bench.json").read_text())
    rates = [f for f in figures if f["figure"] == "disk read 4k QD32"]
    assert [f["peer_name"] for f in rates] == ["nbdkit memory", "nbdkit null", "empty server"]
    direct = [f["peer_name"] for f in figures if f["figure"].startswith("disk direct read")]
    assert direct == ["pvfront socket"] * 2  # polling, and asleep between events
    assert all(f["ours"] > 0 and f["ratio"] == f["ours"] / f["peer"] for f in figures)
    ET.parse(tmp_path / "bench.svg")


def test_a_short_round_of_a_network_is_beside_what_two_taps_alone_can_do(tmp_path: Path) -> None:
    missing = [t for t in ("cc", "ip", "iperf3", "ping") if shutil.which(t) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (tools/apt-demo.txt)")
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip("two TAPs in namespaces of their own want root and /dev/net/tun")
    tap_pair = tmp_path / "tap_pair"
    subprocess.run(
        ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", tap_pair,
         BENCH / "tap_pair.c"],
        check=True,
    )  # fmt: skip
    result = subprocess.run(
        [sys.executable, BENCH / "host.py", "--quick", "--match=net TCP out",
         f"--tap-pair={tap_pair}", f"--output={tmp_path}"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (figure,) = json.loads((tmp_path / "bench.json").read_text())
    assert (figure["figure"], figure["peer_name"]) == ("net TCP out", "two TAPs alone")
    assert figure["ours"] > 0
    assert figure["ratio"] == figure["ours"] / figure["peer"]
