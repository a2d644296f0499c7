# SPDX-License-Identifier: BSD-2-Clause
"""A test module that sets LOOP_FACTORY has its tests run on loops of that kind (vclock.py).

No example of Hypothesis has a deadline (fuzzing.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import fuzzing  # noqa: F401 (it registers the profile)
import pytest
from hypothesis import settings

settings.load_profile("steady")

Factory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Factory]:
    module = getattr(item, "module", None)
    return {"loop": getattr(module, "LOOP_FACTORY", asyncio.new_event_loop)}
