# SPDX-License-Identifier: BSD-2-Clause
"""What is said of a disk that has changed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pvfront.blkfront import report
from pvfront.blkfront.features import DiskGeometry

RICH = DiskGeometry(8, flush=True, barrier=True, discard=True)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (RICH, []),
        (replace(RICH, flush=False), []),  # barriers do as well
        (replace(RICH, flush=False, barrier=False), ["no flush"]),
        (replace(RICH, discard=False, read_only=True), ["read-only", "no discard"]),
    ],
)
def test_what_a_backend_has_no_more_is_said(now: DiskGeometry, said: list[str]) -> None:
    found = report.lost(RICH, now)
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))
    assert report.lost(now, RICH) == [], "more is no loss"


def test_a_size_of_0_is_no_medium() -> None:
    assert report.size_event(512, 1024) == report.size_event(1024, 512) == "resize"
    assert report.size_event(512, 0) == "eject"
    assert report.size_event(0, 512) == "insert"
