# SPDX-License-Identifier: BSD-2-Clause
"""Where the lab keeps things."""

from __future__ import annotations

import os
from pathlib import Path

LAB = Path(__file__).resolve().parent
"""This package; `files/` holds what goes into the images."""

BLOCK_SCRIPT = LAB / "scripts" / "block-lab"
"""dom0's hotplug script for vbds; it goes there when the lab starts."""

VIF_SCRIPT = LAB / "scripts" / "vif-lab"
"""The same for vifs that are a network of their own."""

HERE = LAB.parent
"""ci/xen-nested: package lists."""

PROJECT = HERE.parent.parent
"""The project's root."""

BUILD = PROJECT / "build" / "lab"
"""One directory per run below: logs, disks' overlays, evidence of failures."""


def cache() -> Path:
    """~/.cache/pvfront, or $PVFRONT_CACHE: images by content hash, .debs, the lock. Created."""
    path = Path(os.environ.get("PVFRONT_CACHE") or Path.home() / ".cache" / "pvfront")
    path.mkdir(parents=True, exist_ok=True)
    return path
