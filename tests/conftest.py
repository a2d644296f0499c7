# SPDX-License-Identifier: BSD-2-Clause
"""Makes the helpers in tests/support importable."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))
pytest.register_assert_rewrite(
    "embedded", "nbdkernel", "queueworld", "ringbackend", "storeworld", "supervisorworld",
    "waiting", "workerevents",
)  # fmt: skip
