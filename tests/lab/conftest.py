# SPDX-License-Identifier: BSD-2-Clause
"""What these tests share is the lab's plugin for pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ci" / "xen-nested"))

pytest_plugins = ["lab.plugin"]
