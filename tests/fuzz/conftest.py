# SPDX-License-Identifier: BSD-2-Clause
"""How many examples, and where the helpers are.

A normal run draws the same few hundred examples each time. ``--hypothesis-profile=long`` draws many
times as many, others each time (`make fuzz`).
"""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

settings.register_profile("long", max_examples=10000, deadline=None)
