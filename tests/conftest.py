# SPDX-License-Identifier: BSD-2-Clause
"""Makes the helpers in tests/support importable, and lets an adversary loose where one is asked for
(adversary.py).
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))
pytest.register_assert_rewrite(
    "embedded", "nbdkernel", "queueworld", "ringbackend", "storeworld", "supervisorworld",
    "waiting", "workerevents",
)  # fmt: skip

if os.environ.get("PVFRONT_ADVERSARY"):
    import adversary

    adversary.install()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(item: pytest.Item) -> None:
        adversary.begin(item.nodeid)
